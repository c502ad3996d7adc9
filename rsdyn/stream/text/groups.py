"""Which sequences are left out together to see how far a number would move with other ones: whole documents."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rsdyn.dynamics.resampling import FEW_CLUSTERS, block_of, group_of
from rsdyn.stream.text.tokens import Sequences

Resample = Literal["documents", "sequences"]
Kind = Literal["documents", "blocks", "sequences"]


class SequenceGroups(NamedTuple):
    """Groups of the first sequences of a corpus.

    Attributes:
        group: ``(n,)`` int64, the group of each of them, from 0 on.
        n_clusters: how many documents, blocks or sequences the groups are made of.
        kind: which of the three.
    """

    group: Tensor
    n_clusters: int
    kind: Kind

    def of(self, sequence: Tensor) -> Tensor:
        """The group of each of the sequences numbered ``sequence`` ``(m,)``."""
        return self.group.to(sequence.device)[sequence]

    @property
    def n_groups(self) -> int:
        return int(self.group.max()) + 1

    @property
    def too_few(self) -> str:
        """What is to be said beside an interval that rests on these groups; empty where they are enough."""
        if self.n_clusters >= FEW_CLUSTERS:
            return ""
        return f"rests on {self.counted()}: too few"

    def counted(self) -> str:
        """How many clusters there are, in words."""
        what = {"documents": "document", "blocks": "block", "sequences": "sequence"}[self.kind]
        return f"{self.n_clusters} {what}{'s' * (self.n_clusters != 1)}"

    def words(self) -> str:
        """For a line of output."""
        several = f", in {self.n_groups} groups" if self.n_groups < self.n_clusters else ""
        of_text = " of the text, which names no documents" if self.kind == "blocks" else ""
        return f"{self.counted()}{of_text}{several}"


def clusters_of(sequences: Sequences, n: int, *, resample: Resample = "documents") -> tuple[Tensor, Kind]:
    """What each of the first ``n`` sequences is part of, int64 ``(n,)``, and whether it is documents, blocks or itself.

    See :func:`sequence_groups`, whose groups these are put together to.
    """
    if resample == "sequences":
        return torch.arange(n), "sequences"
    if sequences.documents is not None:
        return torch.from_numpy(sequences.documents[:n]), "documents"
    return block_of(torch.from_numpy(sequences.rows[:n])), "blocks"


def sequence_groups(sequences: Sequences, n: int | None = None, *, resample: Resample = "documents") -> SequenceGroups:
    """Groups of the first ``n`` sequences (default: all), at most ``dynamics.resampling.MOST_GROUPS``.

    With ``resample="documents"`` they are whole documents, where the text knows them: an interval says how far a number
    would move with other documents. Where it does not they are contiguous blocks of the corpus, whatever order the
    sequences are drawn in. With ``"sequences"`` every sequence counts for itself: how far it would move with other
    sequences out of the same documents, which is less.

    A function of the corpus, (seed, row) and ``n``: the same on every process.
    """
    n = len(sequences) if n is None else min(n, len(sequences))
    cluster, kind = clusters_of(sequences, n, resample=resample)
    if kind == "blocks":
        return SequenceGroups(cluster, int(cluster.max()) + 1, kind)
    return SequenceGroups(group_of(cluster), len(cluster.unique()), kind)
