"""What every script does around its own work: config, run folder, provenance, W&B, errors, exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rsdyn.config.command_line import PLAN, load_config
from rsdyn.config.naming import in_keys
from rsdyn.config.schema import Config, to_dict, to_yaml
from rsdyn.errors import UserError
from rsdyn.files import CONFIG, PROVENANCE, write_text
from rsdyn.lm.allocator import keep_pages
from rsdyn.ranks import check_ranks, is_rank_zero
from rsdyn.redaction import redact
from rsdyn.run.folder import RUN_DIR_VARIABLE, create_run_folder, find_unfinished, hold
from rsdyn.run.output import unbroken_output
from rsdyn.run.provenance import provenance
from rsdyn.run.run import Run, kept_by
from rsdyn.run.signals import GRACE, Interrupted, Stop, exit_code_of, how_it_ended
from rsdyn.tracking.session import finish


def run_script(script: str, work: Callable[[Run], None], argv: Sequence[str] | None = None) -> int:
    """Run ``work`` as the body of ``<script>.py``, or print its plan with ``--plan``, and return the exit code.

    0 when all went well, 2 for a mistake of the user and 3 for numbers that are not finite (one message, no traceback),
    128 + n for signal n (130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1), with a sentence about what was kept.
    Whatever else is raised is a bug and shows its traceback.
    """
    keep_pages()  # here and not at import: somebody else's process is not ours to change
    with unbroken_output() as out:
        stop = Stop()
        stop.install()
        try:
            code = _run(script, work, argv, stop)
        except Interrupted as interrupted:  # it came while the run was being closed
            code = interrupted.exit_code
        finally:
            stop.restore()
        out.flush()
        if out.lost is not None:
            rest = f"{script}.py: standard output could not be written ({out.lost.strerror})"
            print(f"{rest}: some of what was printed is lost.", file=sys.stderr)
    distributed = sys.modules.get("torch.distributed")
    if code and distributed is not None and distributed.is_available() and distributed.is_initialized():
        # the process group is beyond repair, and Python's own end would wait for it, or abort
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    return code


def _run(script: str, work: Callable[[Run], None], argv: Sequence[str] | None, stop: Stop) -> int:
    run: Run | None = None
    code = 1
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            config = load_config(words, script)
        except SystemExit as asked:  # --help, --print-config: nothing but what they print
            sys.stdout.flush()
            return 2 if getattr(sys.stdout, "lost", None) else int(asked.code or 0)
        check_ranks(n_processes=_n_processes(script, config), n_nodes=_n_nodes(script, config))
        _quiet()
        if PLAN in words:
            from rsdyn.run.plan import show_plan  # it imports all that it plans for

            show_plan(Run(script, config, Path(), time.time()))
            return 0
        run = _open(script, config, stop)
        work(run)
        code = 0
    except UserError as error:
        code = error.exit_code
        print(f"{script}.py: error: {in_keys(error)}", file=sys.stderr)
        if run is not None:
            run.discard_if_unused(code)
    except Interrupted as error:
        code = error.exit_code
        _farewell(script, run, error)
    except KeyboardInterrupt as error:  # only where the signals could not be taken over
        code = 130
        _farewell(script, run, error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if run is None:
            raise
    except Exception as error:
        failed = stop.failure(wait=1.0)
        if stop.signum is not None:  # the other processes were faster to leave, and this one missed them
            code = 128 + stop.signum
            _farewell(script, run, error)
        elif failed is not None:
            which, theirs = failed
            code = exit_code_of(theirs)
            kept = "" if run is None else f"; {_kept(run, error)}"
            print(f"{script}.py: error: process {which + 1} {how_it_ended(theirs)}{kept}.", file=sys.stderr)
        elif type(error).__name__ == "MisconfigurationException":  # what Lightning finds once it has counted batches
            code = 2
            print(
                f"{script}.py: error: trainer: lightning refuses this: {' '.join(str(error).split())}", file=sys.stderr
            )
        elif run is not None and _lost(error):
            reason = str(error).partition("\n")[0].partition("] ")[2] or str(error)
            print(
                f"{script}.py: error: this process waited for the others in vain ({reason}). One of them has ended, or "
                f"did not answer in trainer.timeout={config.trainer.timeout} seconds; {_kept(run, error)}.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    finally:
        if run is not None:
            finish(run.logger, code)
            if run.held is not None:
                run.held.lock.release()
        stop.end_children() if code == 0 else stop.end_children(GRACE / 2)
    return code


def _n_processes(script: str, config: Config) -> int | None:
    """How many processes a run has together; None where the machine's devices decide."""
    trainer = config.trainer
    if script == "perturb":
        return 1
    if isinstance(trainer.devices, str) and "," not in trainer.devices:
        return None
    listed = trainer.devices.split(",") if isinstance(trainer.devices, str) else []
    devices = trainer.devices if isinstance(trainer.devices, int) else sum(part != "" for part in listed)
    return devices * trainer.num_nodes if devices > 0 else None


