"""Moments against numpy and scikit-learn, in pieces of every kind."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from rsdyn.dynamics.moments import (
    Moments,
    covariance,
    density,
    explained_variance,
    few_levels,
    massive_ratios,
    massive_units,
    merge,
    merge_all,
    merge_covariance,
    moments,
    participation_ratio,
    pool,
)

S, D = 3, 5


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(101, S, D)) * rng.uniform(0.1, 9, (S, D)) + rng.normal(size=(S, D)) * 4)


def assert_like_numpy(found: Moments, data: torch.Tensor, rtol=1e-12):
    data = data.to(torch.float64).numpy()
    assert float(found.n) == len(data)
    assert {t.dtype for t in found} == {torch.float64}
    np.testing.assert_allclose(found.mean.numpy(), data.mean(0), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(found.variance.numpy(), data.var(0), rtol=rtol)
    np.testing.assert_allclose(found.std.numpy(), data.std(0), rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_elements", [1 << 23, 1, S * D, 7 * S * D + 1])
def test_at_once_and_in_chunks(x, dtype, chunk_elements):
    assert_like_numpy(moments(x.to(dtype), chunk_elements), x.to(dtype))


def test_input_is_not_changed(x):
    before = x.clone()
    moments(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(9,), (9, 4), (1, 2, 3), (9, 0)])
def test_shapes(shape):
    assert_like_numpy(moments(torch.ones(shape)), torch.ones(shape))


@pytest.mark.parametrize("cuts", [(50,), (1, 2, 3), (0, 0, 101), (13, 13, 60), (100,)])
def test_any_split_in_any_order(x, cuts):
    parts = [moments(p) for p in torch.tensor_split(x, cuts)]
    for order in itertools.permutations(parts):
        assert_like_numpy(merge_all(list(order)), x)
    if len(parts) == 4:  # a tree instead of a chain
        assert_like_numpy(merge(merge(parts[0], parts[1]), merge(parts[2], parts[3])), x)


def test_empty_parts(x):
    empty = moments(x[:0])
    assert float(empty.n) == 0 and empty.mean.shape == (S, D)
    assert merge(empty, empty).mean.isfinite().all()
    assert empty.variance.isnan().all()
    whole = moments(x)
    for merged in (merge(empty, whole), merge(whole, empty), merge_all([empty, whole, empty])):
        assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_elements", [1 << 23, 97])
def test_mean_far_above_spread(dtype, chunk_elements):
    """Massive units: the mean is 100,000 times the spread. The oracle is numpy in long double."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(20_000, 4)) + np.array([1e5, -1e5, 1e5, 0])).to(dtype)
    expected = x.numpy().astype(np.longdouble).std(0)
    found = merge_all([moments(p, chunk_elements) for p in x.split(777)]).std
    np.testing.assert_allclose(found.numpy(), expected.astype(float), rtol=1e-6)


def test_a_constant_unit_has_exactly_no_variance():
    x = torch.full((1001, 2), 0.1, dtype=torch.float32)
    assert torch.equal(merge_all([moments(p, 50) for p in x.split(333)]).m2, torch.zeros(2, dtype=torch.float64))


def test_pool(x):
    assert_like_numpy(pool(moments(x)), x.reshape(-1, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(), (50,), (0, 1, 60, 101)])
def test_covariance(x, dtype, cuts):
    rows = x.flatten(1).to(dtype)
    parts = [covariance(p) for p in torch.tensor_split(rows, cuts)]
    total = parts[0]
    for part in parts[1:]:
        total = merge_covariance(total, part)
    exact = rows.to(torch.float64).numpy()
    assert {t.dtype for t in total} == {torch.float64} and float(total.n) == len(exact)
    np.testing.assert_allclose(total.mean.numpy(), exact.mean(0), rtol=1e-12)
    scale = np.outer(exact.std(0), exact.std(0))
    error = (total.scatter / total.n).numpy() - np.cov(exact.T, bias=True)
    assert np.abs(error / scale).max() < (1e-12 if dtype == torch.float64 else 1e-6)


def test_covariance_far_from_zero():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(5000, 3)) @ rng.normal(size=(3, 3)) + 1e5).float()
    expected = np.cov(x.double().numpy().T, bias=True)
    total = covariance(x[:0])
    for part in x.split(999):
        total = merge_covariance(total, covariance(part))
    np.testing.assert_allclose((total.scatter / total.n).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", [None, [True, False, True, True, False]])
def test_explained_variance(x, units):
    found = x + 0.5 * torch.from_numpy(np.random.default_rng(3).normal(size=x.shape))
    mask = None if units is None else torch.tensor(units)
    own, about_global, overall = explained_variance((found - x).square().sum(0), moments(x), mask)

    keep = np.ones(D, dtype=bool) if units is None else np.array(units)
    true, guess = x.numpy()[..., keep], found.numpy()[..., keep]
    expected = [r2_score(true[:, s], guess[:, s], multioutput="variance_weighted") for s in range(S)]
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12)
    centre = true.mean((0, 1))
    by_hand = [1 - ((true[:, s] - guess[:, s]) ** 2).sum() / ((true[:, s] - centre) ** 2).sum() for s in range(S)]
    np.testing.assert_allclose(about_global.numpy(), by_hand, rtol=1e-12)
    flat = (true.reshape(-1, keep.sum()), guess.reshape(-1, keep.sum()))
    np.testing.assert_allclose(float(overall), r2_score(*flat, multioutput="variance_weighted"), rtol=1e-12)


