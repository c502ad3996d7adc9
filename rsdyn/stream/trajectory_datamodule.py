"""``TrajectoryDataModule``: whole trajectories in the corpus' order, recorded where they are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from rsdyn.errors import UserError
from rsdyn.stream.cache import Shard
from rsdyn.stream.sharding import Batches, balanced_owners
from rsdyn.stream.text.positions import numbers
from rsdyn.stream.trajectories import TrajectoryStream


class TrajectoryBatch(NamedTuple):
    """Whole trajectories.

    Attributes:
        activations: ``(n, S, D)``, in the cache's dtype.
        sequence: ``(n,)`` int64, the numbers of the sequences in their corpus, never falling.
        number: ``(n,)`` int64, those of the trajectories (:func:`rsdyn.stream.text.positions.numbers`); None where each
            sequence has one, and it is the sequence's.
        kind: ``(n,)`` uint8, as in :class:`~rsdyn.stream.cache.Shard`; None there.
        position: ``(n,)`` int32, the token's place in its sequence; None there.
    """

    activations: Tensor
    sequence: Tensor
    number: Tensor | None = None
    kind: Tensor | None = None
    position: Tensor | None = None


def pieces(stream: TrajectoryStream, k: int, shard: Shard, n: int) -> Iterator[TrajectoryBatch]:
    """The first ``n`` trajectories of shard ``k``, as many at a time as a shard has sequences."""
    turns = stream.turns(k)
    for start in range(0, n, stream.shard_sequences):
        rows = slice(start, min(start + stream.shard_sequences, n))
        batch = TrajectoryBatch(shard.activations[rows], shard.index[rows])
        if turns is not None:
            batch = batch._replace(number=numbers(batch.sequence, turns[rows]))
        if shard.kind is not None:
            batch = batch._replace(kind=shard.kind[rows])
        yield batch if shard.position is None else batch._replace(position=shard.position[rows])


class TrajectoryDataModule(L.LightningDataModule):
    """The trajectories of the first ``samples`` sequences of a stream, once or several times over.

    For ``trainer.test``.

    Each process owns a fixed set of shards and gives every sequence of them once a pass; no sequence is given twice or
    padded in, so counts that do not divide by the processes are exact. A shard that is missing is recorded on the way.
    Without a cache the recorded shards are kept in memory, so that a second pass does not need the LM again, where each
    sequence has one trajectory; more would not fit, and the second pass records them again.

    Args:
        stream: where the shards come from.
        samples: how many sequences, from the first one on; default all.
        passes: how often; each is a dataloader of its own. With 0 nothing is read.
        on_record: called with the number of sequences after each batch that went through the language model.
    """

    def __init__(
        self,
        stream: TrajectoryStream,
        *,
        samples: int | None = None,
        passes: int = 1,
        on_record: Callable[[int], object] = lambda n: None,
    ) -> None:
        super().__init__()
        self.stream, self.passes, self._on_record = stream, passes, on_record
        self.n_samples = min(samples or stream.n_sequences, stream.n_sequences)
        self.n_shards = stream.shards_of(self.n_samples)
        self._pin = False
        self._kept: dict[int, Shard] = {}
        self.set_process(0, 1)

    def set_process(self, rank: int, world_size: int) -> None:
        """Be process ``rank`` of ``world_size``: decides which shards this one owns."""
        if self.passes and world_size > self.n_shards:
            raise UserError(
                f"devices: {world_size} processes for {self.n_shards} shard{'s' * (self.n_shards > 1)} of "
                f"{self.stream.shard_sequences} sequences, so some would have nothing to do. Raise `samples` (now "
                f"{self.n_samples}), lower "
                "`shard_sequences`, or use fewer devices."
            )
        counts = np.array([self._n_rows(k) for k in range(self.n_shards)])
        owners = balanced_owners(counts, world_size)
        self.own_shards = [k for k in range(self.n_shards) if owners[k] == rank]

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.set_process(self.trainer.global_rank, self.trainer.world_size)
            self.stream.device = self.trainer.strategy.root_device
            self._pin = self.stream.device.type == "cuda"

    def test_dataloader(self) -> list[DataLoader]:
        n_batches = sum(-(-self._n_rows(k) // self.stream.shard_sequences) for k in self.own_shards)
        batches = Batches(self._trajectories, n_batches)
        return [DataLoader(batches, batch_size=None, num_workers=0, pin_memory=self._pin) for _ in range(self.passes)]

    def n_own_missing(self) -> int:
        """How many sequences this process still has to record; recording goes by whole shards."""
        shards = self.stream.missing_sequences(self.n_samples) // self.stream.shard_sequences
        return int(np.isin(shards, self.own_shards).sum())

    def _n_rows(self, k: int) -> int:
        start, stop = self.stream.bounds(k)
        return self.stream.n_trajectories(start, min(stop, self.n_samples))

    def _trajectories(self) -> Iterator[TrajectoryBatch]:
        for k in self.own_shards:
            shard = self._kept.get(k) or self.stream.shard(k, self._on_record)
            if self.stream.cache is None and self.stream.positions.is_last:
                self._kept[k] = shard
            yield from pieces(self.stream, k, shard, self._n_rows(k))
