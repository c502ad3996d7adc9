"""What an ensemble of trajectories does as one: converge, part, and be carried by rotation and stretching.

For the claims of other papers. Sets of prompts: how near those of a set are to each other beside those of other sets
(arXiv 2606.09287). Linear transport: what is left when the whole ensemble's singular directions are turned and
stretched from one layer to another (arXiv 2410.01545).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def convergence(x: Tensor, sets: Tensor) -> Tensor:
    """One less the mean distance within sets over that between sets, at each sublayer, ``(S,)`` float64.

    0 where sets do not matter, 1 where the states of a set are one.

    Args:
        x: ``(N, S, D)``.
        sets: ``(N,)`` int64, the set of each; at least two sets, one of them of two or more.

    Raises ``ValueError`` for other shapes and sets.
    """
    if x.ndim != 3 or sets.shape != x.shape[:1]:
        raise ValueError(f"x of shape {tuple(x.shape)} and sets {tuple(sets.shape)}: give (N, S, D) and (N,).")
    above = torch.triu_indices(len(x), len(x), 1)
    same = sets[above[0]] == sets[above[1]]
    if not same.any() or same.all():
        raise ValueError("sets: give two or more sets, of which one has two or more members.")
    return _ratio(_distances(x), same)


def convergence_null(x: Tensor, sets: Tensor, *, n: int = 999, seed: int = 0) -> Tensor:
    """:func:`convergence` where the members of sets are drawn anew, ``(n, S)``."""
    generator = torch.Generator().manual_seed(seed)
    away, above = _distances(x), torch.triu_indices(len(x), len(x), 1)
    found = []
    for _ in range(n):
        drawn = sets[torch.randperm(len(sets), generator=generator)]
        found.append(_ratio(away, drawn[above[0]] == drawn[above[1]]))
    return torch.stack(found)


def _ratio(away: Tensor, same: Tensor) -> Tensor:
    between = away[:, ~same].mean(1)
    return 1 - away[:, same].mean(1) / torch.where(between > 0, between, torch.nan)


def _distances(x: Tensor) -> Tensor:
    """Distances of all pairs at each sublayer, ``(S, pairs)``."""
    return torch.stack([torch.pdist(x[:, s].to(torch.float64)) for s in range(x.shape[1])])


def separation(x: Tensor, y: Tensor) -> Tensor:
    """Distance of pairs of states ``(P, S, D)`` over the mean of their norms, ``(P, S)`` float64."""
    x, y = x.to(torch.float64), y.to(torch.float64)
    size = (x.norm(dim=-1) + y.norm(dim=-1)) / 2
    return (x - y).norm(dim=-1) / torch.where(size > 0, size, torch.nan)


class Transport(NamedTuple):
    """What linear transport leaves of an ensemble.

    Attributes:
        residual: ``(L, L)`` variance per unit and sequence of what is left at layer ``m`` when the ensemble of a layer
            before it is turned and stretched onto it; NaN elsewhere.
        own: ``(L,)`` variance per unit and sequence of the ensemble itself, about 0.
    """

    residual: Tensor
    own: Tensor


def transport(x: Tensor) -> Transport:
    """Linear transport between all layers of an ensemble ``(N, L, D)``, ``N > D`` (arXiv 2410.01545, section 3).

    With ``X = V S U^T`` at each layer, states are carried by ``U_l S_l^-1 S_m U_m^T``: singular direction to singular
    direction, in order, each by its own factor. What is left is ``sum s^2 |v_m - v_l|^2``, the sign of each singular
    vector free.

    Raises ``ValueError`` for another shape, or no more sequences than units: then the directions are the sequences'.
    """
    if x.ndim != 3 or len(x) <= x.shape[2]:
        raise ValueError(f"x of shape {tuple(x.shape)}: give (N, L, D) of more sequences than units.")
    n, n_layers, d = x.shape
    left, sizes = [], []
    for layer in range(n_layers):
        v, s, _ = torch.linalg.svd(x[:, layer].to(torch.float64), full_matrices=False)
        left.append(v)
        sizes.append(s)
    residual = torch.full((n_layers, n_layers), torch.nan, dtype=torch.float64)
    for a in range(n_layers):
        for b in range(a + 1, n_layers):
            along = (left[a] * left[b]).sum(0).abs()
            residual[a, b] = (sizes[b].square() * 2 * (1 - along)).sum() / (n * d)
    return Transport(residual, torch.stack([s.square().sum() / (n * d) for s in sizes]))


class Growth(NamedTuple):
    """``alpha exp(rate m)`` fitted to variances at layers ``m``, and the share of their logarithm that it explains."""

    alpha: float
    rate: float
    r_squared: float


def growth(layers: Tensor, variances: Tensor) -> Growth:
    """Least squares of ``ln variances`` on ``layers``, ``(n,)`` each; what is not positive and finite is left out.

    NaN for fewer than three.
    """
    known = variances.isfinite() & (variances > 0)
    if int(known.sum()) < 3:
        return Growth(*[float("nan")] * 3)
    x, y = layers[known].to(torch.float64), variances[known].to(torch.float64).log()
    dx, dy = x - x.mean(), y - y.mean()
    rate = float((dx * dy).sum() / dx.square().sum())
    left = (dy - rate * dx).square().sum()
    alpha = float((y.mean() - rate * x.mean()).exp())
    return Growth(alpha, rate, float(1 - left / dy.square().sum()) if float(dy.abs().max()) > 0 else 1.0)
