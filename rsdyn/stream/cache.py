"""Trajectories on disk: safetensors shards and one manifest, in a folder named by the hash of what made them.

Shard ``k`` holds sequences ``[k n, (k + 1) n)`` of the corpus, always, so that a shard made again, by whatever process,
has the same bytes. A shard appears whole or not at all (temporary name, fsync, rename, fsync of the folder) and carries
a checksum of its tensors, since a flipped bit in a safetensors file loads silently.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rsdyn.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """Consecutive sequences of a corpus.

    Attributes:
        activations: ``(n, S, D)``, in the cache's dtype; memory-mapped when it comes from disk.
        index: ``(n,)`` int64, each sequence's number in the corpus.
        n_tokens: ``(n,)`` int32, each sequence's length, BOS included.
    """

    activations: Tensor
    index: Tensor
    n_tokens: Tensor


class DamagedShardError(Exception):
    """A shard on disk is not what was written; the message says which and why."""


def default_cache_dir() -> Path:
    """``$RSDYN_CACHE``, else ``$XDG_CACHE_HOME/rsdyn``, else ``~/.cache/rsdyn``."""
    if named := os.environ.get("RSDYN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "rsdyn"


def cache_key(fields: dict[str, Any]) -> str:
    """The hash of everything that decides the recorded numbers, the format version included."""
    text = json.dumps({"format": FORMAT, **fields}, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


class TrajectoryCache:
    """The shards of one corpus through one model.

    Args:
        root: the cache folder (``cache.dir``); this corpus gets a folder of its own in it.
        fields: what made the trajectories (model, tokens, condition, dtype, ...); JSON values. Their hash is the key.
        label: a few words for the folder's name, for people.
        n_sequences, n_sublayers, n_units: ``N``, ``S`` and ``D``.
        dtype: of the activations on disk, ``bfloat16`` or ``float32``.
        shard_sequences: sequences a shard.

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
    ):
        self.root = Path(root).expanduser()
        self.shape = (n_sequences, n_sublayers, n_units)
        self.dtype = DTYPES[dtype]
        self.shard_sequences = shard_sequences
        self.fields = {**fields, "shape": list(self.shape), "dtype": dtype, "shard_sequences": shard_sequences}
        self.key = cache_key(self.fields)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "stream"
        self.folder = self.root / f"{slug}-{self.key[:16]}"
        self.n_shards = -(-n_sequences // shard_sequences)
        self._verified: set[int] = set()

    def open(self, made_by: dict[str, Any] | None = None) -> None:
        """Make or check the folder and its manifest; ``made_by`` (versions, time) is kept beside what made the key.

        Raises ``UserError`` when the folder cannot be written, or holds what another model, text or format made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # better to learn now than after an hour of the LM that nothing can be written
        except OSError as error:
            raise UserError(
                f"cache.dir={self.root}: cannot write there ({error.strerror}). Give a folder you may write, or "
                "cache.enabled=false."
            ) from error
        path = self.folder / MANIFEST
        if path.exists():
            self._check_manifest(path)
        else:
            manifest = {"format": FORMAT, "key": self.key, "made_from": self.fields, "made_by": made_by or {}}
            _publish(path, [json.dumps(manifest, indent=2, ensure_ascii=False).encode()])

    def _check_manifest(self, path: Path) -> None:
        cure = f"Remove the folder {self.folder}, or choose another cache.dir."
        try:
            manifest = json.loads(path.read_text())
            found_format, made_from = manifest["format"], manifest["made_from"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cache.dir={self.root}: {path.name} in {self.folder.name} cannot be read. {cure}"
            ) from error
        if found_format != FORMAT:
            raise UserError(
                f"cache.dir={self.root}: {self.folder.name} has format {found_format}, this rsdyn reads format "
                f"{FORMAT}. {cure}"
            )
        if made_from != self.fields or manifest.get("key") != self.key:
            theirs = made_from if isinstance(made_from, dict) else {}
            names = sorted(k for k in {*theirs, *self.fields} if theirs.get(k) != self.fields.get(k))
            differ = "; ".join(f"{k} is {theirs.get(k)!r} there and {self.fields.get(k)!r} here" for k in names)
            raise UserError(
                f"cache.dir={self.root}: {self.folder.name} was made by something else ({differ or 'its key'}). {cure}"
            )

    # -- what is there -------------------------------------------------------------------------------------------------

    def bounds(self, k: int) -> tuple[int, int]:
        """First and one-past-last sequence of shard ``k``."""
        start = k * self.shard_sequences
        return start, min(start + self.shard_sequences, self.shape[0])

    def path(self, k: int) -> Path:
        return self.folder / f"shard-{k:05d}.safetensors"

    def has(self, k: int) -> bool:
        return self.path(k).exists()

    def missing(self) -> list[int]:
        """The shards that are not on disk."""
        return [k for k in range(self.n_shards) if not self.has(k)]

    def shard_bytes(self, k: int) -> int:
        """Bytes of shard ``k`` on disk, but for a header of about a kilobyte."""
        start, stop = self.bounds(k)
        per_sequence = self.shape[1] * self.shape[2] * self.dtype.itemsize + 12
        return (stop - start) * per_sequence + 1024

    def check_free_space(self, missing: list[int] | None = None) -> None:
        """Raise ``UserError`` when ``missing`` shards (default: all that are) do not fit on the disk."""
        needed = sum(self.shard_bytes(k) for k in (self.missing() if missing is None else missing))
        free = shutil.disk_usage(self.root).free
        if needed > free:
            fit = max(0, free * self.shape[0] // max(1, sum(map(self.shard_bytes, range(self.n_shards)))))
            raise UserError(
                f"cache.dir={self.root}: the cache needs {needed / 2**30:.2f} GiB more and the disk has "
                f"{free / 2**30:.2f} GiB free. Choose another cache.dir, record fewer sequences (data.limit={fit} "
                "would fit), or cache.enabled=false, which runs the LM again in every epoch."
            )

    # -- shards --------------------------------------------------------------------------------------------------------

    def write(self, k: int, shard: Shard) -> None:
        """Put shard ``k`` on disk, whole or not at all; ``UserError`` when the disk is full."""
        tensors = self._check(k, shard)
        header = json.dumps({"key": self.key, "shard": k, "xxh3": _digest(tensors)}, sort_keys=True)
        # one metadata entry: several would be written in no particular order, and the bytes would not repeat
        data = save(tensors, metadata={"rsdyn": header})
        try:
            _publish(self.path(k), [data])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"cache.dir={self.root}: the disk is full ({error.strerror}) at shard {k} of {self.n_shards}. What was "
                "written before is kept: free some space and start again, or choose another cache.dir."
            ) from error
        self._verified.add(k)

    def read(self, k: int) -> Shard:
        """Shard ``k``, memory-mapped, verified against its checksum the first time this process reads it.

        Raises ``FileNotFoundError`` when it is not there, ``DamagedShardError`` when it is not what was written.
        """
        path = self.path(k)
        if not path.exists():
            raise FileNotFoundError(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("activations", "index", "n_tokens")}
                header = json.loads((file.metadata() or {})["rsdyn"])
            shard = Shard(**tensors)
            self._check(k, shard)
            if header["key"] != self.key or header["shard"] != k:
                raise ValueError("it belongs to another cache or place")
            if k not in self._verified and header["xxh3"] != _digest(tensors):
                raise ValueError("its checksum does not match")
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise DamagedShardError(f"shard {k} ({path.name} in {self.folder}) is damaged: {error}") from error
        self._verified.add(k)
        return shard

    def discard(self, k: int) -> None:
        """Remove shard ``k``, so that it is made again."""
        self._verified.discard(k)
        self.path(k).unlink(missing_ok=True)

    def _check(self, k: int, shard: Shard) -> dict[str, Tensor]:
        start, stop = self.bounds(k)
        expected = {
            "activations": ((stop - start, *self.shape[1:]), self.dtype),
            "index": ((stop - start,), torch.int64),
            "n_tokens": ((stop - start,), torch.int32),
        }
        tensors = {name: getattr(shard, name) for name in expected}
        for name, (shape, dtype) in expected.items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, expected {shape} {dtype}"
                )
        if not torch.equal(tensors["index"], torch.arange(start, stop)):
            raise ValueError(f"index is not {start} to {stop - 1}")
        return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()  # 13 GiB/s, where sha256 gives 1
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name].contiguous().view(torch.uint8).numpy()).data)
    return digest.hexdigest()


def _publish(path: Path, parts: list[bytes]) -> None:
    """Write ``path`` so that it is there whole or not at all, also after a crash: same-folder temporary file, fsync,
    rename, fsync of the folder.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, sum(map(len, parts)))  # a full disk is an error here, not halfway
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would break a cache that a group shares
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
