"""Which subsets of the kept trajectories are groups of sequences, and which of these are compared with which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rsdyn.analysis.subset_curves import AT_EQUAL_N, SPECTRAL, Members
from rsdyn.dynamics.resampling import MOST_GROUPS, group_of
from rsdyn.dynamics.subsets import lowest
from rsdyn.errors import UserError

LEAST = 10  # sequences of a group that is compared with others
MOST_SPECTRUM = 100  # sequences of a group whose dimensions are compared, each an eigenproblem of this size


@dataclass(frozen=True)
class Labelled:
    """The groups of the first sequences of a corpus.

    Attributes:
        names: of the groups.
        code: ``(n,)`` int64, each sequence's place in ``names``; -1 where it has no label.
        cluster: ``(n,)`` int64, the document of each, a block of the text, or the sequence itself.
        kind: which of the three, ``documents``, ``blocks`` or ``sequences``.
    """

    names: tuple[str, ...]
    code: Tensor
    cluster: Tensor
    kind: str


def check_groups(labelled: Labelled, n: int) -> None:
    """Raise ``UserError`` unless the first ``n`` sequences are of two groups at least."""
    known = labelled.code[:n]
    there = known[known >= 0].unique().tolist()
    if len(there) < 2:
        said = f"are of one group, {labelled.names[there[0]]}" if there else "have no label"
        raise UserError(
            f"groups: all {len(known)} sequences that are compared {said}, so there is nothing to compare. Measure "
            "more sequences (`samples`, `keep`, `limit`), or leave the groups out."
        )


class GroupDesign:
    """Which subsets of the kept trajectories are compared.

    Attributes:
        names: of the L groups; ``counts`` and ``documents`` ``(L,)`` their sequences, and what these are part of.
        compared: those that are large enough.
        contrasts: pairs of places in what :meth:`members` gives: the compared groups, then the rest to each, if there
            are more than two groups.
        first, second: the names of each contrast.
    """

    def __init__(self, names: tuple[str, ...], code: Tensor, cluster: Tensor, row_of: Tensor, chance: Tensor) -> None:
        self.names, self.code, self.cluster, self.row_of, self.chance = names, code, cluster, row_of, chance
        groups = range(len(names))
        self.counts = torch.tensor([int((code == g).sum()) for g in groups])
        self.documents = torch.tensor([len(cluster[code == g].unique()) for g in groups])
        total = int((code >= 0).sum())
        several = len(names) > 2
        large = [g for g in groups if self.counts[g] >= LEAST and self.documents[g] >= 2]
        if several:
            large = [g for g in large if total - int(self.counts[g]) >= LEAST]
        self.compared, self.several = large, several
        k = len(large)
        self.contrasts = [(i, k + i) for i in range(k)] if several else [(0, 1)] * (k == 2)
        self.first = tuple(names[large[i]] for i, _ in self.contrasts)
        self.second = tuple("the rest" if several else names[large[j]] for _, j in self.contrasts)

    @classmethod
    def of(cls, names: tuple[str, ...], code: Tensor, cluster: Tensor, row_of: Tensor, *, seed: int) -> GroupDesign:
        """The design; ``seed`` draws what of larger groups is compared."""
        return cls(names, code, cluster, row_of, torch.rand(len(row_of), generator=torch.Generator().manual_seed(seed)))

    def n_of(self, path: str) -> Tensor:
        """On how many trajectories each group's curve is measured, ``(L,)``."""
        some = self.of_groups()
        part = some.few if path in SPECTRAL else some.equal if path in AT_EQUAL_N else some.full
        return part.sum(1)

    def full(self, labels: Tensor) -> Tensor:
        """Under labellings ``(P, n)`` of the sequences the trajectories of each subset, ``(P, K, N)``."""
        each = torch.stack([labels == g for g in self.compared], dim=1)
        if self.several:
            each = torch.cat([each, (labels >= 0)[:, None] & ~each], dim=1)
        return each[..., self.row_of]

    def members(self, labels: Tensor) -> Members:
        """The subsets of labellings ``(P, n)``, ``(P K, N)``; N is equal over those of one labelling."""
        full = self.full(labels)
        p, k, n = full.shape
        most = full.sum(2).amin(1, keepdim=True).expand(p, k).reshape(-1)
        full = full.reshape(p * k, n)
        equal = lowest(full, self.chance, most)
        return Members(full, equal, lowest(equal, self.chance, most.clamp(max=MOST_SPECTRUM)))

    def of_groups(self) -> Members:
        """The subsets of all L groups under their own labels; those that are not compared have none at equal N."""
        full = torch.stack([self.code == g for g in range(len(self.names))])[:, self.row_of]
        none = torch.zeros_like(full)
        if not self.compared:
            return Members(full, none, none.clone())
        some = self.members(self.code[None])
        few = none.clone()
        for place, g in enumerate(self.compared):
            none[g], few[g] = some.equal[place], some.few[place]
        return Members(full, none, few)

    def left_of(self, rows: Tensor) -> Tensor:
        """The trajectories that an interval of the subset ``rows`` ``(N,)`` leaves out in turn, ``(G, N)``."""
        place = torch.full((len(rows),), -1)
        place[rows] = group_of(self.cluster[self.row_of][rows])
        return torch.stack([place == g for g in range(int(place.max()) + 1)])

    def left_of_both(self, a: Tensor, b: Tensor) -> Tensor:
        """Those that an interval of a difference leaves out in turn: whole documents, an equal share of each subset's.

        Documents that have sequences of both go with the subset that has more of them.
        """
        cluster = self.cluster[self.row_of].unique(return_inverse=True)[1]
        n = int(cluster.max()) + 1
        ours, theirs = (torch.bincount(cluster[rows], minlength=n) for rows in (a, b))
        sides = [side for side in ((ours >= theirs) & (ours > 0), theirs > ours) if side.any()]
        most = min(MOST_GROUPS, *(int(side.sum()) for side in sides))
        place = torch.full((len(a),), -1)
        for side in sides:
            rows = side[cluster] & (a | b)
            place[rows] = group_of(cluster[rows], most)
        return torch.stack([place == g for g in range(most)])
