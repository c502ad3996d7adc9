"""Statistics of a curve over depth, of which the rows of the findings are made.

Each takes a curve ``(n,)``, or many curves ``(..., n)`` at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNDEFINED = torch.tensor(torch.nan, dtype=torch.float64)


def spearman(curve: Tensor) -> Tensor:
    """Rank correlation of a curve ``(n,)`` with depth, NaN where it has fewer than three values or never moves.

    As ``scipy.stats.spearmanr``, and of many curves ``(..., n)`` at once, since an interval takes it of 400. A value
    that is not finite is left out.
    """
    known = curve.isfinite()
    if not known.all():
        return spearman(curve[known]) if curve.ndim == 1 else torch.stack([spearman(c) for c in curve])
    n = curve.shape[-1]
    if n < 3:
        return _undefined(curve)
    below, same = curve[..., :, None] > curve[..., None, :], curve[..., :, None] == curve[..., None, :]
    rank = below.sum(-1, dtype=torch.float64) + same.sum(-1, dtype=torch.float64) / 2 - n / 2
    depth = torch.arange(n, dtype=torch.float64, device=curve.device) - (n - 1) / 2
    return (rank @ depth) / (rank.square().sum(-1) * depth.square().sum()).sqrt()


def fitted_change(curve: Tensor) -> Tensor:
    """What the least-squares line through a curve ``(n,)`` gains from its first value to its last.

    In the curve's own unit, and a smooth function of it, where a rank correlation moves in steps. NaN for fewer than
    two finite values. Of many curves ``(..., n)`` at once.
    """
    known = curve.isfinite()
    weight = known.to(torch.float64)
    n = weight.sum(-1, keepdim=True)
    at = torch.arange(curve.shape[-1], dtype=torch.float64, device=curve.device)
    y = torch.where(known, curve.to(torch.float64), 0.0)
    x = torch.where(known, at - (weight * at).sum(-1, keepdim=True) / n, 0.0)
    change = (x * y).sum(-1) / x.square().sum(-1) * (curve.shape[-1] - 1)
    return torch.where(n[..., 0] >= 2, change, torch.nan)


def relative_change(curve: Tensor) -> Tensor:
    """:func:`fitted_change` as a share of the curve's mean, for curves that have a zero and no end."""
    return fitted_change(curve) / torch.where(curve.isfinite(), curve, torch.nan).nanmean(-1)


def ends_of(curve: Tensor) -> tuple[float, float, float]:
    """First, middle and last value of a curve ``(n,)``; of an even number of values the middle is that before it."""
    return float(curve[0]), float(curve[(len(curve) - 1) // 2]), float(curve[-1])


def per_layer(curve: Tensor, sites_per_layer: int) -> Tensor:
    """The mean of each layer's transitions, so that a zigzag between within and across layers is not taken for a trend.

    Of curves ``(..., n)``.
    """
    if sites_per_layer == 1:
        return curve
    pairs = curve[..., : curve.shape[-1] // 2 * 2].reshape(*curve.shape[:-1], -1, 2)
    return pairs.nanmean(-1)


def late_steepening(curve: Tensor) -> Tensor:
    """Slope over the last third less the slope before it, as a share of the curve's mean."""
    n = curve.shape[-1]
    if n < 3:
        return _undefined(curve)
    turn = n - 1 - max(1, (n - 1) // 3)
    late = (curve[..., -1] - curve[..., turn]) / (n - 1 - turn)
    before = (curve[..., turn] - curve[..., 0]) / turn
    return (late - before) / curve.nanmean(-1)


def early_fall(curve: Tensor) -> Tensor:
    """The first value less the mean of the last two thirds."""
    if curve.shape[-1] < 3:
        return _undefined(curve)
    return curve[..., 0] - curve[..., curve.shape[-1] // 3 :].nanmean(-1)


def second_layer(curve: Tensor, sites: int) -> Tensor:
    """The value at the first transition of the second layer."""
    return curve[..., sites] if curve.shape[-1] > sites else _undefined(curve)


def _undefined(curve: Tensor) -> Tensor:
    return UNDEFINED.to(curve.device).expand(curve.shape[:-1])


def _kinds(curve: Tensor) -> tuple[Tensor, Tensor]:
    return curve[..., 0::2].nanmean(-1), curve[..., 1::2].nanmean(-1)


def within_minus_cross(curve: Tensor) -> Tensor:
    """Mean of the transitions within layers less that of those across."""
    within, cross = _kinds(curve)
    return within - cross


def cross_over_within(curve: Tensor) -> Tensor:
    """Mean of the transitions across layers over that of those within."""
    within, cross = _kinds(curve)
    return cross / within