def _n_nodes(script: str, config: Config) -> int:
    return 1 if script == "perturb" else config.trainer.num_nodes


def _lost(error: Exception) -> bool:
    """Whether an exchange with the other processes failed: gloo's errors have a text of their own, NCCL's a type."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return False
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def _farewell(script: str, run: Run | None, error: BaseException) -> None:
    if is_rank_zero():
        print(f"\n{script}.py: interrupted; {_kept(run, error)}.", file=sys.stderr, flush=True)


def _kept(run: Run | None, error: BaseException) -> str:
    return kept_by(error) or ("nothing had been started" if run is None else "nothing was recorded yet")


def _open(script: str, config: Config, stop: Stop) -> Run:
    """Find the folder of an unfinished run to resume, or make a new one, and write down what runs."""
    from rsdyn.run.checkpoints import LAST, sweep

    started, settings, held = time.time(), to_yaml(redact(to_dict(config))), None
    resume = config.resume if script == "train" else "never"
    if resume == "auto" and is_rank_zero():
        held = find_unfinished(script, settings, config.run.dir, differing=_differing)
    if held is not None:
        folder = held.path
        os.environ[RUN_DIR_VARIABLE] = str(folder)
        sweep(folder / "checkpoints")
    else:
        name = redact(config.run.name or config.lm.label or _last_part(config.lm.name))
        folder = create_run_folder(script, name, config.run.dir)
    run = Run(script, config, folder, started, stop)
    if resume == "auto" and (folder / "checkpoints" / LAST).is_file():
        run.resume = folder / "checkpoints" / LAST
    elif resume not in ("auto", "never"):
        run.resume = Path(resume).expanduser().absolute()
    described = provenance(script=script, seed=config.seed)
    if held is not None:
        run.say(f"Resume: an unfinished run of the same settings, {folder} (resume=never starts anew)")
        run.provenance = _earlier(folder)
        described = {"resumed": [*run.provenance.get("resumed", []), described]} if run.provenance else described
    elif is_rank_zero():
        held = hold(folder)
        if held is None:
            raise UserError(f"run.dir={folder} belongs to a run that is still going: choose another run.dir.")
        write_text(folder / CONFIG, settings)
    run.held = held
    run.record_provenance(**described)
    return run


def _earlier(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # killed before it was written
    return found if isinstance(found, dict) else {}


def _differing(theirs: str, ours: str) -> list[str]:
    import yaml

    from rsdyn.run.checkpoints import differences, flatten

    try:
        there, here = (flatten(yaml.safe_load(text)) for text in (theirs, ours))
    except (yaml.YAMLError, AttributeError):
        return [f"its {CONFIG} cannot be read"]
    return differences(there, here, free=("run.dir", "resume"))


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _quiet() -> None:
    """Silence the lines of our dependencies that tell a user nothing to act on; each is named, the rest is shown."""
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a backend that is not there would end the next import
    import lightning.pytorch  # noqa: F401  its import sets the levels that are lowered here

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # batches are slices of memory: workers would only copy them
        r".*Your `IterableDataset` has `__len__` defined.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*your dataloader is not resumable.*",  # it is: it goes by the trainer's own count of batches
        r".*Total length of .* across ranks is zero.*",  # nothing is read where no measure needs the stream
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
