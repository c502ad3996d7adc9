"""``ResidualStreamDataModule``: batches of stream vectors, recorded in the first epoch, then read from disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rsdyn.dynamics.moments import Moments, merge, moments
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.private import batches_begun
from rsdyn.stream.cache import ReadAhead, Shard
from rsdyn.stream.sharding import Batches, balanced_owners
from rsdyn.stream.shuffle import Memory, Pool, Vectors, first_needed, plan
from rsdyn.stream.text.tokens import split
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch, pieces

Split = Literal["train", "val", "test"]

# Training vectors of a process that take no more than this stay in its memory, read from the cache once; more are read
# window by window in each epoch. A constant, so that memory does not grow with the corpus.
KEPT_BYTES = 256 << 20


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

    def to(self, device: torch.device) -> VectorBatch:
        """The same on ``device``; Lightning calls it, and would else look through each batch for tensors."""
        if self.x.device == device:
            return self
        return VectorBatch(*(t.to(device, non_blocking=device.type == "cuda") for t in self))


class Stopping(Protocol):
    """What a run knows of signals to end.

    Attributes:
        signum: the signal that came; None before any did.
    """

    signum: int | None

    def leave(self) -> object:
        """End the run at once, with everything that is to be done then."""


class ResidualStreamDataModule(L.LightningDataModule):
    """Train, validation and test batches of a trajectory stream, on one process or several.

    Each process owns a fixed set of shards: it alone records, trains on and evaluates them, so no sequence is recorded
    twice or never. The training batches are equal in number on all processes (the longer ones drop their tail,
    ``dropped`` says how many vectors), since uneven ones would hang. The language model lives in the stream and never
    in a module, so it enters neither checkpoint nor optimiser nor DDP.

    Args:
        stream: where the shards come from.
        val_size, test_size: each a fraction of the sequences if below 1, else their number.
        batch_by: ``vector``: vectors shuffled across sequences; ``sequence``: the ``S`` vectors of whole trajectories
            together, of which a sequence has one for each recorded token (the paper's, with ``batch_size=1``).
        batch_size: vectors, or trajectories, in a training batch.
        shuffle_shards: how many shards are in memory, and shuffled together, at a time.
        seed: of the splits and of the order of the batches, which depends on (seed, epoch, process) alone: it is the
            same whether the cache was there or not, and a run that goes on in the middle of an epoch gets the rest of
            that epoch's batches, the very same ones.
        on_shard: called with the trajectories of each own shard when it is first at hand, some at a time.
        on_record: called with the number of sequences after each batch that went through the language model.
        stop: asked after each of those. When a signal has come, recording ends and an empty batch comes instead, so
            that all processes can agree to leave before the step; outside training batches a process that is alone
            leaves.
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
        on_shard: Callable[[TrajectoryBatch], object] = lambda batch: None,
        on_record: Callable[[int], object] = lambda n: None,
        stop: Stopping | None = None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.batch_by, self.batch_size, self.shuffle_shards, self.seed = batch_by, batch_size, shuffle_shards, seed
        self.splits = split(stream.n_sequences, val_size=val_size, test_size=test_size, seed=seed)
        self._on_shard, self._on_record, self._stop = on_shard, on_record, stop
        self._in_training_batches = False
        self._statistics: Moments | None = None
        self._counted: set[int] = set()
        self._pin = False
        self._memory, self._batch_memory = Memory(), Memory()
        self._ahead: ReadAhead | None = None
        self.set_process(0, 1)

    def set_process(self, rank: int, world_size: int) -> None:
        """Be process ``rank`` of ``world_size``: decides which shards this one owns."""
        self._kept: Vectors | None = None
        if world_size > (shards := self.stream.n_shards):
            raise UserError(
                f"devices: {world_size} processes for {shards} shard{'s' * (shards > 1)} of "
                f"{self.stream.shard_sequences} sequences, so some would have nothing to do. Set `shard_sequences` "
                f"to at most {max(1, self.stream.n_sequences // world_size)}, or use fewer devices."
            )
        self.rank, self.world_size = rank, world_size
        counts = np.array([len(self._rows(k, "train")) for k in range(self.stream.n_shards)])
        self._n_train = counts
        owners = balanced_owners(counts, world_size)
        self.own_shards = [k for k in range(self.stream.n_shards) if owners[k] == rank]
        per_batch = self.batch_size if self.batch_by == "sequence" else self.batch_size / self.stream.n_sublayers
        per_process = np.bincount(owners, weights=counts, minlength=world_size)
        batches = np.ceil(per_process / per_batch).astype(int)
        self.n_train_batches = int(batches.min())
        if self.n_train_batches == 0:
            raise UserError(
                f"devices: a process of {world_size} would have no training sequence. Lower "
                "`shard_sequences`, or use fewer devices."
            )
        kept = np.minimum(per_process, self.n_train_batches * per_batch)
        self.dropped = round(float((per_process - kept).sum()) * self.stream.n_sublayers)

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.set_process(self.trainer.global_rank, self.trainer.world_size)
            self.stream.device = self.trainer.strategy.root_device
            self._pin = self.stream.device.type == "cuda"

    def teardown(self, stage: str | None = None) -> None:
        self._kept, self._memory, self._batch_memory = None, Memory(), Memory()
        self._read_ahead([])

    # -- batches -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        return self._loader(Batches(self._train_batches, self.n_train_batches))

    def val_dataloader(self) -> DataLoader:
        return self._loader(Batches(lambda: self._eval_batches("val"), self._n_eval_batches("val")))

    def test_dataloader(self) -> DataLoader:
        return self._loader(Batches(lambda: self._eval_batches("test"), self._n_eval_batches("test")))

    def _loader(self, batches: Batches) -> DataLoader:
        # no workers: the language model runs in this process, and the batches are slices of what is already in memory
        return DataLoader(batches, batch_size=None, num_workers=0, pin_memory=self._pin, collate_fn=_as_it_is)

    def whole_sequences(self, part: Split) -> Iterator[VectorBatch]:
        """A split's sequences of this process, in order.

        At most a shard's share per batch, and as many trajectories as a shard has sequences.
        """
        for k in self.own_shards:
            rows = self._rows(k, part)
            if len(rows):
                shard = self._shard(k)
                for some in rows.split(self.stream.shard_sequences):
                    yield _as_vectors(shard.activations[some], shard.index[some])

    def _eval_batches(self, part: Split) -> Iterator[VectorBatch]:
        given = False
        for batch in self.whole_sequences(part):
            given = True
            yield batch
        if not given:  # a process without a batch would skip the loop, and the others would wait for it at its end
            yield self._nothing()

    def _nothing(self) -> VectorBatch:
        empty = torch.empty(0, self.stream.n_sublayers, self.stream.n_units, dtype=self.stream.dtype)
        return _as_vectors(empty, torch.empty(0, dtype=torch.int64))

    def _n_eval_batches(self, part: Split) -> int:
        size = self.stream.shard_sequences
        return max(1, sum(-(-len(self._rows(k, part)) // size) for k in self.own_shards))

    def _train_batches(self) -> Iterator[VectorBatch]:
        epoch, first = self._position()
        try:
            yield from self._batches_from(epoch, first)
        except _RecordingStopped:
            # not raised from here: the other processes are on their way into this step, and wait for this one there
            yield self._nothing()

    def _position(self) -> tuple[int, int]:
        """The epoch, and how many of its batches are done: not 0 where a run resumes in the middle of one."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, batches_begun(self.trainer)

    def _batches_from(self, epoch: int, first: int) -> Iterator[VectorBatch]:
        """The batches of an epoch from the ``first`` one on, the ones before having been trained on."""
        with self._stoppable():
            if epoch > 0:  # what the statistics (and a callback that measures) saw in the epochs before
                self.train_statistics(complete=True)
            rng = np.random.default_rng([self.seed, epoch, self.rank])
            windows = self._windows(rng)
            unit = self.stream.n_sublayers if self.batch_by == "sequence" else 1
            step = self.batch_size * unit
            plans = plan([self._n_vectors(window) for window in windows], step)
            now = next((i for i, w in enumerate(plans) if first < w.batches_after), len(plans) - 1)
            skip = first - plans[now].batches_before
            begin = first_needed(plans, now, skip)
            self._read_ahead(windows[begin:])
            left: _Left | None = None
            for window, planned in zip(windows[:now], plans[:now], strict=True):
                if planned.number >= begin:
                    pool = self._window(window, rng, left)
                    left = pool.take(len(pool) - planned.left_after, len(pool))
                    del pool
                    continue
                self._order(window, rng)
                for k in window if epoch == 0 else ():
                    self._shard(int(k))  # the statistics of the first epoch are those of what it has seen
        n_given = first
        for window, planned in zip(windows[now:], plans[now:], strict=True):
            with self._stoppable():
                pool = self._window(window, rng, left)
            ahead = step * skip - (planned.left_before if left is None else 0)
            stop = len(pool) - planned.left_after
            for start in range(ahead, stop, step):
                if n_given == self.n_train_batches:
                    return
                n_given += 1
                yield VectorBatch(*pool.take(start, start + step))
            left = pool.take(stop, len(pool))
            skip = 0
            del pool  # its memory is the next window's

    def _windows(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(self.own_shards)
        return [order[i : i + self.shuffle_shards] for i in range(0, len(order), self.shuffle_shards)]

    def _n_vectors(self, window: np.ndarray) -> int:
        return int(self._n_train[window].sum()) * self.stream.n_sublayers

    def _order(self, window: np.ndarray, rng: np.random.Generator) -> Tensor:
        """In which order the vectors (or sequences) of a window come."""
        n = self._n_vectors(window)
        return torch.from_numpy(rng.permutation(n // self.stream.n_sublayers if self.batch_by == "sequence" else n))

    def _window(self, window: np.ndarray, rng: np.random.Generator, left: _Left | None) -> Pool:
        """The training vectors of some shards, shuffled by vector or by sequence, behind what the last window left."""
        vectors = self._vectors()
        for k in window.tolist():
            if k in vectors.places:
                continue
            if self._ahead is not None:
                self._ahead.wait(k)
            shard = self._shard(k)
            vectors.put(k, shard.activations, shard.index, self._rows(k, "train"))
            if self._ahead is not None:
                self._ahead.take(k)
        order, whole = self._order(window, rng), self.batch_by == "sequence"
        return Pool(vectors, window.tolist(), order, left, whole=whole, memory=self._batch_memory)

    def _read_ahead(self, windows: list[np.ndarray]) -> None:
        """Have the shards of these windows, and no others any more, read from the disk while others are trained on."""
        if self._ahead is not None:
            self._ahead.end()
        kept = set() if self._kept is None else self._kept.places.keys()
        shards = [k for window in windows for k in window.tolist() if k not in kept]
        self._ahead = ReadAhead(self.stream.cache, shards) if self.stream.cache is not None and shards else None

    def _vectors(self) -> Vectors:
        """Where the vectors of a window are put, or are already."""
        if self._kept is not None:
            return self._kept
        counts = sorted(self._n_train[self.own_shards].tolist(), reverse=True)
        shape = (self.stream.n_sublayers, self.stream.n_units)
        fits = sum(counts) * math.prod(shape) * self.stream.dtype.itemsize <= KEPT_BYTES
        # without a cache the language model runs in every epoch, as was asked for
        if fits and self.stream.cache is not None:
            self._kept = Vectors(self._memory.empty(sum(counts), *shape, dtype=self.stream.dtype))
            return self._kept
        largest = sum(counts[: self.shuffle_shards])  # of any epoch's windows
        return Vectors(self._memory.empty(largest, *shape, dtype=self.stream.dtype))

    def records_in(self, epoch: int) -> bool:
        """Whether the language model may run in an epoch."""
        return epoch == 0 or self.stream.cache is None

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        self._in_training_batches = True
        try:
            yield
        finally:
            self._in_training_batches = False

    def _recorded(self, n: int) -> None:
        self._on_record(n)
        if self._stop is None or self._stop.signum is None:
            return
        alone = self.world_size == 1
        if self._in_training_batches and (alone or self.records_in(self._position()[0])):
            raise _RecordingStopped
        if alone:  # several processes must not part here: they meet again before the next step
            self._stop.leave()

    def n_own_missing(self) -> int:
        """How many sequences this process still has to record."""
        shards = self.stream.missing_sequences() // self.stream.shard_sequences
        return int(np.isin(shards, self.own_shards).sum())

    # -- shards --------------------------------------------------------------------------------------------------------

    def _rows(self, k: int, part: Split) -> Tensor:
        """Rows of shard ``k`` that belong to a split."""
        start, stop = self.stream.bounds(k)
        members = self.splits[part]
        return self.stream.rows_of(k, members[np.searchsorted(members, start) : np.searchsorted(members, stop)])

    def _shard(self, k: int) -> Shard:
        shard = self.stream.shard(k, self._recorded)
        if k not in self._counted:
            for batch in pieces(self.stream, k, shard, len(shard.index)):
                self._on_shard(batch)
            # as many at a time as a shard has sequences, which is all of them where a sequence has one trajectory
            for rows in self._rows(k, "train").split(self.stream.shard_sequences):
                part = moments(shard.activations[rows])
                if not (torch.isfinite(part.mean).all() and torch.isfinite(part.m2).all()):
                    raise _not_finite(shard.activations[rows], shard.index[rows])
                self._statistics = part if self._statistics is None else merge(self._statistics, part)
            self._counted.add(k)
        return shard

    def train_statistics(self, *, complete: bool = False) -> Moments:
        """Moments ``(S, D)`` of this process' training sequences seen so far; with ``complete``, of all of them.

        Merged in the order of the first epoch, whenever they are asked for: a run that went on has the same bits.
        """
        if complete or self._statistics is None:
            for k in np.concatenate(self._windows(np.random.default_rng([self.seed, 0, self.rank]))).tolist():
                if k not in self._counted:
                    self._shard(k)
        assert self._statistics is not None
        return self._statistics


class _RecordingStopped(Exception):
    pass


_Left = tuple[Tensor, Tensor, Tensor]  # vectors, sublayers and sequences that did not fill a batch


def _not_finite(activations: Tensor, index: Tensor) -> NonFiniteError:
    """Which record is at fault when the statistics of some ``(n, S, D)`` trajectories are not finite."""
    bad = (~torch.isfinite(activations)).nonzero()
    if len(bad):
        row, sublayer, unit = bad[0].tolist()
        where = f"at sequence {int(index[row])}, sublayer {sublayer}, unit {unit}"
        return NonFiniteError(f"an activation is {float(activations[row, sublayer, unit])} {where}. Record it again.")
    row, sublayer, unit = np.unravel_index(int(activations.abs().argmax()), activations.shape)
    return NonFiniteError(
        f"the statistics of the training split overflow: the largest activation is {float(activations.abs().max()):g}, "
        f"at sequence {int(index[row])}, sublayer {sublayer}, unit {unit}. Check the LM's weights."
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _as_vectors(activations: Tensor, index: Tensor) -> VectorBatch:
    """``(n, S, D)`` trajectories as ``n S`` vectors, sublayers of a sequence together."""
    n, n_sublayers, n_units = activations.shape
    sublayer = torch.arange(n_sublayers).repeat(n)
    return VectorBatch(activations.reshape(-1, n_units), sublayer, index.repeat_interleave(n_sublayers))
