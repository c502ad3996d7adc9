"""Reading ahead: in order, bounded by what nobody has taken yet, and never in the way of who waits."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from rsdyn.stream.cache import ReadAhead, ahead


class Disk:
    """A cache whose shards have 10 bytes each; ``read`` are those that were read, in their order."""

    def __init__(self):
        self.read, self.gate = [], threading.Semaphore(0)
        self.cache = SimpleNamespace(shard_bytes=lambda k: 10, read_ahead=self.read_ahead)

    def read_ahead(self, k):
        self.gate.acquire(timeout=10)
        self.read.append(k)

    def settled(self, n):
        """What was read once ``n`` are, and once there was time for more."""
        until = time.monotonic() + 10
        while len(self.read) < n and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(0.03)
        return self.read


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr(ahead, "ROOM_BYTES", 25)
    return Disk()


def test_no_more_is_read_than_there_is_room_for(disk):
    disk.gate.release(100)
    reading = ReadAhead(disk.cache, [3, 1, 4, 0, 5])
    assert disk.settled(2) == [3, 1]
    reading.wait(3)
    reading.take(3)
    assert disk.settled(3) == [3, 1, 4]
    for k in (1, 4, 0, 5):
        reading.wait(k)
        reading.take(k)
    assert disk.read == [3, 1, 4, 0, 5]


def test_who_waits_gets_a_shard_when_it_was_read_and_not_before(disk):
    reading, got = ReadAhead(disk.cache, [7, 8]), []
    waiting = threading.Thread(target=lambda: (reading.wait(8), got.append(list(disk.read))), daemon=True)
    waiting.start()
    disk.gate.release()
    assert disk.settled(1) == [7] and not got
    disk.gate.release()
    waiting.join(10)
    assert got == [[7, 8]]


def test_a_shard_larger_than_the_room_is_read_alone(disk, monkeypatch):
    monkeypatch.setattr(ahead, "ROOM_BYTES", 5)
    disk.gate.release(100)
    reading = ReadAhead(disk.cache, [0, 1, 2])
    assert disk.settled(1) == [0]
    reading.take(0)
    assert disk.settled(2) == [0, 1]


def test_waiting_ends_whatever_was_not_taken(disk):
    """Shards of the plan that nobody takes must not keep the later ones away; nor those that are not in it."""
    disk.gate.release(100)
    reading = ReadAhead(disk.cache, range(6))
    assert disk.settled(2) == [0, 1]
    reading.wait(5)
    assert disk.read == [0, 1, 2, 3, 4, 5]
    reading.wait(99)
    reading.take(99)


def test_who_waits_for_each_shard_gets_no_more_than_there_is_room_for(monkeypatch):
    """However fast the disk is, and so however often the reader was waited for."""
    monkeypatch.setattr(ahead, "ROOM_BYTES", 25)
    read, taken = [], []
    most = []
    cache = SimpleNamespace(shard_bytes=lambda k: 10, read_ahead=lambda k: (read.append(k), most.append(too_many())))

    def too_many():
        return len(read) - len(taken)

    reading = ReadAhead(cache, range(300))
    for k in range(300):
        reading.wait(k)
        taken.append(k)  # before the room is given, so that it never looks like more than it is
        reading.take(k)
    assert read == taken and max(most) <= 2


def test_it_ends_and_lets_the_cache_go_once_nobody_holds_it(disk):
    """Else a DataModule that is dropped in the middle of an epoch would mark its cache as used for ever."""

    class Cache:
        shard_bytes, read_ahead = staticmethod(disk.cache.shard_bytes), staticmethod(disk.read_ahead)

    disk.gate.release(100)
    before, cache = set(threading.enumerate()), Cache()
    reading, there = ReadAhead(cache, range(6)), weakref.ref(cache)
    (thread,) = set(threading.enumerate()) - before
    assert disk.settled(2) == [0, 1]
    del cache, reading
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and there() is None


def test_after_the_end_nothing_is_read_and_nobody_waits(disk):
    reading = ReadAhead(disk.cache, range(6))
    disk.gate.release()
    assert disk.settled(1) == [0]
    reading.end()
    disk.gate.release(100)
    reading.wait(4)
    assert disk.settled(2) == [0, 1]  # the one that was being read


def test_a_thread_that_fails_keeps_nobody_waiting(disk, monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def fail(k):
        raise MemoryError

    disk.cache.read_ahead = fail
    reading = ReadAhead(disk.cache, [0])
    reading.wait(0)
    until = time.monotonic() + 10
    while not failed and time.monotonic() < until:
        time.sleep(0.002)
    assert failed[0].exc_type is MemoryError
