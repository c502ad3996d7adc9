"""Which tokens of a sequence are recorded, and what is known of each: its place, its turn, BOS or sink.

A trajectory is one token of one sequence, ``(S, D)``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.options import is_positions
from rsdyn.stream.text.tokens import token_order

BOS, SINK = 1, 2  # bits of a trajectory's kind
SINK_RATIO = 10.0
_TURN = 1 << 40  # more sequences than anybody has


class Positions:
    """The tokens recorded of each sequence of a corpus.

    Args:
        rule: ``last``, the last token; ``all``, every token, BOS included; ``{"sample": k}``, ``k`` different tokens of
            each sequence, or all of one that has fewer, BOS as likely as any other. Else ``ValueError``.
        lengths: ``(N,)``, the tokens of each sequence, BOS included.
        seed: of the tokens' turns.

    The tokens of a sequence take turns in an order that depends on (seed, sequence number, its length) alone, never on
    batch, process or worker: ``{"sample": k}`` records the ``k`` whose turn comes first, and where only some of all are
    kept for a measure it is those too. The last token, when it is recorded alone, has turn 0.
    """

    def __init__(self, rule: Any, lengths: np.ndarray, *, seed: int = 0) -> None:
        if not is_positions(rule):
            raise ValueError(f"rule={rule}: it must be last, all, or {{'sample': k}} with a whole number k >= 1.")
        self.rule, self.lengths, self.seed = rule, lengths, seed

    @property
    def is_last(self) -> bool:
        """Whether a sequence has one trajectory, that of its last token."""
        return self.rule == "last"

    @cached_property
    def counts(self) -> np.ndarray:
        """``(N,)`` int64, the trajectories of each sequence."""
        if self.is_last:
            return np.ones(len(self.lengths), np.int64)
        most = self.rule["sample"] if isinstance(self.rule, dict) else np.iinfo(np.int64).max
        return np.minimum(self.lengths, most).astype(np.int64)

    def of(self, index: int) -> np.ndarray:
        """The recorded tokens of sequence ``index``, int64, rising; BOS is 0."""
        n = int(self.lengths[index])
        if self.is_last:
            return np.array([n - 1])
        return np.sort(token_order(self.seed, index, n)[: self.counts[index]])

    def mark(self, index: int) -> bytes:
        """Which tokens of sequence ``index`` are recorded, for the key by which the cache finds it."""
        if self.is_last:
            return b"last"
        return b"all" if self.counts[index] == self.lengths[index] else self.of(index).astype("<i8").tobytes()

    def turns(self, index: int) -> np.ndarray:
        """Of each of them, how many tokens of its sequence have their turn before it, int64."""
        if self.is_last:
            return np.zeros(1, np.int64)
        return np.argsort(token_order(self.seed, index, int(self.lengths[index]))[: self.counts[index]])

    def key(self) -> dict[str, Any]:
        """What of this enters the key of a corpus; nothing for ``last``."""
        if self.is_last:
            return {}
        return {"positions": self.rule} | ({"position_seed": self.seed} if isinstance(self.rule, dict) else {})

    def words(self) -> str:
        """For a line of output."""
        if isinstance(self.rule, dict):
            n = self.rule["sample"]
            return f"{n} token{'s' * (n > 1)} drawn of each sequence"
        return "the last token of each sequence" if self.is_last else "every token of each sequence"


def numbers(sequence: Tensor, turn: Tensor) -> Tensor:
    """One number for each trajectory, int64: in their order every sequence's first turn comes before any second one.

    The first N by number are thus spread over as many sequences as can be, and are the same tokens whatever the
    processes. Where each sequence has one trajectory its number is the sequence's.
    """
    return sequence + turn * _TURN


def sequence_of(number: Tensor) -> Tensor:
    """The sequence of a trajectory's :func:`numbers`."""
    return number % _TURN


def kinds(activations: Tensor, position: Tensor) -> Tensor:
    """Which of the trajectories of a shard ``(n, S, D)`` are BOS and sinks: ``(n,)`` uint8, bits ``BOS`` and ``SINK``.

    BOS is the token at position 0. A sink is one whose state at the middle sublayer, ``S // 2``, is longer than
    ``SINK_RATIO`` times the median over the shard's trajectories: many models put a norm of hundreds of others on BOS
    and on a few more tokens, which attention then rests on. Both are flags for readers; no measure leaves anything out.
    """
    middle = activations[:, activations.shape[1] // 2]
    norm = torch.cat([part.to(torch.float64).norm(dim=-1) for part in middle.split(4096)])
    is_sink = norm > SINK_RATIO * norm.median()
    return (BOS * (position == 0) + SINK * is_sink).to(torch.uint8)
