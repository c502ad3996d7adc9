"""The folder of one run, and files in it that are there whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from filelock import BaseFileLock, FileLock, Timeout

from rsdyn.errors import UserError
from rsdyn.files import CONFIG, LOCK, SUMMARY
from rsdyn.ranks import is_rank_zero

RUN_DIR_VARIABLE = "RSDYN_RUN_DIR"


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
                    "same ones to resume it, or choose another run.dir."
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
