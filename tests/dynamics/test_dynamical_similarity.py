"""Dynamical similarity: turned copies, rotations of known angle, the package's own answer, and nulls that hold."""

import math
import sys

import pytest
import torch

from rsdyn.dynamics.dynamical_similarity import (
    _optimised,
    at_unit_size,
    dsa,
    dsa_at_least,
    explained_of_steps,
    halves,
    linear_step,
    rank_of,
    steps_shuffled,
)
from rsdyn.errors import UserError

N, P = 200, 12


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(n, seed=0):
    return torch.linalg.qr(drawn(n, n, seed=seed))[0]


def rotation(*angles):
    """A block per angle, in radians."""
    blocks = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
    return torch.block_diag(*blocks).to(torch.float64)


def system(step, seed=0, noise=0.0, n=N):
    """``n`` trajectories of ``x -> step x``, from normal states on."""
    x = [drawn(n, len(step), seed=seed)]
    for p in range(P - 1):
        x.append(x[-1] @ step.T + noise * drawn(n, len(step), seed=1000 * (seed + 1) + p))
    return torch.stack(x, dim=1)


@pytest.fixture(scope="module", autouse=True)
def package():
    return pytest.importorskip("DSA", reason="dsa-metric is not installed: pip install -e '.[dsa]'")


def test_a_turned_scaled_and_shifted_copy_is_at_no_distance():
    x = system(0.95 * rotation(0.3, 0.7) + 0.05 * drawn(4, 4, seed=3), noise=0.2)
    copy = 7 * x @ turn(4) - 3
    step, other = linear_step(x), linear_step(copy)
    assert dsa(step, other) < 0.005
    assert float(dsa_at_least(step, other)) < 0.001
    assert dsa(step, step) < 0.005


@pytest.mark.parametrize("angle", [0.35, 0.5, 0.9])
def test_two_rotations_are_as_far_apart_as_their_angles(angle):
    """In the plane the best a rotation can do leaves the difference of the angles: a formula, not ours."""
    one, other = linear_step(system(rotation(0.3))), linear_step(system(turn(2) @ rotation(angle) @ turn(2).T, seed=1))
    # the sizes of the places are those of the sample, so steps are rotations to some per cent
    assert dsa(one, other) == pytest.approx(angle - 0.3, abs=0.02)
    exact = [rotation(a).float() for a in (0.3, angle)]
    assert dsa(*exact) == pytest.approx(angle - 0.3, abs=1e-3)
    assert float(dsa_at_least(*exact)) == pytest.approx(angle - 0.3, abs=1e-6)
    assert dsa(exact[0], exact[1].T) == pytest.approx(angle - 0.3, abs=1e-3)  # the other way round: a reflection


def test_frequencies_further_apart_are_further_apart():
    steps = [linear_step(system(0.97 * rotation(0.2, a), seed=k, noise=0.1)) for k, a in enumerate((0.4, 0.6, 1.2))]
    assert dsa(steps[0], steps[1]) < dsa(steps[0], steps[2])
    assert float(dsa_at_least(steps[0], steps[2])) > 0.1


@pytest.mark.parametrize("delays", [1, 2])
def test_it_is_what_the_package_says(package, delays):
    x, y = (system(0.9 * rotation(a, 0.5), seed=s, noise=0.3) for s, a in ((0, 0.2), (1, 0.6)))
    steps = [linear_step(of, delays=delays) for of in (x, y)]
    mine = _optimised(*steps, seed=5, iterations=150, rate=0.01)
    torch.manual_seed(5)
    theirs = package.DSA(
        at_unit_size(x).float(), at_unit_size(y).float(), n_delays=delays, lamb=0.0, score_method="angular", iters=150,
        lr=0.01,
    ).fit_score()  # fmt: skip
    assert mine == pytest.approx(float(theirs), abs=1e-5)
    assert float(dsa_at_least(*steps)) - 1e-4 <= dsa(*steps, seed=5, iterations=150, rate=0.01) <= mine


def test_directions_that_are_turned_round_are_found():
    """The package alone ends at .03 for this copy, whose directions have other signs."""
    step = linear_step(system(0.95 * rotation(0.3, 0.7) + 0.05 * drawn(4, 4, seed=3), noise=0.2))
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert dsa(step, signs[:, None] * step * signs) < 1e-3


def test_no_rotation_goes_below_the_bound():
    a, b = drawn(3, 3), drawn(3, 3, seed=1)
    cosines = []
    for seed in range(2000):
        q = turn(3, seed=seed)
        cosines.append(float((a * (q @ b @ q.T)).sum() / (a.norm() * b.norm())))
    nearest, least = math.acos(max(cosines)), float(dsa_at_least(a, b))
    assert least <= nearest
    assert least <= dsa(a.float(), b.float()) + 1e-3 <= nearest + 0.02


def test_of_symmetric_steps_the_bound_is_the_distance():
    a, b = (m + m.T for m in (drawn(5, 5), drawn(5, 5, seed=1)))
    found = [torch.linalg.eigvalsh(m) for m in (a, b)]
    exact = math.acos(float((found[0] * found[1]).sum() / (found[0].norm() * found[1].norm())))
    assert float(dsa_at_least(a, b)) == pytest.approx(exact, abs=1e-9)
    assert dsa(a.float(), b.float(), iterations=1000) == pytest.approx(exact, abs=0.02)


