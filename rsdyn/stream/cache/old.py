"""Caches in the layout of rsdyn before shards were found by what is in them: recognised and removed, not read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rsdyn.stream.cache.manifest import DamagedManifestError, UnknownFormatError, key_of_format, read_manifest

OLD_FORMAT = 2
_OLD_SHARD = re.compile(r"shard-\d{5,}\.safetensors")


class OldCache:
    """A folder of an older layout, whose manifest is whole.

    Attributes:
        folder: where it is.
        made_from: what made it.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder, self.made_from = folder, made_from

    @classmethod
    def from_folder(cls, folder: Path) -> OldCache | None:
        """The cache of an older layout in a folder; None where its manifest is not one, or not whole."""
        if folder.is_symlink():
            return None
        try:
            contents = read_manifest(folder, format=OLD_FORMAT)
        except (DamagedManifestError, UnknownFormatError, OSError):
            return None
        made_from = contents["made_from"]
        return cls(folder, made_from) if folder.name.endswith(key_of_format(OLD_FORMAT, made_from)[:16]) else None

    def shards(self) -> list[Path]:
        """Its shards."""
        return sorted(path for path in self.folder.iterdir() if _OLD_SHARD.fullmatch(path.name))

    def n_bytes(self) -> int:
        """Of its shards on disk."""
        return sum(os.lstat(path).st_size for path in self.shards() if not path.is_symlink())


def older_folders(root: Path, *, weights: Any, tokens: Any) -> list[Path]:
    """The folders of an older layout in ``root`` that hold these tokens through these weights."""
    found = []
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    for folder in folders:
        try:
            if json.loads((folder / "manifest.json").read_bytes()[: 1 << 22]).get("format") != OLD_FORMAT:
                continue
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        old = OldCache.from_folder(folder)
        if (
            old
            and weights is not None
            and (old.made_from.get("weights"), old.made_from.get("tokens")) == (weights, tokens)
        ):
            found.append(folder)
    return found
