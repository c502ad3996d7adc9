"""How alike the streams of two models are on the same texts: debiased CKA of their sublayers over depth (METHOD 14).

Nothing is recorded: each run keeps the Gram matrices of its first sequences, and two of them are compared on those
whose text is the same, whatever the tokens, the order, or the width of the models.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rsdyn.analysis.over_sequences import with_interval
from rsdyn.analysis.results import Grams, Measured
from rsdyn.dynamics.resampling import group_of
from rsdyn.dynamics.similarity import map_of, permuted_map, unpacked, without_each_group

LEAST_SHARED = 20  # sequences, below which chance reaches far
N_GROUPS = 20
PERMUTATIONS = 5  # of the sequences, each of which gives a whole map


@dataclass(frozen=True, eq=False)
class ModelSimilarity:
    """CKA between the sublayers of two models, or of a model and an untrained one.

    Attributes:
        labels: theirs.
        n: how many sequences both have.
        map: ``(S, S')``, a row per sublayer of the first.
        floor: what is exceeded by 2.5 % of all pairs of sublayers where the sequences of the second are permuted.
        curve: ``(S,)`` of each sublayer of the first with that of the second at the same share of the depth.
        mean: of that curve.
    """

    labels: tuple[str, str]
    n: int
    map: Tensor
    floor: float
    curve: Measured
    mean: Measured

    @property
    def at(self) -> Tensor:
        """Where the curve is, ``(S,)``, over depth from 0 to 1."""
        return torch.linspace(0, 1, len(self.map), dtype=torch.float64)


def similarities(known: Mapping[str, Grams], *, seed: int = 0) -> tuple[list[ModelSimilarity], list[str]]:
    """The similarity of every pair on the sequences that both have; of other pairs, in words, why there is none."""
    found, missing = [], []
    for (one, a), (other, b) in itertools.combinations(known.items(), 2):
        rows, others = shared_texts(a.texts, b.texts)
        if len(rows) >= LEAST_SHARED:
            found.append(between((one, other), _of(a, rows), _of(b, others), a.group[rows], seed=seed))
        else:
            missing.append(
                f"{one} and {other}: {len(rows)} of their sequences are of the same text, and {LEAST_SHARED} are needed"
            )
    return found, missing


def between(labels: tuple[str, str], mine: Tensor, theirs: Tensor, group: Tensor, *, seed: int) -> ModelSimilarity:
    """The similarity of two models from their hollow Gram matrices ``(S, N, N)`` and ``(S', N, N)``.

    ``group`` ``(N,)`` says which sequences an interval leaves out together.
    """
    at = torch.linspace(0, 1, len(mine), dtype=torch.float64)
    opposite = theirs[(at * (len(theirs) - 1)).round().to(torch.int64)]
    value, without = without_each_group(mine, opposite, group_of(group, N_GROUPS))
    return ModelSimilarity(
        labels=labels,
        n=len(group),
        map=map_of(mine, theirs),
        floor=float(permuted_map(mine, theirs, n=PERMUTATIONS, seed=seed).nanquantile(0.975)),
        curve=with_interval(value, without, n=len(group)),
        mean=with_interval(value.nanmean(), without.nanmean(1), n=len(group)),
    )


def shared_texts(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the texts that both have, the first of equal ones, in the order of ``mine``."""
    place = {text: i for i, text in reversed(list(enumerate(theirs.tolist())))}
    own = {text: i for i, text in reversed(list(enumerate(mine.tolist()))) if text in place}
    rows = sorted(own.values())
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([place[int(mine[i])] for i in rows], dtype=torch.int64)


def _of(kept: Grams, rows: Tensor) -> Tensor:
    return unpacked(kept.pairs, len(kept.texts))[:, rows][:, :, rows]
