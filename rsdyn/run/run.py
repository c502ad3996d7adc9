"""One run of a script: its settings, folder, log and provenance, and what it leaves behind where it is cut short."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsdyn.config.naming import keyed
from rsdyn.config.schema import Config, to_dict
from rsdyn.files import CONFIG, LOCK, PROVENANCE, write_json
from rsdyn.ranks import is_rank_zero
from rsdyn.run.folder import HeldFolder
from rsdyn.run.output import fitted, terminal_columns
from rsdyn.run.signals import Stop
from rsdyn.tracking.session import (
    NotStarted,
    described_by,
    finish,
    make_wandb_logger,
    offline_because,
    project_of,
    unused_folders,
    update_config,
    wandb_mode,
)

if TYPE_CHECKING:
    from rsdyn.tracking.logger import RunLogger


@dataclass
class Run:
    """One run of a script.

    Attributes:
        script: ``train``, ``analyze`` or ``perturb``.
        config: its settings, which nobody changes.
        folder: where its results go.
        started: seconds since the epoch.
        stop: the note of this process' signals.
        resume: the checkpoint that it resumes from.
        held: the lock of the folder; None in processes that share it with the first.
        logger: of W&B, from :meth:`start_tracking` on.
        provenance: what ``provenance.json`` says so far; :meth:`record_provenance` adds to it.
    """

    script: str
    config: Config
    folder: Path
    started: float
    stop: Stop = field(default_factory=Stop)
    resume: Path | None = None
    held: HeldFolder | None = None
    logger: RunLogger | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str = "") -> None:
        """Print a line, on the first process alone; a terminal gets it broken at its width."""
        if is_rank_zero():
            print("\n".join(fitted(line, terminal_columns())), flush=True)

    def note(self, label: str, text: str) -> None:
        """Print what stands behind a label, one below another; below the last one without a label."""
        self.say(f"{label + ':' if label else '':<13}{text}")

    def record_provenance(self, **extra: Any) -> None:
        """Add to ``provenance.json``: what is known only once the model and the text are open."""
        self.provenance |= extra
        if is_rank_zero():
            write_json(self.folder / PROVENANCE, self.provenance)
            update_config(self.logger, provenance=self.provenance)

    def discard_if_unused(self, exit_code: int) -> None:
        """Remove the folder of a run that ended before it did anything, so that the corrected command can have it.

        W&B, which knows its config alone by then, is closed first. What an earlier session told W&B is kept.
        """
        unused = {CONFIG, PROVENANCE, LOCK} | ({"wandb"} if "resumed" not in self.provenance else set())
        logged = self.logger is not None and self.logger.logged
        if logged or not is_rank_zero() or not {path.name for path in self.folder.iterdir()} <= unused:
            return
        finish(self.logger, exit_code)
        try:
            shutil.rmtree(self.folder)
        except OSError as error:  # such as a network drive that keeps the files which W&B's process still has open
            print(f"{self.folder} could not be removed ({error}): choose another run.dir.", file=sys.stderr)

    def start_tracking(self, *, group: str, tags: Sequence[str]) -> None:
        """Start W&B as ``tracking.*`` asks, and say in a line how."""
        tracking = self.config.tracking
        if is_rank_zero():
            mode, line = wandb_mode(tracking.mode, run_dir=self.folder)
            self.say(keyed("tracking", line))
            if mode != "disabled" and (unused := unused_folders(os.environ)) is not None:
                self.say(unused)
            given = os.environ.get("WANDB_RUN_ID")
            of_sweep = given if os.environ.get("WANDB_SWEEP_ID") else None  # its agent's word
            # a run that goes on keeps its id
            run_id = of_sweep or self.provenance.get("wandb_id") or given or secrets.token_hex(4)
            if run_id != self.provenance.get("wandb_id"):
                self.record_provenance(wandb_id=run_id)
            start = partial(
                make_wandb_logger,
                run_id=run_id,
                project=project_of(tracking.project),
                entity=tracking.entity,
                run_dir=self.folder,
                **described_by(
                    os.environ,
                    name=self.folder.name,
                    is_named=self.config.run.name is not None,
                    job_type=self.script,
                    group=group,
                    tags=tags,
                ),
                config={**to_dict(self.config), "provenance": self.provenance},
            )
            try:
                self.logger = start(mode=mode)
            except NotStarted as error:
                if tracking.mode != "auto" or mode != "online" or os.environ.get("WANDB_MODE"):
                    raise  # somebody asked for just this
                self.say(offline_because(f"it did not start online: {error.reason}", self.folder))
                self.logger = start(mode="offline")


class Kept(str):
    """A note on an exception that says what a run leaves behind."""


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Inside, whatever ends the run early takes along, in words and as of then, what the run leaves behind.

    The innermost one speaks: :func:`kept_by` reads it.
    """
    try:
        yield
    except BaseException as error:
        if kept_by(error) is None:
            error.add_note(Kept(kept()))
        raise


def kept_by(error: BaseException) -> str | None:
    """What a run that ended with ``error`` leaves behind; None where nobody said."""
    return next((str(note) for note in getattr(error, "__notes__", []) if isinstance(note, Kept)), None)
