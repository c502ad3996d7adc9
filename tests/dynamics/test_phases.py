"""Phases: planted ones are found where they are, walks and ramps have none, and surrogates keep what they promise."""

import sys

import numpy as np
import pytest
import torch

from rsdyn.dynamics.phases import best_change_points, phase_randomised, phases
from rsdyn.errors import UserError

pytest.importorskip("ruptures")


def planted(generator, lengths=(8, 12, 10), curves=4, noise=0.5):
    level = 3 * torch.randn(len(lengths), curves, generator=generator)
    parts = zip(level, lengths, strict=True)
    return torch.cat([of.expand(n, -1) + noise * torch.randn(n, curves, generator=generator) for of, n in parts])


def test_three_planted_phases_are_found_where_they_are():
    generator = torch.Generator().manual_seed(0)
    found = [phases(planted(generator), n=199, seed=seed) for seed in range(20)]
    assert sum(f.n == 2 for f in found) >= 17
    assert sum(f.places[1] == (8, 20) for f in found) >= 18


def test_walks_and_ramps_have_phases_as_often_as_chance_says():
    """80 walks whose curves move together, half of them on a ramp; benchmarks/calibration.py has more."""
    generator = torch.Generator().manual_seed(1)
    mix = 0.5 * torch.eye(3) + 0.5 / 3**0.5
    false = 0
    for seed in range(80):
        steps = torch.randn(23, 3, generator=generator) @ mix + (seed % 2)
        false += phases(steps.cumsum(0), n=199, seed=seed, most=2).n > 0
    assert false <= 9  # 5 % of 80 is 4, and the standard error 2


def test_the_search_is_exact():
    """Against every way of placing two change points."""
    curves = torch.randn(14, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cumsum(0)
    (_, best), costs = best_change_points(curves, 2)
    x = curves.numpy()

    def cost(*at):
        return sum(((part - part.mean(0)) ** 2).sum() for part in np.split(x, at))

    every = {(i, j): cost(i, j) for i in range(2, 11) for j in range(i + 2, 13)}
    assert best == min(every, key=every.get)
    assert float(costs[2]) == pytest.approx(min(every.values())) and float(costs[0]) == pytest.approx(cost())


@pytest.mark.parametrize("s", [20, 21])
def test_surrogates_keep_trend_spectrum_and_relation(s):
    curves = torch.randn(s, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cumsum(0)
    curves[:, 1] += curves[:, 0]
    for drawn in phase_randomised(curves, 5, seed=4):
        assert not torch.allclose(drawn, curves)
        torch.testing.assert_close(drawn[[0, -1]], curves[[0, -1]])
        a, b = (np.fft.rfft(c.diff(dim=0).numpy(), axis=0) for c in (curves, drawn))
        np.testing.assert_allclose(abs(a), abs(b), atol=1e-9)
        np.testing.assert_allclose(a[:, 0] * a[:, 1].conj(), b[:, 0] * b[:, 1].conj(), atol=1e-9)


def test_scale_sign_and_order_of_curves_make_no_difference():
    curves = planted(torch.Generator().manual_seed(5))
    one, other = phases(curves, n=99), phases(-1e4 * curves[:, [2, 0, 3, 1]] + 5, n=99)
    assert one.places == other.places and one.n == other.n
    torch.testing.assert_close(one.p, other.p)


def test_mistakes(monkeypatch):
    curves = planted(torch.Generator().manual_seed(6))
    for bad, words in (
        (curves[:7], "at least 8 places"),
        (curves[:, 0], r"give \(S, K\)"),
        (curves.index_fill(0, torch.tensor(3), torch.nan), "NaN or infinities"),
        (torch.ones(20, 2), "none of them ever changes"),
    ):
        with pytest.raises(ValueError, match=words):
            phases(bad)
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(UserError, match="ruptures: pip install ruptures"):
        phases(curves)
