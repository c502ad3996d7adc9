"""How far outside the linear range points lie, on a tiny model: small displacements are linear, huge ones are not."""

import numpy as np
import pytest
import torch
from family_zoo import ZOO

from rsdyn.lm.jacobians import reference_run
from rsdyn.lm.model import LanguageModel
from rsdyn.perturbation.linear import LinearRange, linear_cells, linear_ranges

IDS = np.random.default_rng(5).integers(3, 300, size=11)


def test_small_and_large_displacements():
    lm = LanguageModel(ZOO["llama"]().base_model, name="llama")
    reference, generator = reference_run(lm, IDS), torch.Generator().manual_seed(0)
    found = {}
    for size in (1e-3, 64.0):
        points = {}
        for s in (0, 2):
            noise = torch.randn(20, lm.n_units, generator=generator)
            state = reference.stream[s]
            points[s] = state + size * state.norm() * noise / noise.norm(dim=1, keepdim=True)
        found[size] = linear_ranges(lm, IDS, points)
    for s in (0, 2):
        small, large = found[1e-3][s], found[64.0][s]
        assert small.outside == 1 and small.ratio == pytest.approx(1, abs=0.02) and small.error < 0.02
        assert large.error > 0.2
        assert np.isfinite(small.contraction)


def test_a_point_that_the_layers_undo_lies_outside(monkeypatch):
    """A made-up model of one map: what grows linearly at first, and saturates at a thousandth of what is predicted."""
    from rsdyn.perturbation import linear

    state, gain = torch.ones(3), 2.0

    class Run:
        stream, final = state[None], torch.zeros(3)

    def saturating(lm, reference, injections):
        away = injections[0][1] - state
        length = away.norm(dim=-1, keepdim=True)
        Run.final_of = gain * away * (1 / 64 / length).clamp(max=1)
        return [type("Ends", (), {"final": Run.final_of})()]

    monkeypatch.setattr(linear, "continue_all", saturating)
    monkeypatch.setattr(
        linear, "linear_prediction", lambda lm, tokens, s, away, reference: torch.stack([away, gain * away], 1)
    )
    lm = type("Model", (), {"dtype": torch.float32})()
    found = linear._range(lm, Run, IDS, 0, state + torch.eye(3))  # of length 1, where 1/64 is all that comes through
    assert found.outside == 64 and found.ratio == pytest.approx(1 / 64)
    assert found.error == pytest.approx(63 / 64)


def test_a_row_of_the_table():
    assert linear_cells(LinearRange(1.0, 1.01, 0.1, 0.1), 0.11) == ["inside", "1.01", "0.1", "0.11", "0.1"]
    assert linear_cells(LinearRange(8.0, 0.1, 0.9, 0.1), -0.2)[0] == "8 x"
    assert linear_cells(LinearRange(float("inf"), 0.1, 0.9, 0.1), -0.2)[0] == "> 4096 x"
