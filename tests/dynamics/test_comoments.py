"""Correlation against numpy, scipy and torchmetrics, on samples of known correlation, in pieces of every kind."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torchmetrics import PearsonCorrCoef

from rsdyn.dynamics import moments as public
from rsdyn.dynamics.correlation import (
    Comoments,
    comoments,
    correlation,
    correlation_of,
    merge_comoments,
)

PAIRS = ("consecutive", "all")


def walks(n=200, s=6, d=70, seed=0) -> torch.Tensor:
    """Random walks over depth, float64, of spreads and means that differ from unit to unit."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, s, d)).cumsum(1) * rng.uniform(0.01, 50, d) + rng.normal(size=d) * 9
    return torch.from_numpy(x)


def which(s: int, pairs: str) -> tuple[np.ndarray, np.ndarray]:
    """First and second sublayers of the rows of a result, by plain counting."""
    found = [(a, b) for a in range(s) for b in range(a + 1, s) if pairs == "all" or b == a + 1]
    return np.array(found).T


def by_numpy(x: torch.Tensor, pairs: str) -> np.ndarray:
    first, second = which(x.shape[1], pairs)
    data = x.to(torch.float64).numpy()
    return np.stack([np.corrcoef(data[:, :, u].T)[first, second] for u in range(x.shape[2])], axis=1)


def bivariate(rho: float, n: int = 4000, seed: int = 0) -> np.ndarray:
    """``(n, 2)`` whose sample correlation is exactly ``rho``, mean 0 and variance 1."""
    sample = np.random.default_rng(seed).normal(size=(n, 2))
    white = np.linalg.qr(sample - sample.mean(0)).Q * np.sqrt(n)
    return white @ np.array([[1, rho], [0, np.sqrt(1 - rho**2)]])


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [2, 3, 6, 26, 50])
def test_like_numpy(pairs, dtype, s):
    x = walks(s=s, d=67).to(dtype)
    before = x.clone()
    found = correlation(x, pairs)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_numpy(x, pairs), atol=1e-12)
    assert torch.equal(x, before)


def test_the_order_of_pairs_is_that_of_triu_indices():
    first, second = torch.triu_indices(6, 6, 1).numpy()
    np.testing.assert_array_equal(which(6, "all"), (first, second))


