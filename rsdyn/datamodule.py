"""``ResidualStreamDataModule``: batches of stream vectors, recorded in the first epoch, then read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rsdyn.dynamics.moments import Moments, merge, moments
from rsdyn.errors import UserError
from rsdyn.stream.cache import Shard
from rsdyn.stream.text import split
from rsdyn.stream.trajectories import TrajectoryStream

Split = Literal["train", "val", "test"]


class VectorBatch(NamedTuple):
    """Stream vectors, each a sample of its own.

    Attributes:
        x: ``(n, D)``, in the cache's dtype.
        sublayer: ``(n,)`` int64, 0 to ``S - 1``.
        sequence: ``(n,)`` int64, the number of the sequence in its corpus.
    """

    x: Tensor
    sublayer: Tensor
    sequence: Tensor


class ResidualStreamDataModule(L.LightningDataModule):
    """Train, validation and test batches of a trajectory stream, on one process or several.

    Each process owns a fixed set of shards: it alone records, trains on and evaluates them, so no sequence is recorded
    twice or never. The training batches are equal in number on all processes (the longer ones drop their tail,
    ``dropped`` says how many vectors), since uneven ones would hang. The language model lives in the stream and never
    in a module, so it enters neither checkpoint nor optimiser nor DDP. ``on_shard`` is called with the trajectories of
    each own shard when it is first at hand.

    Args:
        stream: where the shards come from.
        val_size, test_size: each a fraction of the sequences if below 1, else their number.
        batch_by: ``vector``: vectors shuffled across sequences; ``sequence``: the ``S`` vectors of whole sequences
            together (the paper's, with ``batch_size=1``).
        batch_size: vectors, or sequences, in a training batch.
        shuffle_shards: how many shards are in memory, and shuffled together, at a time.
        seed: of the splits and of the order of the batches, which depends on (seed, epoch, process) alone: it is the
            same whether the cache was there or not.
    """

    def __init__(
        self,
        stream: TrajectoryStream,
        *,
        val_size: float = 0.1,
        test_size: float = 0.15,
        batch_by: Literal["sequence", "vector"] = "vector",
        batch_size: int = 512,
        shuffle_shards: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        self.stream = stream
        self.batch_by, self.batch_size, self.shuffle_shards, self.seed = batch_by, batch_size, shuffle_shards, seed
        self.splits = split(stream.n_sequences, val_size=val_size, test_size=test_size, seed=seed)
        self.on_shard: Callable[[TrajectoryBatch], object] = lambda batch: None
        self._statistics: Moments | None = None
        self._counted: set[int] = set()
        self._pin = False
        self.set_process(0, 1)

    def set_process(self, rank: int, world_size: int) -> None:
        """Be process ``rank`` of ``world_size``: decides which shards this one owns."""
        if world_size > self.stream.n_shards:
            raise UserError(
                f"trainer.devices: {world_size} processes for {self.stream.n_shards} shards of "
                f"{self.stream.shard_sequences} sequences, so some would have nothing to do. Set cache.shard_sequences "
                f"to at most {max(1, self.stream.n_sequences // world_size)}, or use fewer devices."
            )
        self.rank, self.world_size = rank, world_size
        counts = np.array([len(self._rows(k, "train")) for k in range(self.stream.n_shards)])
        owners = balanced_owners(counts, world_size)
        self.own_shards = [k for k in range(self.stream.n_shards) if owners[k] == rank]
        per_batch = self.batch_size if self.batch_by == "sequence" else self.batch_size / self.stream.n_sublayers
        per_process = np.bincount(owners, weights=counts, minlength=world_size)
        batches = np.ceil(per_process / per_batch).astype(int)
        self.n_train_batches = int(batches.min())
        if self.n_train_batches == 0:
            raise UserError(
                f"trainer.devices: a process of {world_size} would have no training sequence. Lower "
                "cache.shard_sequences, or use fewer devices."
            )
        kept = np.minimum(per_process, self.n_train_batches * per_batch)
        self.dropped = round(float((per_process - kept).sum()) * self.stream.n_sublayers)

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.set_process(self.trainer.global_rank, self.trainer.world_size)
            self.stream.device = self.trainer.strategy.root_device
            self._pin = self.stream.device.type == "cuda"

    # -- batches -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        return self._loader(_Batches(self._train_batches, self.n_train_batches))

    def val_dataloader(self) -> DataLoader:
        return self._loader(_Batches(lambda: self._eval_batches("val"), self._n_eval_batches("val")))

    def test_dataloader(self) -> DataLoader:
        return self._loader(_Batches(lambda: self._eval_batches("test"), self._n_eval_batches("test")))

    def _loader(self, batches: _Batches) -> DataLoader:
        # no workers: the language model runs in this process, and the batches are slices of what is already in memory
        return DataLoader(batches, batch_size=None, num_workers=0, pin_memory=self._pin)

    def whole_sequences(self, part: Split) -> Iterator[VectorBatch]:
        """A split's sequences of this process, in order: at most a shard's share a batch."""
        for k in self.own_shards:
            rows = self._rows(k, part)
            if len(rows):
                shard = self._shard(k)
                yield _as_vectors(shard.activations[rows], shard.index[rows])

    def _eval_batches(self, part: Split) -> Iterator[VectorBatch]:
        given = False
        for batch in self.whole_sequences(part):
            given = True
            yield batch
        if not given:  # a process without a batch would skip the loop, and the others would wait for it at its end
            empty = torch.empty(0, self.stream.n_sublayers, self.stream.n_units, dtype=self.stream.dtype)
            yield _as_vectors(empty, torch.empty(0, dtype=torch.int64))

    def _n_eval_batches(self, part: Split) -> int:
        return max(1, sum(len(self._rows(k, part)) > 0 for k in self.own_shards))

    def _train_batches(self) -> Iterator[VectorBatch]:
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        order = rng.permutation(self.own_shards)
        windows = [order[i : i + self.shuffle_shards] for i in range(0, len(order), self.shuffle_shards)]
        left: VectorBatch | None = None
        n_given = 0
        for position, window in enumerate(windows):
            pool = self._window(window, rng, left)
            unit = self.stream.n_sublayers if self.batch_by == "sequence" else 1
            step = self.batch_size * unit
            is_last = position == len(windows) - 1
            stop = len(pool.x) if is_last else len(pool.x) // step * step
            for start in range(0, stop, step):
                if n_given == self.n_train_batches:
                    return
                n_given += 1
                yield VectorBatch(*(t[start : start + step] for t in pool))
            left = VectorBatch(*(t[stop:].clone() for t in pool))

    def _window(self, window: np.ndarray, rng: np.random.Generator, left: VectorBatch | None) -> VectorBatch:
        """The training vectors of some shards, shuffled by vector or by sequence, behind what the last window left."""
        activations, index = [], []
        for k in window:
            shard = self._shard(int(k))
            rows = self._rows(int(k), "train")
            activations.append(shard.activations[rows])
            index.append(shard.index[rows])
        x = torch.cat(activations)
        sequences = torch.cat(index)
        if self.batch_by == "sequence":
            order = torch.from_numpy(rng.permutation(len(x)))
            pool = _as_vectors(x[order], sequences[order])
        else:
            order = torch.from_numpy(rng.permutation(len(x) * x.shape[1]))
            pool = VectorBatch(*(t[order] for t in _as_vectors(x, sequences)))
        if left is None or len(left.x) == 0:
            return pool
        return VectorBatch(*(torch.cat(pair) for pair in zip(left, pool, strict=True)))

    def n_own_missing(self) -> int:
        """How many sequences this process still has to record."""
        cache = self.stream.cache
        missing = [k for k in self.own_shards if cache is None or not cache.has(k)]
        return sum(stop - start for start, stop in map(self.stream.bounds, missing))

    # -- shards --------------------------------------------------------------------------------------------------------

    def _rows(self, k: int, part: Split) -> Tensor:
        """Rows of shard ``k`` that belong to a split."""
        start, stop = self.stream.bounds(k)
        members = self.splits[part]
        return torch.from_numpy(members[np.searchsorted(members, start) : np.searchsorted(members, stop)] - start)

    def _shard(self, k: int) -> Shard:
        shard = self.stream.shard(k)
        if k not in self._counted:
            self.on_shard(TrajectoryBatch(shard.activations, shard.index))
            part = moments(shard.activations[self._rows(k, "train")])
            self._statistics = part if self._statistics is None else merge(self._statistics, part)
            self._counted.add(k)
        return shard

    def train_statistics(self, *, complete: bool = False) -> Moments:
        """Moments ``(S, D)`` of this process' training sequences seen so far; with ``complete``, of all of them."""
        if complete or self._statistics is None:
            for k in self.own_shards:
                if k not in self._counted:
                    self._shard(k)
        assert self._statistics is not None
        return self._statistics


class TrajectoryBatch(NamedTuple):
    """Whole trajectories.

    Attributes:
        activations: ``(n, S, D)``, in the cache's dtype.
        sequence: ``(n,)`` int64, the numbers of the sequences in their corpus, rising.
    """

    activations: Tensor
    sequence: Tensor


class TrajectoryDataModule(L.LightningDataModule):
    """The first ``samples`` trajectories of a stream, whole, once or several times over, for ``trainer.test``.

    Each process owns a fixed set of shards and gives every sequence of them once a pass; no sequence is given twice or
    padded in, so counts that do not divide by the processes are exact. A shard that is missing is recorded on the way.
    Without a cache the recorded shards are kept in memory, so that a second pass does not need the LM again.

    Args:
        stream: where the shards come from.
        samples: how many sequences, from the first one on; default all.
        passes: how often; each is a dataloader of its own.
    """

    def __init__(self, stream: TrajectoryStream, *, samples: int | None = None, passes: int = 1):
        super().__init__()
        self.stream, self.passes = stream, passes
        self.n_samples = min(samples or stream.n_sequences, stream.n_sequences)
        self.n_shards = stream.shards_of(self.n_samples)
        self._pin = False
        self._kept: dict[int, Shard] = {}
        self.set_process(0, 1)

    def set_process(self, rank: int, world_size: int) -> None:
        """Be process ``rank`` of ``world_size``: decides which shards this one owns."""
        if world_size > self.n_shards:
            raise UserError(
                f"trainer.devices: {world_size} processes for {self.n_shards} shards of {self.stream.shard_sequences} "
                f"sequences, so some would have nothing to do. Raise analysis.samples (now {self.n_samples}), lower "
                "cache.shard_sequences, or use fewer devices."
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
        batches = _Batches(self._trajectories, len(self.own_shards))
        return [DataLoader(batches, batch_size=None, num_workers=0, pin_memory=self._pin) for _ in range(self.passes)]

    def n_own_missing(self) -> int:
        """How many sequences this process still has to record; recording goes by whole shards."""
        missing = set(self.stream.missing(self.n_samples)) & set(self.own_shards)
        return sum(stop - start for start, stop in map(self.stream.bounds, missing))

    def _n_rows(self, k: int) -> int:
        start, stop = self.stream.bounds(k)
        return min(stop, self.n_samples) - start

    def _trajectories(self) -> Iterator[TrajectoryBatch]:
        for k in self.own_shards:
            shard = self._kept.get(k) or self.stream.shard(k)
            if self.stream.cache is None:
                self._kept[k] = shard
            rows = self._n_rows(k)
            yield TrajectoryBatch(shard.activations[:rows], shard.index[:rows])


class _Batches(IterableDataset):
    """A generator function with a length: Lightning needs the length for its progress and for exact restarts."""

    def __init__(self, make: Callable[[], Iterator[Any]], n_batches: int):
        self.make, self.n_batches = make, n_batches

    def __iter__(self) -> Iterator[Any]:
        return self.make()

    def __len__(self) -> int:
        return self.n_batches


def _as_vectors(activations: Tensor, index: Tensor) -> VectorBatch:
    """``(n, S, D)`` trajectories as ``n S`` vectors, sublayers of a sequence together."""
    n, n_sublayers, n_units = activations.shape
    sublayer = torch.arange(n_sublayers).repeat(n)
    return VectorBatch(activations.reshape(-1, n_units), sublayer, index.repeat_interleave(n_sublayers))


def balanced_owners(counts: np.ndarray, world_size: int) -> np.ndarray:
    """An owner for each shard, so that all have about the same count: largest first, to whoever has least.

    Depends on its arguments alone, so every process finds the same.
    """
    owners = np.zeros(len(counts), dtype=np.int64)
    load = np.zeros(world_size)
    n_owned = np.zeros(world_size)
    for k in np.argsort(-counts, kind="stable"):
        owner = int(np.lexsort((np.arange(world_size), n_owned, load))[0])
        owners[k] = owner
        load[owner] += counts[k]
        n_owned[owner] += 1
    return owners
