"""Null models of rotations: what each keeps, that the fast path counts what numpy counts, calibration and power."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import toeplitz
from scipy.stats import binom, chisquare, false_discovery_control, kstest
from systems import orbits, random_walks

from rsdyn.dynamics import surrogates as module
from rsdyn.dynamics.linear_process import fit_linear_process
from rsdyn.dynamics.rotation import rotations
from rsdyn.dynamics.rotation_test import (
    NULLS,
    benjamini_hochberg,
    join,
    mid_rank_p,
    paired_swap_test,
    pooled_test,
    rotation_test,
    surrogate_turns,
    surrogates,
    two_sided_p,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from calibration import SIZES, walks

S = 64
RESHUFFLING = [null for null in NULLS if null != "layer_shuffle"]  # whose portraits are those of a trajectory


def white(s: int, u: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(s, u, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def depth(values) -> torch.Tensor:
    """One number a step, ``(S - 1, 1)``, from a function of the step's index."""
    return torch.tensor([float(values(s)) for s in range(S - 1)], dtype=torch.float64)[:, None]


def all_of(a, null, n=20, **options):
    blocks = list(surrogates(a, null, n, **options))
    return torch.cat([b.x for b in blocks]).double().numpy(), torch.cat([b.y for b in blocks]).double().numpy()


def assert_rejects(p: torch.Tensor, rate: float = 0.05, liberal: float = 1.0):
    """The number of p up to ``rate`` is what independent tests give, 1 in 10,000 outside; up to ``liberal`` as many."""
    count = int((p <= rate).sum())
    low, high = binom.ppf(5e-5, len(p), rate), binom.ppf(1 - 5e-5, len(p), rate * liberal)
    assert low <= count <= high, f"{count} of {len(p)} rejected at {rate}"


# ---------------------------------------------------------------- the numbers are those of the literal formulas


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("null", NULLS)
def test_counts_what_numpy_counts_on_the_portraits(null, shared):
    a = random_walks(S, 9 if null != "innovation_shuffle" else 80, 3.0, seed=4)
    x, y = all_of(a, null, 33, seed=2, shared=shared)
    theta = np.unwrap(np.arctan2(np.diff(y, axis=1), np.diff(x, axis=1)), axis=1)
    expected = (theta[:, -1] - theta[:, 0]) / (2 * np.pi)
    found = rotation_test(a, null, 33, seed=2, shared=shared)
    np.testing.assert_allclose(found.observed.numpy(), rotations(a).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.null_mean.numpy(), expected.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.null_std.numpy(), expected.std(0, ddof=1), atol=1e-4)
    np.testing.assert_allclose(found.population.numpy(), np.abs(expected).mean(1), atol=1e-4)
    np.testing.assert_allclose(found.signed_population.numpy(), expected.mean(1), atol=1e-4)
    # portraits are summed up in float32, so that a surrogate may come out on the other side of a unit's own turns
    away = (found.p - mid_rank_p(found.observed, torch.from_numpy(expected))).abs()
    assert float(away.max()) < 2.01 / 34 and float((away < 1e-9).double().mean()) > 0.95
    np.testing.assert_allclose(found.delta, found.observed - found.null_mean, rtol=1e-12)
    np.testing.assert_allclose(found.z, found.delta / found.null_std, rtol=1e-12)
    assert found.null == null and found.n == 33 and found.shared == shared
    if null != "layer_shuffle":  # its gradient is that of the trajectory as it was
        np.testing.assert_allclose(y, np.gradient(x, axis=1) - np.gradient(x, axis=1)[:, :1], atol=1e-4)


def test_two_sided_p_by_hand():
    observed, null = torch.tensor([3.0, 0.0, math.nan]), torch.tensor([[0.0], [1.0], [-1.0], [5.0]]).expand(4, 3)
    # centres (8/5, 1): 3 is 1.4 away, further are 0 (1.6), -1 and 5; 0 is 1 away, as 0 is, 1 is not, -1 and 5 are
    np.testing.assert_allclose(two_sided_p(observed, null).numpy(), [4 / 5, 4 / 5, np.nan])


def test_two_sided_p_is_exact():
    """Whatever the null's shape, p is uniform on its grid when the observed value is drawn from it too."""
    draws = torch.from_numpy(np.random.default_rng(0).exponential(size=(100, 4000)))
    p = two_sided_p(draws[0], draws[1:])
    assert chisquare(np.bincount((p.numpy() * 100).round().astype(int), minlength=101)[1:]).pvalue > 1e-3
    assert float(p.min()) == pytest.approx(1 / 100)


# ---------------------------------------------------------------- what each surrogate keeps


