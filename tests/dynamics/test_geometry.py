"""Cosine, speed and norm on systems with exact answers, and against torch, scipy and numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from systems import contraction, norm_growth, rotation

from rsdyn.dynamics import geometry
from rsdyn.dynamics.geometry import cosine, norm, relative_speed, speed

MEASURES = (cosine, speed, norm, relative_speed)


@pytest.fixture
def x():
    return torch.randn(7, 5, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1) * 3


def test_norm_growth():
    h = norm_growth(9, 6, 20, factor=1.3)
    np.testing.assert_allclose(cosine(h).numpy(), 1, rtol=1e-12)
    np.testing.assert_allclose(speed(h).numpy(), 0.3 * h[:, :-1].norm(dim=-1).numpy(), rtol=1e-12)
    np.testing.assert_allclose((norm(h)[:, 1:] / norm(h)[:, :-1]).numpy(), 1.3, rtol=1e-12)


@pytest.mark.parametrize("angle", [1e-3, 0.3, 2.0, math.pi])
def test_rotation(angle):
    h, _ = rotation(9, 6, 20, angle)
    size = h.norm(dim=-1).numpy()
    np.testing.assert_allclose(cosine(h).numpy(), math.cos(angle), atol=1e-12)
    np.testing.assert_allclose(speed(h).numpy(), 2 * math.sin(angle / 2) * size[:, 1:], rtol=1e-9)
    np.testing.assert_allclose(norm(h).numpy(), size, rtol=1e-12)


def test_contraction():
    h, point = contraction(9, 6, 20, rate=0.7)
    v = speed(h)
    np.testing.assert_allclose((v[:, 1:] / v[:, :-1]).numpy(), 0.7, rtol=1e-12)
    np.testing.assert_allclose(v.numpy(), 0.3 * (h - point)[:, :-1].norm(dim=-1).numpy(), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1 << 19, 5 * 33, 2 * 5 * 33 + 1, 1])
def test_like_torch_scipy_and_numpy(x, chunk, monkeypatch):
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", chunk)
    a = x.numpy()
    by_scipy = [[1 - distance.cosine(row[s], row[s + 1]) for s in range(4)] for row in a]
    np.testing.assert_allclose(cosine(x).numpy(), by_scipy, rtol=1e-12)
    np.testing.assert_allclose(cosine(x), torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1))
    np.testing.assert_allclose(speed(x).numpy(), np.linalg.norm(np.diff(a, axis=1), axis=-1), rtol=1e-12)
    np.testing.assert_allclose(norm(x).numpy(), np.linalg.norm(a, axis=-1), rtol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(x, measure, dtype):
    stored = x.to(dtype)
    found = measure(stored)
    assert found.dtype == torch.float32 and measure(x).dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), measure(stored.double()).numpy(), rtol=2e-6, atol=1e-6)


def test_subtract_first_where_the_expanded_square_fails():
    """Steps of a hundred-thousandth of the norm, in float32; the oracle is numpy in float64."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(20, 1, 4096, generator=generator) * 10
    x = torch.cat([h, h + 3e-4 * torch.randn(20, 1, 4096, generator=generator)], dim=1)
    expected = np.linalg.norm(np.diff(x.double().numpy(), axis=1), axis=-1)
    np.testing.assert_allclose(speed(x).numpy(), expected, rtol=1e-6)
    a, b = x[:, 0], x[:, 1]
    expanded = ((a * a).sum(1) + (b * b).sum(1) - 2 * (a * b).sum(1)).clamp(min=0).sqrt()
    assert np.abs(expanded.numpy() / expected[:, 0] - 1).max() > 0.01


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mask_of_units(x, measure, dtype):
    x = x.to(dtype)
    units = torch.arange(33) % 3 > 0
    expected = measure(x[..., units].contiguous())
    x[..., ~units] = torch.tensor([torch.nan, torch.inf, 1e20]).repeat(4)[:11].to(dtype)
    before = x.clone()
    np.testing.assert_allclose(measure(x, units).numpy(), expected.numpy(), rtol=2e-6)
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    np.testing.assert_array_equal(measure(expected[..., None], torch.tensor([True])), measure(expected[..., None]))


def test_one_massive_unit_hides_everything_else(x):
    x[..., 4] = 1e4
    assert (cosine(x) > 0.999).all()
    units = torch.arange(33) != 4
    np.testing.assert_allclose(cosine(x, units).numpy(), cosine(x[..., units]).numpy(), rtol=1e-12)
    assert (cosine(x, units) < 0.99).any()


