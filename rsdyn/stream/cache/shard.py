"""One shard as a file: safetensors, with a checksum, named by what is in it, and read with suspicion."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

KEY_BYTES = 16  # of a sequence's key
_LARGEST_HEADER = 1 << 16  # ours has some 500 bytes
_BLOCK = 1 << 22  # bytes that are read at a time
_ABSURD = 10**9  # more sequences, or trajectories, than anybody has in a file
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}  # in safetensors
_DAMAGE = {errno.ELOOP: "it is a link", errno.EIO: "the disk cannot read it", errno.EISDIR: "it is a folder"}

Which = tuple[int, ...]  # a file on disk: another one, or the same one written to, gives another


@dataclass(frozen=True)
class Shard:
    """Consecutive sequences of a corpus: a trajectory each, or one for each recorded token, a sequence's together.

    Attributes:
        activations: ``(n, S, D)``, in the cache's dtype; memory-mapped where one file has them all.
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


@dataclass(frozen=True)
class Recorded:
    """What one file holds: sequences, of whatever corpora, that went through the model together.

    Attributes:
        activations: ``(n, S, D)``; memory-mapped when it comes from disk.
        keys: ``(m, 16)`` uint8, what each sequence is known by: its tokens, and which of them were recorded.
        trajectories: ``(m,)`` int32, how many of the ``n`` belong to each, which stand together.
        n_tokens: ``(m,)`` int32, the length of each.
        position: ``(n,)`` int32, each trajectory's token.
    """

    activations: Tensor
    keys: Tensor
    trajectories: Tensor
    n_tokens: Tensor
    position: Tensor


@dataclass(frozen=True)
class Form:
    """What every shard of a model's folder has in common, and must fit.

    Attributes:
        key: the hash of what decides the numbers: model, sites, precision.
        n_sublayers, n_units: ``S`` and ``D``.
        dtype: of the activations.
    """

    key: str
    n_sublayers: int
    n_units: int
    dtype: torch.dtype

    def n_bytes(self, n_trajectories: int, n_sequences: int) -> int:
        """Of the tensors of a file."""
        return file_bytes(n_trajectories, n_sequences, (self.n_sublayers, self.n_units), self.dtype)

    def check(self, recorded: Recorded) -> None:
        """``ValueError`` when the tensors do not fit here, or each other."""
        n, m = len(recorded.position), len(recorded.keys)
        expected = {
            "activations": ((n, self.n_sublayers, self.n_units), self.dtype),
            "keys": ((m, KEY_BYTES), torch.uint8),
            "trajectories": ((m,), torch.int32),
            "n_tokens": ((m,), torch.int32),
            "position": ((n,), torch.int32),
        }
        for name, (shape, dtype) in expected.items():
            found = getattr(recorded, name)
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(f"{name} is {tuple(found.shape)} {found.dtype}, expected {shape} {dtype}")
        if m == 0 or (recorded.trajectories < 1).any() or int(recorded.trajectories.sum()) != n:
            raise ValueError(f"trajectories is not a number of each sequence that adds up to {n}")
        starts = torch.zeros(n, dtype=torch.bool)
        starts[(recorded.trajectories.cumsum(0) - recorded.trajectories).long()] = True
        length = recorded.n_tokens.repeat_interleave(recorded.trajectories)
        rises = recorded.position.diff(prepend=torch.tensor([-1])) > 0
        if not (rises | starts).all() or not ((recorded.position >= 0) & (recorded.position < length)).all():
            raise ValueError("position is not that of different tokens of each sequence, in their order")


class DamagedShardError(Exception):
    """A shard on disk is not what was written; the message says which and why.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, reason: str, number: int | None = None) -> None:
        named = "" if number is None else f"shard {number} ("
        super().__init__(f"{named}{path.name} in {path.parent}{')' if named else ''} is damaged: {reason}")
        self.path, self.reason = path, reason


def file_bytes(n_trajectories: int, n_sequences: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Of the tensors of ``n_trajectories`` of this shape ``(S, D)``, of ``n_sequences``; the header is some 500."""
    return n_trajectories * (shape[0] * shape[1] * dtype.itemsize + 4) + n_sequences * (KEY_BYTES + 8)


def name_of(key: str, keys: np.ndarray) -> str:
    """The name of the file that holds these sequences ``(m, 16)``, in this order, recorded together."""
    return f"shard-{xxhash.xxh3_128_hexdigest(key.encode() + np.ascontiguousarray(keys).tobytes())}.safetensors"


