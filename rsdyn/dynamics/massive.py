"""Massive activations: the few units that are thousands of times larger than the rest, and where they come from.

Sun et al. 2024 (arXiv 2402.17762) found that they stand at the first token and at a few others, are written by one
layer and stay until the last ones. A mean over tokens hides them, so the largest absolute value is kept instead, by
class of token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS = (0, 1, 4, 16, 64)
"""The first position of each range in which norms are averaged; the last one has no end."""


class Written(NamedTuple):
    """Where curves over depth rise and fall.

    Attributes:
        onset: ``(...)`` the sublayer at which the largest step up has been made.
        before, after: ``(...)`` the values on either side of it.
        unwritten: ``(...)`` the first sublayer behind the peak with less than half of it; -1 where there is none.
    """

    onset: Tensor
    before: Tensor
    after: Tensor
    unwritten: Tensor


def written(curves: Tensor) -> Written:
    """Where curves of largest absolute values ``(..., S)`` are written and unwritten.

    Raises ``ValueError`` for fewer than two sublayers.
    """
    if curves.shape[-1] < 2:
        raise ValueError(f"curves: {curves.shape[-1]} sublayers, and a step needs two.")
    at = curves.diff(dim=-1).argmax(-1)
    values = curves.gather(-1, torch.stack([at, at + 1], -1))
    peak, where = curves.max(-1)
    sublayers = torch.arange(curves.shape[-1], device=curves.device)
    fallen = (sublayers > where[..., None]) & (curves < peak[..., None] / 2)
    unwritten = torch.where(fallen.any(-1), fallen.int().argmax(-1), -1)
    return Written(at + 1, values[..., 0], values[..., 1], unwritten)


def largest_units(largest: Tensor, typical: Tensor, n: int) -> Tensor:
    """The ``n`` units that stand out most, the first one first.

    Args:
        largest: ``(C, S, D)`` the largest absolute value of each unit, by class of token; NaN where a class is empty.
        typical: ``(C, S)`` the size of a typical unit there.
        n: how many.
    """
    ratio = (largest / typical[..., None].clamp_min(torch.finfo(typical.dtype).tiny)).nan_to_num(nan=0.0)
    return ratio.flatten(0, 1).amax(0).topk(min(n, largest.shape[-1])).indices


def position_range(position: Tensor) -> Tensor:
    """The range of :data:`POSITIONS` that positions ``(n,)`` lie in: ``(n,)`` int64."""
    return torch.bucketize(position, torch.tensor(POSITIONS[1:], device=position.device), right=True)


def range_names() -> tuple[str, ...]:
    """What the ranges of :data:`POSITIONS` are called: ``0``, ``1 to 3``, ..., ``64 on``."""
    ends = [*(stop - 1 for stop in POSITIONS[1:]), None]
    spans = zip(POSITIONS, ends, strict=True)
    return tuple(f"{a} on" if b is None else str(a) if a == b else f"{a} to {b}" for a, b in spans)