def test_zero_and_non_finite_vectors(x):
    x[2, 3] = 0
    x[4, 0, 7] = torch.nan
    found = cosine(x)
    assert found.isnan().nonzero().tolist() == [[2, 2], [2, 3], [4, 0]]
    assert speed(x).isnan().nonzero().tolist() == [[4, 0]] and norm(x).isnan().nonzero().tolist() == [[4, 0]]
    assert float(norm(x)[2, 3]) == 0
    np.testing.assert_allclose(speed(x)[2, 2:].numpy(), [x[2, 2].norm(), x[2, 4].norm()])
    ray = torch.randn(500, 1, 33, generator=torch.Generator().manual_seed(2))
    assert float(cosine(torch.cat([ray, ray * 3, ray / -7], dim=1)).abs().max()) == 1  # never past it, by rounding


def test_scale_changes_speed_and_norm_only(x):
    for c in (1e-6, 1e6):
        np.testing.assert_allclose(cosine((c * x).float()).numpy(), cosine(x).numpy(), atol=1e-6)
        np.testing.assert_allclose(speed(c * x).numpy(), c * speed(x).numpy(), rtol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("inference", [False, True])
def test_same_bits_for_one_thread_and_two(x, measure, inference, monkeypatch):
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 2 * 5 * 33)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                found.append(measure(x.bfloat16(), torch.arange(33) != 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_shapes_and_bad_input(x):
    assert [m(x[:0]).shape for m in MEASURES] == [(0, 4), (0, 4), (0, 5), (0, 4)]
    assert norm(x[:, :1]).shape == (7, 1)
    for measure in (cosine, speed):
        with pytest.raises(ValueError, match=r"1 sublayers: at least 2.*record more"):
            measure(x[:, :1])
    for measure in MEASURES:
        with pytest.raises(ValueError, match=r"shape \(7, 5\).*\(N, S, D\)"):
            measure(x[..., 0])
        with pytest.raises(ValueError, match=r"torch.float32 and shape \(33,\).*boolean mask of shape \(33,\)"):
            measure(x, torch.ones(33))
        with pytest.raises(ValueError, match=r"shape \(32,\).*boolean mask of shape \(33,\)"):
            measure(x, torch.ones(32, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"none of 33 is left.*mark at least one"):
            measure(x, torch.zeros(33, dtype=torch.bool))
        with pytest.raises(ValueError, match="none of 0 is left"):
            measure(x[..., :0])


def test_relative_speed_is_the_step_over_the_norm(x):
    expected = np.linalg.norm(np.diff(x.numpy(), axis=1), axis=-1) / np.linalg.norm(x[:, :-1].numpy(), axis=-1)
    np.testing.assert_allclose(relative_speed(x).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(relative_speed(norm_growth(9, 6, 20, factor=1.3)).numpy(), 0.3, rtol=1e-12)
    x[2, 1] = 0
    assert relative_speed(x).isnan().nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_curves_without_the_largest_units_are_those_of_the_others(x, dtype):
    x[..., 20] *= 1e4  # beside it the others are lost in a sum that is taken apart again
    order, counts = torch.tensor([20, 3, 7, 11, 30]), [0, 1, 5, 2]
    found = geometry.curves_without_largest(x.to(dtype), order, counts)
    exact = dtype == torch.float64
    for i, count in enumerate(counts):
        stays = torch.ones(33, dtype=torch.bool)
        stays[order[:count]] = False
        for name, measure in geometry.Curves(cosine, speed, relative_speed, norm)._asdict().items():
            expected = measure(x, stays).numpy()
            got = getattr(found, name)[i].numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-11 if exact else 2e-5, atol=0 if exact else 1e-6)


def test_curves_leave_out_what_does_not_count_at_all(x):
    x[3, :, 5] = torch.nan
    usable = torch.ones(33, dtype=torch.bool)
    usable[5] = False
    found = geometry.curves_without_largest(x, torch.tensor([8]), [0, 1], usable)
    np.testing.assert_allclose(found.speed[0].numpy(), speed(x, usable).numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"counts=\[2\]"):
        geometry.curves_without_largest(x, torch.tensor([8]), [2])


# -- curvature, straightness (METHOD section 14) -----------------------------------------------------------------------


def test_curvature_of_independent_steps_is_a_right_angle():
    walk = torch.randn(400, 30, 500, generator=torch.Generator().manual_seed(1)).cumsum(1)
    found = geometry.curvature(walk)
    assert found.shape == (400, 28)
    assert float(found.mean()) == pytest.approx(math.pi / 2, abs=0.01)


@pytest.mark.parametrize("angle", [1e-4, 0.3, 2.0, 3.1415])
def test_curvature_of_a_circle_is_the_angle_of_its_steps(angle):
    turn = torch.arange(12, dtype=torch.float64) * angle
    circle = torch.stack([turn.cos(), turn.sin(), torch.zeros_like(turn)], -1)[None]
    np.testing.assert_allclose(geometry.curvature(circle).numpy(), angle, rtol=1e-7)
    chord, step = (circle[0, -1] - circle[0, 0]).norm(), 2 * math.sin(angle / 2)
    np.testing.assert_allclose(geometry.straightness(circle).numpy(), float(chord) / (11 * step), rtol=1e-9)


def test_curvature_does_not_depend_on_basis_scale_or_place(x):
    q, _ = torch.linalg.qr(torch.randn(33, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(geometry.curvature(x @ q), geometry.curvature(x))
    torch.testing.assert_close(geometry.curvature(1e6 * x - 3), geometry.curvature(x))
    torch.testing.assert_close(geometry.curvature(x.flip(1)).flip(1), geometry.curvature(x))
    torch.testing.assert_close(geometry.straightness(x @ q), geometry.straightness(x))


def test_curvature_against_numpy(x):
    steps = np.diff(x.numpy(), axis=1)
    unit = steps / np.linalg.norm(steps, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        geometry.curvature(x).numpy(), np.arccos((unit[:, 1:] * unit[:, :-1]).sum(-1)), rtol=1e-9
    )
    length = np.linalg.norm(steps, axis=-1)
    ends = np.linalg.norm(x[:, -1].numpy() - x[:, 0].numpy(), axis=-1)
    np.testing.assert_allclose(geometry.path_length(x).numpy(), length.sum(1), rtol=1e-12)
    np.testing.assert_allclose(geometry.straightness(x).numpy(), ends / length.sum(1), rtol=1e-12)


def test_straightness_of_lines_walks_and_what_stands_still():
    line = torch.arange(6.0)[None, :, None] ** 2 * torch.ones(3, 6, 4)  # in a line, faster and faster
    torch.testing.assert_close(geometry.straightness(line), torch.ones(3))
    assert (geometry.curvature(line) < 1e-3).all()
    walk = torch.randn(300, 26, 400, generator=torch.Generator().manual_seed(3)).cumsum(1)
    assert float(geometry.straightness(walk).mean()) == pytest.approx(1 / 5, abs=0.01)
    still = torch.ones(2, 5, 3)
    assert geometry.straightness(still).isnan().all() and geometry.curvature(still).isnan().all()


def test_scaled_steps_count_alike():
    steps = torch.randn(200, 25, 300, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    growth = torch.logspace(0, 2, 25, dtype=torch.float64)
    h = torch.cat([torch.zeros(200, 1, 300, dtype=torch.float64), (steps * growth[:, None]).cumsum(1)], 1)
    plain = torch.cat([torch.zeros(200, 1, 300, dtype=torch.float64), steps.cumsum(1)], 1)
    torch.testing.assert_close(geometry.straightness(h, scale=growth), geometry.straightness(plain))
    assert float(geometry.straightness(h).mean()) > 1.3 * float(geometry.straightness(plain).mean())
    with pytest.raises(ValueError, match="one per step"):
        geometry.straightness(h, scale=growth[1:])


@pytest.mark.parametrize("measure", [geometry.curvature, geometry.straightness, geometry.path_length])
def test_shapes_that_have_none_are_refused(measure):
    with pytest.raises(ValueError, match=r"give \(N, S, D\)"):
        measure(torch.randn(4, 5))
    with pytest.raises(ValueError, match="sublayers"):
        measure(torch.randn(4, 2 if measure is geometry.curvature else 1, 5))


def test_steps_too_long_for_their_square_have_no_angle(x):
    """In float32 the square of 1e25 is infinite: no angle, where one of 0 would be told of any path."""
    found = geometry.curvature((x * 1e25).float())
    assert found.isnan().all()
    np.testing.assert_allclose(geometry.curvature(x * 1e25).numpy(), geometry.curvature(x).numpy(), rtol=1e-9)


@pytest.mark.parametrize("measure", [geometry.curvature, geometry.straightness, geometry.path_length, cosine])
def test_whole_numbers_one_sequence_and_what_is_being_trained(measure, x):
    whole = (100 * x).round()
    np.testing.assert_allclose(measure(whole.long()).numpy(), measure(whole).numpy(), rtol=1e-5)
    np.testing.assert_allclose(measure(x[:1]).numpy(), measure(x)[:1].numpy())
    assert not measure(x.clone().requires_grad_()).requires_grad
