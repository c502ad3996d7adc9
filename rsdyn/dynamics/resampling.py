"""How far a number would move with other samples, when samples of one document are alike.

Samples fall into clusters, such as the documents their texts come from, and clusters are put together into groups. The
delete-a-group jackknife measures the statistic without each group; what is not smooth in the data (ranks, counts,
turns) is instead looked at on simulated data that scatter as the jackknife says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

MOST_GROUPS = 20
FEW_CLUSTERS = 10  # with fewer, an interval is a guess: Student's t at 5 degrees of freedom is 31 % wider than normal
N_DRAWS = 400
_AT_ONCE = 1 << 20  # numbers of the draws that are made together


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, all of the estimate's shape."""

    value: Tensor
    low: Tensor
    high: Tensor


def jackknife(value: Tensor, without: Tensor, level: float = 0.95) -> Interval:
    """Confidence interval of a statistic from its values with one group of samples left out at a time.

    Args:
        value: the statistic of all samples, any shape ``(...)``.
        without: ``(G, ...)``, the statistic of all samples but those of group g. The groups are of about equal size and
            chosen without looking at the samples.
        level: of confidence.

    The standard error is ``sqrt((G - 1) / G sum (without_g - mean)^2)`` and the interval takes Student's t with
    ``G - 1`` degrees of freedom (Efron 1982). It holds for smooth functions of means, such as correlations and their
    averages over units; dependence among units does not matter to it, since whole sequences are left out. It is too
    wide for what jumps, such as a number of turns, by about ``G ** 0.25``: take :func:`simulated` there. Raises
    ``ValueError`` for fewer than two groups.
    """
    groups = _check(without)
    spread = (without - without.mean(0)).square().sum(0)
    error = (spread * (groups - 1) / groups).sqrt() * float(student.ppf(0.5 + level / 2, groups - 1))
    value = torch.as_tensor(value, dtype=without.dtype, device=without.device)
    return Interval(value, value - error, value + error)


def simulate(
    statistic: Callable[[Tensor], Tensor], value: Tensor, without: Tensor, *, n: int = N_DRAWS, seed: int = 0
) -> Tensor:
    """A statistic on data that scatter about ``value`` as its jackknife says, ``(n, ...)``, for :func:`simulated`.

    Args:
        statistic: takes several draws at once, ``(m, ...)``, and gives ``m`` results.
        value, without: ``(...)`` and ``(G, ...)`` as in :func:`jackknife`, smooth in the samples: a curve of means
            whose ranks the statistic takes, or mean trajectories whose turns it counts.
        n, seed: of the draws, which are the same for the same ``G``.

    Each draw is ``value`` and a random combination of the deviations ``without_g - mean``, so that what varies together
    over groups varies together in it, scaled so that it has the jackknife's covariance and Student's t with ``G - 1``
    degrees of freedom. Some are made at a time, in float64. Raises ``ValueError`` for fewer than two groups.
    """
    groups = _check(without)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, groups, generator=generator, dtype=torch.float64)
    squares = torch.randn(n, groups - 1, generator=generator, dtype=torch.float64).square().mean(1, keepdim=True)
    weights = (normal / squares.sqrt() * ((groups - 1) / groups) ** 0.5).to(without.device)
    value, without = value.to(torch.float64), without.to(torch.float64)
    away = (without - without.mean(0)).reshape(groups, -1)
    some = weights.split(max(1, _AT_ONCE // max(1, value.numel())))
    return torch.cat([statistic(value + (w @ away).reshape(len(w), *value.shape)) for w in some])


def simulated(value: Tensor, drawn: Tensor, level: float = 0.95) -> Interval:
    """Confidence interval of a statistic that is not smooth, from its values on simulated data.

    Args:
        value: the statistic of the data, ``(...)``.
        drawn: ``(n, ...)`` by :func:`simulate`. Those that are NaN do not count; all NaN gives NaN.
        level: of confidence.

    The middle ``level`` of ``drawn``, and ``value`` where it lies outside: noise on noise moves a curve's ranks and a
    path's tangents in one direction, away from where the first noise left them.
    """
    tails = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64, device=drawn.device)
    low, high = torch.nanquantile(drawn.to(torch.float64), tails, dim=0)
    value = torch.as_tensor(value, dtype=torch.float64, device=drawn.device)
    return Interval(value, torch.minimum(low, value), torch.maximum(high, value))


def group_of(cluster: Tensor, most: int = MOST_GROUPS) -> Tensor:
    """Put whole clusters together into at most ``most`` groups of about equal size: the group of each sample, ``(N,)``.

    Args:
        cluster: ``(N,)`` int64, which cluster each sample belongs to, any numbers.
        most: how many groups at most; with no more clusters than that, each is a group.

    The largest cluster first, each to the group that has fewest samples: a function of the clusters alone, the same on
    every process. Groups are numbered from 0 on.
    """
    _, inverse, counts = cluster.unique(return_inverse=True, return_counts=True)
    sizes = counts.tolist()
    load = [0] * min(most, len(sizes))
    owner = torch.empty(len(sizes), dtype=torch.int64)
    for c in sorted(range(len(sizes)), key=lambda c: -sizes[c]):
        owner[c] = least = min(range(len(load)), key=load.__getitem__)
        load[least] += sizes[c]
    return owner.to(cluster.device)[inverse]


def block_of(place: Tensor, most: int = MOST_GROUPS) -> Tensor:
    """Cut samples into ``most`` contiguous blocks of equal size, to within one: the block of each sample, ``(N,)``.

    ``place`` ``(N,)`` is where each sample stands in its corpus, no two alike. Neighbours are likely to be alike, so
    blocks stand in for documents where nobody knows those. Fewer samples than ``most`` are a block each.
    """
    n = len(place)
    rank = torch.empty_like(place)
    rank[place.argsort()] = torch.arange(n, device=place.device)
    return rank * min(most, n) // max(1, n)


def _check(without: Tensor) -> int:
    groups = without.shape[0]
    if groups < 2:
        raise ValueError(f"without has {groups} group(s), but a jackknife needs at least 2: split the samples further.")
    return groups
