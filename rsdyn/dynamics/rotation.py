"""How often a unit's trajectory turns in the plane of its activation and that activation's gradient over depth.

The number of rotations ``R`` sums the wrapped turns of the tangent (paper 2.6, METHOD section 7). One kernel,
:func:`turns`, computes it for observed trajectories and for surrogates alike, so that a comparison never rests on two
ways to round. The sum telescopes: ``R`` is the angle between the first and last tangent, plus one turn for each step
that crosses the negative x axis. A sign and a cross product tell that exactly, where ``np.unwrap`` on rounded angles
decides half turns by the last bit of ``arctan2``: on bf16 walks it is one turn off in 0.06 % of units, 1.4 % at mean
100, and always in the same direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsdyn.threads import side_by_side


class Portrait(NamedTuple):
    """A trajectory in the plane of activation and gradient, each less its first value.

    Attributes:
        x: ``(..., S, U)`` activation ``a_s - a_0``.
        y: ``(..., S, U)`` gradient ``g_s - g_0`` over sublayers, ``g`` as ``np.gradient`` takes it.
    """

    x: Tensor
    y: Tensor


def portrait(a: Tensor) -> Portrait:
    """Phase portraits of trajectories ``a`` ``(..., S, U)``, in float64 (paper 2.6, Fig. 2A).

    Raises ``ValueError`` for fewer than 3 sublayers.
    """
    check_sublayers(a)
    a = a.to(torch.float64)
    (g,) = torch.gradient(a, dim=-2)
    return Portrait(a - a[..., :1, :], g - g[..., :1, :])


def rotations(a: Tensor) -> Tensor:
    """Signed number of rotations ``R`` of each trajectory, ``(..., S, U)`` to ``(..., U)`` float64 (METHOD section 7).

    ``R`` counts turns counter-clockwise in the plane of :func:`portrait`; unit trajectories mostly turn clockwise, so
    ``R`` is mostly negative, and the paper plots ``-R``. A turn of exactly half a circle keeps the sign of the raw
    difference of the two angles in (-pi, pi], as ``np.unwrap`` does; but for such turns ``R`` is the same for the
    trajectory run backwards, negated, shifted or scaled. A tangent of length zero has angle 0, as
    ``arctan2(0, 0)``: ask :func:`zero_tangents` how much that matters. A constant unit therefore has ``R = 0``; a unit
    with NaN or Inf anywhere is NaN, and no other is. Raises ``ValueError`` for fewer than 3 sublayers.
    """
    steps, _ = increments(a, torch.float64)
    return turns(steps, gradient_steps(steps))


def sequence_rotations(trajectories: Tensor) -> Tensor:
    """Rotations of each unit in each sequence, ``(N, S, D)`` to ``(N, D)`` float32, as :func:`rotations` counts them.

    Computed in float32 (float64 for float64 input) in small blocks, side by side, so that no copy of the whole is made;
    the result is where the input is. The mean over sequences differs from the rotations of the mean trajectory once
    increments are correlated. Raises ``ValueError`` for fewer than 3 sublayers.
    """
    check_sublayers(trajectories)
    dtype = torch.float64 if trajectories.dtype == torch.float64 else torch.float32
    count, _, width = trajectories.shape
    found = torch.empty(count, width, dtype=torch.float32, device=trajectories.device)
    # 2048 columns of 64 sublayers are half a megabyte an array: near a core's own cache, and malloc keeps its pages
    columns = 2048
    rows = max(1, columns // max(1, width))

    def block(first: int) -> None:
        for unit in range(0, width, columns):
            steps, _ = increments(trajectories[first : first + rows, :, unit : unit + columns], dtype)
            found[first : first + rows, unit : unit + columns] = turns(steps, gradient_steps(steps))

    for _ in side_by_side(block, range(0, count, rows), trajectories.device):
        pass
    return found


def zero_tangents(a: Tensor) -> Tensor:
    """Fraction of the ``S - 1`` tangents of each unit that are exactly (0, 0), ``(..., S, U)`` to ``(..., U)`` float64.

    Such a tangent has no direction and counts as angle 0: a half-precision stream freezes units whose mean is far
    above their steps. NaN where the unit has NaN or Inf. Raises ``ValueError`` for fewer than 3 sublayers.
    """
    steps, _ = increments(a, torch.float64)
    zero = (steps == 0) & (gradient_steps(steps) == 0)
    return torch.where(steps.isfinite().all(0), zero.to(torch.float64).mean(0), torch.nan)


def increments(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Steps ``(S - 1, ..., U)`` between the sublayers of ``a`` ``(..., S, U)``, and their unit of length ``(..., U)``.

    Rotations need no more than the steps, in any unit of length. In this one each unit's largest step lies between 0.5
    and 1, so that products of tiny steps do not vanish in float32. It is a power of two, so nothing is rounded and
    steps that were parallel stay exactly parallel; 1 for a constant unit, NaN for one with NaN or Inf.
    """
    check_sublayers(a)
    a = a.movedim(-2, 0).to(dtype)
    steps = a[1:] - a[:-1]
    length = power_of_two(steps.abs().amax(0))
    return steps.div_(length), length


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two that brings ``largest >= 0`` between 0.5 and 1; 1 for 0, NaN for NaN and Inf."""
    return torch.where(largest == 0, 1.0, largest / torch.frexp(largest).mantissa)


def gradient_steps(steps: Tensor) -> Tensor:
    """Steps of the gradient, from steps of the activation along the first axis; both ``(S - 1, ...)``.

    ``np.gradient`` averages the steps on both sides, and takes the one there is at an end. So its own steps are half
    the difference of the activation's next and last step, with the first and last step repeated beyond the ends.
    """
    found = torch.empty_like(steps)
    torch.sub(steps[2:], steps[:-2], out=found[1:-1])
    torch.sub(steps[1], steps[0], out=found[0])
    torch.sub(steps[-1], steps[-2], out=found[-1])
    return found.mul_(0.5)


def turns(x: Tensor, y: Tensor) -> Tensor:
    """Number of rotations of tangents ``(x, y)``, each ``(S - 1, ...)``, to ``(...)``; counter-clockwise is positive.

    Expects tangents of size about 1, or NaN throughout a unit, as :func:`increments` gives them. Angles are in
    (-pi, pi]; a step's raw difference of angles needs a whole turn more or less exactly when the step crosses the
    negative x axis, going down counter-clockwise or up clockwise. At exactly half a turn the cross product is 0 and the
    raw difference stays. Runs in numpy on the CPU, whose comparisons are several times faster than torch's there.

    Raises ``ValueError`` for shapes or dtypes that differ, for fewer than 2 tangents, and for a dtype numpy lacks.
    """
    if x.shape != y.shape or x.dim() == 0 or len(x) < 2:
        raise ValueError(
            f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}: both must be (tangents, ...), the same, with at "
            "least 2 tangents, since one turn is the angle between two; give the steps of a trajectory, and of its "
            "gradient."
        )
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype} and y {y.dtype}: both must be float32 or float64; convert them.")
    device, x_, y_ = x.device, x.detach().cpu().numpy(), y.detach().cpu().numpy()
    # which half plane: angles in (0, pi] are up. The tiny shear decides tangents along the x axis, of which the
    # negative one is up; cross products are those of the tangents as they are
    sheared = np.multiply(x_, x_.dtype.type(-1e-30))
    sheared += y_
    up = sheared > 0
    now, then = up[:-1], up[1:]
    # two products compared, never fused into one rounding: parallel tangents are exactly neither one way nor the other
    one, other = x_[:-1] * y_[1:], np.multiply(y_[:-1], x_[1:], out=sheared[1:])
    wraps = ((now > then) & (one > other)).view(np.int8)
    wraps -= ((now < then) & (one < other)).view(np.int8)
    count = np.add.reduce(wraps, axis=0, dtype=np.int8 if len(wraps) < 128 else np.int32)
    # the zero that is added turns -0.0 to 0.0, whose angle is 0 and not pi
    angle = np.arctan2(y_[-1] + 0.0, x_[-1] + 0.0) - np.arctan2(y_[0] + 0.0, x_[0] + 0.0)
    return torch.as_tensor(angle * x_.dtype.type(0.5 / math.pi) + count, device=device)


def check_sublayers(a: Tensor) -> None:
    """Raise ``ValueError`` unless ``a`` ``(..., S, U)`` has the sublayers that one turn takes."""
    if a.dim() < 2 or a.shape[-2] < 3:
        raise ValueError(
            f"a has the shape {tuple(a.shape)}: (..., sublayers, units) with at least 3 sublayers is needed, since one "
            "turn is the angle between two tangents, and each tangent joins two sublayers."
        )
