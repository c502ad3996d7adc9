"""Means, variances and products of each unit at pairs of sublayers, and the correlation that follows from them.

Like the moments beside them they are taken in pieces and merged in any order. Deviations from a sample of the unit
itself, products and sums are all float64: exact for float32 input, and no setting that lets matrix products run in
lower precision (TF32) touches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rsdyn.threads import side_by_side

Pairs = Literal["consecutive", "all"]

# 512 units at a time keep the running sums of 64 sublayers near a core's cache. For all pairs, 64 units of 64 sequences
# are transposed at a time, about 6 MB a thread; panels of 24 sublayers leave out most of the mirror image, and 24 suits
# the kernels of the BLAS: a fifth faster than whole products, where 16 and 32 gain little (measured with MKL).
_CONSECUTIVE_UNITS = 512
_ALL_UNITS = 64
_ALL_ROWS = 64
_ALL_PANEL = 24


class Comoments(NamedTuple):
    """Count, means and sums of products of deviations of ``S`` sublayers by ``D`` units, float64.

    Attributes:
        n: number of sequences, a scalar tensor.
        mean: ``(S, D)``.
        m2: ``(S, D)``, the sum of squared deviations from the mean.
        cross: ``(P, D)``, for each pair of sublayers the sum of products of their deviations: ``P = S - 1`` for
            consecutive sublayers, ``S (S - 1) / 2`` for all pairs ``s < m``, in the order of
            ``torch.triu_indices(S, S, 1)``.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    cross: Tensor


