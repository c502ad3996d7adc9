"""Rotations against ``np.gradient``, ``np.arctan2`` and ``np.unwrap``, against circles, and as METHOD measured them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from systems import orbits, random_walks

from rsdyn.dynamics.rotation import portrait, rotations, sequence_rotations, turns, zero_tangents

S = 64


def angles(a: torch.Tensor) -> np.ndarray:
    a = a.to(torch.float64).numpy()
    x, y = a - a[:1], np.gradient(a, axis=0)
    return np.arctan2(np.diff(y - y[:1], axis=0), np.diff(x, axis=0))


def literal(a: torch.Tensor) -> np.ndarray:
    """The paper's formulas, in numpy."""
    unwrapped = np.unwrap(angles(a), axis=0)
    return (unwrapped[-1] - unwrapped[0]) / (2 * np.pi)


def on_a_grid(a: torch.Tensor) -> np.ndarray:
    """The same with half turns exact: angles in units of pi, less the last bits that ``arctan2`` rounds."""
    unwrapped = np.unwrap(np.round(angles(a) / np.pi * 2**40) / 2**40, axis=0, period=2.0)
    return (unwrapped[-1] - unwrapped[0]) / 2


def lattice(u: int, high: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: most steps stand still, turn by exactly half a circle, or run along an axis."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, (S, u))).to(torch.float64)


@pytest.mark.parametrize(
    "a",
    [
        random_walks(S, 500),
        torch.randn(S, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        orbits(S, 500, 8, 0.1),
        torch.exp(random_walks(S, 500)),
    ],
    ids=["walk", "white", "orbit", "heavy"],
)
def test_against_numpy(a):
    np.testing.assert_allclose(rotations(a).numpy(), literal(a), atol=1e-12)
    np.testing.assert_allclose(rotations(a.float()).numpy(), literal(a.float()), atol=1e-12)
    found = portrait(a.float())
    x, y = a.float().double().numpy(), np.gradient(a.float().double().numpy(), axis=0)
    np.testing.assert_array_equal(found.x.numpy(), x - x[0])
    np.testing.assert_array_equal(found.y.numpy(), y - y[0])


@pytest.mark.parametrize(
    "a",
    [
        *(random_walks(S, 3000, seed=3).add(mean).bfloat16() for mean in (0, 1, 100, 1000)),
        *(lattice(3000, high) for high in (2, 3, 8)),
        -lattice(3000, 3),
        lattice(3000, 3) * 1e-20,
    ],
    ids=["bf16", "bf16+1", "bf16+100", "bf16+1000", "bits", "trits", "eight", "negative", "tiny"],
)
def test_half_turns_and_standstills_as_np_unwrap_decides(a):
    np.testing.assert_allclose(rotations(a).numpy(), on_a_grid(a), atol=1e-10)
    np.testing.assert_allclose(sequence_rotations(a.float()[None])[0].numpy(), on_a_grid(a.float()), atol=1e-5)


def test_numpy_itself_is_a_turn_off_where_arctan2_rounds_across_pi():
    """Why the kernel does not unwrap rounded angles. Should numpy mend this, ``rotations`` may say so."""
    a = random_walks(S, 5000, seed=1).add(100).bfloat16()
    off = literal(a) - rotations(a).numpy()
    np.testing.assert_allclose(off, off.round(), atol=1e-9)
    assert 0 < (off.round() != 0).mean() < 0.05


@pytest.mark.parametrize(("period", "phase"), [(12, 0.0), (20, 0.4), (6, 2.0), (60, -1.0)])
def test_a_sampled_circle(period, phase):
    """a_s = cos(w s + p): inside, tangents run clockwise round an ellipse, one turn a period; the ends are one-sided.

    With psi = w (s + 1/2) + p the step is -2 sin(w/2) sin(psi) and the gradient's -2 sin(w/2) sin(w) cos(psi).
    """
    w = 2 * math.pi / period
    a = (w * torch.arange(S, dtype=torch.float64) + phase).cos()[:, None]
    step = [-2 * math.sin(w / 2) * math.sin(w * (s + 0.5) + phase) for s in range(S - 1)]
    inner = [-2 * math.sin(w / 2) * math.sin(w) * math.cos(w * (s + 0.5) + phase) for s in range(S - 1)]

    def turn(x0, y0, x1, y1):  # between -1/2 and 1/2
        return math.atan2(x0 * y1 - y0 * x1, x0 * x1 + y0 * y1) / (2 * math.pi)

    first = turn(step[0], (step[1] - step[0]) / 2, step[1], inner[1])
    last = turn(step[-2], inner[-2], step[-1], (step[-1] - step[-2]) / 2)
    np.testing.assert_allclose(float(rotations(a)), first - (S - 4) / period + last, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 30, 250])
@pytest.mark.parametrize("start", [0.0, 1.0, math.pi, -2.0])
def test_counter_clockwise_is_positive(count, start):
    angle = start + 2 * math.pi * count * torch.linspace(0, 1, max(S, 3 * count), dtype=torch.float64)
    np.testing.assert_allclose(float(turns(angle.cos(), angle.sin())), count, atol=1e-12)
    np.testing.assert_allclose(float(turns(angle.cos(), -angle.sin())), -count, atol=1e-12)


def test_zigzag_turns_half_a_circle_to_and_fro():
    """Steps +, -, +, ... along the axis: angles 0, pi, 0, ... whose differences, all of size pi, cancel."""
    a = torch.tensor([0.0, 1.0]).repeat(S // 2)[:, None]
    np.testing.assert_allclose(rotations(a).numpy(), on_a_grid(a), atol=1e-12)
    assert abs(float(rotations(a))) < 1


def test_minus_zero_is_zero():
    """-0.0 - 0.0 is -0.0, and arctan2(0, -0.0) is pi, so a unit that stands still would turn half a circle."""
    plain = torch.tensor([0.0, 0, 0, 1, 2, 0, 0, 0])[:, None]
    signed = torch.tensor([0.0, -0.0, -0.0, 1, 2, 0, 0, -0.0])[:, None]
    assert float(rotations(signed)) == float(rotations(plain))
    assert float(rotations(signed.flip(0))) == float(rotations(plain.flip(0)))
    assert float(zero_tangents(signed)) == float(zero_tangents(plain)) == 2 / 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_invariances(dtype):
    a = random_walks(S, 300, seed=2).to(dtype)
    expected = rotations(a)
    # an exact half turn goes the other way in the mirror, so bf16 walks, which have some, are only scaled
    mirrored = () if dtype == torch.bfloat16 else (a.flip(0), -a)
    for other in (*mirrored, a * 0.25, a * 2.0**-100, a * 2.0**60):
        torch.testing.assert_close(rotations(other), expected, atol=1e-10, rtol=0)
    if dtype == torch.float64:  # whatever would round a narrower type
        for other in (3 * a + 7, 1e-300 * a, 1e200 * a, 5 - a):
            torch.testing.assert_close(rotations(other), expected, atol=1e-9, rtol=0)


def test_as_method_measured():
    """METHOD section 7: |R| measures jaggedness, and an orbit has less of it than a random walk."""
    walk = rotations(random_walks(S, 4000))
    assert float(-walk.mean()) == pytest.approx(10.95, abs=0.1)
    assert float(walk.std()) == pytest.approx(1.7, abs=0.1)
    white = torch.randn(S, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(-rotations(white).mean()) == pytest.approx(14.9, abs=0.1)
    assert float(-rotations(orbits(S, 1000, 8)).mean()) == pytest.approx(7.7, abs=0.1)


def test_zero_tangents():
    a = random_walks(S, 2000).add(1000).bfloat16()
    x, y = a.double().numpy(), np.gradient(a.double().numpy(), axis=0)
    expected = ((np.diff(x, axis=0) == 0) & (np.diff(y, axis=0) == 0)).mean(0)
    np.testing.assert_allclose(zero_tangents(a).numpy(), expected, rtol=1e-12)
    assert float(zero_tangents(a).mean()) > 0.5
    assert float(zero_tangents(random_walks(S, 2000)).max()) == 0


def test_bf16_freezes_steps_at_mean_100():
    """Numbers between 64 and 128 lie 0.5 apart: a step of size d stands still with probability 1 - 2 |d|, if below 0.5.

    At a standard deviation of 0.37 that freezes the 47 % of METHOD; few of those tangents are zero, since their
    gradient still changes.
    """
    sd = 0.37
    a = random_walks(S, 3000, sd).add(100).bfloat16()
    c = 0.5 / sd
    expected = 2 * (norm.cdf(c) - 0.5 - (norm.pdf(0) - norm.pdf(c)) / c)
    assert expected == pytest.approx(0.47, abs=0.005)
    assert float((a.diff(dim=0) == 0).double().mean()) == pytest.approx(expected, abs=0.01)
    assert 0.05 < float(zero_tangents(a).mean()) < expected


def test_nan_and_constant_units_keep_to_themselves():
    a = random_walks(S, 6)
    expected = rotations(a)
    a[10, 1], a[0, 2], a[63, 3] = math.nan, math.inf, -math.inf
    a[:, 4] = 0.1
    for found in (rotations(a), sequence_rotations(a[None])[0].double()):
        assert found.isnan().tolist() == [False, True, True, True, False, False]
        torch.testing.assert_close(found[[0, 5]], expected[[0, 5]], atol=1e-6, rtol=0)
        assert float(found[4]) == 0
    zero = zero_tangents(a)
    assert zero.isnan().tolist() == [False, True, True, True, False, False] and float(zero[4]) == 1


def test_shapes():
    a = random_walks(S, 24).reshape(S, 2, 3, 4).permute(1, 2, 0, 3)
    expected = literal(a.permute(2, 0, 1, 3).reshape(S, 24)).reshape(2, 3, 4)
    np.testing.assert_allclose(rotations(a).numpy(), expected, atol=1e-12)
    assert zero_tangents(a).shape == (2, 3, 4) and portrait(a).y.shape == a.shape
    three = random_walks(3, 50)
    np.testing.assert_allclose(rotations(three).numpy(), literal(three), atol=1e-12)
    assert rotations(three).abs().max() <= 0.5


@pytest.mark.parametrize("f", [rotations, portrait, zero_tangents, lambda a: sequence_rotations(a[None])])
def test_too_few_sublayers(f):
    with pytest.raises(ValueError, match="at least 3 sublayers"):
        f(torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3000), (50, 40), (0, 4)])
def test_each_sequence(dtype, shape):
    n, d = shape
    x = random_walks(S, n * d).reshape(S, n, d).movedim(1, 0).add(1).to(dtype)
    before = x.clone()
    found = sequence_rotations(x)
    assert found.dtype == torch.float32 and torch.equal(x, before)
    torch.testing.assert_close(found.double(), rotations(x), atol=1e-5, rtol=0)


def test_mean_over_sequences_is_not_the_rotations_of_the_mean():
    """METHOD section 7: they differ once increments are correlated. Here the mean is a smooth orbit, the rest noise."""
    x = torch.stack([orbits(S, 20, 16, seed=5) + random_walks(S, 20, 0.3, seed=i) for i in range(100)])
    each, of_mean = sequence_rotations(x).double().mean(0), rotations(x.mean(0))
    assert float((each - of_mean).mean()) < -2


def test_threads_leave_the_bits():
    x = random_walks(S, 20 * 500).reshape(S, 20, 500).movedim(1, 0).float()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(sequence_rotations(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), r"\(5, 3\) and y \(5, 4\)"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2 tangents"),
        (torch.zeros(()), torch.zeros(()), "at least 2 tangents"),
        (torch.zeros(5, 3), torch.zeros(5, 3).double(), "convert them"),
        (torch.zeros(5, 3).bfloat16(), torch.zeros(5, 3).bfloat16(), "x is torch.bfloat16"),
        (torch.zeros(5, 3).long(), torch.zeros(5, 3).long(), "x is torch.int64"),
    ],
)
def test_turns_says_what_it_takes(x, y, said):
    with pytest.raises(ValueError, match=said):
        turns(x, y)
