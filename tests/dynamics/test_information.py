"""Mutual information against analytic values, scipy's densities, scikit-learn, and its own invariances."""

import threading

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import digamma
from scipy.stats import gaussian_kde, norm, rankdata
from sklearn.feature_selection import mutual_info_regression

from rsdyn.dynamics.information import ESTIMATORS, MIN_SAMPLES, consecutive_information, mutual_information

TRUE_ESTIMATORS = [e for e in ESTIMATORS if e != "paper_literal"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gaussians(rho, n, units=1, seed=0):
    """Pairs whose *sample* correlation is exactly ``rho`` in every unit, so that no sampling error is left."""
    white = np.random.default_rng(seed).normal(size=(units, n, 2))
    white = np.stack([np.linalg.qr(w - w.mean(0))[0] for w in white]) * n**0.5
    x, y = white[..., 0], rho * white[..., 0] + np.sqrt(1 - rho**2) * white[..., 1]
    return torch.from_numpy(x.T.copy()), torch.from_numpy(y.T.copy())


def samples(kind, n, seed=0):
    """One pair ``(N,), (N,)`` of a named kind."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, n))
    y = 0.8 * x + 0.6 * noise
    if kind == "nearly collinear":
        y = x + 0.03 * noise
    elif kind == "heavy tails":
        x = rng.standard_t(2, size=n)
        y = x + rng.standard_t(2, size=n)
    elif kind == "bimodal":
        x = rng.choice([-1, 1], n) + 0.05 * x
        y = 0.9 * x + 0.1 * noise
    elif kind == "skewed":
        x = rng.exponential(size=n)
        y = x * rng.exponential(size=n)
    elif kind == "nonlinear":
        y = x**2 + 0.2 * noise
    elif kind == "outlier":
        x[0], y[0] = 30.0, -25.0
    elif kind == "large mean":
        x, y = 1e5 + x, 3.0 * y - 3e5
    elif kind == "bfloat16":
        x, y = (torch.from_numpy(v + 30).bfloat16().double().numpy() for v in (x, y))
    return x, y


KINDS = "gaussian,nearly collinear,heavy tails,bimodal,skewed,nonlinear,outlier,large mean,bfloat16".split(",")


def scipy_integral(x, y, steps=0.3, reach=6.0):
    """``∫∫ p ln(p / (p_x p_y))`` of scipy's density, whose marginals are scipy's too, on a fine sheared grid."""
    n, joint = len(x), gaussian_kde([x, y])
    slope, h = np.cov(x, y)[0, 1] / np.var(x, ddof=1), n ** (-1 / 6)
    rest = y - slope * x
    axes = []
    for v in (x, rest):
        d = h * np.std(v, ddof=1)
        axes.append(np.arange(v.min() - reach * d, v.max() + reach * d, steps * d))
    a, b = np.meshgrid(*axes, indexing="ij")
    points = np.stack([a.ravel(), (b + slope * a).ravel()])
    p = joint(points)
    marginals = joint.marginal([0])(points[0]) * joint.marginal([1])(points[1])
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    keep = p > 0
    return float((p[keep] * np.log(p[keep] / marginals[keep])).sum() * cell)


def one(x, y, estimator="kde", **kwargs):
    return float(mutual_information(torch.as_tensor(x)[:, None], torch.as_tensor(y)[:, None], estimator, **kwargs))


# kde


@pytest.mark.parametrize("kind", KINDS)
def test_kde_is_the_integral_over_scipy_s_density(kind):
    x, y = samples(kind, 150)
    # p ln p bends most between clumps of samples, where the grid is too coarse for it
    assert one(x, y) == pytest.approx(scipy_integral(x, y), abs=5e-5 if kind == "bimodal" else 1e-5)


@pytest.mark.parametrize("n", [MIN_SAMPLES["kde"], 30, 5000])
def test_kde_at_other_sizes(n):
    x, y = samples("gaussian", n)  # 5000 samples go through the buffer in parts
    assert one(x, y) == pytest.approx(scipy_integral(x, y, steps=0.6, reach=5), abs=2e-5)


@pytest.mark.parametrize("rho", [0, 0.3, 0.8, 0.95, 0.99, 0.999, 1 - 1e-8])
def test_kde_of_gaussians(rho):
    """A kernel shaped as the covariance keeps the correlation: what is left is the bias of the floor, whatever rho."""
    bias = mutual_information(*gaussians(rho, 1000, units=8)) + np.log1p(-(rho**2)) / 2
    assert (bias > 0).all() and (bias < 0.02).all()


@pytest.mark.parametrize(("n", "units", "expected"), [(200, 60, 0.023), (1000, 30, 0.011), (5000, 6, 0.005)])
def test_floor_of_independent_samples(n, units, expected):
    x = torch.randn(n, 2, units, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert float(mutual_information(x[:, 0], x[:, 1]).mean()) == pytest.approx(expected, rel=0.2)
    y = x[:, :1].expand(-1, 2, -1)  # identical sublayers, paired at random
    pairing = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    assert float(consecutive_information(y, pairing=pairing).mean()) == pytest.approx(expected, rel=0.2)


def test_an_outlier_of_30_sigma_has_its_own_grid():
    x, y = (torch.randn(400, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    before = mutual_information(x, y)
    x[3, 2] = 30 * x[:, 2].std()
    after = mutual_information(x, y)
    assert torch.equal(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert after[2] == pytest.approx(scipy_integral(x[:, 2].double().numpy(), y[:, 2].double().numpy()), abs=1e-5)


# kde_resub, copula, ksg, paper_literal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [MIN_SAMPLES["kde_resub"], 157, 1000])
def test_kde_resub_is_scipy_s(kind, n):
    x, y = samples(kind, n)
    ratio = gaussian_kde([x, y])([x, y]) / (gaussian_kde(x)(x) * gaussian_kde(y)(y))
    # scipy works on raw coordinates: a mean of 1e5 costs it, not us, five digits
    assert one(x, y, "kde_resub") == pytest.approx(np.log(ratio).mean(), abs=1e-9 if kind == "large mean" else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_copula_is_the_correlation_of_scipy_s_normal_scores(kind, dtype):
    x, y = (torch.from_numpy(v).to(dtype) for v in samples(kind, 501))
    if not (x.isfinite().all() and y.isfinite().all()) or len(x.unique()) == 1 or len(y.unique()) == 1:
        assert one(x, y, "copula") != one(x, y, "copula")  # NaN
        return
    scores = [norm.ppf(rankdata(v.double().numpy()) / 502) for v in (x, y)]
    expected = -0.5 * np.log1p(-(np.corrcoef(scores)[0, 1] ** 2))
    assert one(x, y, "copula") == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_copula_of_more_samples_than_16_bits_can_number():
    x = torch.randn(70_000, 2, generator=torch.Generator().manual_seed(0)).cumsum(1).bfloat16()
    scores = norm.ppf(rankdata(x.double().numpy(), axis=0) / 70_001)
    expected = -0.5 * np.log1p(-(np.corrcoef(scores.T)[0, 1] ** 2))
    assert one(x[:, 0], x[:, 1], "copula") == pytest.approx(expected, rel=1e-10)


def test_copula_counts_negative_zero_as_zero():
    x = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0, 2.0])
    y = torch.arange(7.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert one(x.to(dtype), y, "copula") == one(x.abs() * x.sign(), y, "copula")


@pytest.mark.parametrize("rho", [0, 0.3, 0.8, 0.95, 0.99, 0.999])
def test_copula_of_gaussians(rho):
    found = mutual_information(*gaussians(rho, 5000, units=4), "copula")
    # the tails of 5000 ranks fall short of the tails of a Gaussian, which near rho = 1 shows
    assert found.numpy() == pytest.approx(-0.5 * np.log1p(-(rho**2)), rel=0.01, abs=0.003)


def test_copula_is_blind_to_monotone_maps_and_steady_under_an_outlier():
    x, y = (torch.from_numpy(v) for v in samples("gaussian", 500))
    plain = one(x, y, "copula")
    assert one((20 * x).exp(), y**3, "copula") == pytest.approx(plain, abs=1e-12)
    assert one(x, -y, "copula") == pytest.approx(plain, abs=1e-12)
    x[0] = 1e6
    assert one(x, y, "copula") == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bfloat16"])
@pytest.mark.parametrize("n", [MIN_SAMPLES["ksg"], 50, 400])
def test_ksg_is_scikit_learn_s(kind, n):
    x, y = samples(kind, n)
    expected = mutual_info_regression(x[:, None] - x.mean(), y - y.mean(), n_neighbors=3, random_state=0)[0]
    assert one(x, y, "ksg") == pytest.approx(expected, abs=1e-9)


def test_ksg_with_ties_counts_what_its_definition_says():
    """By the definition, from all distances; whole numbers put three neighbours and more in one place."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 120).astype(float), rng.integers(0, 6, 120).astype(float)
    y += x
    z = [(v - v.mean()) / v.std(ddof=1) for v in (x, y)]
    far = [cdist(v[:, None], v[:, None]) for v in z]
    radius = np.sort(np.maximum(*far), axis=1)[:, 3]
    nearer = [np.where(radius < 1e-9, (d < 1e-9).sum(1), (d < radius[:, None] - 1e-9).sum(1)) for d in far]
    expected = digamma(120) + digamma(3) - sum(digamma(c).mean() for c in nearer)
    assert (radius == 0).any() and (radius > 0).any()
    assert one(x, y, "ksg") == pytest.approx(max(0.0, expected), abs=1e-12)


def test_ksg_sees_what_no_rank_correlation_does():
    x, y = samples("nonlinear", 1000)
    assert one(x, y, "ksg") > 0.8 and one(x, y, "copula") < 0.05


def scipy_paper(x, y):
    a, b = (np.linspace(v.min(), v.max(), 100) for v in (x, y))
    p = gaussian_kde([x, y])(np.stack([m.ravel() for m in np.meshgrid(a, b, indexing="ij")])).reshape(100, 100)
    product = gaussian_kde(x)(a)[:, None] * gaussian_kde(y)(b)
    return (p * np.log((p + 1e-10) / (product + 1e-10))).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_paper_literal_is_the_paper_s_sum_over_scipy_s_densities(kind):
    x, y = samples(kind, 120)
    assert one(x, y, "paper_literal") == pytest.approx(scipy_paper(x, y), rel=1e-7)


def test_paper_literal_is_not_a_mutual_information():
    x, y = (torch.from_numpy(v) for v in samples("gaussian", 300))
    plain = one(x, y, "paper_literal")
    assert one(0.001 * x, 0.001 * y, "paper_literal") == pytest.approx(1e6 * plain, rel=0.01)
    growing = [one(s * x, s * y, "paper_literal") for s in (1, 2, 4, 8)]  # the correlation stays
    assert growing == sorted(growing, reverse=True) and growing[-1] < growing[0] / 50
    assert one(8 * x, 8 * y) == pytest.approx(one(x, y), abs=1e-6)


# properties of all


@pytest.mark.parametrize("estimator", TRUE_ESTIMATORS)
@pytest.mark.parametrize(("a", "b"), [(1e6, 1e6), (1e-6, 1e-6), (1e6, 1e-6), (-3.0, 0.1), (1e-200, 1e200)])
def test_scale_does_not_matter(estimator, a, b):
    x, y = (torch.from_numpy(v) for v in samples("nonlinear", 200))
    assert one(a * x, b * y, estimator) == pytest.approx(one(x, y, estimator), abs=1e-6)


@pytest.mark.parametrize("estimator", TRUE_ESTIMATORS)
@pytest.mark.parametrize("mean", [1e2, 1e5])
def test_mean_does_not_matter(estimator, mean):
    x, y = (torch.from_numpy(v) for v in samples("gaussian", 200))
    assert one(x + mean, y - mean, estimator) == pytest.approx(one(x, y, estimator), abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_of_samples_and_of_sublayers_does_not_matter(estimator):
    x, y = (torch.from_numpy(v) for v in samples("skewed", 300))
    found = one(x, y, estimator)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert one(x[order], y[order], estimator) == pytest.approx(found, rel=1e-6)
    # kde shears one way or the other: two grids for the same integral
    assert one(y, x, estimator) == pytest.approx(found, rel=1e-5 if estimator == "kde" else 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_input_dtypes(estimator):
    x, y = (torch.from_numpy(v) for v in samples("gaussian", 200))
    exact = one(x, y, estimator)
    assert one(x.float(), y.float(), estimator) == pytest.approx(exact, rel=2e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pair = x.to(dtype), y.to(dtype)
        as_double = one(pair[0].double(), pair[1].double(), estimator)
        assert one(*pair, estimator) == pytest.approx(as_double, rel=1e-12)
        assert one(pair[0], pair[1].double(), estimator) == pytest.approx(as_double, rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_degenerate_units_are_flagged_and_touch_no_other(estimator):
    x, y = (torch.randn(60, 9, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (2, 3))
    alone = mutual_information(x, y, estimator)
    assert alone.isfinite().all()
    x[:, 1] = 0.1  # constant, and not a number that float64 holds
    y[:, 2] = 7.0
    x[5, 3] = torch.nan
    y[5, 4] = torch.inf
    y[:, 5] = x[:, 5]  # identical
    y[:, 6] = 3e5 - 2e-4 * x[:, 6]  # collinear
    x[:, 7], y[:, 7] = 1e-3, torch.nan
    found = mutual_information(x, y, estimator)
    assert found.isnan().tolist() == [False, True, True, True, True, False, False, True, False]
    assert found.isinf().nonzero().flatten().tolist() == [5, 6] and (found[5:7] > 0).all()
    assert torch.equal(found[[0, 8]], alone[[0, 8]])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_degenerate_sublayers_cost_their_own_pairs_only(estimator):
    stream = torch.randn(60, 6, 3, generator=torch.Generator().manual_seed(4)).cumsum(1)
    whole = consecutive_information(stream, estimator)
    stream[3, 2, 1] = torch.nan
    stream[:, 5, 0] = stream[:, 4, 0]
    found = consecutive_information(stream, estimator)
    assert found.isnan().nonzero().tolist() == [[1, 1], [2, 1]]
    assert found.isinf().nonzero().tolist() == [[4, 0]]
    kept = found.isfinite()
    # batches of a unit's own pairs may fall otherwise: last digits only
    np.testing.assert_allclose(found[kept].numpy(), whole[kept].numpy(), rtol=1e-6)
    assert torch.equal(found[:, 2], whole[:, 2])


def test_nearly_collinear_pairs_keep_their_digits():
    """1 - r² would have lost them: the residual's standard deviation is 1e-5 of the spread."""
    x, y = gaussians(0.0, 2000)
    y = x + 1e-5 * y
    for estimator in ("kde", "kde_resub"):
        assert float(mutual_information(x, y, estimator)) == pytest.approx(-np.log(1e-5), abs=0.1)
    scores = [norm.ppf(rankdata(v[:, 0]) / 2001).astype(np.longdouble) for v in (x, y)]
    a, b = (v - v.mean() for v in scores)
    rest = b - a * (a @ b) / (a @ a)
    expected = float(-np.log(rest @ rest / (b @ b)) / 2)
    assert expected > 8 and float(mutual_information(x, y, "copula")) == pytest.approx(expected, abs=1e-10)
    r = 1 - 3e-11
    assert float(mutual_information(*gaussians(r, 2000), "kde")) == pytest.approx(-0.5 * np.log1p(-(r**2)), abs=0.05)


# consecutive_information


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consecutive_is_pair_by_pair(estimator, dtype):
    stream = torch.randn(80, 5, 11, generator=torch.Generator().manual_seed(5)).cumsum(1).to(dtype)
    pairing = torch.randperm(80, generator=torch.Generator().manual_seed(6))
    plain, permuted = (
        consecutive_information(stream, estimator),
        consecutive_information(stream, estimator, pairing=pairing),
    )
    assert plain.shape == permuted.shape == (4, 11) and plain.dtype == torch.float64
    for s in range(4):
        for found, later in ((plain, stream[:, s + 1]), (permuted, stream[pairing, s + 1])):
            expected = mutual_information(stream[:, s], later, estimator)
            # a marginal from one pair or another is on another grid
            np.testing.assert_allclose(
                found[s].numpy(), expected.numpy(), rtol=1e-9, atol=1e-5 if estimator == "kde" else 0
            )
    assert (permuted.mean() < plain.mean()) or estimator == "paper_literal"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_same_bits_on_one_thread_and_two_and_whatever_the_neighbours(estimator, threads):
    stream = torch.randn(50, 4, 37, generator=torch.Generator().manual_seed(7)).cumsum(1).bfloat16()
    threads(1)
    one_thread = consecutive_information(stream, estimator)
    assert torch.equal(consecutive_information(stream[..., 30:], estimator), one_thread[:, 30:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(consecutive_information(stream, estimator), one_thread)
    threads(2)
    assert torch.equal(consecutive_information(stream, estimator), one_thread)


def test_progress_is_told_in_the_caller_s_thread(threads):
    threads(2)
    told = []
    consecutive_information(
        torch.randn(20, 3, 70), "copula", on_block=lambda n: told.append((n, threading.current_thread().name))
    )
    assert sum(n for n, _ in told) == 70 and len(told) > 1
    assert {name for _, name in told} == {threading.current_thread().name}


def test_inputs_with_gradients_or_strides_and_none_is_changed():
    stream = torch.randn(40, 3, 8, requires_grad=True)
    expected = consecutive_information(stream)
    assert not expected.requires_grad
    turned = stream.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    before = turned.clone()
    for estimator in ESTIMATORS:
        consecutive_information(turned, estimator)
    assert torch.equal(turned, before)
    assert torch.equal(consecutive_information(turned), expected)
    assert consecutive_information(stream[..., :0]).shape == (2, 0)
    assert mutual_information(stream[:, 0, :0], stream[:, 1, :0]).shape == (0,)


# bad input


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_too_few_samples(estimator):
    n = MIN_SAMPLES[estimator]
    x = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(8))
    assert not consecutive_information(x, estimator).isnan().any()
    with pytest.raises(
        ValueError, match=rf"estimator='{estimator}' needs at least {n} samples and got N = {n - 1}; give"
    ):
        consecutive_information(x[:-1], estimator)
    with pytest.raises(ValueError, match=f"got N = {n - 1}"):
        mutual_information(x[:-1, 0], x[:-1, 1], estimator)


def test_bad_input():
    x = torch.randn(20, 3, 4)
    with pytest.raises(ValueError, match=r"estimator='kd' is unknown; choose one of kde, "):
        consecutive_information(x, "kd")
    with pytest.raises(ValueError, match=r"trajectories has 1 sublayers, .* at least 2"):
        consecutive_information(x[:, :1])
    with pytest.raises(ValueError, match=r"trajectories is \(20, 4\): it must be"):
        consecutive_information(x[:, 0])
    with pytest.raises(ValueError, match=r"x is \(20, 4\) and y \(19, 4\)"):
        mutual_information(x[:, 0], x[1:, 1])
    with pytest.raises(ValueError, match=r"x is \(20, 3, 4\)"):
        mutual_information(x, x)
    for pairing in (torch.zeros(20, dtype=torch.long), torch.arange(19), torch.arange(20.0), torch.arange(1, 21)):
        with pytest.raises(ValueError, match=r"pairing is .* integers 0\.\.19 once"):
            consecutive_information(x, pairing=pairing)