def test_explained_variance_of_the_mean_is_zero_and_of_the_truth_one(x):
    data = moments(x)
    own, _, _ = explained_variance(data.m2, data)
    np.testing.assert_allclose(own.numpy(), 0, atol=1e-12)
    assert all((part == 1).all() for part in explained_variance(torch.zeros(S, D), data))


def test_no_variance_to_explain_is_nan(x):
    x = x.to(torch.float32)  # whose sums float64 holds exactly
    x[:, 1] = x[0, 1]  # one sublayer does not vary
    own, about_global, overall = explained_variance(torch.ones(S, D, dtype=torch.float64), moments(x))
    assert own.isnan().tolist() == [False, True, False]
    assert about_global.isfinite().all() and overall.isfinite()
    for part in explained_variance(torch.ones(S, D), moments(torch.ones(4, S, D))):
        assert part.isnan().all()
    for part in explained_variance(torch.zeros(S, D), moments(x), torch.zeros(D, dtype=torch.bool)):
        assert part.isnan().all()


def test_massive_units():
    mean = torch.from_numpy(np.random.default_rng(4).choice([-1, 1], (S, 50)) * np.linspace(0.5, 1.5, 50))
    assert not massive_units(mean).any()
    mean[2, 7], mean[0, 31], mean[1, 9] = 150.0, -120.0, 90.0  # the median is 1
    assert massive_units(mean).nonzero().flatten().tolist() == [7, 31]
    assert massive_units(mean, factor=80).nonzero().flatten().tolist() == [7, 9, 31]
    assert massive_units(mean * 1e-3).nonzero().flatten().tolist() == [7, 31]


def test_density():
    mean = torch.tensor([[0.1, -0.5, 2.0, -3.0], [0.0, 0.0, 0.0, 0.0], [1.0, torch.nan, 2.0, 3.0]])
    found = density(mean, 0.5)
    assert found.dtype == torch.float64 and found.tolist()[:2] == [0.5, 0.0] and found[2].isnan()  # strictly above
    assert density(mean, 0.0)[:2].tolist() == [1.0, 0.0]
    rng = np.random.default_rng(5)
    normal = torch.from_numpy(rng.normal(size=(2, 200_000)) * [[1.0], [2.0]])
    assert density(normal, 1.0).tolist() == pytest.approx([0.3173, 0.6171], abs=0.005)  # 2 Phi(-1), 2 Phi(-1/2)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold=(-1.0|nan).*at least 0"):
            density(mean, threshold)


@pytest.mark.parametrize("scale", [1e-100, 1, 1e100])
def test_participation_ratio(scale):
    mean = torch.zeros(5, 8, dtype=torch.float64)
    mean[0, 3] = -7
    mean[1] = torch.tensor([2.0, -2.0]).repeat(4)
    mean[2, :3] = 5
    mean[3] = torch.arange(8)
    found = participation_ratio(mean * scale)
    assert participation_ratio(mean.bfloat16()).dtype == torch.float64
    squares = np.arange(8.0) ** 2
    assert found[4].isnan()
    assert found[:4].tolist() == pytest.approx([1, 8, 3, squares.sum() ** 2 / (squares**2).sum()], rel=1e-6)
    mean[0, 0] = torch.nan
    assert participation_ratio(mean).isnan().tolist() == [True, False, False, False, True]


def test_participation_ratio_of_normal_means_is_a_third():
    mean = torch.from_numpy(np.random.default_rng(6).normal(size=(1, 200_000)))
    assert float(participation_ratio(mean)) / 200_000 == pytest.approx(1 / 3, abs=0.005)  # E[m^2]^2 / E[m^4]


def test_few_levels_counts_what_bf16_can_tell_apart():
    """Where the flag is up, at most some 50 values of bf16 lie within 4 standard deviations of the mean."""
    ratios = torch.tensor([0.0, 5.0, 29.0, 31.0, 100.0, -100.0, 1000.0])
    exact = torch.from_numpy(np.random.default_rng(7).normal(size=(4000, 7))) + ratios
    flagged = few_levels(moments(exact))
    assert flagged.tolist() == [False, False, False, True, True, True, True]
    levels = torch.tensor([len(column.unique()) for column in exact.bfloat16().T])
    assert (levels[flagged] < 50).all() and (levels[~flagged] > 50).all()
    assert not few_levels(moments(exact), torch.float32).any()
    assert few_levels(moments(exact), torch.float16).tolist() == [False] * 6 + [True]
    assert few_levels(moments(exact), ratio=200).tolist() == [False] * 6 + [True]


def test_constant_and_non_finite_units_are_other_flags():
    x = torch.ones(9, 3) * 7
    x[0, 1], x[0, 2] = torch.nan, torch.inf
    assert not few_levels(moments(x)).any()


def test_covariance_over_several_panels_and_pieces():
    rng = np.random.default_rng(8)
    rows = torch.from_numpy(rng.normal(size=(2100, 600)) * rng.uniform(0.1, 5, 600) + 9).float()
    found = covariance(rows)
    exact = rows.double().numpy()
    error = (found.scatter / found.n).numpy() - np.cov(exact.T, bias=True)
    assert np.abs(error / np.outer(exact.std(0), exact.std(0))).max() < 5e-7
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0), rtol=1e-13)


def test_massive_ratios_are_the_largest_over_the_median():
    mean = torch.ones(3, 5)
    mean[1, 4], mean[2, 1], mean[0] = -300.0, 50.0, 0.0  # a sublayer of zeros has no scale
    ratios = massive_ratios(mean)
    assert ratios.tolist() == [1.0, 50.0, 1.0, 1.0, 300.0]
    assert torch.equal(massive_units(mean), ratios > 100)
    assert massive_ratios(torch.zeros(2, 3)).tolist() == [0.0, 0.0, 0.0]
