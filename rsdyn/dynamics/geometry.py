"""Direction and pace of trajectories: what each sequence's stream vector does from one sublayer to the next.

Chunks of sequences are taken to float32 one at a time, so no float32 copy of a bf16 stream is made. Gradients are not
followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.threads import side_by_side

_CHUNK_ELEMENTS = 1 << 19  # 2 MB in float32: with the products, about a core's cache


def cosine(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Cosine of successive stream vectors ``h_s, h_{s+1}`` of each sequence (paper 2.3, Fig. 1E, METHOD section 5).

    Args:
        trajectories: ``(N, S, D)``, any floating dtype.
        units: boolean mask ``(D,)`` of the units to count, for a cosine without massive units; default all. What the
            others hold, NaN too, has no influence.

    Returns:
        ``(N, S - 1)``, within [-1, 1]; float64 for float64 input, else float32. NaN where either vector is zero or not
        finite, or longer than the root of the largest number, 1.8e19 in float32.

    Raises:
        ValueError: for another shape, fewer than two sublayers, or a mask of another shape or of no unit.
    """
    return _over_chunks(_cosine, trajectories, units, lost=1)


def speed(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Length of the step ``h_{s+1} - h_s`` of each sequence, ``(N, S - 1)`` (paper 2.4, Fig. 1F, METHOD section 5).

    Subtracted first, then the norm: the expanded square loses 2.7 % in float32. Arguments, dtype and errors are those
    of :func:`cosine`.
    """
    return _over_chunks(lambda x: torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1), trajectories, units, lost=1)


def relative_speed(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Length of the step from each sublayer over the length of the state there, ``(N, S - 1)`` (METHOD section 0.12).

    What is left of a speed that rises only because the stream grows. Arguments, dtype and errors are those of
    :func:`cosine`; NaN where the state is zero.
    """

    def measure(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x[:, :-1], dim=-1)
        return torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1) / torch.where(size > 0, size, torch.nan)

    return _over_chunks(measure, trajectories, units, lost=1)


class Curves(NamedTuple):
    """Cosine of successive states, speed, speed over the norm, each ``(C, N, S - 1)``, and the norm ``(C, N, S)``."""

    cosine: Tensor
    speed: Tensor
    relative_speed: Tensor
    norm: Tensor


def curves_without_largest(
    trajectories: Tensor, order: Tensor, counts: Sequence[int], units: Tensor | None = None
) -> Curves:
    """Cosine, speeds and norm without the first ``counts`` units of ``order`` (METHOD section 0.10).

    Args:
        trajectories: ``(N, S, D)``, any floating dtype.
        order: ``(K,)`` numbers of units, the largest first.
        counts: ``C`` numbers of units to leave out, each from 0 to ``K``.
        units: boolean mask ``(D,)`` of the units that count at all; default all.

    All counts come from one reading: sums over the units that always stay, to which the others' are added from the
    smallest up, so that nothing is lost to cancellation. One sublayer has a norm alone, and empty curves beside it.

    Raises:
        ValueError: as :func:`norm`, and for a count above ``K``.
    """
    if max(counts) > len(order) or min(counts) < 0:
        raise ValueError(f"counts={list(counts)}: order names {len(order)} units; leave out at most those.")
    order = order.to(trajectories.device)

    def measure(x: Tensor) -> Tensor:
        some = x[..., order].to(torch.float64)
        rest = x.index_fill(-1, order, 0)

        def sums(of_rest: Tensor, of_some: Tensor) -> Tensor:
            """``(C, n, ...)``: without the first ``count`` units, for each count."""
            back = of_some.flip(-1).cumsum(-1).flip(-1)  # entry k: of the units from the k-th on
            back = torch.cat([back, back.new_zeros(*back.shape[:-1], 1)], dim=-1)
            return torch.stack([of_rest.to(torch.float64) + back[..., k] for k in counts])

        dot = sums((rest[:, 1:] * rest[:, :-1]).sum(-1), some[:, 1:] * some[:, :-1])
        size = sums(rest.square().sum(-1), some.square()).sqrt()
        before, after = size[..., :-1], size[..., 1:]
        step = sums((rest[:, 1:] - rest[:, :-1]).square().sum(-1), (some[:, 1:] - some[:, :-1]).square()).sqrt()
        relative = step / torch.where(before > 0, before, torch.nan)
        found = size.new_empty(4, *size.shape)
        for row, curve in zip(found, ((dot / before / after).clamp(-1, 1), step, relative), strict=False):
            row[..., 1:] = curve
        found[3] = size
        return found.permute(2, 0, 1, 3)

    out = _over_chunks(measure, trajectories, units, lost=0, more=(4, len(counts))).permute(1, 2, 0, 3)
    return Curves(out[0, ..., 1:], out[1, ..., 1:], out[2, ..., 1:], out[3])


