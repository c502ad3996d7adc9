"""Write a file so that it is there whole or not at all, whatever happens, and clear away what killed writers left."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsdyn.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

_TEMPORARY = re.compile(r"\.(?P<target>[A-Za-z0-9][A-Za-z0-9._-]*)\.[0-9a-f]{16}\.tmp")


def publish(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Put ``parts``, one behind the other, at ``path``.

    Temporary file in the same folder, fsync, rename, fsync of the folder, in this order: a reader sees the old file or
    the whole new one, also after a power cut. Raises ``OSError`` when the disk is full or fails, and leaves nothing
    behind then. The caller holds the lock of the file (``lock.py``): :func:`temporaries` without one are anybody's to
    remove.
    """
    try:
        _publish(path, parts)
    except FileNotFoundError:
        # another host removed the temporary file, on a disk whose locks reach no further than one host
        _publish(path, parts)


def try_to_write(path: Path) -> None:
    """Raise ``OSError`` when nothing can be written beside ``path``; the caller holds its lock."""
    temporary, descriptor = _temporary(path)
    os.close(descriptor)
    temporary.unlink()


def output_file(given: str | Path, option: str) -> Path:
    """The path that ``option`` gives for a file to be written, before the work whose result it is to hold.

    Raises ``UserError`` where it is a folder, where its folder is not there, and where nothing can be written.
    """
    path = Path(given).expanduser()
    if os.path.isdir(path):  # False, where Path.is_dir raises, for a name that is too long
        raise UserError(f"{option} {given} is a folder: name a file in it, as in {option} {path / 'name'}.")
    if not os.path.isdir(path.absolute().parent):
        raise UserError(f"{option} {given}: there is no folder {path.parent}. Make it first, or write elsewhere.")
    with writing(f"{option} {given}"):
        try_to_write(path)
    return path


def output_folder(path: str | Path, where: str) -> Path:
    """A folder, made if it is not there; ``UserError``, naming ``where`` as it was given, if it cannot be written."""
    folder = Path(path).expanduser()
    with writing(where):
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder / "name")
    return folder


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Raise ``UserError``, naming ``where`` as it was given, where what is written inside cannot be (a full disk)."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written there ({error.strerror or error}). Choose a place that you may write to."
        ) from error


def _temporary(path: Path) -> tuple[Path, int]:
    """A new, empty file that is to become ``path``, and its descriptor."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    # not mkstemp: its mode, 0600, would break a cache that a group shares; here the umask decides
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _publish(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    temporary, descriptor = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _reserve(file.fileno(), sum(map(len, parts)))
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Take the space at once, so that a full disk is an error before anything is written."""
    if not hasattr(os, "posix_fallocate") or n_bytes == 0:
        return  # macOS: the write itself says that the disk is full
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # the file system cannot; write() can
            raise


def _sync_folder(folder: Path) -> None:
    """Make names that were added to or taken from ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporaries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Temporary files in ``folder``, each with the name of the file it was to become.

    They belong to a writer at work, or are the strays of one that was killed: who can take the file's lock, knows.
    """
    for path in sorted(folder.iterdir()):
        if (match := _TEMPORARY.fullmatch(path.name)) and not path.is_dir():
            yield path, match["target"]


CONFIG, PROVENANCE, SUMMARY, LOCK = "config.yaml", "provenance.json", "summary.json", ".lock"
RESULTS = "results.npz"
LAYOUT = 2  # of results.npz and summary.json; 1, without a number, had flat names such as original/r_mean_interval


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder."""
    from rsdyn.files import publish  # its package needs torch, which a mistyped key need not wait for

    publish(Path(path), [text.encode("utf-8", "backslashreplace")])


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as strict JSON, atomically.

    NaN and infinities become null (JSON has neither); arrays, tensors and their scalars become lists and numbers;
    paths, dates, enums and dataclasses become what they print as. Raises TypeError, naming the place, for the rest.
    """
    write_text(path, json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_results(folder: Path, arrays: Mapping[str, ndarray], summary: Mapping[str, Any]) -> None:
    """Write ``results.npz`` and then ``summary.json``, each whole, with the number of their layout."""
    import numpy as np  # which a mistyped key need not wait for

    packed, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez_compressed(packed, layout=np.array(LAYOUT), **named)
    publish(folder / RESULTS, [packed.getbuffer()])
    write_json(folder / SUMMARY, {"layout": LAYOUT, **summary})


def plain(obj: Any, place: str = "value") -> Any:
    """Return ``obj`` as dicts, lists, strings, finite numbers, booleans and None (see `write_json`)."""
    if isinstance(obj, Enum):
        return plain(obj.value, place)
    if isinstance(obj, str):
        return obj.encode("utf-8", "backslashreplace").decode()  # odd bytes of a path are halves of surrogates
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, (int, float)) and not hasattr(obj, "tolist"):
        return obj if math.isfinite(obj) else None
    if hasattr(obj, "tolist"):  # numpy and torch alike, bf16 and tensors that require gradients included
        return plain(obj.tolist(), place)
    if isinstance(obj, Mapping):
        return {plain(str(key)): plain(value, f"{place}.{key}") for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value, f"{place}[{i}]") for i, value in enumerate(obj)]
    if isinstance(obj, (set, frozenset)):
        return sorted(plain(list(obj), place), key=str)
    if isinstance(obj, Path):
        return plain(str(obj))
    if isinstance(obj, date):
        return obj.isoformat()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return plain(dataclasses.asdict(obj), place)
    raise TypeError(f"{place} is a {type(obj).__name__}, which JSON cannot hold: convert it to numbers or text first.")
