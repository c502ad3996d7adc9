"""``KeptStream``: trajectories that are in memory already, where a run would record them or read them from a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.stream.cache import Shard
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.text.positions import kinds
from rsdyn.stream.text.sequence_labels import labels_from
from rsdyn.stream.text.tokens import sequences_of
from rsdyn.stream.trajectories import TrajectoryStream


@dataclass(frozen=True)
class RecordedModel:
    """What is known of the model that a stream was recorded from, when the model itself is not there."""

    label: str
    site_names: tuple[str, ...]
    n_layers: int
    n_units: int

    digest: str = ""
    revision: None = None
    commit: None = None
    quantisation: None = None

    @property
    def name(self) -> str:
        return self.label

    def identity(self) -> str:
        """What tells this stream from all others, where a model would tell its weights: a digest of its numbers."""
        return f"a stream, xxh3 {self.digest}"

    def n_parameters(self) -> int:
        """Nobody knows."""
        return 0

    @property
    def n_sublayers(self) -> int:
        """``S``."""
        return self.n_layers * len(self.site_names)


class RecordedPositions:
    """Which tokens were recorded: what :class:`~rsdyn.stream.text.positions.Positions` answers, of a stream at hand."""

    def __init__(self, sequence: np.ndarray, position: np.ndarray) -> None:
        self._order = np.argsort(sequence, kind="stable")
        self._position = position[self._order]
        self.counts = np.bincount(sequence).astype(np.int64)
        self._ends = np.cumsum(self.counts)
        self.is_last = bool((self.counts == 1).all())
        place = np.arange(len(sequence)) - np.repeat(self._ends - self.counts, self.counts)
        every = bool((self._position == place).all())  # from the first one on, none left out
        self.rule: Any = "last" if self.is_last else "all" if every else "as recorded"

    def of(self, index: int) -> np.ndarray:
        """The recorded tokens of sequence ``index``."""
        return self._position[self._ends[index] - self.counts[index] : self._ends[index]]

    def turns(self, index: int) -> np.ndarray:
        """The turn of each of them, in the order they stand in."""
        return np.arange(self.counts[index])

    def key(self) -> dict[str, Any]:
        """Nothing of this enters a cache's key: there is no cache."""
        return {}

    def words(self) -> str:
        """For a line of output."""
        return "one token of each sequence" if self.is_last else "several tokens of each sequence, as recorded"


class KeptStream(TrajectoryStream):
    """A stream over :class:`~rsdyn.stream.recorded.Trajectories`; nothing of it is missing, and no model is loaded.

    Args:
        x: the trajectories; those of a sequence stand together.
        shard_sequences: sequences per shard.
        label: the model's name, in place of the trajectories' own.

    Raises ``UserError`` where sequences are not numbered from 0 on without a gap, in order.
    """

    def __init__(self, x: Trajectories, *, shard_sequences: int = 256, label: str | None = None) -> None:
        sequence = x.sequence.numpy()
        if len(sequence) == 0:
            raise UserError("x: it holds no trajectory.")
        numbers = np.unique(sequence)
        renumbered = np.searchsorted(numbers, sequence)
        if (np.diff(renumbered) < 0).any():
            raise UserError("x: the trajectories of a sequence must stand together, in the order of the sequences.")
        self.x = x
        self.lm: Any = RecordedModel(
            label or x.label, tuple(dict.fromkeys(x.sites)), len(set(x.layers)), x.shape[2], x.digest()
        )
        self.notes = x.notes
        ids = [np.zeros(1, np.int64)] * len(numbers) if x.tokens is None else [x.tokens[i].numpy() for i in numbers]
        self.sequences = sequences_of(ids, bos_id=None)  # of one token each, where nobody knows them
        if x.groups is not None:
            self.sequences = replace(self.sequences, labels=labels_from(x.groups[i] for i in numbers))
        self.tokens_are_known = x.tokens is not None
        self.positions: Any = RecordedPositions(renumbered, x.position.numpy())
        self.n_sequences, self.n_sublayers, self.n_units = len(numbers), x.shape[1], x.shape[2]
        self.dtype = x.tensor.dtype
        self.shard_sequences = shard_sequences
        self.n_shards = -(-self.n_sequences // shard_sequences)
        self.device = "cpu"
        self.n_recorded = 0
        self.certificate = x.certificate
        self.cache = None
        self._model = None
        self._starts = np.concatenate([[0], np.cumsum(self.positions.counts)])

    def open(self, samples: int | None = None) -> None:
        """Nothing is to be opened."""

    def missing_sequences(self, samples: int | None = None) -> np.ndarray:
        """Nothing is missing."""
        return np.empty(0, np.int64)

    def shard(self, k: int, on_record: Callable[[int], object] = lambda n: None) -> Shard:
        """Sequences ``k * shard_sequences`` and those after it, as a view of what is in memory."""
        start, stop = self.bounds(k)
        rows = slice(int(self._starts[start]), int(self._starts[stop]))
        index = torch.from_numpy(np.repeat(np.arange(start, stop), self.positions.counts[start:stop]))
        position = self.x.position[rows].to(torch.int32)
        activations: Tensor = self.x.tensor[rows]
        if self.positions.is_last:
            return Shard(activations, index, position + 1)
        return Shard(activations, index, position + 1, position, kinds(activations, position))
