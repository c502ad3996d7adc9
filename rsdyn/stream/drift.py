"""Does the language model still make the numbers that the cache holds? A few sequences recorded again tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.lm.batches import SORTED, make_batches, tokens_computed


class Canary(NamedTuple):
    """How far trajectories recorded again are from those in the cache, at worst.

    Attributes:
        difference: the distance of the two states over the norm of the cached one.
        row, sublayer: where.
    """

    difference: float
    row: int
    sublayer: int


def canary_rows(lengths: list[int], batch_tokens: int, layout: str = SORTED, apart: int | None = None) -> list[int]:
    """The sequences of a shard to record again: those that went through the model together, and cost least.

    Together, since what goes along changes the rounding: the same machine must give the same bits. ``layout`` and
    ``apart`` are those of :func:`rsdyn.lm.batches.make_batches`.
    """
    batches = make_batches(lengths, batch_tokens, layout, apart)
    return min(batches, key=lambda rows: tokens_computed(lengths, [rows], layout))


def compare(again: Tensor, cached: Tensor) -> Canary:
    """Compare trajectories ``(n, S, D)`` recorded again with the cached ones."""
    tiny = torch.finfo(torch.float32).tiny
    parts = []
    for a, b in zip(again.split(32), cached.split(32), strict=True):  # float64 copies of a few rows at a time
        b = b.double()
        parts.append((a.double() - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(tiny))
    difference = torch.cat(parts)
    row, sublayer = divmod(int(difference.argmax()), difference.shape[1])
    return Canary(float(difference[row, sublayer]), row, sublayer)


def tolerance(*, lm_dtype: str, matmul_precision: str, stored: torch.dtype) -> float:
    """The largest :attr:`Canary.difference` that rounding on another processor can explain.

    float32 differs by some 1e-6 a layer, and bfloat16 on disk rounds that to whole steps of 2^-8 in a few units; bf16
    or TF32 products differ by 1e-2 (1.8e-2 was the largest in 16 layers).
    """
    if lm_dtype in ("bfloat16", "float16") or matmul_precision != "highest":
        return 5e-2
    return 5e-3 if stored == torch.bfloat16 else 1e-3
