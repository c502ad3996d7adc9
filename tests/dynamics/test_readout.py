"""The readout over depth, against scipy, and on a model that decides at a known layer."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from rsdyn.dynamics.readout import commit_depth, readout


def drawn(*shape, seed=0):
    return torch.from_numpy(log_softmax(2 * np.random.default_rng(seed).normal(size=shape), axis=-1))


def test_against_scipy():
    final, here = drawn(6, 30), drawn(6, 5, 30, seed=1)
    found = readout(final, here)
    p, q = final.exp().numpy(), here.exp().numpy()
    np.testing.assert_allclose(found.kl, entropy(p[:, None], q, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(found.entropy, entropy(q, axis=-1), rtol=1e-9)
    top = p.argmax(-1)
    for n in range(6):
        for s in range(5):
            assert int(found.rank[n, s]) == int((q[n, s] > q[n, s, top[n]]).sum())
            assert float(found.probability[n, s]) == pytest.approx(q[n, s, top[n]])
            assert bool(found.agrees[n, s]) == (q[n, s].argmax() == top[n])


@pytest.mark.parametrize("decides", [0, 3, 7])
def test_a_model_that_decides_at_a_known_layer(decides):
    here = drawn(4, 8, 20)
    final = torch.full((4, 20), -50.0, dtype=torch.float64)
    final[:, 11] = 0.0
    final = final.log_softmax(-1)
    here[:, :decides, 11] = -40.0  # not yet
    here[:, decides:] = final[:, None]
    found = readout(final, here.log_softmax(-1))
    assert found.commit.tolist() == [decides] * 4
    assert found.kl[:, decides:].abs().max() < 1e-9 and (found.kl[:, :decides] > 1).all()


def test_a_lapse_moves_the_commitment_behind_it():
    agrees = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    assert commit_depth(agrees).tolist() == [3, 5, 0, 5]


def test_a_token_that_cannot_come_counts_for_nothing():
    final = torch.tensor([[0.5, 0.5, 0.0]]).log()
    here = torch.tensor([[[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]]).log()
    found = readout(final, here)
    assert found.kl.isfinite().all() and found.entropy.isfinite().all()
    np.testing.assert_allclose(found.kl[0, 0], entropy([0.5, 0.5], [0.25, 0.75]), rtol=1e-6)


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"give \(N, V\) and \(N, S, V\)"):
        readout(drawn(6, 30), drawn(6, 5, 29))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "wrong", [lambda x: x.exp(), lambda x: x + 1, lambda x: x * torch.nan], ids=["probabilities", "logits", "NaN"]
)
def test_what_are_no_logarithms_of_probabilities_is_refused(which, wrong):
    """Each would give numbers that look like a readout: of NaN at the end a KL of 0, of NaN here agreement."""
    given = [drawn(6, 30), drawn(6, 5, 30, seed=1)]
    given[which] = wrong(given[which])
    with pytest.raises(ValueError, match=("final_log_probs" if which == 0 else "^log_probs") + ": a row .* not to 1"):
        readout(*given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    final, here = drawn(6, 30).to(dtype), drawn(6, 5, 30, seed=1).to(dtype)
    found, exact = readout(final, here), readout(final.double(), here.double())
    assert found.kl.dtype == torch.float32
    torch.testing.assert_close(found.kl, exact.kl.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.commit, exact.commit)