def norm(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Length of the stream vector at each sublayer of each sequence, ``(N, S)`` (METHOD section 5).

    Arguments, dtype and errors are those of :func:`cosine`, but one sublayer is enough.
    """
    return _over_chunks(lambda x: torch.linalg.vector_norm(x, dim=-1), trajectories, units, lost=0)


def curvature(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Angle in radians between successive steps ``h_{s+1} - h_s`` and ``h_{s+2} - h_{s+1}``, ``(N, S - 2)``.

    0 is straight on, pi/2 what independent steps give in many dimensions, pi is turning back (Hosseini & Fedorenko
    2023, METHOD section 14). Scaling the steps of a sublayer changes no angle. As twice the arc tangent of half the
    angle, which keeps small angles and those near pi exact where the arc cosine loses them.

    Arguments, dtype and errors are those of :func:`cosine`, but three sublayers are needed; NaN where a step is zero,
    or longer than its square can be told.
    """

    def measure(x: Tensor) -> Tensor:
        steps = x[:, 1:] - x[:, :-1]
        size = torch.linalg.vector_norm(steps, dim=-1, keepdim=True)
        ahead = steps / torch.where((size > 0) & size.isfinite(), size, torch.nan)
        before, after = ahead[:, :-1], ahead[:, 1:]
        apart = torch.linalg.vector_norm(after - before, dim=-1)
        return 2 * torch.atan2(apart, torch.linalg.vector_norm(after + before, dim=-1))

    return _over_chunks(measure, trajectories, units, lost=2)


def path_length(trajectories: Tensor, units: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Length of the whole way, the sum of the steps' lengths, ``(N,)``.

    ``scale`` ``(S - 1,)`` divides each step first, such as its RMS over sequences, so that the longest steps do not own
    the sum. The other arguments, dtype and errors are those of :func:`cosine`.
    """
    return _scaled(speed(trajectories, units), scale).sum(-1)


def straightness(trajectories: Tensor, units: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Distance from the first state to the last over the length of the way, ``(N,)`` (METHOD section 14).

    1 is a straight line; ``S - 1`` independent steps of one length give about ``1 / sqrt(S - 1)``. Arguments, dtype and
    errors are those of :func:`path_length`; NaN where nothing moves.
    """
    dtype = torch.float64 if trajectories.dtype == torch.float64 else torch.float32

    def measure(x: Tensor) -> Tensor:
        steps = x[:, 1:] - x[:, :-1]
        if scale is not None:
            steps = steps / scale.to(x.device, dtype)[:, None]
        return torch.linalg.vector_norm(steps.sum(1), dim=-1, keepdim=True)

    length = path_length(trajectories, units, scale)
    ends = _over_chunks(measure, trajectories, units, lost=trajectories.shape[1] - 1 if trajectories.ndim == 3 else 1)
    return ends[:, 0] / torch.where(length > 0, length, torch.nan)


def _scaled(steps: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return steps
    if scale.shape != steps.shape[-1:] or not bool((scale > 0).all()):
        raise ValueError(f"scale of shape {tuple(scale.shape)}: give ({steps.shape[-1]},) sizes above 0, one per step.")
    return steps / scale.to(steps.device, steps.dtype)


def _cosine(x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=-1)
    dot = (x[:, 1:] * x[:, :-1]).sum(-1)
    return (dot / size[:, 1:] / size[:, :-1]).clamp_(-1, 1)  # 0 / 0 is NaN, and stays so


def _over_chunks(
    measure: Callable[[Tensor], Tensor], x: Tensor, units: Tensor | None, lost: int, more: tuple[int, ...] = ()
) -> Tensor:
    """``measure`` of chunks of sequences side by side, ``(N, *more, S - lost)``; ``x`` and ``units`` are checked."""
    if x.ndim != 3:
        raise ValueError(f"trajectories of shape {tuple(x.shape)}: give (N, S, D), sequences by sublayers by units.")
    x = x.detach()
    n, s, d = x.shape
    if s <= lost:
        raise ValueError(f"trajectories of {s} sublayers: at least {lost + 1} are needed; record more sublayers.")
    excluded = None
    if units is not None:
        if units.dtype != torch.bool or units.shape != (d,):
            raise ValueError(
                f"units of {units.dtype} and shape {tuple(units.shape)}: give a boolean mask of shape ({d},), "
                "or None for all units."
            )
        excluded = (~units).nonzero().flatten().to(x.device)
    if d == (0 if excluded is None else len(excluded)):
        raise ValueError(f"units: none of {d} is left to measure; mark at least one.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = max(1, _CHUNK_ELEMENTS // (s * d))

    def work(part: Tensor) -> Tensor:
        if excluded is None or len(excluded) == 0:
            return measure(part.to(dtype))
        # Zeros count for nothing in a sum, and to write a few costs less than to gather all the rest
        return measure(part.to(dtype, copy=True).index_fill_(-1, excluded, 0))

    out = torch.empty(n, *more, s - lost, dtype=dtype, device=x.device)
    for found, part in zip(out.split(rows), side_by_side(work, x.split(rows), x.device), strict=True):
        found.copy_(part)
    return out