def kept(values: np.ndarray, original: np.ndarray, axis: int) -> None:
    """The same values, whatever their order."""
    np.testing.assert_allclose(np.sort(values, axis), np.sort(np.broadcast_to(original, values.shape), axis), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("null", ["increment_shuffle_windowed", "increment_shuffle"])
def test_increments_trade_places_within_their_kind_and_window(null, kinds, shared):
    a = random_walks(S, 5)
    x, _ = all_of(a, null, sites_per_layer=kinds, shared=shared, window=12)
    steps, original = np.diff(x, axis=1), np.diff(a.numpy(), axis=0)
    width = 12 if null.endswith("windowed") else S
    for start in range(0, S - 1, width):
        for kind in range(kinds):
            places = [s for s in range(start, min(start + width, S - 1)) if s % kinds == kind]
            kept(steps[:, places], original[places], 1)
    order = np.abs(steps[:, :, None] - original).argmin(2)
    assert (order != np.arange(S - 1)[:, None]).mean() > 0.6
    assert (order == order[:, :, :1]).all() == shared  # one order for all units, or one for each


@pytest.mark.parametrize("shared", [True, False])
def test_layer_shuffle_keeps_the_points_of_the_portrait(shared):
    a = random_walks(S, 5)
    x, y = all_of(a, "layer_shuffle", shared=shared)
    for found, original in ((x, a.numpy()), (y, np.gradient(a.numpy(), axis=0))):
        kept(found - found.mean(1, keepdims=True), original - original.mean(0), 1)
    # together: the point nearest to each surrogate's activation has its gradient
    for u in range(5):
        value = a[:, u].numpy() - a[:, u].numpy().mean()
        slope = np.gradient(a[:, u].numpy())
        order = np.abs((x[0, :, u] - x[0, :, u].mean())[:, None] - value).argmin(1)
        np.testing.assert_allclose(y[0, :, u] - y[0, 0, u], slope[order] - slope[order[0]], atol=1e-4)
    found = rotation_test(random_walks(S, 300), "layer_shuffle", 200)
    assert float(found.null_mean.mean()) == pytest.approx(0, abs=0.1)  # METHOD: 0 and 3.25, and about -15
    assert float(found.null_std.mean()) == pytest.approx(3.25, abs=0.1)
    assert float(rotation_test(random_walks(S, 300), "layer_shuffle_regradient", 200).null_mean.mean()) < -14.5


def test_layer_shuffle_regradient_keeps_the_activations():
    a = random_walks(S, 5)
    x, _ = all_of(a, "layer_shuffle_regradient")
    kept(x - x.mean(1, keepdims=True), a.numpy() - a.numpy().mean(0), 1)


@pytest.mark.parametrize("shared", [True, False])
def test_sign_flip_keeps_the_sizes_about_the_mean_of_each_kind(shared):
    a = random_walks(S, 5, depth(lambda s: 1 + 3 * (s % 2))) + depth(lambda s: s).new_tensor(range(S))[:, None]
    x, _ = all_of(a, "sign_flip", 200, shared=shared)
    original = np.diff(a.numpy(), axis=0)
    centre = np.stack([original[s % 2 :: 2].mean(0) for s in range(S - 1)])
    signs = (np.diff(x, axis=1) - centre) / (original - centre)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-3)
    assert abs(signs.mean()) < 0.03
    assert (np.ptp(signs, axis=2).max() < 1) == shared


@pytest.mark.parametrize("shared", [True, False])
def test_iaaft_keeps_the_values_and_nearly_the_spectrum(shared):
    steps = white(S - 1, 4)
    for s in range(1, S - 1):
        steps[s] += 0.6 * steps[s - 1]
    a = torch.cat([torch.zeros(1, 4), steps.cumsum(0)])
    original = np.diff(a.numpy(), axis=0)
    x, _ = all_of(a, "iaaft", 50, shared=shared)
    steps = np.diff(x, axis=1)
    kept(steps, original, 1)
    wanted = np.abs(np.fft.rfft(original, axis=0))
    error = np.linalg.norm(np.abs(np.fft.rfft(steps, axis=1)) - wanted, axis=1) / np.linalg.norm(wanted, axis=0)
    assert error.max() < 0.15
    assert np.abs(steps - original).mean() > 0.3 * original.std()  # and they are not the original


@pytest.mark.parametrize("length", [31, 32])
def test_iaaft_is_that_of_schreiber_and_schmitz(length):
    """By numpy's transforms in double precision; two values that come out alike in single precision may trade ranks."""
    series, orders = white(3, length).float(), white(3, 200 * length, 1).view(3, 200, length).argsort(-1)
    found = module._iaaft(series, orders).numpy()
    same = []
    for values, starts, ours in zip(series.double().numpy(), orders.numpy(), found, strict=True):
        amplitude, ordered = np.abs(np.fft.rfft(values)), np.sort(values)
        x = values[starts]
        for _ in range(10):
            phase = np.angle(np.fft.rfft(x))
            x = ordered[np.fft.irfft(amplitude * np.exp(1j * phase), length).argsort(-1).argsort(-1)]
        same.append((x == ours).all(-1))
    assert np.mean(same) > 0.99


