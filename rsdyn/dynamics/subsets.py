"""Measures of many subsets of some trajectories at once, from sums that each subset has a share in.

What a subset's measure rests on, its means and products of two sublayers, are products of a matrix of members with what
single trajectories have: a thousand relabellings of a corpus cost as much as a few passes over it. Everything is per
unit or a sum over units, so processes that hold some of the units add up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rsdyn.dynamics.rotation import rotations

_AT_ONCE = 1 << 23  # numbers of the subsets that are made together
_NOTHING = 1e-10  # of a unit's variance over all trajectories: below, it is constant in a subset


def weights_of(members: Tensor) -> Tensor:
    """Boolean ``(P, N)`` as weights that sum to 1 in each row, float64; a row without members is NaN."""
    weight = members.to(torch.float64)
    return weight / weight.sum(1, keepdim=True)


def subset_means(values: Tensor, members: Tensor) -> Tensor:
    """The mean over each subset's members of values ``(N, ...)``, those that are NaN left out: ``(P, ...)`` float64.

    ``members`` is boolean ``(P, N)``. NaN where no member has a value.
    """
    flat = values.to(torch.float64).flatten(1)
    known = flat.isfinite()
    weight = members.to(torch.float64)
    count = weight @ known.to(torch.float64)
    total = weight @ torch.where(known, flat, 0.0)
    return torch.where(count > 0, total / count, torch.nan).reshape(len(members), *values.shape[1:])


class Subsets:
    """Sums over units of what subsets of trajectories ``x`` ``(N, S, U)`` are; members are boolean ``(P, N)``.

    Everything is made from trajectories about their common mean, in float64, a few units at a time.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.centre = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
        self.spread = torch.zeros_like(self.centre)
        for units in _blocks(x, len(x)):
            part = x[..., units].to(torch.float64)
            self.centre[:, units] = part.mean(0)
            self.spread[:, units] = part.var(0, correction=0).sqrt()

    def _away(self, units: slice) -> Tensor:
        return self.x[..., units].to(torch.float64) - self.centre[:, units]

    def squares(self) -> Tensor:
        """Squared distance of each trajectory from the common mean, ``(N, S)``."""
        found = torch.zeros(self.x.shape[:2], dtype=torch.float64, device=self.x.device)
        for units in _blocks(self.x, 1):
            found += self._away(units).square().sum(-1)
        return found

    def means(self, members: Tensor) -> Tensor:
        """Mean trajectories ``(P, S, U)``."""
        weight = weights_of(members)
        parts = [_mean(weight, self._away(units)) + self.centre[:, units] for units in _blocks(self.x, len(members))]
        return torch.cat(parts, -1) if parts else self.x.new_zeros(len(members), *self.x.shape[1:]).to(torch.float64)

    def mean_squares(self, members: Tensor) -> Tensor:
        """Squared distance of each subset's mean from the common one, ``(P, S)``."""
        weight = weights_of(members)
        found = weight.new_zeros(len(members), self.x.shape[1])
        for units in _blocks(self.x, len(members)):
            found += _mean(weight, self._away(units)).square().sum(-1)
        return found

    def last_squares(self, members: Tensor) -> Tensor:
        """Sum of squares of each subset's mean at the last sublayer, ``(P,)``."""
        last = self.x[:, -1].to(torch.float64) - self.centre[-1]
        return (weights_of(members) @ last + self.centre[-1]).square().sum(-1)

    def of_means(self, members: Tensor, limits: Tensor, *, turns: bool) -> Tensor:
        """Sums over units of mean trajectories, ``(P, 5, S)``.

        How many pass ``limits`` ``(P,)`` in size, their squares, their fourth powers; and, at every sublayer alike,
        ``|R|`` and how many units have it (0 without ``turns``).
        """
        weight, s = weights_of(members), self.x.shape[1]
        found = weight.new_zeros(len(members), 5, s)
        for units in _blocks(self.x, len(members)):
            mean = _mean(weight, self._away(units)) + self.centre[:, units]
            square = mean.square()
            found[:, 0] += (mean.abs() > limits[:, None, None]).sum(-1)
            found[:, 1] += square.sum(-1)
            found[:, 2] += square.square().sum(-1)
            if turns:
                r = rotations(mean).abs()
                found[:, 3] += r.nansum(-1, keepdim=True)
                found[:, 4] += r.isfinite().sum(-1, keepdim=True)
        return found

    def correlation_sums(self, members: Tensor) -> Tensor:
        """Pearson's r from each sublayer to the next over members, summed over units, and how many have it.

        ``(P, S - 1, 2)``. A unit that is constant in a subset has none, nor has one with fewer than two members.
        """
        weight = weights_of(members)
        found = weight.new_zeros(len(members), self.x.shape[1] - 1, 2)
        for units in _blocks(self.x, len(members)):
            r = _correlations(self._away(units), self.spread[:, units], weight)
            found[..., 0] += r.nansum(-1)
            found[..., 1] += r.isfinite().sum(-1)
        return found


def _correlations(away: Tensor, spread: Tensor, weight: Tensor) -> Tensor:
    z = away / torch.where(spread > 0, spread, torch.nan)
    first = _mean(weight, z)
    variance = _mean(weight, z.square()) - first.square()
    variance = torch.where(variance > _NOTHING, variance, torch.nan)
    product = _mean(weight, z[:, 1:] * z[:, :-1]) - first[:, 1:] * first[:, :-1]
    return (product / (variance[:, 1:] * variance[:, :-1]).sqrt()).clamp(-1, 1)


def _mean(weight: Tensor, values: Tensor) -> Tensor:
    """``(P, ...)`` of weights ``(P, N)`` and values ``(N, ...)``."""
    return (weight @ values.flatten(1)).reshape(len(weight), *values.shape[1:])


def _blocks(x: Tensor, n_subsets: int) -> Iterator[slice]:
    """Slices of the units of ``x`` ``(N, S, U)`` for which what is made of all subsets fits."""
    n, s, u = x.shape
    width = max(1, _AT_ONCE // max(1, s * max(n, n_subsets)))
    yield from (slice(first, min(first + width, u)) for first in range(0, u, width))


def lowest(members: Tensor, priority: Tensor, most: Tensor) -> Tensor:
    """Of each subset ``(P, N)`` the ``most`` ``(P,)`` members of lowest ``priority`` ``(N,)``, boolean ``(P, N)``."""
    order = priority.argsort()
    turn = members[:, order].cumsum(1)
    out = torch.zeros_like(members)
    out[:, order] = members[:, order] & (turn <= most[:, None])
    return out


def subset_spectra(gram: Tensor, rows: Tensor) -> Tensor:
    """Variances along the principal components of some rows, ``(..., K)``, largest first.

    Args:
        gram: ``(..., N, N)`` products of all rows with each other.
        rows: ``(K,)`` int64, which of them.
    """
    part = gram[..., rows, :][..., rows]
    part = part - part.mean(-1, keepdim=True) - part.mean(-2, keepdim=True) + part.mean((-1, -2), keepdim=True)
    return torch.linalg.eigvalsh(part).flip(-1).clamp(min=0) / len(rows)
