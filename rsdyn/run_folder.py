"""The folder of one run, and files in it that are there whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock, Timeout

from rsdyn.errors import UserError

RUN_DIR_VARIABLE = "RSDYN_RUN_DIR"
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
CONFIG, PROVENANCE, SUMMARY, LOCK = "config.yaml", "provenance.json", "summary.json", ".lock"


def is_rank_zero(env: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process is the first of its run, before any Trainer exists to ask.

    True when every rank variable that is set is 0: a child of Lightning's ddp launcher may inherit ``SLURM_PROCID=0``
    from its parent while its own ``LOCAL_RANK`` is 1, so no single variable decides.
    """
    env = os.environ if env is None else env
    return all(env.get(name, "") in ("", "0") for name in RANK_VARIABLES)


def create_run_folder(script: str, name: str, directory: str | None = None, root: str | Path = "runs") -> Path:
    """Make the folder of one run and return its absolute path.

    Without ``directory`` it is ``root/<YYYYmmdd-HHMMSS>-<script>-<name as a slug>``, created exclusively, with a random
    suffix when two runs start in one second. A given ``directory`` is created with its parents and must be empty.

    Several processes: rank zero creates the folder and leaves its path in the environment variable ``RSDYN_RUN_DIR``
    (never removed), which Lightning's ddp children inherit when they run the script again; every other rank takes
    that path as it is. Under torchrun or srun no process is the parent of the others, so ``directory`` is needed there.

    Raises UserError when the folder is not empty or cannot be written, or when a rank above zero has no path.
    """
    if not is_rank_zero():
        given = os.environ.get(RUN_DIR_VARIABLE) or directory
        if not given:
            raise UserError(
                "run.dir is not set, and the processes of this launcher cannot agree on a name by themselves: "
                "give one to all of them, as in run.dir=runs/my-run."
            )
        directory = given
    try:
        if directory:
            folder = Path(directory).expanduser().absolute()
            folder.mkdir(parents=True, exist_ok=True)
            if is_rank_zero() and any(path.name != LOCK for path in folder.iterdir()):
                what = "holds a finished run" if (folder / SUMMARY).exists() else "exists and is not empty"
                raise UserError(
                    f"run.dir={directory} {what}: choose another run.dir, or leave it out "
                    f"and a new folder is made under {root}."
                )
        else:
            parent = Path(root).expanduser().absolute()
            parent.mkdir(parents=True, exist_ok=True)
            folder = _new_folder(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(script)}-{_slug(name)}")
        if is_rank_zero():
            _write_probe(folder)
            os.environ[RUN_DIR_VARIABLE] = str(folder)
    except OSError as error:
        raise UserError(
            f"run.dir={directory or root}: no run folder can be written there ({error.strerror or error}); "
            "choose a folder that you may write to with run.dir=."
        ) from error
    return folder


class HeldFolder(NamedTuple):
    """A run folder that no other process writes to, until ``lock.release()`` or the end of this process."""

    path: Path
    lock: BaseFileLock


def hold(folder: Path) -> HeldFolder | None:
    """Take a run folder for this process alone; None when a run that is still going has it."""
    lock = FileLock(folder / LOCK)  # the kernel drops it when its holder dies, however it dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return HeldFolder(folder, lock)


def find_unfinished(
    script: str,
    settings: str,
    directory: str | None = None,
    root: str | Path = "runs",
    *,
    differing: Callable[[str, str], list[str]],
) -> HeldFolder | None:
    """The folder of a run of ``script`` that was killed, and whose settings are these; held.

    It is ``directory``, if given, else the newest such folder under ``root``. A folder with a ``summary.json`` is of a
    run that finished, one whose lock is taken of a run that is still going: neither is gone on with.

    Args:
        settings: the text of ``config.yaml``.
        differing: from two such texts, the settings that differ, in words.

    Raises UserError when ``directory`` holds an unfinished run of other settings, or one that is still going.
    """
    if directory:
        candidates = [Path(directory).expanduser().absolute()]
    else:
        started = sorted(Path(root).expanduser().absolute().glob(f"*-{_slug(script)}-*"))
        candidates = started[::-1]  # their names begin with the time
    for folder in candidates:
        try:
            theirs = (folder / CONFIG).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if (folder / SUMMARY).exists():
            continue
        differ = differing(theirs, settings)
        if differ:
            if directory:
                raise UserError(
                    f"run.dir={directory} holds an unfinished run of other settings: {'; '.join(differ)}. Give the "
                    "same ones to go on with it, or choose another run.dir."
                )
            continue
        held = hold(folder)
        if held is not None:
            return held
        if directory:
            raise UserError(f"run.dir={directory} belongs to a run that is still going: choose another run.dir.")
    return None


def _slug(text: str) -> str:
    """Reduce any text to [A-Za-z0-9._-] without leading or trailing dots, so that it stays one harmless file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60].strip("-.") or "run"


def _new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = parent / f"{name}-{secrets.token_hex(3)}"


def _write_probe(folder: Path) -> None:
    """Write and remove a file: permissions, quotas and read-only mounts show now, not after an hour of extraction."""
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"rsdyn")
    probe.unlink()


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder."""
    from rsdyn.stream.cache.publish import publish  # its package needs torch, which a mistyped key need not wait for

    publish(Path(path), [text.encode()])


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as strict JSON, atomically.

    NaN and infinities become null (JSON has neither); arrays, tensors and their scalars become lists and numbers;
    paths, dates, enums and dataclasses become what they print as. Raises TypeError, naming the place, for the rest.
    """
    write_text(path, json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def plain(obj: Any, place: str = "value") -> Any:
    """Return ``obj`` as dicts, lists, strings, finite numbers, booleans and None (see `write_json`)."""
    if isinstance(obj, Enum):
        return plain(obj.value, place)
    if obj is None or isinstance(obj, (str, bool)):
        return obj
    if isinstance(obj, (int, float)) and not hasattr(obj, "tolist"):
        return obj if math.isfinite(obj) else None
    if hasattr(obj, "tolist"):  # numpy and torch alike, bf16 and tensors that require gradients included
        return plain(obj.tolist(), place)
    if isinstance(obj, Mapping):
        return {str(key): plain(value, f"{place}.{key}") for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value, f"{place}[{i}]") for i, value in enumerate(obj)]
    if isinstance(obj, (set, frozenset)):
        return sorted(plain(list(obj), place), key=str)
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, date):
        return obj.isoformat()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return plain(dataclasses.asdict(obj), place)
    raise TypeError(f"{place} is a {type(obj).__name__}, which JSON cannot hold: convert it to numbers or text first.")