def test_like_scipy_and_torchmetrics():
    x = walks(d=9).float()
    found = correlation(x)
    for s in range(5):
        metric = PearsonCorrCoef(num_outputs=9)
        metric.update(x[:, s], x[:, s + 1])
        np.testing.assert_allclose(found[s].numpy(), metric.compute().numpy(), atol=1e-5)
        for u in range(9):
            expected = pearsonr(x[:, s, u].double().numpy(), x[:, s + 1, u].double().numpy()).statistic
            assert float(found[s, u]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("rho", [-0.999, -0.3, 0.0, 0.3, 0.8, 0.95, 0.999999])
def test_planted_correlation(rho, pairs):
    x = torch.from_numpy(bivariate(rho))[:, :, None].expand(-1, -1, 3)
    np.testing.assert_allclose(correlation(x, pairs).numpy(), np.full((1, 3), rho), atol=1e-12)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("s", [2, 5, 7, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_and_mirrored_sublayers(pairs, s, dtype):
    """Not true of float32 matrix products: BLAS kernels sum the edges of a matrix in another order."""
    x = (walks(s=1, d=41) + 30).to(dtype).repeat(1, s, 1)
    np.testing.assert_allclose(correlation(x, pairs).numpy(), 1, rtol=0, atol=1e-12)
    x[:, 1::2] *= -1
    first, second = which(s, pairs)
    expected = np.broadcast_to(((-1.0) ** (second - first))[:, None], (len(first), 41))
    found = correlation(x, pairs).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.abs(found).max() <= 1


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_mean_far_above_spread(pairs, ratio):
    x = (walks(s=4, d=12) * 0.3).float()
    x += ratio * x.std(0) * torch.tensor([1.0, -1.0]).repeat(6)
    np.testing.assert_allclose(correlation(x, pairs).numpy(), by_numpy(x, pairs), atol=1e-10)
    state = comoments(x[:0], pairs)
    for part in x.split(33):
        state = merge_comoments(state, comoments(part, pairs))
    np.testing.assert_allclose(correlation_of(state).numpy(), by_numpy(x, pairs), atol=1e-7)


def test_naive_float32_sums_fail_where_ours_hold():
    sample = torch.from_numpy(bivariate(0.8))
    x = (sample + 1000).float()
    a, b = x.T
    n = len(x)
    below = ((n * (a * a).sum() - a.sum() ** 2) * (n * (b * b).sum() - b.sum() ** 2)).sqrt()
    naive = float((n * (a * b).sum() - a.sum() * b.sum()) / below)
    assert not abs(naive - 0.8) < 0.05  # NaN or far off
    assert float(correlation(x[:, :, None])) == pytest.approx(0.8, abs=1e-4)  # what float32 storage itself costs


@pytest.mark.parametrize(
    ("ratio", "lost", "within"), [(1, 0, 1e-3), (10, 0, 1e-3), (100, 0.02, 0.01), (1000, 0.66, 0.1)]
)
def test_what_bf16_storage_costs_is_flagged(ratio, lost, within):
    """The figures of METHOD section 4, at a correlation of 0.95.

    A mean over units of different spreads: at 1000 the loss is 0.2 to 0.9, as the mean falls among bf16's numbers.
    """
    spread = torch.from_numpy(2 ** np.random.default_rng(2).uniform(0, 1, (2, 200)))
    exact = (torch.from_numpy(bivariate(0.95, n=1000))[:, :, None] + ratio) * spread
    state = comoments(exact.bfloat16())
    assert 0.95 - float(correlation_of(state).nanmean()) == pytest.approx(lost, abs=within)
    stored = public.Moments(*state[:3])
    flagged = public.few_levels(stored)
    assert flagged[~stored.constant].eq(ratio > 30).float().mean() > 0.99 and not flagged[stored.constant].any()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("cuts", [(100,), (1, 2, 3), (0, 0, 200), (199,), (64, 128)])
def test_any_split_in_any_order(pairs, cuts):
    x = walks(d=5)
    whole = comoments(x, pairs)
    np.testing.assert_allclose(whole.m2.numpy() / 200, x.numpy().var(0), rtol=1e-12)
    parts = [comoments(p, pairs) for p in torch.tensor_split(x, cuts)]
    for order in itertools.permutations(parts):
        total = order[0]
        for part in order[1:]:
            total = merge_comoments(total, part)
        assert {t.dtype for t in total} == {torch.float64}
        for found, expected in zip(total, whole, strict=True):
            scale = expected.abs().max()
            np.testing.assert_allclose(found / scale, expected / scale, atol=1e-12)
        np.testing.assert_allclose(correlation_of(total).numpy(), by_numpy(x, pairs), atol=1e-12)


@pytest.mark.parametrize("pairs", PAIRS)
def test_empty_parts(pairs):
    x = walks(n=20)
    empty, whole = comoments(x[:0], pairs), comoments(x, pairs)
    assert float(empty.n) == 0 and [t.shape for t in empty] == [t.shape for t in whole]
    for merged in (merge_comoments(empty, whole), merge_comoments(whole, empty)):
        assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))
    nothing = merge_comoments(empty, empty)
    assert all(t.isfinite().all() for t in nothing) and correlation_of(nothing).isnan().all()
    one = comoments(x[:1], pairs)
    assert torch.equal(one.mean, x[0]) and not one.m2.any() and correlation_of(one).isnan().all()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_and_non_finite_units_are_nan_and_leave_the_others(pairs, dtype):
    x = walks(d=90, s=30).to(dtype)
    clean = correlation(x, pairs)
    first, second = which(30, pairs)
    expected = torch.zeros_like(clean, dtype=torch.bool)
    for u, s, value in ((3, 2, 0.1), (17, 28, 0.0), (64, 0, -1e5 / 3)):
        x[:, s, u] = value
        expected[:, u] |= torch.from_numpy((first == s) | (second == s))
    for u, s, n, value in ((5, 1, 0, np.nan), (40, 25, 199, np.inf), (89, 29, 70, -np.inf), (70, 3, 0, np.inf)):
        x[n, s, u] = value
        expected[:, u] |= torch.from_numpy((first == s) | (second == s))
    x[:, :, 60] = 0.1  # constant at every sublayer
    expected[:, 60] = True
    found = correlation(x, pairs)
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(found[~expected], clean[~expected])
    state = comoments(x[:0], pairs)
    for part in x.split(37):
        state = merge_comoments(state, comoments(part, pairs))
    assert torch.equal(correlation_of(state).isnan(), expected)


@pytest.mark.parametrize("pairs", PAIRS)
def test_scale_shift_and_sign_of_a_unit(pairs):
    x = walks(d=20)
    rng = np.random.default_rng(1)
    scale = torch.from_numpy(10 ** rng.uniform(-6, 6, (6, 20)) * rng.choice([-1, 1], (6, 20)))
    first, second = which(6, pairs)
    expected = correlation(x, pairs) * (scale[first] * scale[second]).sign()
    np.testing.assert_allclose(correlation(x * scale + 3 * scale, pairs).numpy(), expected.numpy(), atol=1e-11)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("inference", [False, True])
def test_same_bits_for_one_thread_and_two(pairs, inference):
    x = walks(n=90, s=26, d=700).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):  # as a Trainer tests; worker threads are not in it
                part = comoments(x.clone(), pairs)
                found.append(merge_comoments(part, part))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("pairs", PAIRS)
def test_strided_input(pairs):
    x = walks(s=12, d=140)
    expected = correlation(x[:, ::2, 1::2].contiguous(), pairs)
    assert torch.equal(correlation(x[:, ::2, 1::2], pairs), expected)
    assert correlation(x[..., :0], pairs).shape == (11 if pairs == "consecutive" else 66, 0)


def test_functions_of_the_library_are_found_in_moments():
    assert public.correlation is correlation and public.Comoments is Comoments


def test_bad_input():
    x = walks(n=5)
    for n in range(3):
        with pytest.raises(ValueError, match=f"trajectories of {n} sequences.*at least 3.*give more"):
            correlation(x[:n])
    assert correlation(x[:3]).abs().max() <= 1
    with pytest.raises(ValueError, match=r"1 sublayer.*at least 2.*record more"):
        correlation(x[:, :1])
    with pytest.raises(ValueError, match=r"shape \(5, 6\).*\(N, S, D\)"):
        correlation(x[..., 0])
    with pytest.raises(ValueError, match=r"pairs='some'.*consecutive, all"):
        correlation(x, "some")
    for other in (comoments(x, "all"), comoments(x[:, 1:]), comoments(x[..., 1:])):
        with pytest.raises(ValueError, match="same sublayers, units and pairs"):
            merge_comoments(comoments(x), other)
