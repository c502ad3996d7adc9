"""What every script does around its own work: config, run folder, provenance, W&B, errors, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsdyn.cli import load_config
from rsdyn.config import Config, to_dict, to_yaml
from rsdyn.errors import UserError
from rsdyn.provenance import provenance, redact
from rsdyn.run_folder import create_run_folder, is_rank_zero, write_json, write_text
from rsdyn.tracking import finish, make_wandb_logger, wandb_mode

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger


@dataclass
class Run:
    """One run of a script: its settings, its folder, its logger.

    ``kept`` says, in words and when asked, what an interrupted run leaves behind; the script sets it as it goes.
    """

    script: str
    config: Config
    folder: Path
    started: float
    logger: WandbLogger | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    kept: Callable[[], str] = lambda: "nothing was recorded yet"

    def say(self, line: str = "") -> None:
        """Print a line, on the first process alone."""
        if is_rank_zero():
            print(line, flush=True)

    def record_provenance(self, **extra: Any) -> None:
        """Add to ``provenance.json``: what is known only once the model and the text are open."""
        self.provenance |= extra
        if is_rank_zero():
            write_json(self.folder / "provenance.json", self.provenance)

    def discard_if_unused(self) -> None:
        """Remove the folder of a run that ended before it did anything, so that the corrected command can have it."""
        if is_rank_zero() and {path.name for path in self.folder.iterdir()} <= {"config.yaml", "provenance.json"}:
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def start_tracking(self, *, group: str, tags: Sequence[str]) -> None:
        """Start W&B as ``tracking.*`` asks, and say in a line how."""
        tracking = self.config.tracking
        if is_rank_zero():
            mode, line = wandb_mode(tracking.mode, run_dir=self.folder)
            self.say(line)
            self.logger = make_wandb_logger(
                mode=mode,
                project=tracking.project,
                entity=tracking.entity,
                run_dir=self.folder,
                name=self.folder.name,
                job_type=self.script,
                group=group,
                tags=tags,
                config={**to_dict(self.config), "provenance": self.provenance},
            )


def run_script(script: str, work: Callable[[Run], None], argv: Sequence[str] | None = None) -> int:
    """Run ``work`` as the body of ``<script>.py`` and return the exit code.

    0 when all went well, 2 for a mistake of the user and 3 for numbers that are not finite (one message, no traceback),
    130 for Ctrl-C, with a sentence about what was kept. Whatever else is raised is a bug and shows its traceback.
    """
    run: Run | None = None
    code = 1
    try:
        config = load_config(list(sys.argv[1:] if argv is None else argv), script)
        _quiet()
        started = time.time()
        folder = create_run_folder(script, config.run.name or _last_part(config.lm.name), config.run.dir)
        run = Run(script, config, folder, started)
        if is_rank_zero():
            write_text(folder / "config.yaml", redact(to_yaml(config)))
        run.record_provenance(**provenance(script=script, seed=config.seed))
        work(run)
        code = 0
    except UserError as error:
        code = error.exit_code
        print(f"{script}.py: error: {error}", file=sys.stderr)
        if run is not None:
            run.discard_if_unused()
    except KeyboardInterrupt:
        code = _interrupted(script, run)
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if run is None:
                raise
        else:  # Lightning turns Ctrl-C into exit(1)
            code = _interrupted(script, run)
    except Exception:
        traceback.print_exc()
    finally:
        if run is not None:
            finish(run.logger, code)
    return code


def _interrupted(script: str, run: Run | None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the farewell short
    if is_rank_zero():
        kept = "nothing had been started" if run is None else run.kept()
        print(f"\n{script}.py: interrupted; {kept}.", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return 130


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _quiet() -> None:
    """Silence the lines of our dependencies that tell a user nothing to act on; each is named, the rest is shown."""
    import lightning.pytorch  # noqa: F401  its import sets the levels that are lowered here

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # batches are slices of memory: workers would only copy them
        r".*Your `IterableDataset` has `__len__` defined.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
