"""The measure ``similarity``: how alike the states of sublayers and of streams are, whatever their basis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rsdyn.analysis.by_position import states_by_range
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.over_sequences import with_interval
from rsdyn.analysis.results import Grams, Measured, Similarity
from rsdyn.analysis.settings import UNTRAINED
from rsdyn.dynamics.resampling import group_of
from rsdyn.dynamics.similarity import LEAST, hollow_grams, map_of, packed, permuted_floor, without_each_group
from rsdyn.metrics.processes import from_all

N_GROUPS = 20
KEPT = 400  # sequences whose Gram matrices are kept: 10 MB for 60 sublayers


def similarity(collected: Collected, main: Collected | None = None, *, seed: int, floor: bool = True) -> Similarity:
    """CKA of the states that were kept: all sublayers with each other, and each with that of the stream ``main``.

    ``floor`` also measures it where the sequences of one of two sublayers are permuted.
    """
    share = collected.share
    assert share is not None
    usable = ~collected.unusable
    grams = _grams(collected, usable)
    few = _grams(collected, usable & ~collected.massive) if collected.massive.any() else None
    found = Similarity(
        map=map_of(grams),
        adjacent=_pairs(collected, grams[:-1], grams[1:], None if few is None else (few[:-1], few[1:])),
        floor=permuted_floor(grams[:-1], grams[1:], seed=seed) if floor else None,
        map_without_massive=None if few is None else map_of(few),
        grams=_kept(collected, grams) if main is None or collected.name == UNTRAINED else None,
        by_position=_by_position(collected),
    )
    if main is None:
        return found
    assert main.share is not None
    theirs, ours = main.share.number, share.number
    both = torch.isin(ours, theirs)
    if int(both.sum()) < LEAST:
        return found
    mine, their_rows = both.nonzero().flatten(), torch.searchsorted(theirs, ours[both])
    grams, others = _of_rows(grams, mine), _of_rows(_grams(main, ~main.unusable), their_rows)
    return replace(found, with_main=_pairs(collected, grams, others, None, mine))


def _of_rows(grams: Tensor, rows: Tensor) -> Tensor:
    """Some rows and columns; no copy of all of them, which is 240 MB for 60 sublayers of 1000 sequences."""
    if torch.equal(rows, torch.arange(grams.shape[-1], device=rows.device)):
        return grams
    return grams[:, rows][:, :, rows]


def _by_position(collected: Collected) -> Tensor | None:
    """``(P, S - 1)``, of each sublayer with the next, over the tokens of each range of positions."""
    states = states_by_range(collected)
    if all(x is None for x in states):
        return None
    found = []
    for x in states:
        mine = None if x is None else hollow_grams(x)
        parts = [part for part in from_all(mine, collected.unusable.device) if part is not None]
        if not parts:
            found.append(torch.full((collected.n_sublayers - 1,), torch.nan, dtype=torch.float64))
            continue
        grams = torch.cat(parts)
        found.append(without_each_group(grams[:-1], grams[1:], torch.zeros(grams.shape[-1]))[0])
    return torch.stack(found)


def _kept(collected: Collected, grams: Tensor) -> Grams | None:
    share, texts = collected.share, collected.texts
    assert share is not None
    if texts is None:
        return None
    sequence = share.sequence[:KEPT].cpu()
    n = len(sequence)
    return Grams(packed(grams[:, :n, :n]).cpu(), texts[sequence], collected.group_of(sequence))


def _pairs(
    collected: Collected,
    grams: Tensor,
    others: Tensor,
    few: tuple[Tensor, Tensor] | None,
    rows: Tensor | None = None,
) -> Measured:
    share = collected.share
    assert share is not None
    sequence = share.sequence if rows is None else share.sequence[rows]
    group = group_of(collected.group_of(sequence), N_GROUPS)
    value, without = without_each_group(grams, others, group)
    one = torch.zeros_like(group)
    rest = None if few is None else Measured(without_each_group(*few, one)[0])
    return with_interval(value, without, without_massive=rest, n=len(sequence))


def _grams(collected: Collected, units: Tensor) -> Tensor:
    """The Gram matrix of each sublayer, ``(S, N, N)``; over processes each makes those of its sublayers."""
    share = collected.share
    assert share is not None
    x = share.by_sublayer()
    mine = hollow_grams(x if units.all() else x[..., units])
    return torch.cat(from_all(mine, mine.device))


MEASURE = Measure(
    lambda collected, how: similarity(collected, how.main, seed=how.seed, floor=how.main is None), keeps_samples=True
)
