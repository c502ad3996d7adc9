"""Products of steps against the direct measures; the null models' calibration, and what they refuse."""

import math

import pytest
import torch

from rsdyn.dynamics import geometry
from rsdyn.dynamics.step_nulls import (
    curvature_of,
    curvature_test,
    path_length_of,
    step_products,
    step_sizes,
    straightness_of,
    straightness_test,
)

N, S, D = 20, 13, 64
SIZES = torch.logspace(0, 1.5, S - 1)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def path(steps):
    return torch.cat([torch.zeros(len(steps), 1, steps.shape[-1]), steps.cumsum(1)], 1)


def walk(generator):
    """Independent steps of sizes that grow 30 x."""
    return path(normal(generator, N, S - 1, D) * SIZES[:, None])


def turned(generator):
    """Steps that sequences largely share, each sublayer's turned by a rotation of its own."""
    steps = normal(generator, N, S - 1, D) * torch.linspace(3, 0.1, D) + 3 * normal(generator, 1, 1, D)
    for s in range(S - 1):
        q, r = torch.linalg.qr(normal(generator, D, D))
        steps[:, s] = steps[:, s] @ (q * r.diagonal().sign())  # uniform; q alone is not
    return path(steps * SIZES[:, None])


def exchangeable(generator):
    """Steps that share a direction over depth, in no order."""
    along = normal(generator, 1, S - 1, 1).abs() * normal(generator, 1, 1, D)
    return path(normal(generator, N, S - 1, D) + normal(generator, N, 1, D) + along)


@pytest.fixture
def x():
    return torch.randn(30, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1) * 3


@pytest.mark.parametrize("units", [None, torch.arange(24) % 3 > 0])
def test_products_give_the_direct_measures(x, units):
    products = step_products(x, units)
    torch.testing.assert_close(curvature_of(products), geometry.curvature(x, units))
    torch.testing.assert_close(straightness_of(products), geometry.straightness(x, units))
    torch.testing.assert_close(path_length_of(products), geometry.path_length(x, units))
    scale = geometry.speed(x, units).square().mean(0).sqrt()
    torch.testing.assert_close(step_sizes(products), scale)
    torch.testing.assert_close(straightness_of(products, scale), geometry.straightness(x, units, scale))


def test_products_of_shares_of_the_units_add_up(x):
    whole, parts = step_products(x), step_products(x[..., :10]) + step_products(x[..., 10:])
    for a, b in zip(whole, parts, strict=True):
        assert a == b if isinstance(a, int) else torch.allclose(a, b, rtol=1e-12)


MANY = pytest.mark.parametrize(("sets", "within"), [(300, 0.03), pytest.param(4000, 0.01, marks=pytest.mark.slow)])


@MANY
@pytest.mark.parametrize(
    ("make", "null"), [(walk, "random_walk"), (turned, "rotated_steps"), (exchangeable, "shuffled_steps")]
)
def test_each_null_of_curvature_is_calibrated_on_what_obeys_it(make, null, sets, within):
    """Of 300 data sets 5 % are rejected, with a Monte Carlo error of 1.3, of 4,000 of .34; z of spread 1."""
    generator = torch.Generator().manual_seed(1)
    found = [curvature_test(step_products(make(generator)), null, n=199, seed=seed) for seed in range(sets)]
    z = torch.tensor([test.z for test in found])
    assert sum(test.p < 0.05 for test in found) / sets == pytest.approx(0.05, abs=within)
    assert float(z.mean()) == pytest.approx(0, abs=0.2) and float(z.std()) == pytest.approx(1, abs=0.12)


@MANY
@pytest.mark.parametrize(("make", "null"), [(walk, "random_walk"), (turned, "rotated_steps")])
def test_each_null_of_straightness_is_calibrated(make, null, sets, within):
    generator = torch.Generator().manual_seed(2)
    found = [straightness_test(step_products(make(generator)), null) for _ in range(sets)]
    assert sum(test.p < 0.05 for test in found) / sets == pytest.approx(0.05, abs=within)
    assert float(torch.tensor([test.z for test in found]).std()) == pytest.approx(1, abs=0.15)


def test_what_sequences_share_is_mistaken_for_curvature_by_a_walk_and_not_by_rotations():
    generator = torch.Generator().manual_seed(3)
    products = [step_products(turned(generator)) for _ in range(40)]
    assert sum(curvature_test(p, "random_walk").p < 0.05 for p in products) > 12
    assert sum(curvature_test(p, "rotated_steps").p < 0.05 for p in products) < 8


@pytest.mark.parametrize("null", ["shuffled_steps", "rotated_steps", "random_walk"])
def test_a_path_that_bends_steadily_is_refused_by_each(null):
    turn = 0.4 * torch.arange(16.0)
    circle = torch.zeros(25, 16, 50)
    circle[..., 0], circle[..., 1] = 10 * turn.cos(), 10 * turn.sin()
    circle += 0.1 * torch.randn(25, 16, 50, generator=torch.Generator().manual_seed(4))
    test = curvature_test(step_products(circle), null, n=199)
    assert test.value < test.mean and test.p < 0.01


def test_attention_and_mlp_are_shuffled_apart():
    """Steps that go forth and back: in any order that keeps sites apart neighbours are opposed."""
    steps = torch.ones(10, 20, 30) * torch.tensor([1.0, -1.0]).repeat(10)[:, None]
    steps += 0.1 * torch.randn(10, 20, 30, generator=torch.Generator().manual_seed(5))
    products = step_products(path(steps))
    assert curvature_test(products, "shuffled_steps", sites_per_layer=2, n=99).mean > 2.9
    assert curvature_test(products, "shuffled_steps", sites_per_layer=1, n=99).mean < 2.0


def test_bases_and_scales_make_no_difference(x):
    q, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    for null in ("rotated_steps", "shuffled_steps"):
        test = curvature_test(step_products(x), null, n=99)
        assert curvature_test(step_products(1e3 * x @ q + 7), null, n=99) == pytest.approx(test, rel=1e-6)


def test_paths_that_stand_still_do_not_count(x):
    still = x.clone()
    still[3:6] = 1.0
    test = curvature_test(step_products(still), "rotated_steps")
    rest = [*range(3), *range(6, 30)]
    assert test.value == pytest.approx(curvature_test(step_products(x[rest]), "rotated_steps").value)
    assert math.isfinite(test.p)
    assert math.isnan(curvature_test(step_products(torch.ones(4, 5, 3)), "rotated_steps").p)
    assert math.isfinite(curvature_test(step_products(x[:1]), "rotated_steps").p)  # one sequence


def test_mistakes(x):
    with pytest.raises(ValueError, match="at least three sublayers"):
        step_products(x[:, :2])
    with pytest.raises(ValueError, match="does not change straightness"):
        straightness_test(step_products(x), "shuffled_steps")
    with pytest.raises(ValueError, match="one size per step"):
        straightness_of(step_products(x), torch.ones(3))
