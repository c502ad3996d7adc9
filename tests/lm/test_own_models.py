"""A model that somebody hands in is theirs: what is done with it leaves it as it was, also after an exception."""

import numpy as np
import pytest
import torch
from family_zoo import make

from rsdyn.errors import UserError
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.continuation import continue_from, run_reference
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.packing_trial import choose_layout

SEQUENCES = [np.arange(1, 12), np.arange(5, 27), np.arange(9, 30)]


def state_of(model):
    """All of a model that calls could change: modes, gradients, hooks, attention kernels, weights."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        },
        "attention": model.config._attn_implementation,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def assert_same(model, before):
    after = state_of(model)
    weights = after.pop("weights"), {**before}.pop("weights")
    for kind, of_modules in after.items():
        assert of_modules == before[kind], kind
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.fixture
def theirs():
    """A model in the middle of training: dropout, one frozen part, one part in eval mode, a hook of its owner's."""
    model = make("gpt2").train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.transformer.h[1].eval()
    model.transformer.wte.requires_grad_(False)
    model.calls = []
    model.transformer.h[0].register_forward_hook(lambda *_: model.calls.append(1))
    return model


def test_what_is_recorded_and_continued_leaves_the_model_as_it_was(theirs):
    before = state_of(theirs)
    lm = LanguageModel(theirs.base_model, causal=theirs)
    assert_same(theirs, before)
    certify(lm, SEQUENCES)
    lm.layout = choose_layout(lm, SEQUENCES)
    recorded = lm.record(SEQUENCES)
    assert torch.equal(lm.record(SEQUENCES), recorded)  # no dropout while it records
    reference = run_reference(lm, SEQUENCES[0])
    continue_from(lm, reference, 2, recorded[:, 2], log_probs=True)
    assert not lm.log_probs(recorded[:, -1]).requires_grad
    assert_same(theirs, before)
    assert theirs.calls and torch.is_grad_enabled()
    loss = theirs(input_ids=torch.from_numpy(SEQUENCES[0])[None], labels=torch.from_numpy(SEQUENCES[0])[None]).loss
    loss.backward()  # and it can go on training
    assert theirs.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["packed", "sorted"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(theirs, layout):
    lm = LanguageModel(theirs.base_model, causal=theirs)
    lm.layout = choose_layout(lm, SEQUENCES, layout)

    def fail(*args):
        raise RuntimeError("in the middle")

    handle = theirs.transformer.h[1].mlp.register_forward_hook(fail)
    before = state_of(theirs)
    for call in (
        lambda: lm.record(SEQUENCES),
        lambda: certify(lm, SEQUENCES),
        lambda: run_reference(lm, SEQUENCES[0]),
    ):
        with pytest.raises((RuntimeError, UserError), match="in the middle"):
            call()
        assert_same(theirs, before)
    handle.remove()


def test_calls_side_by_side_and_within_each_other_share_one_eval_mode(theirs):
    lm = LanguageModel(theirs.base_model)
    before = state_of(theirs)
    with lm.evaluating():
        with lm.evaluating():
            assert not any(module.training for module in theirs.base_model.modules())
        assert not any(module.training for module in theirs.base_model.modules())
    assert_same(theirs, before)
