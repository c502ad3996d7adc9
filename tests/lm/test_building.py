"""transformers' patches of itself, and why one thread at a time builds a model."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rsdyn import embedded
from rsdyn.lm.model_lock import one_at_a_time
from rsdyn.lm.sites import site_names
from rsdyn.lm.source import find_lm
from rsdyn.lm.weights import empty_model


def test_threads_that_open_models_leave_transformers_as_it_was(tiny_llama):
    """Without the lock the first round already left ``tie_weights`` doing nothing."""
    lm, before, failed = find_lm(str(tiny_llama)), PreTrainedModel.tie_weights, []

    def work():
        try:
            for _ in range(3):
                lm.load(head=True)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert PreTrainedModel.tie_weights is before and torch.get_default_dtype() == torch.float32
    causal = AutoModelForCausalLM.from_pretrained(embedded.MODEL, local_files_only=True)
    assert causal.get_output_embeddings().weight is causal.get_input_embeddings().weight


@pytest.mark.parametrize(
    "build",
    [
        lambda lm: lm.load(),
        lambda lm: lm.without_training(0).load(),
        lambda lm: empty_model(lm.config),
        lambda lm: site_names(lm.config),
    ],
    ids=["load", "untrained", "empty_model", "traced"],
)
def test_each_way_to_build_a_model_waits_for_the_others(build, tiny_llama):
    lm = find_lm(str(tiny_llama))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (build(lm), done.set()))
    with one_at_a_time():
        thread.start()
        assert not done.wait(0.5)
    assert done.wait(30)
    thread.join()
