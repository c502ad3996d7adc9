"""``Raw``: states as somebody wrote them, sequence by sequence, before anything is believed of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Raw:
    """States of tokens of several sequences.

    Attributes:
        states: of each sequence ``(t, S, D)``, its recorded tokens.
        position: of each sequence ``(t,)`` int64, which token each is; the first is 0.
        sites, layers: ``S`` names and numbers.
        tokens: the ids of each sequence, all of them, as far as they are known.
        is_batch: whether the sequences stood in one array of equal length, where padding may be.
        name: what messages call it.
    """

    states: tuple[Tensor, ...]
    position: tuple[Tensor, ...]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[Tensor, ...] | None
    is_batch: bool
    name: str

    @property
    def begins_at_embedding(self) -> bool:
        """Whether the first sublayer is declared to be the input of layer 0."""
        return self.layers[0] == 0 and self.sites[0] == "resid_pre"

    def recorded_tokens(self) -> Tensor | None:
        """The id of each recorded token, ``(n,)``; None where they are not known."""
        if self.tokens is None:
            return None
        return torch.cat([ids[at] for ids, at in zip(self.tokens, self.position, strict=True)])

    def all_states(self) -> Tensor:
        """``(n, S, D)``, in the order of the sequences."""
        return torch.cat(self.states)

    def words_from_the_start(self) -> tuple[Tensor, ...] | None:
        """A number for each of the first tokens of every sequence: equal ones for equal tokens; None if unknown.

        Without ids, equal states in front of layer 0 are equal tokens, where positions are not added to them.
        """
        if self.tokens is not None:
            return self.tokens
        starts = all(len(at) > 1 and torch.equal(at, torch.arange(len(at))) for at in self.position)
        if not starts or not self.begins_at_embedding:
            return None
        first = torch.cat([x[:, 0] for x in self.states])
        return torch.unique(first.float(), dim=0, return_inverse=True)[1].split([len(x) for x in self.states])
