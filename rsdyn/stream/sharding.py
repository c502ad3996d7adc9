"""What the DataModules share: which process owns which shard, and a generator that a DataLoader takes for a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset


class Batches(IterableDataset):
    """A generator function with a length: Lightning needs the length for its progress and for exact restarts."""

    def __init__(self, make: Callable[[], Iterator[Any]], n_batches: int) -> None:
        self.make, self.n_batches = make, n_batches

    def __iter__(self) -> Iterator[Any]:
        return self.make()

    def __len__(self) -> int:
        return self.n_batches


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
