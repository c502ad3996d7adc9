"""Correlation between and within groups of sequences, from sums per group (METHOD section 0.7).

Sequences that end in one token share their first state, so a correlation over all of them at the first transition is
one between tokens, weighted by how often each ends a sequence. Between groups counts each token once; within groups
asks what is left among sequences that end alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING_LEFT = 1e-9  # of the whole variance: below, what is left within groups is rounding


def between_groups(n: Tensor, mean: Tensor) -> Tensor:
    """Pearson correlation over groups of their means at two sublayers, each group counted once.

    Args:
        n: ``(G,)`` sequences in each group; empty ones do not count.
        mean: ``(G, 2, D)`` the groups' means at the two sublayers.

    Returns:
        ``(D,)`` float64; NaN for fewer than three groups, and where the means do not vary.
    """
    x = mean[n > 0].to(torch.float64)
    if len(x) < 3:
        return torch.full(mean.shape[-1:], torch.nan, dtype=torch.float64, device=mean.device)
    x = x - x.mean(0)
    xx, yy = x.square().sum(0)
    return _pearson(xx, yy, (x[:, 0] * x[:, 1]).sum(0))


def within_groups(n: Tensor, mean: Tensor, m2: Tensor, cross: Tensor) -> Tensor:
    """Pearson correlation at two sublayers of what is left when each sequence has its group's mean taken out.

    Args:
        n, mean: as for :func:`between_groups`.
        m2: ``(2, D)`` squared deviations of all sequences from their common mean, summed.
        cross: ``(D,)`` the sum of the products of the two deviations.

    Returns:
        ``(D,)`` float64; NaN where groups explain all of a unit's variance at either sublayer, to rounding.
    """
    here = n > 0
    weight, x = n[here].to(torch.float64)[:, None, None], mean[here].to(torch.float64)
    x = x - (weight * x).sum(0) / weight.sum()
    explained = (weight * x.square()).sum(0)
    left = m2 - explained
    left = torch.where(left > _NOTHING_LEFT * m2, left, torch.nan)
    xx, yy = left
    return _pearson(xx, yy, cross - (weight[:, 0] * x[:, 0] * x[:, 1]).sum(0))


def _pearson(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    size = (xx * yy).sqrt()
    return torch.where(size > 0, xy / size, torch.nan).clamp(-1, 1)
