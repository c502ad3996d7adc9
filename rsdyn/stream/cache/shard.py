"""One shard as a file: safetensors, with a checksum, and read with suspicion."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

_LARGEST_HEADER = 1 << 16  # ours has some 400 bytes
_BLOCK = 1 << 22  # bytes that are read at a time
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}  # in safetensors
_DAMAGE = {errno.ELOOP: "it is a link", errno.EIO: "the disk cannot read it", errno.EISDIR: "it is a folder"}

Which = tuple[int, ...]  # a file on disk: another one, or the same one written to, gives another


@dataclass(frozen=True)
class Shard:
    """Consecutive sequences of a corpus: a trajectory each, or one for each recorded token, a sequence's together.

    Attributes:
        activations: ``(n, S, D)``, in the cache's dtype; memory-mapped when it comes from disk.
        index: ``(n,)`` int64, each trajectory's sequence, by its number in the corpus.
        n_tokens: ``(n,)`` int32, the length of that sequence, BOS included.
        position: ``(n,)`` int32, the token's place in the sequence, BOS being 0; None where it is the last.
        kind: ``(n,)`` uint8, what :func:`rsdyn.stream.text.positions.kinds` says of it; None with ``position``.
    """

    activations: Tensor
    index: Tensor
    n_tokens: Tensor
    position: Tensor | None = None
    kind: Tensor | None = None


class DamagedShardError(Exception):
    """A shard on disk is not what was written; the message says which and why."""


@dataclass(frozen=True)
class Place:
    """A shard's place in its cache, which its contents must fit.

    Attributes:
        key: of the cache.
        number: of the shard.
        first: its first sequence.
        shape: of its activations, ``(n, S, D)``.
        dtype: of its activations.
        n_sequences: how many sequences share the ``n`` trajectories; None where each has one, that of its last token.
    """

    key: str
    number: int
    first: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    n_sequences: int | None = None

    @property
    def n_bytes(self) -> int:
        """Of its tensors."""
        n, n_sublayers, n_units = self.shape
        return n * trajectory_bytes(n_sublayers, n_units, self.dtype, marked=self.n_sequences is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        return ("activations", "index", "n_tokens") + (() if self.n_sequences is None else ("position", "kind"))

    def check(self, shard: Shard) -> dict[str, Tensor]:
        """The shard's tensors by name; ``ValueError`` when they do not fit here."""
        n = self.shape[0]
        dtypes = {"activations": self.dtype, "index": torch.int64, "n_tokens": torch.int32}
        dtypes |= {"position": torch.int32, "kind": torch.uint8}
        tensors = {name: getattr(shard, name) for name in self.names}
        for name, found in tensors.items():
            shape, dtype = self.shape if name == "activations" else (n,), dtypes[name]
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                what = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(f"{name} is {what}, expected {shape} {dtype}")
        index, end = tensors["index"], self.first + (self.n_sequences or n)
        numbers = index if self.n_sequences is None else index.unique_consecutive()
        if not torch.equal(numbers, torch.arange(self.first, end)):
            raise ValueError(f"index is not {self.first} to {end - 1}")
        if self.n_sequences is not None:
            position = tensors["position"]
            rises = (position.diff() > 0) | (index.diff() > 0)
            if not rises.all() or not ((position >= 0) & (position < tensors["n_tokens"])).all():
                raise ValueError("position is not that of different tokens of each sequence, in their order")
        return tensors


def trajectory_bytes(n_sublayers: int, n_units: int, dtype: torch.dtype, *, marked: bool) -> int:
    """Of a trajectory in a shard; ``marked`` with its position and kind."""
    return n_sublayers * n_units * dtype.itemsize + 12 + 5 * marked


def pack(shard: Shard, place: Place) -> list[bytes | memoryview]:
    """The file's bytes: the header, and tensor by tensor what its checksum is of. Always the same bytes.

    The tensors are not copied: they must stay as they are until they are written. What ``safetensors.torch.save`` makes
    is these very bytes, copied twice into new memory, which took as long as writing them to the disk.
    """
    tensors = place.check(shard)
    # the larger its numbers the further in front, then by name, as safetensors has it
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    parts = [tensors[name].contiguous().flatten().view(torch.uint8).numpy().data for name in names]
    digest = xxhash.xxh3_128()  # 13 GiB/s, where sha256 gives 1
    for part in parts:
        digest.update(part)
    ours = json.dumps({"key": place.key, "shard": place.number, "xxh3": digest.hexdigest()}, sort_keys=True)
    # one metadata entry: several would be written in no particular order, and the bytes would not repeat
    header: dict[str, Any] = {"__metadata__": {"rsdyn": ours}}
    end = 0
    for name, part in zip(names, parts, strict=True):
        start, end = end, end + len(part)
        tensor = tensors[name]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return [len(text).to_bytes(8, "little") + text, *parts]


def unpack(path: Path, place: Place, *, verified: Which | None = None) -> tuple[Shard, Which]:
    """Map a shard's file into memory, after comparing it with its checksum unless it is the file ``verified``.

    Raises ``FileNotFoundError``, ``DamagedShardError``, and ``OSError`` where the file cannot be read for a reason that
    says nothing about it (no permission, too many open files).
    """
    try:
        which = _verify(path, place, verified)
        with safe_open(path, framework="pt") as file:
            shard = Shard(**{name: file.get_tensor(name) for name in place.names})
        place.check(shard)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        reason = _DAMAGE[error.errno]
        raise _damaged(path, place, reason) from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, place, str(error)) from error
    return shard, which


def _damaged(path: Path, place: Place, reason: str) -> DamagedShardError:
    return DamagedShardError(f"shard {place.number} ({path.name} in {path.parent}) is damaged: {reason}")


def _verify(path: Path, place: Place, verified: Which | None) -> Which:
    """Read the file through and say which it was.

    Plain reads, before anything is mapped: a file that is too short, or a disk that fails, is an error here and would
    be SIGBUS in a mapping.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        which = which_file(found)
        if which == verified:
            return which
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        # the sizes first: a lie about them must not make us read, or allocate, more than there should be
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > _LARGEST_HEADER or found.st_size != 8 + n_header + place.n_bytes:
            raise ValueError(f"it has {found.st_size} bytes, which is not what its sequences take")
        ours = json.loads(json.loads(file.read(n_header))["__metadata__"]["rsdyn"])
        if ours["key"] != place.key or ours["shard"] != place.number:
            raise ValueError("it belongs to another cache or place")
        if ours["xxh3"] != _digest(file):
            raise ValueError("its checksum does not match")
    return which


def read_through(path: Path) -> None:
    """Read what of a file is not in the operating system's memory, and keep nothing of it.

    Raises ``OSError``; what is no file is left alone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        block, size = bytearray(_BLOCK), found.st_size if stat.S_ISREG(found.st_mode) else 0
        for start in range(0, size, _BLOCK):
            # not its first byte: the kernel reads ahead a little, so the block before brings that one along
            places = (min(start + _BLOCK // 2, size - 1), min(start + _BLOCK, size) - 1)
            if not all(_is_in_memory(descriptor, place) for place in places):
                os.preadv(descriptor, [block], start)
    finally:
        os.close(descriptor)


def _is_in_memory(descriptor: int, place: int) -> bool:
    """Whether the operating system has a file's byte at hand; False where it does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return False


def which_file(found: os.stat_result) -> Which:
    """Tell a file on disk from others, and from itself before it was last written to."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _digest(file: IO[bytes]) -> str:
    """The checksum of all that is left in ``file``."""
    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