def unvarying(n: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """Where nothing varies: a boolean mask. Merging leaves up to an ulp of the mean, far below any real spread."""
    return (m2 / n).sqrt() <= 1e-12 * mean.abs()


def comoments(x: Tensor, pairs: Pairs = "consecutive") -> Comoments:
    """Comoments of trajectories ``x`` ``(N, S, D)`` over sequences; ``N`` may be 0.

    On a CPU blocks of units go side by side, one thread each, with the same bits for any number of threads. A value
    that is not finite makes NaN of that unit at that sublayer and of its pairs, nothing else.

    Raises:
        ValueError: for another shape, fewer than two sublayers, or unknown ``pairs``.
    """
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs={pairs!r}: choose one of {', '.join(get_args(Pairs))}.")
    if x.ndim != 3:
        raise ValueError(f"trajectories of shape {tuple(x.shape)}: give (N, S, D), sequences by sublayers by units.")
    n, s, d = x.shape
    if s < 2:
        raise ValueError(f"trajectories of {s} sublayer: a pair needs at least 2; record more sublayers.")
    n_pairs = s - 1 if pairs == "consecutive" else s * (s - 1) // 2
    found = [torch.zeros(rows, d, dtype=torch.float64, device=x.device) for rows in (s, s, n_pairs)]
    if n > 0:
        width = _ALL_UNITS if pairs == "all" else _CONSECUTIVE_UNITS if x.device.type == "cpu" else max(1, d)
        of_block = _consecutive if pairs == "consecutive" else _all
        blocks = [slice(first, first + width) for first in range(0, d, width)]
        # written here and not by the threads, which may not write to what was made in inference mode
        for units, parts in zip(blocks, side_by_side(lambda b: of_block(x[..., b]), blocks, x.device), strict=True):
            for whole, part in zip(found, parts, strict=True):
                whole[:, units] = part
    return Comoments(torch.tensor(float(n), dtype=torch.float64, device=x.device), *found)


def _consecutive(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, m2 and cross of consecutive sublayers of ``x`` ``(N, S, W)``: one pass, a sequence at a time."""
    n, s, w = x.shape
    shift, row, total, squares, products = torch.zeros(5, s, w, dtype=torch.float64, device=x.device)
    products = products[1:]
    shift.copy_(x[0])  # a sample, not the mean: a constant unit deviates from it by exactly 0
    for sequence in x:
        row.copy_(sequence).sub_(shift)
        total += row
        squares.addcmul_(row, row)
        products.addcmul_(row[:-1], row[1:])
    total /= n
    squares.addcmul_(total, total, value=-n)
    products.addcmul_(total[:-1], total[1:], value=-n)
    return shift + total, squares, products


def _all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, m2 and cross of all pairs of sublayers of ``x`` ``(N, S, W)``: matrix products, unit by unit."""
    n, s, w = x.shape
    rows = min(n, _ALL_ROWS)
    # Gather strips, then transpose, then widen: three passes, and a third of the time of one that does it all
    gathered, turned = (torch.empty(s * rows * w, dtype=x.dtype, device=x.device) for _ in range(2))
    widened = torch.empty(s * rows * w, dtype=torch.float64, device=x.device)
    shift = x[0].T.to(torch.float64)  # (W, S)
    total = torch.zeros(w, s, dtype=torch.float64, device=x.device)
    panels = [(a, min(a + _ALL_PANEL, s)) for a in range(0, s, _ALL_PANEL)]
    products = [torch.zeros(w, s - a, b - a, dtype=torch.float64, device=x.device) for a, b in panels]
    for part in x.split(rows):
        size = part.numel()
        strips = gathered[:size].view(s, len(part), w).copy_(part.transpose(0, 1))
        units = turned[:size].view(w, -1).copy_(strips.view(-1, w).T)
        deviations = widened[:size].view(w, s, len(part)).copy_(units.view(w, s, len(part)))
        deviations -= shift[:, :, None]
        total += deviations.sum(2)
        for product, (a, b) in zip(products, panels, strict=True):
            product.baddbmm_(deviations[:, a:], deviations[:, a:b].transpose(1, 2))
    total /= n
    m2, cross = [], []
    for product, (a, b) in zip(products, panels, strict=True):
        product.baddbmm_(total[:, a:, None], total[:, None, a:b], alpha=-n)
        first, second = torch.triu_indices(b - a, s - a, 1, device=x.device)
        by_pair = product.view(w, -1).T.contiguous()
        cross.append(by_pair[second * (b - a) + first])
        m2.append(by_pair[: (b - a) ** 2 : b - a + 1])
    return (shift + total).T, torch.cat(m2), torch.cat(cross)


def merge_comoments(a: Comoments, b: Comoments) -> Comoments:
    """The comoments of both sets of sequences together (Chan, Golub and LeVeque 1979); either set may be empty.

    Raises:
        ValueError: when the two are of other sublayers, units or pairs.
    """
    if a.mean.shape != b.mean.shape or a.cross.shape != b.cross.shape:
        shapes = " and ".join(str([tuple(part.shape) for part in (m.mean, m.cross)]) for m in (a, b))
        raise ValueError(f"comoments of shapes {shapes}: merge only those of the same sublayers, units and pairs.")
    count = a.n + b.n
    share = torch.where(count > 0, b.n / count.clamp(min=1), 0.0)
    delta = b.mean - a.mean
    weight = a.n * share
    cross = a.cross + b.cross
    for pair, first, second in _pair_rows(a):
        cross[pair].addcmul_(delta[first] * weight, delta[second])
    return Comoments(count, a.mean + delta * share, a.m2 + b.m2 + delta.square() * weight, cross)


def correlation_of(state: Comoments) -> Tensor:
    """Pearson correlation of each pair ``(P, D)`` from its comoments, float64, within [-1, 1].

    NaN where a unit does not vary at one of the two sublayers, or holds a value that is not finite.
    """
    spread = state.m2.sqrt().masked_fill(unvarying(*state[:3]), torch.nan)
    out = torch.empty_like(state.cross)
    for pair, first, second in _pair_rows(state):
        torch.div(state.cross[pair], spread[first], out=out[pair])
        out[pair] /= spread[second]
    return out.clamp_(-1, 1)  # which keeps NaN; rounding alone goes past 1, by 1e-16


def correlation(trajectories: Tensor, pairs: Pairs = "consecutive") -> Tensor:
    """Pearson correlation over sequences of each unit's activation at two sublayers (paper 2.3, Fig. 1C and D).

    Args:
        trajectories: ``(N, S, D)``, any floating dtype.
        pairs: ``consecutive`` sublayers, or ``all`` pairs ``s < m``.

    Returns:
        ``(S - 1, D)``, or ``(S (S - 1) / 2, D)`` in the order of ``torch.triu_indices(S, S, 1)``; float64. NaN, never
        0, where a unit does not vary or is not finite at one of the two sublayers.

    Raises:
        ValueError: for fewer than three sequences (two always correlate by 1 or -1), fewer than two sublayers, another
            shape, or unknown ``pairs``.
    """
    state = comoments(trajectories, pairs)
    if len(trajectories) < 3:
        raise ValueError(
            f"trajectories of {len(trajectories)} sequences: a correlation needs at least 3, for two always give 1 or "
            "-1; give more sequences."
        )
    return correlation_of(state)


def _pair_rows(state: Comoments) -> Iterator[tuple[slice, slice, slice]]:
    """Which rows of ``cross`` belong to which rows of ``mean``: (pairs, first sublayers, second sublayers).

    For all pairs a first sublayer at a time, so that nothing of the size of ``cross`` is made on the way.
    """
    n_sublayers, n_pairs = len(state.mean), len(state.cross)
    if n_pairs == n_sublayers - 1:  # with two sublayers, the one pair is both consecutive and all
        yield slice(0, n_pairs), slice(0, n_pairs), slice(1, n_sublayers)
        return
    start = 0
    for first in range(n_sublayers - 1):
        stop = start + n_sublayers - 1 - first
        yield slice(start, stop), slice(first, first + 1), slice(first + 1, n_sublayers)
        start = stop