def pack(recorded: Recorded, form: Form) -> list[bytes | memoryview]:
    """The file's bytes: the header, and tensor by tensor what its checksum is of. Always the same bytes.

    The tensors are not copied: they must stay as they are until they are written. What ``safetensors.torch.save`` makes
    is these very bytes, copied twice into new memory, which took as long as writing them to the disk.
    """
    form.check(recorded)
    return packed({field.name: getattr(recorded, field.name) for field in fields(recorded)}, {"key": form.key})


def packed(tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file of these tensors, with ``words`` and a checksum in its header."""
    # the larger its numbers the further in front, then by name, as safetensors has it
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    parts = [tensors[name].contiguous().flatten().view(torch.uint8).numpy().data for name in names]
    digest = xxhash.xxh3_128()  # 13 GiB/s, where sha256 gives 1
    for part in parts:
        digest.update(part)
    ours = json.dumps({**words, "xxh3": digest.hexdigest()}, sort_keys=True)
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


def unpack(path: Path, form: Form, *, verified: Which | None = None) -> tuple[Recorded, Which]:
    """Map a shard's file into memory, after comparing it with its checksum unless it is the file ``verified``.

    Raises ``FileNotFoundError``, ``DamagedShardError``, and ``OSError`` where the file cannot be read for a reason that
    says nothing about it (no permission, too many open files).
    """
    with _named_as_damage(path):
        which = _verify(path, form, verified)
        with safe_open(path, framework="pt") as file:
            recorded = Recorded(**{field.name: file.get_tensor(field.name) for field in fields(Recorded)})
        form.check(recorded)
        if name_of(form.key, recorded.keys.numpy()) != path.name:
            raise ValueError("it belongs to another cache or place")
        return recorded, which


def read_keys(path: Path, form: Form) -> tuple[np.ndarray, Which]:
    """The keys ``(m, 16)`` of the sequences in a file, which its name vouches for; the rest of it is not read.

    Raises as :func:`unpack` does.
    """
    with _named_as_damage(path), _opened(path) as (file, found):
        header, first = _header(file, found)
        keys = header["keys"]
        (m, width), (start, stop) = keys["shape"], keys["data_offsets"]
        if keys["dtype"] != "U8" or width != KEY_BYTES or not 0 < m < _ABSURD or stop - start != m * KEY_BYTES:
            raise ValueError("its keys are none")
        data = os.pread(file.fileno(), stop - start, first + start)
        if len(data) != stop - start:
            raise ValueError("it is too short for its keys")
        found_keys = np.frombuffer(data, np.uint8).reshape(m, KEY_BYTES)
        if name_of(form.key, found_keys) != path.name:
            raise ValueError("it belongs to another cache or place")
        return found_keys, which_file(found)


@contextmanager
def _named_as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamagedShardError(path, _DAMAGE[error.errno]) from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DamagedShardError(path, str(error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], os.stat_result]]:
    """A regular file, that is no link, for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        yield file, found


def _header(file: IO[bytes], found: os.stat_result) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin; ``ValueError`` where it cannot be ours."""
    n_header = int.from_bytes(file.read(8), "little")
    if n_header > _LARGEST_HEADER or found.st_size < 8 + n_header:
        raise ValueError(f"it has {found.st_size} bytes, which is not what its sequences take")
    return json.loads(file.read(n_header)), 8 + n_header


def _verify(path: Path, form: Form, verified: Which | None) -> Which:
    """Read the file through and say which it was.

    Plain reads, before anything is mapped: a file that is too short, or a disk that fails, is an error here and would
    be SIGBUS in a mapping.
    """
    with _opened(path) as (file, found):
        which = which_file(found)
        if which == verified:
            return which
        header, first = _header(file, found)
        # the sizes first: a lie about them must not make us read, or allocate, more than there should be
        n, m = header["activations"]["shape"][0], header["keys"]["shape"][0]
        if not (0 < n < _ABSURD and 0 < m < _ABSURD) or found.st_size != first + form.n_bytes(n, m):
            raise ValueError(f"it has {found.st_size} bytes, which is not what its sequences take")
        ours = json.loads(header["__metadata__"]["rsdyn"])
        if ours["key"] != form.key:
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
