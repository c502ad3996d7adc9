"""Sets of prompts and linear transport on ensembles whose answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from rsdyn.dynamics.ensembles import convergence, convergence_null, growth, separation, transport


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sets_that_come_together_converge():
    centre, own = drawn(4, 1, 30)[torch.arange(20) % 4], drawn(20, 5, 30, seed=1)
    x = centre + own * torch.tensor([10.0, 1, 0.1, 1e-6, 0])[:, None]
    found = convergence(x, torch.arange(20) % 4)
    assert found[0].abs() < 0.1 and (found.diff() > -1e-6).all() and float(found[-1]) == pytest.approx(1)
    assert convergence_null(x, torch.arange(20) % 4, n=200)[:, 1].mean().abs() < 0.05


def test_sets_that_mean_nothing_are_refused_as_often_as_chance_says():
    sets, false = torch.arange(20) % 5, 0
    for seed in range(200):
        x = drawn(20, 1, 8, seed=seed)
        null = convergence_null(x, sets, n=99, seed=seed)
        false += int((null >= convergence(x, sets)).sum()) + 1 <= 5
    assert false / 200 == pytest.approx(0.05, abs=0.035)


def test_convergence_against_numpy():
    x, sets = drawn(7, 2, 4), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    for s in range(2):
        pairs = [(i, j) for i in range(7) for j in range(i)]
        away = {(i, j): np.linalg.norm(x[i, s] - x[j, s]) for i, j in pairs}
        within = np.mean([away[p] for p in pairs if sets[p[0]] == sets[p[1]]])
        between = np.mean([away[p] for p in pairs if sets[p[0]] != sets[p[1]]])
        assert float(convergence(x, sets)[s]) == pytest.approx(1 - within / between)


def test_separation_of_pairs():
    x = drawn(3, 4, 6)
    assert float(separation(x, x).abs().max()) == 0
    torch.testing.assert_close(separation(x, -x), torch.full((3, 4), 2.0, dtype=torch.float64))
    torch.testing.assert_close(separation(5 * x, 5 * x.roll(1, 0)), separation(x, x.roll(1, 0)))


def test_an_ensemble_that_is_turned_and_stretched_leaves_nothing():
    x = [drawn(200, 10) * torch.logspace(2, 0, 10, dtype=torch.float64)]
    q = torch.linalg.qr(drawn(10, 10, seed=2))[0]
    for _ in range(4):
        u = torch.linalg.svd(x[-1], full_matrices=False)[2]
        x.append(x[-1] @ u.T @ torch.diag(torch.linspace(1.3, 1.1, 10, dtype=torch.float64)) @ u @ q)
    found = transport(torch.stack(x, 1))
    above = torch.triu_indices(5, 5, 1)
    assert (found.residual[above[0], above[1]] < 1e-9 * found.own[above[1]]).all()
    assert found.residual[1, 0].isnan()
    torch.testing.assert_close(found.own, torch.stack([one.square().mean() for one in x]))


def test_unrelated_ensembles_leave_twice_their_variance_and_noise_grows():
    x = drawn(300, 4, 12)
    found = transport(x)
    assert float(found.residual[0, 3]) == pytest.approx(2 * float(found.own[3]), rel=0.1)
    base = drawn(300, 1, 12) * torch.logspace(2, 0, 12, dtype=torch.float64)
    noise = drawn(300, 12, 12, seed=4) * (0.05 * torch.exp(0.3 * torch.arange(12, dtype=torch.float64) / 2))[:, None]
    residual = transport(base + noise).residual
    assert growth(torch.arange(3, 12), residual[0, 3:]).rate == pytest.approx(0.3, abs=0.1)


def test_growth_against_scipy():
    layers, variances = torch.arange(9.0), 0.64 * torch.exp(0.18 * torch.arange(9.0) + 0.1 * drawn(9))
    line = linregress(layers.numpy(), variances.log().numpy())
    found = growth(layers, variances)
    assert found.rate == pytest.approx(line.slope) and found.r_squared == pytest.approx(line.rvalue**2)
    assert found.alpha == pytest.approx(np.exp(line.intercept))
    assert np.isnan(growth(layers[:2], variances[:2]).rate)


def test_mistakes():
    with pytest.raises(ValueError, match="two or more sets"):
        convergence(drawn(4, 2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="two or more members"):
        convergence(drawn(4, 2, 3), torch.arange(4))
    with pytest.raises(ValueError, match=r"give \(N, S, D\)"):
        convergence(drawn(4, 2), torch.arange(4))
    with pytest.raises(ValueError, match="more sequences than units"):
        transport(drawn(10, 3, 10))