def test_orders_are_uniform():
    """5 sublayers have 120 orders of activations; 4 increments of one kind 24."""
    a = torch.tensor([0.0, 1, 3, 7, 15, 31])[:, None]  # all differences differ
    for null, length, options in (
        ("layer_shuffle_regradient", 5, {}),
        ("increment_shuffle", 4, {"sites_per_layer": 1}),
    ):
        x, _ = all_of(a[: length if "layer" in null else length + 1], null, 12_000, **options)
        _, counts = np.unique(np.diff(x[..., 0], axis=1).round(), axis=0, return_counts=True)
        assert len(counts) == math.factorial(length)
        assert chisquare(counts).pvalue > 1e-3, null


def test_deep_streams_take_wider_random_words():
    """300 sublayers in windows of 4 need 17 bits to number groups and places: 64-bit words, the same rules."""
    a = random_walks(300, 3)
    x, _ = all_of(a, "increment_shuffle_windowed", 8, window=4)
    steps, original = np.diff(x, axis=1), np.diff(a.numpy(), axis=0)
    for start in range(0, 299, 4):
        for places in (range(start, min(start + 4, 299), 2), range(start + 1, min(start + 4, 299), 2)):
            kept(steps[:, list(places)], original[list(places)], 1)
    assert 0.4 < (np.abs(steps - original) > 1e-3).mean() < 0.6  # of two, half stay
    found = rotation_test(a, "increment_shuffle_windowed", 50, window=4)
    assert float(found.null_mean.mean()) == pytest.approx(float(found.observed.mean()), abs=10)


# ---------------------------------------------------------------- calibration and power


WALKS = {
    "plain": (random_walks(S, 1000, seed=1), 1.0),
    "heavy tails": (
        torch.from_numpy(np.random.default_rng(0).standard_t(3, (S, 1000)).cumsum(0)),
        1.0,
    ),
    "kinds": (random_walks(S, 1000, depth(lambda s: 1 + 3 * (s % 2)), seed=2), 1.0),
    "growing": (random_walks(S, 1000, depth(lambda s: math.exp(3 * s / S)), seed=3), 1.4),
    "a jump in scale": (random_walks(S, 1000, depth(lambda s: 1 + 4 * (s > 31)), seed=4), 1.4),
    "drift": (random_walks(S, 1000, seed=5) + 0.5 * torch.arange(S)[:, None], 1.0),
}


@pytest.mark.parametrize("walk", WALKS)
def test_the_default_null_lets_random_walks_pass(walk):
    """METHOD: 3 to 7 % rejected at .05. Where the scale stays the same within windows the null is exact."""
    a, liberal = WALKS[walk]
    found = rotation_test(a, n=199, seed=7)
    assert_rejects(found.p, liberal=liberal)
    assert_rejects(found.p_normal, liberal=1.4)
    assert int((found.q <= 0.05).sum()) <= 2


@pytest.mark.parametrize("walk", ["plain", "heavy tails", "kinds", "growing"])
def test_the_papers_null_rejects_nearly_every_random_walk(walk):
    """Why it is not the default: METHOD says 98 to 100 %."""
    found = rotation_test(WALKS[walk][0][:, :300], "layer_shuffle", n=199)
    assert float((found.p <= 0.05).double().mean()) > 0.95
    assert float((found.q <= 0.05).double().mean()) > 0.95


def test_the_papers_null_rejects_noise_and_lets_clean_orbits_pass():
    assert float((rotation_test(white(S, 300), "layer_shuffle", n=199).p <= 0.05).double().mean()) > 0.98
    clean = orbits(S, 300, 16, 0.1)
    assert float((rotation_test(clean, "layer_shuffle", n=199).p <= 0.05).double().mean()) < 0.05


