"""One writer at a time for each file of a cache, whatever the number of processes and hosts.

A lock belongs to one shard (or to the manifest) and is held only while that one is recorded and written. No process
waits for a lock while it holds another's, nor at a barrier with one in hand, so waiting always ends. The processes of
one run own different shards and never meet; two runs meet when they want the same shard.

Local disks and most cluster file systems have ``flock``: the kernel drops it when the holder dies, however it dies.
Where the file system has none, a lease stands in: a file that its holder renews, and that others take over once it was
not renewed for ``LEASE_SECONDS``. A holder that was only asleep may then write beside its successor, which is harmless:
both write the same bytes, under temporary names of their own.

Apart from these, a cache's folder carries a mark of use (:func:`mark_used`): a shared ``flock`` on the folder itself,
which takes no file, no right to write and no time, and which every run that has the cache open holds until it ends.
Removing a whole cache wants it alone (:func:`if_unused`).
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

LEASE_SECONDS = 90.0
POLL_SECONDS = 0.1
SAY_AGAIN_SECONDS = 60.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Locks:
    """Locks by name, as files in ``folder``, which is made when the first is taken.

    A name that this object holds already is given at once, so that who records a shard under its lock can write it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[str] = set()
        self._has_flock = True

    @contextmanager
    def hold(self, name: str, on_wait: Callable[[str], object] = lambda holder: None) -> Iterator[None]:
        """Hold the lock ``name`` while the context lasts, however long it takes to get.

        ``on_wait`` is called with who holds it (host and process, as far as is known) when that is somebody else, and
        again each minute.
        """
        if name in self._held:
            yield
            return
        said = -SAY_AGAIN_SECONDS
        while (lock := self._take(name)) is None:
            if time.monotonic() - said >= SAY_AGAIN_SECONDS:
                said = time.monotonic()
                on_wait(self.holder(name))
            time.sleep(POLL_SECONDS)
        with self._holding(name, lock):
            yield

    @contextmanager
    def hold_if_free(self, name: str) -> Iterator[bool]:
        """Hold the lock ``name`` while the context lasts, if nobody has it; gives whether."""
        if name in self._held:
            yield True
        elif (lock := self._take(name)) is None:
            yield False
        else:
            with self._holding(name, lock):
                yield True

    def holder(self, name: str) -> str:
        """Who took the lock ``name`` last, in words."""
        with suppress(OSError, UnicodeDecodeError):
            if words := (self.folder / f"{name}.lock").read_text()[:200].strip():
                return words
        return "another process"

    @contextmanager
    def _holding(self, name: str, lock: BaseFileLock) -> Iterator[None]:
        self._held.add(name)
        try:
            yield
        finally:
            self._held.discard(name)
            lock.release()

    def _take(self, name: str) -> BaseFileLock | None:
        if self.folder.is_symlink():
            raise OSError(errno.ELOOP, "the folder of its locks is a link")
        self.folder.mkdir(exist_ok=True)
        if self._has_flock:
            path = self.folder / f"{name}.lock"
            try:
                if (lock := _acquired(FileLock(path, fallback_to_soft=False))) is not None:
                    with suppress(OSError):  # on a full disk nobody learns who holds it; it is held all the same
                        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
                return lock
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                self._has_flock = False
        return _acquired(SoftFileLease(self.folder / f"{name}.lease", lease_duration=LEASE_SECONDS))


def mark_used(folder: Path) -> int:
    """Make ``folder``, if it is not there, and mark it as used until the descriptor that this returns is closed.

    Waits while somebody removes the folder, and makes it anew then. Where the file system has no ``flock`` there is no
    mark; on NFS it reaches the processes of one host.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed at this very moment
            descriptor = _open_folder(folder)
            try:
                _flock(descriptor, alone=False)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


@contextmanager
def if_unused(folder: Path) -> Iterator[bool]:
    """Whether nobody has ``folder`` marked; when so, nobody can mark it while the context lasts."""
    descriptor = _open_folder(folder)
    try:
        try:
            _flock(descriptor, alone=True)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _flock(descriptor: int, *, alone: bool) -> None:
    import fcntl  # here, since Windows has none, and this package can be imported there

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise


def _acquired(lock: BaseFileLock) -> BaseFileLock | None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
