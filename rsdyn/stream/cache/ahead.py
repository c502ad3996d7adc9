"""Shards brought into the operating system's memory by a thread, ahead of whoever reads them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsdyn.stream.cache.corpus import TrajectoryCache

# What is read and not yet taken is no more than this, or one shard. Without a bound the pages of one window of shards
# push out those of the window before on a machine with little memory, and each is read twice.
ROOM_BYTES = 256 << 20


class ReadAhead:
    """Reads ``shards`` of a cache from the disk, in their order, while somebody works on the ones before.

    A disk that is read through gives twice to three times what the page faults of a mapping get out of it. Only a hint:
    shards that are missing or cannot be read are passed over. Who uses a shard calls :meth:`wait` before, :meth:`take`
    afterwards, and :meth:`end` once no more are wanted; it ends by itself once nobody holds this object.
    """

    def __init__(self, cache: TrajectoryCache, shards: Iterable[int]) -> None:
        self._plan = _Plan({k: cache.shard_bytes(k) for k in shards})
        # the thread holds the cache, and with it the mark that it is used: neither may outlive whoever reads
        weakref.finalize(self, self._plan.end)
        # a daemon: a run that ends does not wait for shards that nobody will want
        threading.Thread(target=self._plan.run, args=(cache,), daemon=True).start()

    def wait(self, k: int) -> None:
        """Return once shard ``k`` was read, or will not be."""
        self._plan.wait(k)

    def take(self, k: int) -> None:
        """Say that shard ``k`` was used, so that there is room for another."""
        self._plan.take(k)

    def end(self) -> None:
        """Read no further; what is being read is read to its end, by the thread alone."""
        self._plan.end()


class _Plan:
    """What :class:`ReadAhead` and its thread both know: the bytes of each shard, and how far it has come."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self._sizes = sizes
        self._read: set[int] = set()
        self._n_ahead = 0  # bytes that were read and not taken
        self._wanted: set[int] = set()
        self._ended = False
        self._changed = threading.Condition()

    def wait(self, k: int) -> None:
        with self._changed:
            self._wanted.add(k)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or k in self._read or k not in self._sizes)
            self._wanted.discard(k)

    def take(self, k: int) -> None:
        with self._changed:
            if k in self._read:
                self._read.discard(k)
                self._n_ahead -= self._sizes.pop(k)
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def run(self, cache: TrajectoryCache) -> None:
        try:
            for k, size in [*self._sizes.items()]:
                with self._changed:
                    # somebody who waits gets what is wanted, also where shards before it were never taken
                    while not (self._ended or self._wanted - self._read or self._n_ahead <= max(0, ROOM_BYTES - size)):
                        self._changed.wait()
                    if self._ended:
                        return
                    self._n_ahead += size
                cache.read_ahead(k)
                with self._changed:
                    self._read.add(k)
                    self._changed.notify_all()
        finally:
            self.end()