def test_the_bound_takes_many_steps_at_once():
    a, b = drawn(4, 4), drawn(6, 4, 4, seed=1)
    expected = torch.stack([dsa_at_least(a, one) for one in b])
    torch.testing.assert_close(dsa_at_least(a, b), expected)


def test_the_distance_does_not_depend_on_the_random_start_nor_touch_it():
    steps = [linear_step(system(0.9 * rotation(0.3, a), noise=0.3, seed=k)) for k, a in enumerate((0.4, 0.9))]
    state, kept = torch.random.get_rng_state(), [step.clone() for step in steps]
    found = [dsa(*steps, seed=seed) for seed in range(4)]
    assert max(found) - min(found) < 0.002
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(steps, kept, strict=True))


def test_steps_in_another_order_keep_their_sizes_and_their_directions():
    x = drawn(30, 7, 4).cumsum(1) * torch.linspace(1, 20, 7, dtype=torch.float64)[:, None]
    (other,) = steps_shuffled(x, 1, seed=3)
    centred = [(y - y.mean(0)).diff(dim=1) for y in (x, other)]
    sizes = [y.square().mean((0, 2)).sqrt() for y in centred]
    torch.testing.assert_close(sizes[0], sizes[1])
    directions = [y / s[:, None] for y, s in zip(centred, sizes, strict=True)]
    came_from = [
        next(k for k in range(6) if torch.allclose(directions[1][:, p], directions[0][:, k])) for p in range(6)
    ]
    assert sorted(came_from) == list(range(6)) and came_from != list(range(6))
    torch.testing.assert_close(other[:, 0], x[:, 0])


def test_planted_dynamics_are_nearer_than_their_steps_in_another_order():
    x = system(rotation(0.5, 0.9), noise=0.1)
    mine, copy = linear_step(x), linear_step(system(turn(4) @ rotation(0.5, 0.9) @ turn(4).T, seed=4, noise=0.1))
    shuffled = torch.stack([linear_step(y) for y in steps_shuffled(x, 39)])
    assert (dsa_at_least(copy, shuffled) > 2 * dsa(mine, copy)).all()


def test_depth_in_another_order_is_far_away():
    x = system(0.97 * rotation(0.3, 0.5), noise=0.1)
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    assert float(dsa_at_least(linear_step(x), linear_step(x[:, order]))) > 0.3


def test_running_sums_without_order_are_as_near_as_their_steps_in_another_order():
    """Walks whose steps have nothing to do with each other: 5 % are called nearer, and so p may be believed."""
    growth, rejected = torch.linspace(1, 6, P, dtype=torch.float64)[:, None], 0
    for k in range(40):
        a, b = ((drawn(60, P, 3, seed=2 * k + i) * growth).cumsum(1) for i in (0, 1))
        mine, other = linear_step(a), linear_step(b)
        null = dsa_at_least(mine, torch.stack([linear_step(y) for y in steps_shuffled(b, 39, seed=k)]))
        rejected += (1 + int((null <= dsa_at_least(mine, other)).sum())) / 40 <= 0.05
    assert rejected <= 6  # of 40 at 5 %: more comes by chance once in 300 times


def test_halves_are_of_whole_clusters():
    cluster = torch.arange(60) // 7
    cuts = halves(cluster, 20)
    assert cuts.shape == (20, 60) and len({tuple(row.tolist()) for row in cuts}) > 10
    for row in cuts:
        assert all(len(row[cluster == c].unique()) == 1 for c in cluster.unique())
        assert 20 <= int(row.sum()) <= 40
    alone = halves(torch.zeros(11, dtype=torch.int64), 3)
    assert all(5 <= int(row.sum()) <= 6 for row in alone)
    lopsided = halves(torch.tensor([0] * 50 + [1] * 3), 10)
    assert all(0 < int(row.sum()) < 53 for row in lopsided)


def test_a_linear_system_is_predicted_and_a_walk_is_not():
    half = torch.arange(N) < N // 2
    assert explained_of_steps(system(rotation(0.4, 0.8)), half) > 0.97
    assert abs(explained_of_steps(drawn(N, P, 4).cumsum(1), half)) < 0.15
    # a walk at unit size is drawn back a little, which is what is predicted; white noise is by half
    assert explained_of_steps(drawn(N, P, 4), half) == pytest.approx(0.5, abs=0.02)


def test_what_has_no_dynamics_is_refused():
    x = system(rotation(0.4, 0.8))
    constant = x.clone()
    constant[:, 3] = constant[0, 3]
    assert rank_of(x) == 4 and rank_of(constant) == 0
    with pytest.raises(ValueError, match="states fill 0 of 4 dimensions"):
        linear_step(constant)
    flat = x.clone()
    flat[..., 3] = flat[..., 0]
    with pytest.raises(ValueError, match="states fill 3 of 4 dimensions: keep that many"):
        linear_step(flat)
    with pytest.raises(ValueError, match="delays=4: 5 places are too few, since two steps of 4 states need 6"):
        linear_step(x[:, :5], delays=4)
    with pytest.raises(ValueError, match=r"states of shape \(12, 4\): give \(N, P, D\)"):
        linear_step(x[0])
    with pytest.raises(ValueError, match="they must be equal"):
        dsa(linear_step(x), torch.eye(3))


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "DSA", None)
    with pytest.raises(UserError, match="needs the package dsa-metric: pip install dsa-metric"):
        linear_step(system(rotation(0.4)))
