"""The scripts on a GPU, a pretended one: no tensor is left behind on the CPU, and the numbers are those of the CPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils import backend_registration

# what pretend_gpu.py is made of is not in torch 2.8
NEEDED = ("_DummyBackendModule", "_setup_privateuseone_for_python_backend")
pytestmark = pytest.mark.skipif(
    not all(hasattr(backend_registration, name) for name in NEEDED), reason="this torch has no devices made in Python"
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

WORDS = {
    "train": ["trainer.max_epochs=2", "data.batch_size=64"],
    "analyze": ["analysis.conditions=[original]", "analysis.rotation.surrogates=10", "analysis.rotation.window=4"],
    "perturb": ["perturb.layers=[0]", "perturb.grid.n=2"],
}
# small differences of rounding decide in which order IAAFT puts equal values, and whether a unit stays frozen in bf16
CHAOTIC = ("iaaft", "frozen", "counts", "regularity/nulls/increment_shuffle_scaled/z")


@pytest.fixture(scope="module")
def results(tiny_llama, tmp_path_factory):
    """``results.npz`` of each script on the pretend GPU and on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")

    def words(script, device):
        common = {
            "lm.name": tiny_llama, "data.limit": 40, "data.l_max": 200, "tracking.mode": "disabled",
            "trainer.accelerator": "cpu", "cache.dir": folder / device, "run.dir": folder / f"{script}-{device}",
        }  # fmt: skip
        return [*(f"{key}={value}" for key, value in common.items()), *WORDS[script]]

    there = json.dumps({script: words(script, "gpu") for script in WORDS})
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "run_on_pretend_gpu.py"],
        input=there, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for script in WORDS:
        assert importlib.import_module(f"rsdyn.commands.{script}").main(words(script, "cpu")) == 0
        found[script] = [dict(np.load(folder / f"{script}-{device}" / "results.npz")) for device in ("gpu", "cpu")]
    return found


@pytest.mark.parametrize("script", WORDS)
def test_the_numbers_are_those_of_the_cpu(results, script):
    gpu, cpu = results[script]
    assert set(gpu) == set(cpu)
    compared = 0
    for name, expected in cpu.items():
        if expected.dtype.kind not in "fiub":
            np.testing.assert_array_equal(gpu[name], expected)
        elif not any(word in name for word in CHAOTIC):
            scale = np.nanmax(np.abs(np.where(np.isfinite(expected), expected, np.nan)), initial=0.0)
            np.testing.assert_allclose(gpu[name], expected, rtol=0, atol=1e-3 * scale, err_msg=name)
            compared += expected.dtype.kind == "f"
    assert compared >= 20


def test_a_tensor_left_behind_is_found():
    """The pretended one refuses what a real one does, and computes what the CPU does."""
    code = """
import torch
from pretend_gpu import GPU, pretend_gpu

def refused(work, error, words):
    try:
        work()
    except error as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(words)

with pretend_gpu():
    here, there = torch.arange(6.0), torch.arange(6.0, device=GPU)
    assert there.device == GPU and torch.tensor([1.0], device=GPU).device == GPU
    refused(lambda: here + there, RuntimeError, "same device")
    refused(lambda: there.index_select(0, torch.tensor([1])), RuntimeError, "same device")
    refused(lambda: here[torch.tensor([1], device=GPU)], RuntimeError, "same device")
    refused(lambda: torch.cat([here, there]), RuntimeError, "same device")
    refused(lambda: there.numpy(), TypeError, "Tensor.cpu()")
    assert there[torch.tensor([1])].item() == 1 and (there + torch.tensor(1.0)).device == GPU
    assert torch.equal((there.view(2, 3) @ there.view(3, 2)).cpu(), here.view(2, 3) @ here.view(3, 2))
    weight = torch.ones(6, device=GPU, requires_grad=True)
    (weight * there).sum().backward()
    assert weight.grad.device == GPU and torch.equal(weight.grad.cpu(), here)
print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True, capture_output=True)
    assert done.stdout.strip() == "refused", done.stderr[-3000:]
