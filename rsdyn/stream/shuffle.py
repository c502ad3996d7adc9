"""Vectors in a drawn order: which window of shards gives which batches, and batches gathered into memory used again."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


class Memory:
    """Tensors without values, in memory that is given again once nobody holds a tensor of it.

    Pages that a process never touched cost more to write to than the copy itself: a gather of 4096 vectors into a new
    tensor is two to five times slower than into an old one. A tensor from here, a slice or view of it, or an array that
    shares it with numpy, may be kept as long as anybody likes: what it lies in is not given to another meanwhile.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[Tensor, weakref.ref[np.ndarray]]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of undefined values."""
        n_bytes = math.prod(shape) * dtype.itemsize
        ours = None
        for i in reversed(range(len(self._lent))):
            memory, holder = self._lent[i]
            if holder() is None:
                del self._lent[i]  # the larger one stays: sizes change with the last batch, and with other settings
                ours = memory if ours is None or len(memory) > len(ours) else ours
        if ours is None or len(ours) < n_bytes:
            ours = _pages(max(1, n_bytes))
        array = ours.numpy()  # each tensor that shares it keeps this very object, so its end is the end of them all
        self._lent.append((ours, weakref.ref(array)))
        return torch.from_numpy(array)[:n_bytes].view(dtype).view(shape)


def _pages(n_bytes: int) -> Tensor:
    """New bytes, in huge pages where they are many and the system has such pages.

    Rows in a drawn order are a page each at least: out of huge ones, batches of 4096 are gathered 1.2 times as fast
    with 1,024 or 4,096 units in bf16, and 1.1 times with 512.
    """
    if n_bytes < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_bytes, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, n_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(n_bytes, dtype=torch.uint8)  # whose error, if there is no memory, says how much was wanted
    with suppress(OSError):  # a kernel without them has the constant all the same
        pages.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(pages, dtype=np.uint8)
    start = -array.ctypes.data % _HUGE_PAGE
    return torch.from_numpy(array[start : start + n_bytes])


class Vectors:
    """Trajectories of some shards, one behind the other, each shard put where the one before ended.

    Args:
        activations: ``(n, S, D)``, room for all of them.
    """

    def __init__(self, activations: Tensor) -> None:
        self.activations = activations
        self.index = torch.empty(len(activations), dtype=torch.int64)
        self.places: dict[int, tuple[int, int]] = {}  # of each shard that is here, first and one past last trajectory
        self.n = 0

    def put(self, k: int, activations: Tensor, index: Tensor, rows: Tensor) -> None:
        """Copy some rows of shard ``k``: its ``(m, S, D)`` trajectories and the sequences they belong to."""
        stop = self.n + len(rows)
        torch.index_select(activations, 0, rows, out=self.activations[self.n : stop])
        torch.index_select(index, 0, rows, out=self.index[self.n : stop])
        self.places[k], self.n = (self.n, stop), stop


class Pool:
    """What is shuffled together: the vectors that the last window left over, in their order, then those of a window.

    Args:
        vectors: where the window's are, among others perhaps.
        window: its shards.
        order: a permutation of their vectors, counted on through these shards; with ``whole``, of their trajectories.
        left: what comes before them: vectors, sublayers, sequences.
        memory: what batches are gathered into.
    """

    def __init__(
        self,
        vectors: Vectors,
        window: Sequence[int],
        order: Tensor,
        left: tuple[Tensor, Tensor, Tensor] | None,
        *,
        whole: bool,
        memory: Memory,
    ) -> None:
        self.n_sublayers, n_units = vectors.activations.shape[1:]
        self.vectors, self.index, self.memory = vectors.activations.view(-1, n_units), vectors.index, memory
        self.left, self.n_left = left, 0 if left is None else len(left[0])
        self.unit = self.n_sublayers if whole else 1
        self.sublayers = torch.arange(self.n_sublayers)
        per_trajectory = 1 if whole else self.n_sublayers
        places = torch.tensor([vectors.places[k] for k in window]) * per_trajectory
        counts = places[:, 1] - places[:, 0]
        away = places[:, 0] - (counts.cumsum(0) - counts)  # from where the order has it to where it is
        self.order = order + away.repeat_interleave(counts)[order] if away.any() else order

    def __len__(self) -> int:
        return self.n_left + len(self.order) * self.unit

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``start`` to ``stop`` with their sublayers and sequences, copied."""
        stop = min(stop, len(self))
        x = self.memory.empty(stop - start, self.vectors.shape[1], dtype=self.vectors.dtype)
        n_left = max(0, min(stop, self.n_left) - start)
        rows = self.order[max(0, start - self.n_left) // self.unit : max(0, stop - self.n_left) // self.unit]
        torch.index_select(_by(self.unit, self.vectors), 0, rows, out=_by(self.unit, x[n_left:]))
        if self.unit == 1:
            sublayer, sequence = rows % self.n_sublayers, self.index[rows // self.n_sublayers]
        else:
            sublayer = self.sublayers.repeat(len(rows))
            sequence = self.index[rows].repeat_interleave(self.n_sublayers)
        if self.left is None or n_left == 0:
            return x, sublayer, sequence
        before = [t[start : start + n_left] for t in self.left]
        x[:n_left] = before[0]
        return x, torch.cat([before[1], sublayer]), torch.cat([before[2], sequence])


def _by(unit: int, vectors: Tensor) -> Tensor:
    """``(n, D)`` as ``(n / unit, unit D)``."""
    return vectors.view(len(vectors) // unit, unit * vectors.shape[1])


class Planned(NamedTuple):
    """What a window of shards gives: batches before and after it, vectors left over before and after it."""

    number: int
    batches_before: int
    batches_after: int
    left_before: int
    left_after: int


def plan(sizes: list[int], step: int) -> list[Planned]:
    """The windows' batches of ``step`` vectors; what does not fill one goes to the next window, the last takes all."""
    found, batches, left = [], 0, 0
    for i, size in enumerate(sizes):
        n = left + size
        given, rest = divmod(n, step) if i < len(sizes) - 1 else (-(-n // step), 0)
        found.append(Planned(i, batches, batches + given, left, rest))
        batches, left = batches + given, rest
    return found


def first_needed(planned: list[Planned], now: int, skip: int) -> int:
    """The first window whose vectors are needed for the batches from the ``skip``-th of window ``now`` on."""
    begin, needs_left = now, skip == 0
    while needs_left and planned[begin].left_before:
        begin -= 1
        needs_left = planned[begin].batches_before == planned[begin].batches_after  # all it had, it left
    return begin
