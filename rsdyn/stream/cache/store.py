"""The shards of one model, in a folder of the cache: found by what is in them, whatever corpus they were recorded for.

A shard is a file of some sequences that went through the model together. Its name is the hash of what they are, so that
one made again, by whatever process, has the same name and the same bytes. It appears whole or not at all
(``files.publish``), is written by one process at a time (``lock.py``), and carries a checksum, since a flipped bit in a
safetensors file loads silently. No list of the shards is kept: what is in the folder is what there is.
"""

from __future__ import annotations

import errno
import os
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
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
from rsdyn.stream.cache.shard import (
    DamagedShardError,
    Form,
    Recorded,
    Which,
    name_of,
    pack,
    read_keys,
    read_through,
    unpack,
    which_file,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOCKS, CORPORA = "locks", "corpora"
_ABSURD = 10**9  # more sublayers or units than anybody has
SHARD = re.compile(r"shard-[0-9a-f]{32}\.safetensors")


def default_cache_dir() -> Path:
    """``$RSDYN_CACHE``, else ``$XDG_CACHE_HOME/rsdyn``, else ``~/.cache/rsdyn``."""
    if named := os.environ.get("RSDYN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "rsdyn"


def slug(label: str) -> str:
    """A few words as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label)[:60].strip("-.") or "stream"


class ShardStore:
    """The shards of one model, recorded in one way.

    Args:
        root: the cache folder (``cache.dir``); this model gets a folder of its own in it.
        fields: what decides the numbers, whatever the text (weights, sites, precision, ...); JSON values.
        label: a few words for the folder's name, for people.
        n_sublayers, n_units: ``S`` and ``D``.
        dtype: of the activations on disk, ``bfloat16`` or ``float32``.

    Nothing is written before :meth:`open`.

    Attributes:
        key: the hash of ``fields``, sizes and dtype.
        files: the keys ``(m, 16)`` of the sequences in each shard, by the file's name, as of the last :meth:`refresh`.
        damaged: what has the name of a shard and is none, and why.
    """

    def __init__(
        self, root: str | Path, fields: dict[str, Any], *, label: str, n_sublayers: int, n_units: int, dtype: str
    ) -> None:
        self.root = Path(root).expanduser()
        self.fields = {**fields, "n_sublayers": n_sublayers, "n_units": n_units, "dtype": dtype}
        self.key = cache_key(self.fields)
        self.form = Form(self.key, n_sublayers, n_units, DTYPES[dtype])
        self.folder = self._folder(label)
        self.files: dict[str, np.ndarray] = {}
        self.damaged: dict[str, str] = {}
        self.locks = Locks(self.folder / LOCKS)
        self._seen: dict[str, Which] = {}
        self._verified: dict[str, Which] = {}  # the files whose checksum was seen to match
        self._touched = time.monotonic()
        self._used: weakref.finalize | None = None  # takes the mark of use off the folder

    def _folder(self, label: str) -> Path:
        """The folder of this key, whatever label somebody gave it when it was made."""
        ours, end = self.root / f"{slug(label)}-{self.key[:16]}", f"-{self.key[:16]}"
        if not os.path.lexists(ours):
            with suppress(OSError):
                names = sorted(entry.name for entry in os.scandir(self.root) if entry.name.endswith(end))
                return self.root / names[0] if names else ours
        return ours

    @classmethod
    def from_folder(cls, folder: Path) -> ShardStore:
        """The store that a folder's manifest describes, for looking after it; nothing is written.

        Raises ``FileNotFoundError`` without a manifest, ``DamagedManifestError`` and ``UnknownFormatError`` with one
        that is not to be trusted, or that belongs to a folder of another name.
        """
        if folder.is_symlink():
            raise DamagedManifestError("its folder is a link")
        fields = dict(read_manifest(folder)["made_from"])
        n_sublayers, n_units, dtype = (fields.pop(name, None) for name in ("n_sublayers", "n_units", "dtype"))
        sizes = (n_sublayers, n_units)
        if not all(type(n) is int and 0 < n < _ABSURD for n in sizes) or dtype not in DTYPES:
            raise DamagedManifestError(f"its sizes cannot be: {sizes}, {dtype}")
        label = folder.name.rpartition("-")[0]
        store = cls(folder.parent, fields, label=label, n_sublayers=n_sublayers, n_units=n_units, dtype=dtype)
        if store.folder.name != folder.name:
            raise DamagedManifestError("it belongs to a folder of another name")
        return store

    # -- the folder ----------------------------------------------------------------------------------------------------

    def open(self, made_by: dict[str, Any]) -> list[str]:
        """Make or check the folder and its manifest, and clear away what killed writers left.

        Until this object is gone nobody removes the store (:meth:`if_unused`). Returns what a user should know, a
        sentence each. Raises ``UserError`` where the folder is a link or holds what another model or format made, and
        ``OSError`` where it cannot be written.
        """
        if self.folder.is_symlink():
            raise UserError(
                f"dir={self.root}: {self.folder.name} in it is a link, and a cache is not followed out of its "
                "folder. Remove the link, or set `dir` to the folder that it leads to."
            )
        self._mark_used()
        with self.locks.hold("manifest"):
            try_to_write(self.folder / MANIFEST)  # better now than after an hour of the LM
            notes = self._make_manifest(made_by)
        for path in self.strays():
            with suppress(PermissionError):  # another user's, in a folder where only owners may remove
                path.unlink(missing_ok=True)
        self.touch()
        return notes

    def _mark_used(self) -> None:
        before, self._used = self._used, weakref.finalize(self, os.close, mark_used(self.folder))
        if before is not None:  # it may have been a folder that is gone
            before()

    def touch(self) -> None:
        """Say that the store is in use, for whoever removes what was not used for so many days."""
        self._touched = time.monotonic()
        with suppress(OSError):  # somebody else's file: then it says when its owner last used the cache
            os.utime(self.folder / MANIFEST)

    def if_unused(self) -> AbstractContextManager[bool]:
        """Keep every run from opening this store while the context lasts, if none has it open; gives whether."""
        return if_unused(self.folder)

    def _make_manifest(self, made_by: dict[str, Any]) -> list[str]:
        contents = {"format": FORMAT, "key": self.key, "made_from": self.fields, "made_by": made_by}
        notes = []
        try:
            self.check_manifest()
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

    def check_manifest(self) -> None:
        """Compare the manifest with what this store is made from; ``UserError`` when it is another's."""
        cure = f"Remove the folder {self.folder}, or choose another `dir`."
        try:
            manifest = read_manifest(self.folder)
        except UnknownFormatError as error:
            raise UserError(f"dir={self.root}: {self.folder.name} {error}. {cure}") from error
        theirs = manifest["made_from"]
        if theirs != self.fields or manifest["key"] != self.key:
            names = sorted(k for k in {*theirs, *self.fields} if theirs.get(k) != self.fields.get(k))
            differ = "; ".join(f"{k} is {theirs.get(k)!r} there and {self.fields.get(k)!r} here" for k in names)
            raise UserError(
                f"dir={self.root}: {self.folder.name} was made by something else ({differ or 'its key'}). {cure}"
            )

    def is_readable(self) -> bool:
        """Whether the manifest is there and this store's."""
        try:
            self.check_manifest()
        except (OSError, DamagedManifestError):
            return False
        return True

    def add_to_manifest(self, name: str, value: Any) -> None:
        """Put ``value`` (JSON) under ``name`` in the manifest, whole or not at all; the key stays as it is.

        Several processes may do so at once, and none loses what another added. Raises ``ValueError`` for a name that
        the manifest has by itself, ``UserError`` when it cannot be written.
        """
        if name in ("format", "key", "made_from", "made_by", "checksum"):
            raise ValueError(f"name={name}: the manifest has this entry by itself. Take another name.")
        try:
            with self.locks.hold("manifest"):
                contents = read_manifest(self.folder)
                if contents.get(name) != value:
                    publish(self.folder / MANIFEST, [seal({**contents, name: value})])
        except DamagedManifestError as damage:
            raise UserError(
                f"dir={self.root}: {MANIFEST} in {self.folder.name} is damaged ({damage}). Start again: it will "
                "be written anew, and what was recorded is kept."
            ) from damage
        except OSError as error:
            raise self.cannot_write(error, f" {MANIFEST}") from error

    def strays(self) -> Iterator[Path]:
        """Temporary files of dead writers, each while its lock is held, so that no new writer meets its removal."""
        corpora = self.folder / CORPORA
        for folder in (self.folder, *([corpora] if corpora.is_dir() and not corpora.is_symlink() else [])):
            for path, target in temporaries(folder):
                if folder == corpora or target == MANIFEST or SHARD.fullmatch(target):
                    lock = "manifest" if folder == corpora else _lock_name(target)
                    with self.locks.hold_if_free(lock) as is_free:
                        if is_free:
                            yield path

    # -- what is there -------------------------------------------------------------------------------------------------

    def refresh(self) -> set[str]:
        """Look which shards there are; the names of those that came, went or changed since the last time."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if SHARD.fullmatch(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        except OSError as error:
            raise self.cannot_read(self.folder, error) from error
        there, changed = set(), set()
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                which = which_file(entry.stat(follow_symlinks=False))
                there.add(entry.name)
                if self._seen.get(entry.name) == which:
                    continue
                changed.add(entry.name)
                self._forget(entry.name)
                keys, _ = read_keys(Path(entry.path), self.form)
            except FileNotFoundError:
                there.discard(entry.name)  # removed at this very moment
                continue
            except DamagedShardError as damage:
                self.damaged[entry.name] = damage.reason
            except OSError as error:
                raise self.cannot_read(Path(entry.path), error) from error
            else:
                self.files[entry.name] = keys
            self._seen[entry.name] = which
        for name in self._seen.keys() - there:
            changed.add(name)
            self._forget(name)
        return changed

    def _forget(self, name: str) -> None:
        for known in (self.files, self.damaged, self._seen, self._verified):
            known.pop(name, None)  # type: ignore[attr-defined]

    def path(self, name: str) -> Path:
        return self.folder / name

    # -- shards --------------------------------------------------------------------------------------------------------

    def write(self, recorded: Recorded) -> str:
        """Put a shard on disk, whole or not at all; its name. ``OSError`` when the disk is full or fails.

        Raises ``ValueError`` when it is none of this store's.
        """
        parts = pack(recorded, self.form)
        keys = recorded.keys.numpy()
        name = name_of(self.key, keys)
        with self.locks.hold(_lock_name(name)):
            publish(self.path(name), parts)
            self._forget(name)
            self._verified[name] = self._seen[name] = which_file(os.stat(self.path(name)))
            self.files[name] = keys
        return name

    def read(self, name: str) -> Recorded:
        """A shard, memory-mapped, verified against its checksum the first time this process reads it.

        Raises ``FileNotFoundError`` when it is not there, ``DamagedShardError`` when it is not what was written, and
        ``UserError`` when it cannot be read for another reason.
        """
        try:
            recorded, self._verified[name] = unpack(self.path(name), self.form, verified=self._verified.get(name))
        except FileNotFoundError:
            raise
        except OSError as error:  # no permission, too many open files: no reason to record it again
            raise self.cannot_read(self.path(name), error) from error
        if time.monotonic() - self._touched > 3600:  # a night of training is use too, and prune --unused-days asks
            self.touch()
        return recorded

    def read_ahead(self, name: str) -> None:
        """Bring a shard into the operating system's memory, before :meth:`read` maps it.

        What is there already is not read again. A shard that is missing or cannot be read is passed over here.
        """
        with suppress(OSError):
            read_through(self.path(name))

    def verify(self, name: str) -> None:
        """Read a shard through again and compare it with its checksum; raises as :meth:`read` does."""
        self._verified.pop(name, None)
        self.read(name)

    def discard(self, name: str) -> None:
        """Remove a shard, so that its sequences are recorded again; ``UserError`` when it cannot be removed."""
        self._forget(name)
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"dir={self.root}: {name} in {self.folder.name} is damaged and cannot be removed "
                f"({error.strerror}). Remove it by hand, or choose another `dir`."
            ) from error

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Be the one who writes or removes the shard of this name."""
        with self.locks.hold(_lock_name(name)):
            yield

    def cannot_read(self, path: Path, error: OSError) -> UserError:
        """What to say when a file cannot be read for a reason that says nothing about it."""
        return UserError(f"dir={self.root}: {path.name} in {self.folder.name} cannot be read ({error.strerror}).")

    def cannot_write(self, error: OSError, what: str = "") -> UserError:
        """What to say when something cannot be written."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"dir={self.root}: cannot write{what}, the disk is full ({error.strerror}). What was written "
                "before is kept: free some space and start again, or choose another `dir`."
            )
        if error.errno == errno.ENOENT and not self.folder.is_dir():
            return UserError(
                f"dir={self.root}: {self.folder.name} was removed while this run was using it. Start the run "
                "again: what it held is recorded anew."
            )
        return UserError(
            f"dir={self.root}: cannot write{what} there ({error.strerror}). What was written before is kept. "
            "Give a folder you may write, or enabled=false."
        )


def _lock_name(file: str) -> str:
    return file.partition(".")[0]
