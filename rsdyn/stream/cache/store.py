"""The shards of one corpus through one model, in a folder.

Shard ``k`` holds sequences ``[k n, (k + 1) n)`` of the corpus, always, so that a shard made again, by whatever process,
has the same bytes. A shard appears whole or not at all (``publish.py``), is written by one process at a time
(``lock.py``), and carries a checksum, since a flipped bit in a safetensors file loads silently.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rsdyn.errors import UserError
from rsdyn.files import publish, temporaries, try_to_write
from rsdyn.stream.cache.lock import Locks, if_unused, mark_used
from rsdyn.stream.cache.manifest import (
    FORMAT,
    MANIFEST,
    DamagedManifestError,
    UnknownFormatError,
    cache_key,
    read_manifest,
    seal,
)
from rsdyn.stream.cache.shard import Place, Shard, Which, pack, read_through, unpack, which_file

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOCKS = "locks"
_ABSURD = 10**9  # more sequences, sublayers or units than anybody has
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")


def default_cache_dir() -> Path:
    """``$RSDYN_CACHE``, else ``$XDG_CACHE_HOME/rsdyn``, else ``~/.cache/rsdyn``."""
    if named := os.environ.get("RSDYN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "rsdyn"


class TrajectoryCache:
    """The shards of one corpus through one model.

    Args:
        root: the cache folder (``cache.dir``); this corpus gets a folder of its own in it.
        fields: what made the trajectories (model, tokens, condition, dtype, ...); JSON values. Their hash is the key.
        label: a few words for the folder's name, for people.
        n_sequences, n_sublayers, n_units: ``N``, ``S`` and ``D``.
        dtype: of the activations on disk, ``bfloat16`` or ``float32``.
        shard_sequences: sequences a shard.
        shard_trajectories: how many trajectories each shard has, in all its recorded tokens; None where a sequence has
            one, that of its last token. In the key, so that a cache's sizes are known from its manifest.

    Nothing is written before :meth:`open`.
    """

    def __init__(
        self,
        root: str | Path,
        fields: dict[str, Any],
        *,
        label: str,
        n_sequences: int,
        n_sublayers: int,
        n_units: int,
        dtype: str = "bfloat16",
        shard_sequences: int = 256,
        shard_trajectories: Sequence[int] | None = None,
    ):
        self.root = Path(root).expanduser()
        self.shape = (n_sequences, n_sublayers, n_units)
        self.dtype = DTYPES[dtype]
        self.shard_sequences = shard_sequences
        self.fields = {**fields, "shape": list(self.shape), "dtype": dtype, "shard_sequences": shard_sequences}
        self.shard_trajectories = None if shard_trajectories is None else [int(n) for n in shard_trajectories]
        if self.shard_trajectories is not None:
            self.fields["shard_trajectories"] = self.shard_trajectories
        self.key = cache_key(self.fields)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", label)[:60].strip("-.") or "stream"
        self.folder = self.root / f"{slug}-{self.key[:16]}"
        self.n_shards = -(-n_sequences // shard_sequences)
        self._locks = Locks(self.folder / LOCKS)
        self._verified: dict[int, Which] = {}  # the files whose checksum was seen to match
        self._touched = time.monotonic()
        self._used: weakref.finalize | None = None  # takes the mark of use off the folder

    @classmethod
    def from_folder(cls, folder: Path) -> TrajectoryCache:
        """The cache that a folder's manifest describes, for looking after it; nothing is written.

        Raises ``FileNotFoundError`` without a manifest, ``DamagedManifestError`` and ``UnknownFormatError`` with one
        that is not to be trusted, or that belongs to a folder of another name.
        """
        if folder.is_symlink():
            raise DamagedManifestError("its folder is a link")
        fields = dict(read_manifest(folder)["made_from"])
        shape, dtype, per_shard = (fields.pop(name, None) for name in ("shape", "dtype", "shard_sequences"))
        per_token = fields.pop("shard_trajectories", None)
        sizes = [*shape, per_shard] if isinstance(shape, list) and len(shape) == 3 else []
        if not sizes or not all(isinstance(n, int) and 0 < n < _ABSURD for n in sizes) or dtype not in DTYPES:
            raise DamagedManifestError(f"its sizes cannot be: {shape}, {dtype}, {per_shard} a shard")
        if per_token is not None and (
            not isinstance(per_token, list)
            or len(per_token) != -(-sizes[0] // per_shard)
            or not all(isinstance(n, int) and 0 < n < _ABSURD for n in per_token)
        ):
            raise DamagedManifestError("its numbers of trajectories a shard cannot be")
        n_sequences, n_sublayers, n_units = shape
        cache = cls(
            folder.parent,
            fields,
            label=folder.name.rpartition("-")[0],
            n_sequences=n_sequences,
            n_sublayers=n_sublayers,
            n_units=n_units,
            dtype=dtype,
            shard_sequences=per_shard,
            shard_trajectories=per_token,
        )
        if cache.folder.name != folder.name:
            raise DamagedManifestError("it belongs to a folder of another name")
        return cache

    # -- the folder ----------------------------------------------------------------------------------------------------

    def open(self, made_by: dict[str, Any] | None = None, *, wanted: Iterable[int] | None = None) -> list[str]:
        """Make or check the folder and its manifest, and clear away what killed writers left.

        Until this object is gone nobody removes the whole cache (:meth:`if_unused`).

        ``made_by`` (versions) is kept beside what made the key. A folder that cannot be written will do when it holds
        all ``wanted`` shards (default: all there are). Returns what a user should know, a sentence each: a damaged
        manifest was written again. Raises ``UserError`` when the folder cannot be written and something is missing, or
        when it holds what another model, text or format made, or is a link.
        """
        if self.folder.is_symlink():
            raise UserError(
                f"cache.dir={self.root}: {self.folder.name} in it is a link, and a cache is not followed out of its "
                "folder. Remove the link, or set cache.dir to the folder that it leads to."
            )
        try:
            self._mark_used()
            with self._locks.hold("manifest"):
                try_to_write(self.folder / MANIFEST)  # better now than after an hour of the LM
                notes = self._make_manifest(made_by or {})
            self._sweep()
        except OSError as error:
            if set(self.missing() if wanted is None else wanted) & set(self.missing()) or not self._is_readable():
                raise self._cannot_write(error) from error
            return []
        with suppress(OSError):  # somebody else's file: then it says when its owner last used the cache
            os.utime(self.folder / MANIFEST)
        return notes

    def _mark_used(self) -> None:
        before, self._used = self._used, weakref.finalize(self, os.close, mark_used(self.folder))
        if before is not None:  # it may have been a folder that is gone
            before()

    def if_unused(self) -> AbstractContextManager[bool]:
        """Keep every run from opening this cache while the context lasts, if none has it open; gives whether."""
        return if_unused(self.folder)

    def _make_manifest(self, made_by: dict[str, Any]) -> list[str]:
        contents = {"format": FORMAT, "key": self.key, "made_from": self.fields, "made_by": made_by}
        notes = []
        try:
            self._check_manifest()
            return []
        except FileNotFoundError:
            pass
        except DamagedManifestError as damage:
            notes.append(
                f"{MANIFEST} in {self.folder} is damaged ({damage}); it is written again, and the shards are checked "
                "against checksums of their own as they are read"
            )
            contents["made_by"] = {**made_by, "note": "the first manifest was damaged: some shards may be older"}
        publish(self.folder / MANIFEST, [seal(contents)])
        return notes

    def _check_manifest(self) -> None:
        """Compare the manifest with what this cache is made from; ``UserError`` when it is another's."""
        cure = f"Remove the folder {self.folder}, or choose another cache.dir."
        try:
            manifest = read_manifest(self.folder)
        except UnknownFormatError as error:
            raise UserError(f"cache.dir={self.root}: {self.folder.name} {error}. {cure}") from error
        theirs = manifest["made_from"]
        if theirs != self.fields or manifest["key"] != self.key:
            names = sorted(k for k in {*theirs, *self.fields} if theirs.get(k) != self.fields.get(k))
            differ = "; ".join(f"{k} is {theirs.get(k)!r} there and {self.fields.get(k)!r} here" for k in names)
            raise UserError(
                f"cache.dir={self.root}: {self.folder.name} was made by something else ({differ or 'its key'}). {cure}"
            )

    def _is_readable(self) -> bool:
        try:
            self._check_manifest()
        except (OSError, DamagedManifestError):
            return False
        return True

    def manifest(self) -> dict[str, Any]:
        """What the manifest says: ``format``, ``key``, ``made_from``, ``made_by``, and what was added to it.

        Raises ``FileNotFoundError`` and ``DamagedManifestError``.
        """
        return read_manifest(self.folder)

    def add_to_manifest(self, name: str, value: Any) -> None:
        """Put ``value`` (JSON) under ``name`` in the manifest, whole or not at all; the key stays as it is.

        Several processes may do so at once, and none loses what another added. Raises ``ValueError`` for a name that
        the manifest has by itself, ``UserError`` when it cannot be written.
        """
        if name in ("format", "key", "made_from", "made_by", "checksum"):
            raise ValueError(f"name={name}: the manifest has this entry by itself. Take another name.")
        try:
            with self._locks.hold("manifest"):
                contents = read_manifest(self.folder)
                if contents.get(name) != value:
                    publish(self.folder / MANIFEST, [seal({**contents, name: value})])
        except DamagedManifestError as damage:
            raise UserError(
                f"cache.dir={self.root}: {MANIFEST} in {self.folder.name} is damaged ({damage}). Start again: it will "
                "be written anew, and what was recorded is kept."
            ) from damage
        except OSError as error:
            raise self._cannot_write(error, f" {MANIFEST}") from error

    def strays(self) -> Iterator[Path]:
        """Temporary files of dead writers, each while its lock is held, so that no new writer meets its removal."""
        for path, target in temporaries(self.folder):
            if target == MANIFEST or _SHARD.fullmatch(target):
                with self._locks.hold_if_free(_lock_name(target)) as is_free:
                    if is_free:
                        yield path

    def _sweep(self) -> None:
        for path in self.strays():
            with suppress(PermissionError):  # another user's, in a folder where only owners may remove
                path.unlink(missing_ok=True)

    # -- what is there -------------------------------------------------------------------------------------------------

    def bounds(self, k: int) -> tuple[int, int]:
        """First and one-past-last sequence of shard ``k``."""
        start = k * self.shard_sequences
        return start, min(start + self.shard_sequences, self.shape[0])

    def path(self, k: int) -> Path:
        return self.folder / f"shard-{k:05d}.safetensors"

    def has(self, k: int) -> bool:
        """Whether there is something in shard ``k``'s place; :meth:`read` says what it is worth."""
        return os.path.lexists(self.path(k))

    def missing(self) -> list[int]:
        """The shards that are not on disk."""
        return [k for k in range(self.n_shards) if not self.has(k)]

    @property
    def n_trajectories(self) -> int:
        """Of the whole corpus."""
        return self.shape[0] if self.shard_trajectories is None else sum(self.shard_trajectories)

    def shard_bytes(self, k: int) -> int:
        """Bytes of shard ``k`` on disk, but for a header of about a kilobyte."""
        return self._place(k).n_bytes + 1024

    def check_free_space(self, missing: list[int] | None = None) -> None:
        """Raise ``UserError`` when ``missing`` shards (default: all that are) do not fit on the disk."""
        needed = sum(self.shard_bytes(k) for k in (self.missing() if missing is None else missing))
        free = shutil.disk_usage(self.root).free
        if needed > free:
            fit = max(0, free * self.shape[0] // max(1, sum(map(self.shard_bytes, range(self.n_shards)))))
            tokens = "" if self.shard_trajectories is None else " or fewer tokens of each (data.positions)"
            fewer = f"record fewer sequences (data.limit={fit} would fit){tokens}, " if fit else ""
            raise UserError(
                f"cache.dir={self.root}: the cache needs {needed / 2**30:.2f} GiB more and the disk has "
                f"{free / 2**30:.2f} GiB free. Choose another cache.dir, {fewer}or cache.enabled=false, which runs the "
                "LM again in every epoch."
            )

    # -- shards --------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, k: int, on_wait: Callable[[str], object] = lambda holder: None) -> Iterator[None]:
        """Be the one writer of shard ``k``; ``on_wait`` is told who is, when it is somebody else.

        Whoever waited looks again before recording: the other may have written the shard.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locks.hold(_lock_name(self.path(k).name), on_wait))
            except OSError as error:
                raise self._cannot_write(error, f" the lock of shard {k}") from error
            yield

    def lock_if_free(self, k: int) -> AbstractContextManager[bool]:
        """Be the one writer of shard ``k``, if nobody is; gives whether."""
        return self._locks.hold_if_free(_lock_name(self.path(k).name))

    def write(self, k: int, shard: Shard) -> None:
        """Put shard ``k`` on disk, whole or not at all; ``UserError`` when the disk is full or fails.

        Raises ``ValueError`` when it is not shard ``k``.
        """
        parts = pack(shard, self._place(k))
        with self.lock(k):
            try:
                publish(self.path(k), parts)
                self._verified[k] = which_file(os.stat(self.path(k)))
            except OSError as error:
                raise self._cannot_write(error, f" shard {k} of {self.n_shards}") from error

    def read(self, k: int) -> Shard:
        """Shard ``k``, memory-mapped, verified against its checksum the first time this process reads it.

        Raises ``FileNotFoundError`` when it is not there, ``DamagedShardError`` when it is not what was written, and
        ``UserError`` when it cannot be read for another reason.
        """
        try:
            shard, self._verified[k] = unpack(self.path(k), self._place(k), verified=self._verified.get(k))
        except FileNotFoundError:
            raise
        except OSError as error:  # no permission, too many open files: no reason to record it again
            raise UserError(
                f"cache.dir={self.root}: {self.path(k).name} in {self.folder.name} cannot be read ({error.strerror})."
            ) from error
        if time.monotonic() - self._touched > 3600:  # a night of training is use too, and prune --unused-days asks
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.folder / MANIFEST)
        return shard

    def read_ahead(self, k: int) -> None:
        """Bring shard ``k`` into the operating system's memory, before :meth:`read` maps it.

        What is there already is not read again. A shard that is missing or cannot be read is passed over here.
        """
        with suppress(OSError):
            read_through(self.path(k))

    def verify(self, k: int) -> None:
        """Read shard ``k`` through again and compare it with its checksum; raises as :meth:`read` does."""
        self._verified.pop(k, None)
        self.read(k)

    def discard(self, k: int) -> None:
        """Remove shard ``k``, so that it is made again; ``UserError`` when it cannot be removed."""
        self._verified.pop(k, None)
        try:
            self.path(k).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cache.dir={self.root}: {self.path(k).name} in {self.folder.name} is damaged and cannot be removed "
                f"({error.strerror}). Remove it by hand, or choose another cache.dir."
            ) from error

    def _place(self, k: int) -> Place:
        start, stop = self.bounds(k)
        if self.shard_trajectories is None:
            return Place(self.key, k, start, (stop - start, *self.shape[1:]), self.dtype)
        n = self.shard_trajectories[k]
        return Place(self.key, k, start, (n, *self.shape[1:]), self.dtype, n_sequences=stop - start)

    def _cannot_write(self, error: OSError, what: str = "") -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"cache.dir={self.root}: cannot write{what}, the disk is full ({error.strerror}). What was written "
                "before is kept: free some space and start again, or choose another cache.dir."
            )
        if error.errno == errno.ENOENT and not self.folder.is_dir():
            return UserError(
                f"cache.dir={self.root}: {self.folder.name} was removed while this run was using it. Start the run "
                "again: what it held is recorded anew."
            )
        return UserError(
            f"cache.dir={self.root}: cannot write{what} there ({error.strerror}). What was written before is kept. "
            "Give a folder you may write, or cache.enabled=false."
        )


def _lock_name(file: str) -> str:
    return file.partition(".")[0]
