"""Values of single sequences as a measured mean: its interval over groups of sequences, and its spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from rsdyn.analysis.results import Measured
from rsdyn.dynamics.moments import Moments, merge
from rsdyn.dynamics.resampling import jackknife


def mean_of(
    values: Tensor,
    group: Tensor,
    *,
    without_massive: Measured | None = None,
    left_out: Tensor | None = None,
    n: int | None = None,
) -> Measured:
    """The mean over sequences of ``values`` ``(N, ...)``, those that are NaN left out.

    Args:
        values: of each sequence.
        group: ``(N,)``, which of them an interval leaves out together.
        without_massive, left_out, n: as in :class:`~rsdyn.analysis.results.Measured`.
    """
    values = values.to(torch.float64)
    known = values.isfinite()
    filled = torch.where(known, values, 0.0)
    sums, counts = _by_group(filled, group), _by_group(known.to(torch.float64), group)
    total, count = sums.sum(0), counts.sum(0)
    mean = total / count
    without = (total - sums) / (count - counts)
    std = (torch.where(known, (values - mean).square(), 0.0).sum(0) / count).sqrt()
    return with_interval(mean, without, std=std, without_massive=without_massive, left_out=left_out, n=n)


def over_sequences(groups: Sequence[Moments]) -> Measured:
    """A mean over samples from the moments of each group of them."""
    total = reduce(merge, groups)
    sums = torch.stack([m.n * m.mean for m in groups])
    counts = torch.stack([m.n for m in groups])[:, None]
    without = (sums.sum(0) - sums) / (counts.sum(0) - counts)
    return with_interval(total.mean, without if len(groups) > 1 else without[:0], std=total.std, n=int(total.n))


def with_interval(value: Tensor, without: Tensor, **more: Tensor | Measured | int | None) -> Measured:
    """A value ``(...)``, and its interval from those without each group ``(G, ...)``; none for fewer than two."""
    if len(without) < 2:
        return Measured(value, **more)  # type: ignore[arg-type]
    found = jackknife(value, without)
    return Measured(value, torch.stack([found.low, found.high]), without, **more)  # type: ignore[arg-type]


def _by_group(values: Tensor, group: Tensor) -> Tensor:
    """Sums ``(G, ...)`` of ``values`` ``(N, ...)`` over the groups that occur, in rising order."""
    _, place = group.unique(return_inverse=True)
    out = values.new_zeros(int(place.max()) + 1, *values.shape[1:])
    return out.index_add_(0, place, values)
