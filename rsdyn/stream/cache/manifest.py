"""The manifest of a model's folder: what made its shards, under a checksum of its own."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 3
MANIFEST = "manifest.json"
_ENCODED = ("utf-8", "backslashreplace")  # odd bytes of a path are halves of surrogates, which JSON spells with these
MAX_BYTES = 1 << 22  # what we write is a few kilobytes; more is not ours, and is not read into memory


class DamagedManifestError(Exception):
    """A manifest is not what was written; the message says why."""


class UnknownFormatError(Exception):
    """A manifest was written by a version of rsdyn with another format."""


def cache_key(fields: dict[str, Any]) -> str:
    """The hash of everything that decides the recorded numbers, the format version included."""
    return key_of_format(FORMAT, fields)


def key_of_format(number: int, fields: dict[str, Any]) -> str:
    """:func:`cache_key` of one format version."""
    text = json.dumps({"format": number, **fields}, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode(*_ENCODED))


def seal(contents: dict[str, Any]) -> bytes:
    """The manifest's bytes: ``contents`` and their checksum, as JSON for people."""
    bare = {name: value for name, value in contents.items() if name != "checksum"}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(bare, sort_keys=True, ensure_ascii=False).encode(*_ENCODED))
    return (json.dumps({**bare, "checksum": checksum}, indent=2, ensure_ascii=False) + "\n").encode(*_ENCODED)


def read_manifest(folder: Path, *, format: int = FORMAT) -> dict[str, Any]:
    """The contents of a folder's manifest, without the checksum; ``format`` is the version that is wanted.

    Raises ``FileNotFoundError`` when there is none, and ``DamagedManifestError`` when one bit of it is not as written;
    ``UnknownFormatError`` when another version of rsdyn wrote it.
    """
    data = _read(folder / MANIFEST)
    try:
        contents = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedManifestError("it is not JSON") from error
    if not isinstance(contents, dict):
        raise DamagedManifestError("it is not a mapping")
    found = contents.get("format")
    # the key is a hash over the format too: where it agrees with this one, it is the number itself that is damaged
    if isinstance(found, int) and found != format and not _has_key(contents, format):
        raise UnknownFormatError(f"has format {found!r}, this rsdyn reads format {format}")
    # bytes, not contents: a flipped bit that JSON reads over is found too
    if data != seal(contents):
        raise DamagedManifestError("its checksum does not match")
    if not _has_key(contents, format):
        raise DamagedManifestError("its key is not that of its contents")
    del contents["checksum"]
    return contents


def _has_key(contents: dict[str, Any], format: int) -> bool:
    made_from = contents.get("made_from")
    return isinstance(made_from, dict) and contents.get("key") == key_of_format(format, made_from)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedManifestError(
            "it is a link" if path.is_symlink() else f"it cannot be read ({error.strerror})"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DamagedManifestError("it is not a file")
        if found.st_size > MAX_BYTES:
            raise DamagedManifestError(f"it has {found.st_size} bytes, far more than was written")
        try:
            return file.read(MAX_BYTES)
        except OSError as error:
            raise DamagedManifestError(f"it cannot be read ({error.strerror})") from error
