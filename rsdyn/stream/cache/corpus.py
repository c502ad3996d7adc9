"""The trajectories of one corpus: which shards of its model's folder hold them, and what is still to be recorded.

A corpus is cut into shards of as many sequences as are recorded, read and owned together, by their numbers. On disk
each sequence is found by what it is: its tokens, and which of them were recorded. So a shard of the corpus lies in one
file where it was recorded as a whole, in parts of several where others came before, and what no file has is recorded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.files import publish
from rsdyn.stream.cache.manifest import cache_key, read_manifest
from rsdyn.stream.cache.old import older_folders
from rsdyn.stream.cache.shard import KEY_BYTES, DamagedShardError, Recorded, Shard, name_of, packed
from rsdyn.stream.cache.store import CORPORA, ShardStore, slug

INDEX_BYTES = 1 << 34  # an index is 16 bytes a sequence; more than a thousand million are not ours


def sequence_keys(tokens: Iterable[np.ndarray], recorded: Iterable[bytes]) -> np.ndarray:
    """What each sequence is known by, uint8 ``(N, 16)``: a hash of its tokens and of which of them are ``recorded``.

    A sequence that a corpus has several times has several keys, in the order they come: each is recorded by itself, so
    that what goes through the model together does not depend on which process is first.
    """
    times: dict[bytes, int] = {}
    keys = []
    for ids, which in zip(tokens, recorded, strict=True):
        digest = xxhash.xxh3_128(np.ascontiguousarray(ids, "<i4").tobytes())
        digest.update(b"|" + which)
        key = digest.digest()
        before = times[key] = times.get(key, -1) + 1
        keys.append(key if before == 0 else xxhash.xxh3_128_digest(key + before.to_bytes(8, "little")))
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


class TrajectoryCache:
    """The trajectories of one corpus through one model.

    Args:
        root: the cache folder (``cache.dir``).
        fields: what decides the numbers of any text: the model, its sites, the precision, ...; JSON values.
        label: a few words for the folder's name, for people.
        keys: ``(N, 16)`` uint8, what each sequence is known by (:func:`sequence_keys`).
        n_sublayers, n_units: ``S`` and ``D``.
        dtype: of the activations on disk, ``bfloat16`` or ``float32``.
        shard_sequences: sequences that are recorded and read together.
        counts: ``(N,)``, how many trajectories each sequence has; None where each has one, that of its last token.
        corpus: what the corpus is (text, filter, condition, ...); JSON values, for the index and :attr:`key`.

    Nothing is written before :meth:`open`.

    Attributes:
        store: the model's folder.
        key: the hash of all that decides this corpus' trajectories.
    """

    def __init__(
        self,
        root: str | Path,
        fields: dict[str, Any],
        *,
        label: str,
        keys: np.ndarray,
        n_sublayers: int,
        n_units: int,
        dtype: str = "bfloat16",
        shard_sequences: int = 256,
        counts: np.ndarray | None = None,
        corpus: dict[str, Any] | None = None,
    ) -> None:
        self.store = ShardStore(root, fields, label=label, n_sublayers=n_sublayers, n_units=n_units, dtype=dtype)
        self.root, self.folder, self.dtype = self.store.root, self.store.folder, self.store.form.dtype
        self.keys, self.counts = keys, None if counts is None else np.asarray(counts, np.int64)
        self.shape = (len(keys), n_sublayers, n_units)
        self.shard_sequences = shard_sequences
        self.n_shards = -(-len(keys) // shard_sequences)
        self.corpus = {**(corpus or {}), "n_sequences": len(keys), "n_trajectories": self.n_trajectories}
        self.key = cache_key({**self.store.fields, **self.corpus, "keys": xxhash.xxh3_128_hexdigest(keys.tobytes())})
        self._number = {key.tobytes(): i for i, key in enumerate(keys)}
        self._names: list[str] = []  # of the shards that hold some of these sequences
        self._file = np.full(len(keys), -1)  # which of them each sequence is in, and
        self._place = np.zeros(len(keys), np.int64)  # which of its sequences it is there

    @property
    def fields(self) -> dict[str, Any]:
        """All that made these trajectories: the model's, then the corpus'."""
        return {**self.store.fields, **self.corpus}

    # -- the folder ----------------------------------------------------------------------------------------------------

    def open(self, made_by: dict[str, Any] | None = None, *, wanted: Iterable[int] | None = None) -> list[str]:
        """Make or check the model's folder, its manifest and this corpus' index.

        What killed writers left is cleared away. Until this object is gone nobody removes what is in the folder.

        ``made_by`` (versions) is kept beside what made the key. A folder that cannot be written will do when it holds
        all ``wanted`` shards (default: all there are). Returns what a user should know, a sentence each: a damaged
        manifest was written again, the same text lies there in an older layout. Raises ``UserError`` when the folder
        cannot be written and something is missing, or when it holds what another model, text or format made, or is a
        link.
        """
        try:
            notes = self.store.open(made_by or {})
            self._write_index()
        except OSError as error:
            lost = set(self.missing())
            if (lost if wanted is None else lost & set(wanted)) or not self.store.is_readable():
                raise self.store.cannot_write(error) from error
            return []
        if missing := self.missing():
            names = {self.path(k).name for k in missing}
            if others := sorted(self.store.damaged.keys() - names):
                notes.append(
                    f"{len(others)} damaged shard{'s' * (len(others) > 1)} in {self.folder} ({others[0]}: "
                    f"{self.store.damaged[others[0]]}) may hold sequences of this text, which are recorded again; "
                    "python -m rsdyn.stream.cache prune --damaged --yes removes what is damaged"
                )
            for folder in older_folders(
                self.root, weights=self.fields.get("weights"), tokens=self.corpus.get("tokens")
            ):
                notes.append(
                    f"{folder.name} holds this text in the layout of an older rsdyn, which is not read: it is recorded "
                    f"anew. python -m rsdyn.stream.cache prune {folder.name} --yes removes it"
                )
        return notes

    @property
    def index_path(self) -> Path:
        """Where it is written down what this corpus is, and which sequences it has."""
        return self.folder / CORPORA / f"{slug(str(self.corpus.get('text', 'text')))}-{self.key[:16]}.safetensors"

    def _write_index(self) -> None:
        words = {"key": self.key, "corpus": self.corpus}
        data = b"".join(packed({"keys": torch.from_numpy(self.keys.copy())}, words))
        path = self.index_path
        with self.store.locks.hold("manifest"):
            if path.parent.is_symlink() or path.is_symlink():
                raise UserError(f"dir={self.root}: {path} is, or lies in, a link. Remove the link.")
            path.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                if path.read_bytes() == data:
                    with suppress(OSError):  # another user's file
                        os.utime(path)
                    return
            publish(path, [data])

    def if_unused(self) -> AbstractContextManager[bool]:
        """See :meth:`ShardStore.if_unused`."""
        return self.store.if_unused()

    def manifest(self) -> dict[str, Any]:
        """What the model's manifest says: ``format``, ``key``, ``made_from``, ``made_by``, and what was added to it.

        Raises ``FileNotFoundError`` and ``DamagedManifestError``.
        """
        return read_manifest(self.folder)

    def add_to_manifest(self, name: str, value: Any) -> None:
        """See :meth:`ShardStore.add_to_manifest`."""
        self.store.add_to_manifest(name, value)

    # -- what is there -------------------------------------------------------------------------------------------------

    def bounds(self, k: int) -> tuple[int, int]:
        """First and one-past-last sequence of shard ``k``."""
        start = k * self.shard_sequences
        return start, min(start + self.shard_sequences, self.shape[0])

    def path(self, k: int) -> Path:
        """The file that shard ``k`` is in when all of it was recorded together."""
        return self.store.path(name_of(self.store.key, self.keys[slice(*self.bounds(k))]))

    def files(self) -> list[Path]:
        """The files that hold some of this corpus."""
        self._look()
        used = set(self._file[self._file >= 0].tolist())
        return [self.store.path(name) for i, name in enumerate(self._names) if i in used]

    def missing_sequences(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers of the sequences from ``start`` to ``stop`` that are in no shard."""
        self._look()
        return start + np.flatnonzero(self._file[start:stop] < 0)

    def has(self, k: int) -> bool:
        """Whether there is something in the place of all of shard ``k``; :meth:`read` says what it is worth."""
        return len(self.missing_sequences(*self.bounds(k))) == 0 or os.path.lexists(self.path(k))

    def missing(self) -> list[int]:
        """The shards of which something is not on disk."""
        return np.unique(self.missing_sequences() // self.shard_sequences).tolist()

    @property
    def n_trajectories(self) -> int:
        """Of the whole corpus."""
        return self.shape[0] if self.counts is None else int(self.counts.sum())

    def n_bytes(self, sequences: np.ndarray) -> int:
        """Of some sequences on disk at most, one file per shard."""
        n = len(sequences) if self.counts is None else int(self.counts[sequences].sum())
        return self.store.form.n_bytes(n, len(sequences)) + 1024 * len(np.unique(sequences // self.shard_sequences))

    def shard_bytes(self, k: int) -> int:
        """Bytes of shard ``k``."""
        return self.n_bytes(np.arange(*self.bounds(k)))

    def check_free_space(self, missing: np.ndarray | None = None) -> None:
        """Raise ``UserError`` when the ``missing`` sequences (default: all that are) do not fit on the disk."""
        missing = self.missing_sequences() if missing is None else missing
        if not len(missing):
            return
        needed = self.n_bytes(missing)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            fit = max(0, self.shape[0] - len(missing) + free * len(missing) // needed) if free else 0
            tokens = "" if self.counts is None else " or fewer tokens of each (`positions`)"
            fewer = f"record fewer sequences (limit={fit} would fit){tokens}, " if fit else ""
            raise UserError(
                f"dir={self.root}: the cache needs {needed / 2**30:.2f} GiB more and the disk has "
                f"{free / 2**30:.2f} GiB free. Choose another `dir`, {fewer}or enabled=false, which runs the "
                "LM again in every epoch."
            )

    def _look(self) -> None:
        """Find what has come into the folder, and what has gone."""
        changed = self.store.refresh()
        if changed & set(self._names):
            self._names, self._file[:] = [], -1
            changed = set(self.store.files)
        for name in sorted(changed & self.store.files.keys()):
            self._take(name)

    def _take(self, name: str) -> None:
        """Note which of this corpus' sequences a shard holds, but for those that another one has."""
        found = [self._number.get(key.tobytes(), -1) for key in self.store.files[name]]
        numbers = np.array(found)
        places = np.flatnonzero(numbers >= 0)
        new = places[self._file[numbers[places]] < 0]
        if len(new):
            self._file[numbers[new]], self._place[numbers[new]] = len(self._names), new
            self._names.append(name)

    # -- shards --------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, k: int, on_wait: Callable[[str], object] = lambda holder: None) -> Iterator[None]:
        """Be the one who records what is missing of shard ``k``; ``on_wait`` is told who is, when it is somebody else.

        Whoever waited looks again before recording: the other may have written it. A corpus of more or fewer sequences
        has the same lock, since it begins the shard with the same sequence.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.store.locks.hold(self._lock_name(k), on_wait))
            except OSError as error:
                raise self.store.cannot_write(error, f" the lock of shard {k}") from error
            yield

    def lock_if_free(self, k: int) -> AbstractContextManager[bool]:
        """Be the one who records what is missing of shard ``k``, if nobody is; gives whether."""
        return self.store.locks.hold_if_free(self._lock_name(k))

    def _lock_name(self, k: int) -> str:
        return f"recording-{self.keys[self.bounds(k)[0]].tobytes().hex()}"

    def write(self, k: int, shard: Shard) -> None:
        """Put sequences of shard ``k``, all or those that are missing, on disk, whole or not at all.

        Raises ``UserError`` when the disk is full or fails, ``ValueError`` when they are not of shard ``k``.
        """
        recorded = self._recorded(k, shard)
        with self.lock(k):
            try:
                name = self.store.write(recorded)
            except OSError as error:
                raise self.store.cannot_write(error, f" shard {k} of {self.n_shards}") from error
            if name in self._names:
                self._look()
            self._take(name)

    def _recorded(self, k: int, shard: Shard) -> Recorded:
        start, stop = self.bounds(k)
        numbers = shard.index.unique_consecutive()
        rises = bool((numbers.diff() > 0).all())
        if not len(numbers) or not rises or int(numbers[0]) < start or int(numbers[-1]) >= stop:
            raise ValueError(f"index is not of sequences {start} to {stop - 1}, in their order")
        counts = torch.ones(len(numbers), dtype=torch.int64)
        if self.counts is not None:
            counts = torch.from_numpy(self.counts[numbers.numpy()])
        if not torch.equal(shard.index, numbers.repeat_interleave(counts)):
            raise ValueError("index is not each sequence as often as it has trajectories")
        if (shard.position is None) != (self.counts is None):
            raise ValueError(f"position is {'missing' if shard.position is None else 'given for last tokens'}")
        ends = counts.cumsum(0)
        return Recorded(
            shard.activations,
            torch.from_numpy(self.keys[numbers.numpy()]),
            counts.int(),
            shard.n_tokens[ends - 1],
            shard.n_tokens - 1 if shard.position is None else shard.position,
        )

    def read(self, k: int) -> Shard:
        """Shard ``k``, from whatever files hold it, without ``kind``; each is verified the first time it is read.

        It is memory-mapped where one file has it all in this order, and else gathered in memory.

        Raises ``FileNotFoundError`` when some of it is not there, ``DamagedShardError`` when it is not what was
        written, and ``UserError`` when it cannot be read for another reason.
        """
        start, stop = self.bounds(k)
        for _ in range(2):
            if (self._file[start:stop] < 0).any():
                self._look()
            if (self._file[start:stop] < 0).any():
                path = self.path(k)
                if path.name in self.store.damaged:
                    raise DamagedShardError(path, self.store.damaged[path.name], k)
                break
            try:
                return self._read(k)
            except FileNotFoundError:  # somebody removed it
                self._look()
        raise FileNotFoundError(f"shard {k} of {self.n_shards} is not in {self.folder}, or not all of it")

    def _read(self, k: int) -> Shard:
        start, stop = self.bounds(k)
        whole = self.path(k).name
        if whole in self.store.files:
            return self._shard(k, [(self._file_of(k, whole), np.arange(stop - start), np.arange(stop - start))])
        files, parts = self._file[start:stop], []
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            parts.append((self._file_of(k, self._names[file]), self._place[start + here], here))
        return self._shard(k, parts)

    def _file_of(self, k: int, name: str) -> Recorded:
        try:
            return self.store.read(name)
        except DamagedShardError as damage:
            raise DamagedShardError(damage.path, damage.reason, k) from damage

    def _shard(self, k: int, parts: list[tuple[Recorded, np.ndarray, np.ndarray]]) -> Shard:
        """Shard ``k`` out of files: of each the places of some sequences in it, and in the shard."""
        start, stop = self.bounds(k)
        counts = np.ones(stop - start, np.int64) if self.counts is None else self.counts[start:stop]
        index = torch.from_numpy(np.repeat(np.arange(start, stop), counts))
        ends = np.cumsum(counts)
        gathered: list[Tensor] = []
        for recorded, there, here in parts:
            theirs = recorded.trajectories.numpy().astype(np.int64)
            rows = _rows(np.cumsum(theirs), theirs, there)
            length = recorded.n_tokens[torch.from_numpy(there)].repeat_interleave(torch.from_numpy(counts[here]))
            if len(parts) == 1 and len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
                taken = slice(int(rows[0]), int(rows[-1]) + 1)
                gathered = [recorded.activations[taken], length, recorded.position[taken]]
                break
            if not gathered:
                shape = (len(index), *self.shape[1:])
                gathered = [torch.empty(shape, dtype=self.dtype)]
                gathered += [torch.empty(len(index), dtype=torch.int32) for _ in range(2)]
            into, rows_there = torch.from_numpy(_rows(ends, counts, here)), torch.from_numpy(rows)
            for out, values in zip(
                gathered, (recorded.activations[rows_there], length, recorded.position[rows_there]), strict=True
            ):
                out[into] = values
        activations, n_tokens, position = gathered
        return Shard(activations, index, n_tokens, None if self.counts is None else position)

    def recorded_before(self) -> Iterator[tuple[np.ndarray, Recorded]]:
        """The shards on disk that are whole and hold some of this corpus, the first of it first.

        Each with the number in this corpus of each of its sequences, ``(m,)``, or -1.
        """
        self._look()
        for file in dict.fromkeys(self._file[self._file >= 0].tolist()):
            name = self._names[file]
            with suppress(FileNotFoundError, DamagedShardError):
                recorded = self.store.read(name)
                yield np.array([self._number.get(key.tobytes(), -1) for key in recorded.keys.numpy()]), recorded

    def read_ahead(self, k: int) -> None:
        """Bring shard ``k`` into the operating system's memory, before :meth:`read` maps it.

        What is there already is not read again. A shard that is missing or cannot be read is passed over here.
        """
        names = {self.path(k).name, *(self._names[file] for file in self._file[slice(*self.bounds(k))] if file >= 0)}
        for name in sorted(names & self.store.files.keys()):
            self.store.read_ahead(name)

    def discard(self, k: int) -> None:
        """Remove every shard that holds a sequence of shard ``k``; ``UserError`` when one cannot be removed."""
        self._look()
        of_these = {self._names[file] for file in self._file[slice(*self.bounds(k))] if file >= 0}
        for name in sorted({self.path(k).name, *of_these}):
            self.store.discard(name)
        self._names, self._file[:] = [], -1
        for name in sorted(self.store.files):
            self._take(name)

    def remove_damaged(self, damage: DamagedShardError) -> None:
        """Remove the file that is damaged; ``UserError`` when it cannot be removed. The caller holds a shard's lock."""
        with self.store.holding(damage.path.name):
            self.store.discard(damage.path.name)
        if damage.path.name in self._names:
            self._names, self._file[:] = [], -1
            for name in sorted(self.store.files):
                self._take(name)

    def verify(self, k: int) -> None:
        """Read what shard ``k`` is in through again and compare it with its checksums; raises as :meth:`read` does."""
        self.store._verified.clear()
        self.read(k)


def _rows(ends: np.ndarray, counts: np.ndarray, which: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where the trajectories of some sequences are, whose ``counts`` end at ``ends``."""
    which = np.asarray(which)
    n = counts[which]
    first = np.repeat(ends[which] - n - np.concatenate([[0], np.cumsum(n)[:-1]]), n)
    return first + np.arange(int(n.sum()))


def read_index(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What an index says of its corpus, and the keys ``(N, 16)`` of its sequences.

    Raises ``ValueError`` where it is not what was written, ``OSError`` where it cannot be read.
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size > INDEX_BYTES:
        raise ValueError("it is no file of ours")
    data = path.read_bytes()
    try:
        n = int.from_bytes(data[:8], "little")
        words = json.loads(json.loads(data[8 : 8 + n])["__metadata__"]["rsdyn"])
        keys = np.frombuffer(data[8 + n :], np.uint8).reshape(-1, KEY_BYTES)
        whole = b"".join(packed({"keys": torch.from_numpy(keys.copy())}, {k: words[k] for k in ("key", "corpus")}))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError("it is damaged") from error
    if whole != data or not isinstance(words["corpus"], dict):
        raise ValueError("it is damaged")
    return words["corpus"], keys
