"""Fisher's g: the periodogram it comes from, its exact distribution, and the orbits that turns cannot tell."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import periodogram
from scipy.special import comb
from scipy.stats import kstest
from systems import random_walks

from rsdyn.dynamics.regularity import fisher_g, regularity
from rsdyn.dynamics.rotation_test import join, regularity_test, rotation_and_regularity_test, rotation_test

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from calibration import SIZES, walks


def noise(t, u, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((t, u)))


@pytest.mark.parametrize("length", [5, 6, 59, 60, 64])
def test_is_the_largest_share_of_scipys_periodogram(length):
    x = noise(length, 7)
    power = periodogram(x.numpy(), axis=0, detrend="constant")[1][1 : (length - 1) // 2 + 1]
    np.testing.assert_allclose(fisher_g(x), power.max(0) / power.sum(0), rtol=1e-10)
    np.testing.assert_allclose(fisher_g(x.float()), power.max(0) / power.sum(0), rtol=1e-4)
    assert fisher_g(x.view(length, 7, 1)).shape == (7, 1)


def test_has_fishers_distribution_under_white_noise():
    """P(g > x) = sum_k (-1)^(k - 1) C(m, k) (1 - k x)^(m - 1) over k with k x < 1 (Fisher 1929)."""
    m = 29

    def cdf(x):
        k = np.arange(1, m + 1)
        rest = np.clip(1 - k * np.asarray(x)[..., None], 0, 1) ** (m - 1)
        return 1 - ((-1.0) ** (k - 1) * comb(m, k) * rest).sum(-1)

    assert kstest(fisher_g(noise(59, 4000)).numpy(), cdf).pvalue > 1e-3


def test_is_one_for_a_sinusoid_and_undefined_for_what_never_moves():
    at = torch.arange(60, dtype=torch.float64)[:, None]
    x = torch.cat([torch.cos(2 * math.pi * at / 6 + 1), torch.full_like(at, 0.3), 0 * at], dim=1)
    found = fisher_g(x)
    assert float(found[0]) == pytest.approx(1)
    assert found[1:].isnan().all()
    with pytest.raises(ValueError, match="at least 5 steps"):
        fisher_g(x[:4])


def test_does_not_change_with_units_of_measure_or_sizes_of_places():
    a = walks(0, 80)
    found = regularity(a)
    torch.testing.assert_close(regularity(-1e6 * a + 3), found)
    sized = torch.cat([torch.zeros(1, 80), (a.diff(dim=0) / torch.from_numpy(SIZES)[:, None]).cumsum(0)])
    torch.testing.assert_close(regularity(sized), found, rtol=0.05, atol=0.02)
    a[3, 5] = math.nan
    a[:, 6] = 2.0
    again = regularity(a)
    assert again.isnan().nonzero().flatten().tolist() == [5, 6]
    some = regularity(a[:, :10], a)
    torch.testing.assert_close(some, again[:10], equal_nan=True)


@pytest.mark.parametrize("null", ["increment_shuffle_scaled", "innovation_shuffle"])
def test_false_alarms_are_rare(null):
    shares = [
        float((regularity_test(walks(seed, 160), null, 99, seed, shared=True).p <= 0.05).double().mean())
        for seed in range(6)
    ]
    assert 0.02 < np.mean(shares) < 0.07


def test_sees_orbits_that_turns_cannot():
    """Of period 6, amplitude 2: METHOD section 0.4 says power 1 against 0 to 6 %."""
    phase = 2 * math.pi * torch.rand(200, generator=torch.Generator().manual_seed(0))
    steps = noise(59, 200) + 2 * torch.cos(2 * math.pi / 6 * torch.arange(59)[:, None] + phase)
    a = torch.cat([torch.zeros(1, 200), steps.cumsum(0)])
    null = "increment_shuffle_scaled"
    assert float((regularity_test(a, null, 99).p <= 0.05).double().mean()) > 0.95
    assert float((rotation_test(a, null, 99).p <= 0.05).double().mean()) < 0.15
    together = regularity_test(a, null, 99, shared=True)
    assert together.population_p == pytest.approx(0.01)
    assert float(together.delta.mean()) > 0.2 and (together.p_normal <= 1).all()


def test_parts_join_to_the_whole():
    a = random_walks(20, 90)
    options = {"null": "increment_shuffle_scaled", "n": 20, "shared": True, "of_all": a}
    whole = regularity_test(a, **options)
    joined = join([regularity_test(a[:, :33], **options), regularity_test(a[:, 33:], first_unit=33, **options)])
    torch.testing.assert_close(joined.p, whole.p)
    torch.testing.assert_close(joined.population, whole.population)
    assert joined.population_p == whole.population_p


@pytest.mark.parametrize("null", ["innovation_shuffle", "increment_shuffle_scaled"])
def test_both_tests_at_once_are_each_of_them(null):
    a = torch.cat([random_walks(24, 60), torch.ones(24, 1)], dim=1)  # the last one does not move
    options = {"shared": True, "of_all": a[:, :60]}
    turns, g = rotation_and_regularity_test(a, null, 79, seed=4, **options)
    for found, alone in (
        (turns, rotation_test(a, null, 79, seed=4, **options)),
        (g, regularity_test(a, null, 79, seed=4, **options)),
    ):
        assert type(found) is type(alone)
        for mine, its in zip(found[3:], alone[3:], strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)
    assert turns.p[60].isnan() and g.p[60].isnan()


@pytest.mark.parametrize("shared", [True, False])
def test_the_example_is_the_first_surrogate(shared):
    a = random_walks(24, 60)
    one = rotation_test(a, "increment_shuffle_scaled", 1, shared=shared)
    torch.testing.assert_close(rotation_test(a, "increment_shuffle_scaled", 30, shared=shared).example, one.null_mean)