@pytest.mark.parametrize(
    ("null", "a", "liberal"),
    [
        ("layer_shuffle_regradient", white(S, 1000, 1).exp(), 1.0),
        ("increment_shuffle", torch.from_numpy(np.random.default_rng(1).exponential(size=(S, 1000)).cumsum(0)), 1.0),
        ("increment_shuffle", WALKS["kinds"][0], 1.0),
        ("sign_flip", WALKS["plain"][0], 1.2),
        ("sign_flip", WALKS["kinds"][0], 1.2),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_each_null_lets_pass_what_obeys_it(null, a, liberal, shared):
    assert_rejects(rotation_test(a, null, n=199, seed=3, shared=shared).p, liberal=liberal)


def test_iaaft_lets_linear_gaussian_increments_pass():
    """Nearly: 63 increments are short, and the transform takes the last to be followed by the first."""
    steps = white(S + 200, 300, 2)
    for s in range(1, len(steps)):
        steps[s] += -0.5 * steps[s - 1]
    assert_rejects(rotation_test(steps[200:].cumsum(0), "iaaft", n=99).p, liberal=1.4)


def test_layer_shuffle_is_one_of_its_own_surrogates():
    """No trajectory obeys this null, so it is held against itself: points drawn like the null pass."""
    x, y = (torch.from_numpy(v) for v in all_of(random_walks(S, 600), "layer_shuffle", 100))
    theta = np.unwrap(torch.atan2(y.diff(dim=1), x.diff(dim=1)).numpy(), axis=1)
    turned = torch.from_numpy((theta[:, -1] - theta[:, 0]) / (2 * np.pi))
    assert_rejects(two_sided_p(turned[0], turned[1:]))


@pytest.mark.parametrize(
    ("null", "noise", "power"),
    [
        ("increment_shuffle_windowed", 0.1, 0.8),  # METHOD: 86 %
        ("increment_shuffle", 0.1, 0.99),
        ("sign_flip", 0.1, 0.99),
        ("layer_shuffle_regradient", 0.1, 0.99),
    ],
)
def test_power_on_planted_orbits_of_period_16(null, noise, power):
    found = rotation_test(orbits(S, 400, 16, noise, seed=9), null, n=199)
    assert float((found.p <= 0.05).double().mean()) > power
    assert float(found.delta.mean()) > 5  # an orbit turns less than noise made of its parts


def test_power_of_wider_windows():
    a = orbits(S, 300, 16, 0.1)
    power = [float((rotation_test(a, n=199, window=w).p <= 0.05).double().mean()) for w in (4, 8, 16)]
    assert power[0] < power[1] < power[2] and power[2] > 0.97


def test_iaaft_sees_what_is_not_one_linear_process():
    """An orbit in noise is one, and passes; a slow orbit that gives way to small noise is not."""
    assert float((rotation_test(orbits(S, 100, 16, 0.1), "iaaft", n=99).p <= 0.05).double().mean()) < 0.2
    phase = 2 * math.pi * white(1, 150)
    steps = torch.where(
        depth(lambda s: s) < 32, torch.cos(depth(lambda s: math.pi * s / 16) + phase), 0.1 * white(S - 1, 150, 1)
    )
    found = rotation_test(torch.cat([torch.zeros(1, 150), steps.cumsum(0)]), "iaaft", n=99)
    assert float((found.p <= 0.05).double().mean()) > 0.55


# ---------------------------------------------------------------- many units


def test_shared_surrogates_keep_the_population_as_wide_as_it_is():
    """20 sources behind 500 units: with orders of their own the units' mean hardly varies, and all is significant."""
    steps = white(S, 20) @ white(20, 500, 1)
    a = steps.cumsum(0)
    shared, own = (rotation_test(a, "layer_shuffle", 199, shared=shared) for shared in (True, False))
    assert float(shared.signed_population.std() / own.signed_population.std()) > 3
    torch.testing.assert_close(shared.null_std, own.null_std, rtol=0.4, atol=0)  # unit by unit they agree
    assert float(own.population_observed[0]) == pytest.approx(float(rotations(a).abs().mean()))
    assert float(own.population_observed[1]) == pytest.approx(float(rotations(a).mean()))
    with pytest.raises(ValueError, match="shared=True"):
        own.population_p  # noqa: B018


def test_population_p_is_calibrated():
    p = []
    for seed in range(150):
        a = (white(20, 4, seed) @ white(4, 40, 1000 + seed)).cumsum(0)
        p.append(rotation_test(a, "increment_shuffle", 79, seed, shared=True, sites_per_layer=1).population_p)
    assert kstest(p, "uniform").pvalue > 1e-3


def test_benjamini_hochberg_leaves_nan_out():
    p = torch.tensor([0.001, math.nan, 0.02, 0.9, 0.04, math.nan], dtype=torch.float64)
    found = benjamini_hochberg(p).numpy()
    np.testing.assert_allclose(found[[0, 2, 3, 4]], false_discovery_control([0.001, 0.02, 0.9, 0.04]))
    np.testing.assert_allclose(found[[0, 2]], [0.004, 0.04])  # 4 tests: .001 * 4 / 1, .02 * 4 / 2
    assert np.isnan(found[[1, 5]]).all()
    assert benjamini_hochberg(torch.full((3,), math.nan)).isnan().all()


def test_p_floor_and_the_normal_way_under_it():
    """A few strong units among many: with 99 surrogates no q can pass, with z they do."""
    a = torch.cat([orbits(S, 10, 16, 0.05), random_walks(S, 490)], dim=1)
    found = rotation_test(a, "increment_shuffle", 99)
    assert float(found.p.min()) == pytest.approx(0.01)
    assert found.units_at_floor() == 100
    assert int((found.q <= 0.05).sum()) == 0
    assert found._replace(n=1000, p=torch.zeros(4096)).units_at_floor() == 82  # METHOD's example
    passed = found.q_normal <= 0.05
    assert int(passed[:10].sum()) >= 8 and int(passed[10:].sum()) <= 2
    np.testing.assert_allclose(found.q_normal, false_discovery_control(found.p_normal))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("null", NULLS)
def test_split_blocks_and_threads_leave_the_bits(null, shared, monkeypatch):
    a = random_walks(S, 300, seed=8).float()
    if null == "iaaft":
        a = a[:, :150]  # the slow one
    n = 30 if null != "iaaft" else 9
    options = {"null": null, "n": n, "seed": 5, "shared": shared, "of_all": a}
    whole = rotation_test(a, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        parts = [rotation_test(part, first_unit=i, **options) for i, part in ((0, a[:, :101]), (101, a[:, 101:]))]
    finally:
        torch.set_num_threads(before)
    joined = join(parts)
    for name in ("observed", "null_mean", "null_std", "z", "p", "q"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    for name in ("population", "signed_population", "population_observed"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    if null != "iaaft":  # whose bits may follow the number of surrogates at a time
        monkeypatch.setattr(module, "COLUMNS", 320)
        again = rotation_test(a, **options)
        assert all(torch.equal(x, y) for x, y in zip(whole[3:], again[3:], strict=True))


def test_seeds_nulls_and_units_draw_apart():
    a = random_walks(S, 1).expand(S, 3).contiguous()  # identical units
    found = rotation_test(a, n=50)
    assert len(set(found.null_mean.tolist())) == 3
    assert not torch.equal(found.null_mean, rotation_test(a, n=50, seed=1).null_mean)
    assert not torch.equal(found.null_mean, rotation_test(a, n=50, first_unit=1).null_mean)
    assert torch.equal(found.null_mean[1:], rotation_test(a, n=50, first_unit=1).null_mean[:2])
    orders = [all_of(a, null, 5)[0] for null in ("layer_shuffle", "layer_shuffle_regradient")]
    assert np.abs(orders[0] - orders[1]).max() > 0.1
    shared = rotation_test(a, n=50, shared=True)
    assert len(set(shared.p.tolist())) == 1 and len(set(shared.null_mean.tolist())) == 1


# ---------------------------------------------------------------- text against text, model against model


def pairs(n, s, u, seed=0):
    """Exchangeable pairs: what two texts of one sequence share, and what each has of its own."""
    both = white(s, n * u, seed).reshape(s, n, u)
    each = [white(s, n * u, seed + 1 + i).reshape(s, n, u) for i in (0, 1)]
    mean = random_walks(s, u, seed=seed + 9)[:, None]
    return [(mean + (both + x).cumsum(0)).movedim(1, 0).contiguous() for x in each]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paired_swaps_against_brute_force(dtype):
    """All 2^6 swaps of 6 sequences, one by one in numpy."""
    a, b = (x.to(dtype) for x in pairs(6, 16, 40))
    found = paired_swap_test(a, b, n=4000)
    of_a, of_b = (rotations(x.double().mean(0)) for x in (a, b))
    assert_close = np.testing.assert_allclose
    assert_close(found.observed, of_a, atol=1e-6)
    assert_close(found.null_mean, of_b, atol=1e-6)
    assert_close(found.delta, of_a - of_b, atol=1e-6)
    every = []
    for code in range(64):
        swap = torch.tensor([bool(code >> i & 1) for i in range(6)])[:, None, None]
        one, other = torch.where(swap, b, a).double().mean(0), torch.where(swap, a, b).double().mean(0)
        every.append(rotations(one) - rotations(other))
    null = torch.stack(every)
    expected = (null.abs() >= (of_a - of_b).abs() - 1e-5).double().mean(0)
    assert_close(found.p, expected, atol=0.05)
    assert_close(found.null_std, null.std(0, correction=0), rtol=0.1)
    assert float(found.p.min()) > 1.5 / 64
    assert_close(found.z, found.delta / found.null_std, rtol=1e-6)
    assert found.shared and found.population.shape == (4000,)


def test_paired_swaps_are_calibrated():
    a, b = pairs(30, 20, 1000)
    found = paired_swap_test(a.float(), b.float(), n=199)
    assert_rejects(found.p)
    assert_rejects(found.p_normal, liberal=1.3)
    p = []
    for seed in range(100):
        a, b = pairs(12, 10, 8, seed=100 * seed)
        p.append(paired_swap_test(a, b, 79, seed).population_p)
    assert kstest(p, "uniform").pvalue > 1e-3


def test_paired_swaps_find_an_orbit_that_shuffling_destroys():
    noise, other = pairs(40, S, 100)
    found = paired_swap_test(0.05 * noise + orbits(S, 100, 16), 0.05 * other, n=199)
    assert float((found.p <= 0.05).double().mean()) > 0.9
    assert float(found.delta.mean()) > 3 and found.population_p <= 0.01
    # `population` is about |R|, which the orbit has less of
    assert float(found.population_observed[0]) == pytest.approx(-float(found.delta.mean()), abs=0.5)


def test_tokens_of_a_sequence_are_swapped_together():
    """Sequences of as many tokens each: to swap them whole is to swap their means."""
    a, b = (torch.randn(12, 5, S, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    sequence = torch.arange(3, 15).repeat_interleave(5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))  # rows of a sequence need not lie together
    found = paired_swap_test(a.flatten(0, 1)[order], b.flatten(0, 1)[order], n=200, groups=sequence[order])
    expected = paired_swap_test(a.mean(1), b.mean(1), n=200)
    for name in ("observed", "null_mean", "delta", "null_std", "p", "population"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    alone = paired_swap_test(a.mean(1), b.mean(1), n=200, groups=torch.arange(12))
    assert torch.equal(alone.null_std, expected.null_std)
    apart = paired_swap_test(a.flatten(0, 1), b.flatten(0, 1), n=200)
    assert not torch.allclose(apart.null_std, expected.null_std, rtol=1e-3)


def test_paired_swaps_of_the_same_text_twice():
    a, _ = pairs(5, 20, 6)
    a[2, 3, 1], a[..., 4] = math.nan, 2.5
    found = paired_swap_test(a, a.clone(), n=50)
    assert found.observed.isnan().tolist() == [False, True, False, False, True, False]
    keep = [0, 2, 3, 5]
    assert (found.p[keep] == 1).all() and (found.delta[keep] == 0).all() and found.z.isnan().all()


@pytest.mark.parametrize("n", [3, 64, 65])
def test_paired_swaps_in_any_pieces(n):
    a, b = (x.bfloat16() for x in pairs(300, 8, 40))
    whole = paired_swap_test(a, b, n)
    parts = join([paired_swap_test(a[..., some], b[..., some], n) for some in (slice(0, 33), slice(33, 40))])
    torch.testing.assert_close(parts.p, whole.p, rtol=0, atol=0)
    torch.testing.assert_close(parts.null_std, whole.null_std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.population, whole.population, rtol=1e-4, atol=1e-4)


def test_pooled():
    null, observed = white(300, 1)[:, 0], torch.cat([white(50, 1, 1)[:, 0], torch.tensor([math.nan, 9.0])])
    found = pooled_test(observed, torch.cat([null, torch.tensor([math.nan])]))
    expected = mid_rank_p(observed, null[:, None].expand(300, 52))
    np.testing.assert_array_equal(found.p.numpy(), expected.numpy())
    assert float(found.p[51]) == pytest.approx(1 / 301) and found.p[50].isnan() and found.n == 300
    assert float(found.null_mean[0]) == pytest.approx(float(null.mean()))
    np.testing.assert_allclose(found.z[:50], (observed[:50] - null.mean()) / null.std())
    np.testing.assert_allclose(found.q[[*range(50), 51]], false_discovery_control(expected[[*range(50), 51]]))
    same = pooled_test(torch.tensor([2.0, 2.0]), torch.full((10,), 2.0))
    assert same.p.tolist() == [1, 1] and same.z.isnan().all()
    assert_rejects(pooled_test(white(2000, 1, 5)[:, 0], white(3000, 1, 6)[:, 0]).p, liberal=1.3)
    with pytest.raises(ValueError, match="at least 1"):
        pooled_test(observed, torch.tensor([math.nan]))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("null", NULLS)
def test_nan_constant_and_identical_units(null, shared):
    a = random_walks(S, 7 if null != "innovation_shuffle" else 80)
    a[5, 1], a[9, 2], a[:, 3] = math.nan, math.inf, 7.0
    a[:, 5] = a[:, 4]
    found = rotation_test(a, null, 19, shared=shared)
    for name in ("observed", "null_mean", "null_std", "delta", "z", "p", "q", "p_normal"):
        assert getattr(found, name).isnan()[:7].tolist() == [False, True, True, True, False, False, False], name
    assert found.population.isfinite().all() and found.population_observed.isfinite().all()
    rest = [0, *range(4, a.shape[1])]
    kept = rotation_test(a[:, rest], null, 19, shared=True)
    if shared and null != "iaaft":
        assert torch.equal(found.population, kept.population)
        assert torch.equal(found.q[rest], kept.q)


def test_nothing_to_test():
    found = rotation_test(torch.ones(S, 2), n=9)
    assert found.p.isnan().all() and found.population.isnan().all()
    joined = join([found, rotation_test(random_walks(S, 2), n=9)])
    assert joined.population.isfinite().all() and joined.q.isnan().tolist() == [True, True, False, False]


def test_three_sublayers_leave_nothing_to_trade():
    found = rotation_test(random_walks(3, 5), n=9)
    assert (found.p == 1).all() and found.z.isnan().all() and (found.delta.abs() < 1e-6).all()


def test_one_surrogate():
    found = rotation_test(random_walks(S, 5), n=1)
    assert (found.p >= 0.5).all() and found.z.isnan().all() and (found.null_std == 0).all()


@pytest.mark.parametrize("mean", [0, 1e5])
def test_units_far_from_zero(mean):
    a = random_walks(S, 50, seed=3).float() + mean
    found = rotation_test(a, n=99)
    np.testing.assert_allclose(found.observed, rotations(a))
    exact = rotation_test(a.double(), n=99)
    assert torch.equal(found.null_mean, exact.null_mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null": "layer_shufle"}, "did you mean 'layer_shuffle'"),
        ({"null": ""}, "one of layer_shuffle"),
        ({"n": 0}, "n=0: at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"first_unit": -3}, "first_unit=-3"),
        ({"sites_per_layer": 0}, "sites_per_layer=0"),
        ({"window": 3}, "window=3: at least 4"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        rotation_test(random_walks(S, 3), **options)
    with pytest.raises(ValueError, match=message):
        next(surrogates(random_walks(S, 3), **options))


def test_shapes_that_cannot_be_tested():
    with pytest.raises(ValueError, match="at least 3 sublayers"):
        rotation_test(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="one trajectory a"):
        rotation_test(torch.zeros(2, S, 5))
    with pytest.raises(ValueError, match="row i of each the same sequence"):
        paired_swap_test(torch.zeros(3, S, 5), torch.zeros(4, S, 5))
    with pytest.raises(ValueError, match="at least 2"):
        paired_swap_test(torch.zeros(1, S, 5), torch.zeros(1, S, 5))
    with pytest.raises(ValueError, match="join each alone"):
        join([rotation_test(random_walks(S, 2), n=3), rotation_test(random_walks(S, 2), n=4)])


def test_progress_and_input_untouched():
    a = random_walks(S, 600).bfloat16()
    before, seen = a.clone(), []
    rotation_test(a, n=3, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)] and torch.equal(a, before)
    seen.clear()
    x = a.T.reshape(8, 75, S).movedim(-1, 1)
    paired_swap_test(x, x.clone(), n=3, on_block=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (75, 75) and len(seen) == 3


# ---------------------------------------------------------------- the nulls for claims, and regularity


def test_mid_rank_p_by_hand():
    observed = torch.tensor([3.0, 0.0, 9.0, math.nan])
    null = torch.tensor([[0.0], [1.0], [3.0], [3.0], [5.0]]).expand(5, 4)
    # below, ties, above: (2, 2, 1), (0, 1, 4), (5, 0, 0)
    np.testing.assert_allclose(mid_rank_p(observed, null).numpy(), [5 / 6, 2 / 6, 1 / 6, np.nan])


def test_mid_rank_p_is_exact_and_steady_where_two_values_share_the_surrogates():
    draws = torch.from_numpy(np.random.default_rng(0).exponential(size=(100, 4000)))
    p = mid_rank_p(draws[0], draws[1:])
    counts = np.bincount((p.numpy() * 100).round().astype(int), minlength=101)
    assert counts[2::2].sum() < 10 and chisquare(counts[1::2]).pvalue > 1e-3  # uniform on 1, 3, ... 99 %
    two = (torch.rand(20, 1000, 1, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    over_seeds = torch.stack([mid_rank_p(torch.zeros(1), null) for null in two])
    assert float(over_seeds.max() - over_seeds.min()) < 0.1
    by_distance = torch.stack([two_sided_p(torch.zeros(1), null) for null in two])
    assert float(by_distance.max() - by_distance.min()) > 0.4  # the fault that it mends


def test_share_beyond_hardly_moves_with_the_seed():
    a = walks(3, 576)  # as many as SmolLM2 has
    shares = [float((rotation_test(a, n=1000, seed=s).p < 0.05).double().mean()) for s in range(3)]
    assert max(shares) - min(shares) < 0.01


def test_scaled_steps_take_the_size_of_their_new_place():
    """Steps of one shape times sizes that jump: each comes out as a step of its window times the size of its place."""
    sizes = depth(lambda s: 5.0 if s % 3 == 0 else 1.0)
    signs = white(S - 1, 40).sign()
    a = torch.cat([torch.zeros(1, 40), (signs * sizes).cumsum(0)])
    x, _ = all_of(a, "increment_shuffle_scaled")
    np.testing.assert_allclose(np.abs(np.diff(x, axis=1)), np.broadcast_to(sizes.numpy(), (20, S - 1, 40)), rtol=1e-4)
    assert (np.sign(np.diff(x, axis=1)) != signs.numpy()).mean() > 0.3


@pytest.mark.parametrize("units", [400, 4000])
def test_the_linear_process_is_the_one_that_was_planted(units):
    """AR(1) with -.3 and jumping sizes: the mixing is that of the process, and innovations are white."""
    steps = np.diff(walks(1, units, lag=-0.3).numpy(), axis=0)
    process = fit_linear_process(torch.from_numpy(steps), 2)
    planted = np.linalg.cholesky(toeplitz((-0.3) ** np.arange(59)))
    assert np.abs(process.mix.numpy() - planted).max() < 4 / units**0.5
    ratio = process.scale.numpy() / SIZES
    assert np.std(ratio / ratio.mean()) < 2 / units**0.5
    innovations = process.innovations(torch.from_numpy(steps)).numpy()
    innovations /= innovations.std(0)
    assert np.abs((innovations @ innovations.T / units)[~np.eye(59, dtype=bool)]).max() < 6 / units**0.5
    torch.testing.assert_close(process.kept(torch.ones(1, 59, dtype=torch.float64))[0], process.kept())
    assert process.certain and len(process.first) == 6


def test_new_innovations_keep_sizes_correlations_and_other_units():
    a = walks(2, 300, correlation=0.5, lag=-0.3)
    x, _ = all_of(a, "innovation_shuffle", 100, shared=True)
    steps, original = np.diff(x, axis=1), np.diff(a.numpy(), axis=0)
    scale = original.std(0)
    near = [
        np.mean([np.corrcoef(one[s] / scale, one[s + 1] / scale)[0, 1] for one in found for s in range(58)])
        for found in (steps[:20], original[None])
    ]
    assert near[0] == pytest.approx(near[1], abs=0.06)
    np.testing.assert_allclose(np.sqrt((steps**2).mean(axis=(0, 2))) / np.sqrt((original**2).mean(1)), 1, rtol=0.6)
    between = [np.corrcoef(found / scale, rowvar=False)[0, 1:].mean() for found in (steps[0], original)]
    assert between[0] == pytest.approx(between[1], abs=0.15)


def test_too_few_units_for_a_linear_process():
    a = random_walks(S, 20)
    with pytest.raises(ValueError, match=r"20 units that move make 63 steps.*of_all"):
        rotation_test(a, "innovation_shuffle", 9)
    sequences = torch.stack([a + random_walks(S, 20, seed=i) for i in range(1, 9)])
    found = rotation_test(a, "innovation_shuffle", 99, shared=True, of_all=sequences)
    assert found.p.isfinite().all() and 0 < found.population_p <= 1


# Monte Carlo error of 60 sets: 3 points; the whole grid is benchmarks/calibration.py
@pytest.mark.parametrize(
    ("tail", "correlation", "lag"),
    [("normal", 0.0, 0.0), ("t3", 0.0, -0.115), ("normal", 0.5, -0.115), ("normal", 0.9, 0.0), ("normal", 0.0, 0.3)],
)
def test_new_innovations_are_calibrated_on_real_step_sizes(tail, correlation, lag):
    p, share = [], []
    for seed in range(60):
        found = rotation_test(walks(seed, 80, tail, correlation, lag), "innovation_shuffle", 99, seed, shared=True)
        p.append(found.population_p)
        share.append(float((found.p <= 0.05).double().mean()))
    assert np.mean(np.array(p) <= 0.05) <= 0.15 and 0.25 < np.mean(p) < 0.75
    assert 0.025 < np.mean(share) < 0.075


def test_scaled_steps_are_calibrated_per_unit_where_sizes_jump():
    share = [
        float((rotation_test(walks(seed, 160), "increment_shuffle_scaled", 199, seed).p <= 0.05).double().mean())
        for seed in range(8)
    ]
    assert np.mean(share) == pytest.approx(0.05, abs=0.02)
    windowed = [rotation_test(walks(s, 160), n=79, seed=s, shared=True).population_p for s in range(12)]
    assert np.mean(np.array(windowed) <= 0.05) > 0.05  # which is why there are others


@pytest.mark.parametrize("period", [8, 12, 16])
def test_new_innovations_see_orbits_in_all_units(period):
    p = []
    for seed in range(4):
        phase = 2 * math.pi * torch.rand(80, generator=torch.Generator().manual_seed(seed))
        steps = white(59, 80, seed) + 2 * torch.cos(2 * math.pi / period * torch.arange(59)[:, None] + phase)
        a = torch.cat([torch.zeros(1, 80), (steps * torch.from_numpy(SIZES)[:, None]).cumsum(0)])
        p.append(rotation_test(a, "innovation_shuffle", 99, seed, shared=True).population_p)
    assert np.mean(np.array(p) <= 0.05) >= 0.75


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("null", [null for null in NULLS if null != "innovation_shuffle"])  # the test brings that along
def test_turns_of_some_units_are_those_that_the_test_counts(null, shared):
    a, units = random_walks(S, 40, 3.0, seed=4), [33, 2, 7]
    a[:, 7] = 1.0  # does not move
    found, tested = (
        surrogate_turns(a, null, units, 33, seed=2, shared=shared),
        rotation_test(a, null, 33, 2, shared=shared),
    )
    assert found.shape == (33, 3) and float(found[:, 2].abs().max()) == 0
    np.testing.assert_allclose(found[:, :2].double().mean(0), tested.null_mean[units[:2]], atol=1e-6)
    np.testing.assert_allclose(found[:, :2].double().std(0), tested.null_std[units[:2]], atol=1e-6)
