"""Does the language model still make the numbers that the cache holds? A few sequences recorded again tell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
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


class CanaryRows(NamedTuple):
    """Sequences of a shard to record again.

    Attributes:
        rows: their places in the shard.
        is_whole: whether they are all that went through the model together, so that the same machine gives the same
            bits.
    """

    rows: list[int]
    is_whole: bool


def canary_rows(
    lengths: list[int],
    batch_tokens: int,
    layout: str = SORTED,
    apart: int | None = None,
    known: np.ndarray | None = None,
) -> CanaryRows:
    """The sequences of a shard to record again: those that went through the model together, and cost least.

    Together, since what goes along changes the rounding. ``layout`` and ``apart`` are those of
    :func:`rsdyn.lm.batches.make_batches`. ``known`` ``(n,)`` says of which sequences the tokens are at hand, at least
    one (default: all); where no batch is known as a whole, it is the known part of one.
    """
    known = np.ones(len(lengths), bool) if known is None else known
    batches = make_batches(lengths, batch_tokens, layout, apart)
    whole = [rows for rows in batches if known[rows].all()]
    if whole:
        return CanaryRows(min(whole, key=lambda rows: tokens_computed(lengths, [rows], layout)), True)
    parts = [[i for i in rows if known[i]] for rows in batches]
    return CanaryRows(min((p for p in parts if p), key=lambda rows: tokens_computed(lengths, [rows], layout)), False)


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
