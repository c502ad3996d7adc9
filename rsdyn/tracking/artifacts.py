"""W&B artifacts with their lineage: cache → checkpoint → results, small files alone.

A run that recorded into a cache logs it, and every run uses the caches it read; `train.py` logs the checkpoint,
`perturb.py` uses it; each logs its results. An artifact is known by its contents: one that is there already is not
uploaded again. Offline the records and copies of the files are in the run folder, until ``wandb sync`` uploads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from packaging.version import Version
from safetensors import safe_open

from rsdyn.files import PROVENANCE, SUMMARY, plain
from rsdyn.private import add_reference, log_artifact
from rsdyn.redaction import redact
from rsdyn.stream.cache import MANIFEST, TrajectoryCache
from rsdyn.tracking.sending import sending

if TYPE_CHECKING:
    from wandb import Artifact

    from rsdyn.tracking.logger import RunLogger

MAX_BYTES = 1 << 30  # of a file that is uploaded


def log_cache(logger: RunLogger | None, cache: TrajectoryCache | None, *, recorded: bool) -> None:
    """Use ``cache-<folder>``, and before that log it, if this run ``recorded`` any of it, in whichever process.

    It is the manifest, and references with the checksums of the shards that are on disk; shards are never uploaded.
    """
    if logger is None or cache is None:
        return
    metadata = redact(plain({"made_from": cache.fields, "key": cache.key}))
    shards = cache.files()
    with sending(logger, f"the artifact of the cache {cache.folder.name}"):
        for uses in (False, True) if recorded else (True,):
            artifact = _artifact(f"cache-{cache.folder.name}", "cache", metadata)
            _add_file(artifact, cache.folder / MANIFEST)
            for shard in shards:
                _add_reference(artifact, shard)
            _log(logger, artifact, uses=uses)


def log_checkpoint(logger: RunLogger | None, path: Path, **metadata: Any) -> None:
    """Log a checkpoint as ``checkpoint-<run id>``."""
    if logger is None:
        return
    metadata = redact(plain(metadata))
    with sending(logger, f"the artifact of {path.name}"):
        artifact = _artifact(f"checkpoint-{logger.experiment.id}", "model", metadata)
        _add_file(artifact, path)
        _log(logger, artifact)


def use_checkpoint(logger: RunLogger | None, path: Path) -> None:
    """Use the checkpoint of another run: ``checkpoint-<its id>``, or by its checksum where its folder does not say."""
    if logger is None:
        return
    known = _id_of(path.parent.parent)
    with sending(logger, f"the artifact of {path.name}"):
        name = known or xxhash.xxh3_64_hexdigest(path.read_bytes())
        artifact = _artifact(f"checkpoint-{name}", "model", {})
        _add_file(artifact, path)
        _log(logger, artifact, uses=True)


def log_results(logger: RunLogger | None, folder: Path, **metadata: Any) -> None:
    """Log ``results.npz`` and ``summary.json`` as ``results-<run id>``."""
    if logger is None:
        return
    metadata = redact(plain(metadata))
    with sending(logger, "the artifact of the results"):
        artifact = _artifact(f"results-{logger.experiment.id}", "results", metadata)
        for name in ("results.npz", SUMMARY):
            _add_file(artifact, folder / name, copy=not syncing_leaves_files())
        _log(logger, artifact)


def _artifact(name: str, kind: str, metadata: dict[str, Any]) -> Artifact:
    import wandb

    return wandb.Artifact(name[:128], type=kind, metadata=metadata)


def syncing_leaves_files() -> bool:
    """Whether ``wandb sync`` leaves the files that an offline run names.

    By its source 0.28 removes them once they are
    uploaded, wherever they lie, and 0.31 does not.
    """
    import wandb

    return Version(wandb.__version__) >= Version("0.31")


def _add_file(artifact: Artifact, path: Path, *, copy: bool = True) -> None:
    """Add a file, or a copy of it; ``OSError`` for one that is too large to upload unasked.

    The manifest of a cache and a checkpoint are copied, since later runs rewrite them; results stay as they are, and
    are not twice in a run's folder.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise OSError(f"{path.name} has {size / 2**30:.1f} GiB, and no more than {MAX_BYTES / 2**30:.0f} are uploaded")
    artifact.add_file(str(path), name=path.name, policy="mutable" if copy else "immutable")


def _add_reference(artifact: Artifact, path: Path) -> None:
    """Add where a shard lies, with the checksum that its own header has: W&B's own way would read it all again."""
    with safe_open(path, framework="numpy") as shard:
        digest = json.loads(shard.metadata()["rsdyn"])["xxh3"]
    add_reference(artifact, path, digest)


def _log(logger: RunLogger, artifact: Artifact, *, uses: bool = False) -> None:
    log_artifact(logger.experiment, artifact, uses=uses)


def _id_of(folder: Path) -> str | None:
    """The W&B id of a run by its folder."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a checkpoint that was moved out of its run
    name = found.get("wandb_id") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name.isalnum() else None


def log_caches(logger: RunLogger | None, streams: Sequence[Any], recorded: Sequence[int]) -> None:
    """Log or use the caches of some `TrajectoryStream`, of each of which this run ``recorded`` so many sequences."""
    for stream, n in zip(streams, recorded, strict=True):
        log_cache(logger, stream.cache, recorded=n > 0)
