"""Permutations of labels that leave exchangeable what is exchangeable: of whole documents, or within them.

If a label says nothing, it might as well have been another's. Whose, depends on how labels lie.

- Where all samples of a document have one label, documents are the units: whole documents exchange labels, and rows
  that are alike because they are of one document stay together (Winkler et al. 2015, NeuroImage 123, 253).
- Where labels vary within documents, samples exchange labels with samples of their own document alone, and what
  documents differ by cannot enter; documents of a single sample exchange theirs with one another. That takes the
  samples of one document as exchangeable, which labels in long stretches of it would not be.
- Where few documents have several labels, so that the second would leave less than half of the samples of some group
  other than the largest anything to exchange, documents are the units, and what a document has of each label is one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Exchange(NamedTuple):
    """Which labels may be exchanged.

    Attributes:
        kind: ``documents``, where whole ones exchange theirs, or ``within`` them.
        divided: how many documents have several labels.
        movable: how many samples can have another label than their own.
        log_count: the natural logarithm of how many labellings there are.
    """

    kind: Literal["documents", "within"]
    divided: int
    movable: int
    log_count: float


def exchange_of(label: Tensor, cluster: Tensor) -> Exchange:
    """How labels ``(N,)`` lie in clusters ``(N,)``, such as documents, both int64."""
    _, at = cluster.unique(return_inverse=True)
    kind, unit, stratum = _strata(label, at)
    first = _first(unit)
    of_unit, where = label[first], stratum[first]
    divided = int(((_table(label, at) > 0).sum(1) > 1).sum())
    log_count, mixed = 0.0, torch.zeros(int(stratum.max()) + 1, dtype=torch.bool)
    for s in range(len(mixed)):
        counts = of_unit[where == s].unique(return_counts=True)[1].tolist()
        mixed[s] = len(counts) > 1
        log_count += math.lgamma(1 + sum(counts)) - sum(math.lgamma(1 + c) for c in counts)
    return Exchange(kind, divided, int(mixed[stratum].sum()), log_count)


def permuted_labels(label: Tensor, cluster: Tensor, n: int, *, seed: int) -> Tensor:
    """``n`` labellings ``(n, N)`` of samples as good as their own if labels say nothing; see the module's words.

    Args:
        label: ``(N,)`` int64.
        cluster: ``(N,)`` int64, the document of each, any numbers.
        n, seed: of the permutations; the same whatever the process.
    """
    _, at = cluster.unique(return_inverse=True)
    _, unit, stratum = _strata(label, at)
    first = _first(unit)
    of_unit, where = label[first], stratum[first]
    generator = torch.Generator().manual_seed(seed)
    # sorted by stratum, then at random within it: the units' labels are dealt out in this order
    home = where.argsort(stable=True)
    out = torch.empty(n, len(of_unit), dtype=torch.int64)
    for row in out:
        chance = torch.randperm(len(of_unit), generator=generator)
        row[home] = of_unit[chance[where[chance].argsort(stable=True)]]
    return out[:, unit]


def _strata(label: Tensor, at: Tensor) -> tuple[Literal["documents", "within"], Tensor, Tensor]:
    """The kind, and of each sample the unit that has one label, and the stratum in which units exchange theirs."""
    table = _table(label, at)
    divided, alone = (table > 0).sum(1) > 1, table.sum(1) == 1
    if not divided.any():
        return "documents", at, torch.zeros_like(at)
    singles = label[alone[at]]
    moves = divided[at] | (alone[at] & bool((singles != singles[:1]).any()))
    size = table.sum(0)
    share = torch.bincount(label[moves], minlength=len(size)) / size.clamp(min=1)
    others = (size > 0) & (torch.arange(len(size)) != size.argmax())
    if bool((share[others] >= 0.5).all()):
        return "within", torch.arange(len(label)), torch.where(alone[at], 0, at + 1)
    unit = (at * len(size) + label).unique(return_inverse=True)[1]
    return "documents", unit, torch.zeros_like(at)


def _table(label: Tensor, at: Tensor) -> Tensor:
    """How many samples of each label each cluster, numbered from 0, has: ``(clusters, labels)``."""
    table = torch.zeros(int(at.max()) + 1, int(label.max()) + 1, dtype=torch.int64)
    return table.index_put_((at, label), torch.tensor(1), accumulate=True)


def _first(unit: Tensor) -> Tensor:
    """Where each unit, numbered from 0, first stands."""
    n = int(unit.max()) + 1
    return torch.full((n,), len(unit)).scatter_reduce_(0, unit, torch.arange(len(unit)), "amin")


def holm(p: Tensor) -> Tensor:
    """Holm's step-down adjustment of p-values ``(...)`` for all of them being tested; NaN is no test (Holm 1979)."""
    flat = p.flatten().to(torch.float64)
    known = (~flat.isnan()).nonzero().flatten()
    order = known[flat[known].argsort()]
    left = torch.arange(len(order), 0, -1, dtype=torch.float64)
    out = torch.full_like(flat, torch.nan)
    out[order] = (flat[order] * left).cummax(0).values.clamp(max=1) if len(order) else flat[order]
    return out.reshape(p.shape)


def permutation_p(observed: Tensor, permuted: Tensor) -> Tensor:
    """Two-sided p ``(...)`` of a difference from those under permuted labels ``(n, ...)``: ``(1 + b) / (1 + n)``.

    ``b`` counts those that are as large, ties by rounding included; permutations that leave nothing to compare (NaN)
    count as large. NaN where the difference itself is.
    """
    size = observed.abs()
    as_large = ~(permuted.abs() < size * (1 - 1e-9))
    p = (1 + as_large.sum(0, dtype=torch.float64)) / (1 + len(permuted))
    return torch.where(observed.isnan(), torch.nan, p)


def sequential_p(observed: Tensor, permuted: Tensor, enough: int) -> tuple[Tensor, bool]:
    """:func:`permutation_p` that may stop once ``enough`` are as large: ``enough`` over how many that took.

    Returns the p-values, and whether all of them have stopped (Besag & Clifford 1991, Biometrika 78, 301).
    """
    as_large = ~(permuted.abs() < observed.abs() * (1 - 1e-9))
    count = as_large.cumsum(0)
    stopped = count[-1] >= enough
    at = (count >= enough).to(torch.int8).argmax(0) + 1
    p = torch.where(stopped, enough / at.to(torch.float64), permutation_p(observed, permuted))
    return torch.where(observed.isnan(), torch.nan, p), bool((stopped | observed.isnan()).all())
