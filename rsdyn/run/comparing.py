"""Run ``analyze`` for each model of a comparison, one after the other, each in a process and a folder of its own.

A process of its own gives a model's memory back, whatever happened to it, and its failure ends nothing else. What is
finished is not run again: a folder with a summary is read as it is, if its settings and weights are those asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from rsdyn.analysis.comparison import Model
from rsdyn.config.command_line import load_config
from rsdyn.config.schema import to_dict, to_yaml
from rsdyn.errors import UserError
from rsdyn.files import CONFIG, PROVENANCE, SUMMARY, write_json, write_text
from rsdyn.redaction import redact
from rsdyn.report.compared import failed, read_model
from rsdyn.run.folder import HeldFolder, create_run_folder, hold
from rsdyn.run.models_to_compare import Entry
from rsdyn.run.signals import GRACE, Interrupted, how_it_ended

JSON = "comparison.json"
MODELS = "models"  # the folder of the runs
TAIL = 8192  # bytes of what a failed run said that its reason is looked for in
FREE = ("run.", "tracking.", "resume", "cache.dir", "cache.enabled", "lm.label", "trainer.")  # decide no number
NOT_INHERITED = ("RSDYN_RUN_DIR", "WANDB_RUN_ID", "WANDB_NAME")  # each run has its own


@dataclass(frozen=True)
class Job:
    """A comparison: its models, the settings that all share as words of a command line, and its folder."""

    entries: tuple[Entry, ...]
    words: tuple[str, ...]
    folder: Path
    held: HeldFolder

    def folder_of(self, entry: Entry) -> Path:
        return self.folder / MODELS / slug(entry.label)


def slug(label: str) -> str:
    """A label as the name of a folder: unlike labels that would be one are told apart by what was changed."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:80] or "model"
    return plain if plain == label else f"{plain}-{sum(label.encode()) % 1000:03d}"


def described(entries: Sequence[Entry], words: Sequence[str]) -> str:
    """A comparison as its ``config.yaml`` has it, by which it is found again; a list in YAML that can be given again.

    ``words`` are the settings that all share, as on a command line.
    """
    models = [{"name": entry.name, "label": entry.label, **entry.settings} for entry in entries]
    return str(yaml.safe_dump(redact({"models": models, "words": list(words)}), sort_keys=False, allow_unicode=True))


def open_job(
    entries: Sequence[Entry], words: Sequence[str], *, directory: str | None, name: str | None, resume: bool
) -> Job:
    """Find the folder of an unfinished comparison of the same models and settings, or make a new one; held.

    A given ``directory`` may hold a comparison of any models: what it has of these is read and the rest is added.
    Raises ``UserError`` where a folder is not a comparison's, or belongs to one that is still going.
    """
    text = described(entries, words)
    if directory is not None and (folder := Path(directory).expanduser().absolute()).is_dir() and any(folder.iterdir()):
        if not _is_comparison(folder):
            raise UserError(f"run.dir={directory} exists, is not empty, and is no comparison: choose another run.dir.")
        held = hold(folder)
        if held is None:
            raise UserError(f"run.dir={directory} belongs to a comparison that is still going: choose another run.dir.")
        write_text(folder / CONFIG, text)
        return Job(tuple(entries), tuple(words), folder, held)
    held = _unfinished(text) if directory is None and resume else None
    if held is None:
        label = name or "-".join(dict.fromkeys(e.series or e.label for e in entries))
        folder = create_run_folder("compare", redact(label), directory)
        os.environ.pop("RSDYN_RUN_DIR", None)  # it is for the processes of one run
        held = hold(folder)
        assert held is not None  # it was made just now
        write_json(folder / PROVENANCE, {"script": "compare", "argv": redact(sys.argv), "started": time.time()})
        write_text(folder / CONFIG, text)
    return Job(tuple(entries), tuple(words), held.path, held)


def _is_comparison(folder: Path) -> bool:
    try:
        return "models" in (yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, yaml.YAMLError, TypeError):
        return False


def _unfinished(text: str) -> HeldFolder | None:
    """The newest comparison of the same models and settings that did not come to its end, or had failures."""
    for folder in sorted(Path("runs").absolute().glob("*-compare-*"))[::-1]:
        try:
            if (folder / CONFIG).read_text(encoding="utf-8") != text:
                continue
        except (OSError, UnicodeDecodeError):
            continue
        if not _all_finished(folder) and (held := hold(folder)) is not None:
            return held
    return None


def _all_finished(folder: Path) -> bool:
    try:
        found = json.loads((folder / JSON).read_text(encoding="utf-8"))
        return all(model["status"] == "finished" for model in found["models"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


# -- settings ----------------------------------------------------------------------------------------------------------


def check_settings(job_words: Sequence[str], entries: Sequence[Entry]) -> None:
    """Read the settings of every model as its run will; ``UserError`` on the first that does not hold."""
    for entry in entries:
        if entry.run is None:
            load_config([*job_words, *entry.words()], "analyze")


def check_finished(job: Job) -> list[Entry]:
    """The models whose runs are there already, finished.

    Raises ``UserError`` where a run is of other settings than those asked for, or of weights that are gone since.
    """
    found = []
    for entry in job.entries:
        folder = job.folder_of(entry)
        if entry.run is not None or not (folder / SUMMARY).is_file():
            continue
        differ = _differing(folder, [*job.words, *entry.words()])
        if differ:
            raise UserError(
                f"{job.folder} holds {entry.label} measured with other settings: {'; '.join(differ)}. Give the same "
                "ones, or choose another run.dir."
            )
        found.append(entry)
    return found


def _differing(folder: Path, words: Sequence[str]) -> list[str]:
    """What a finished run's settings and weights differ in from those of ``words``; settings that only one has do not.

    Weights are looked at where they lie on this machine: a folder may hold others by now.
    """
    from rsdyn.run.checkpoints import differences, flatten

    config = load_config(words, "analyze")
    ours = flatten(yaml.safe_load(to_yaml(redact(to_dict(config)))))
    try:
        theirs = flatten(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
        made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return [f"its {CONFIG} or {PROVENANCE} cannot be read"]
    both = theirs.keys() & ours.keys()
    found = differences({k: theirs[k] for k in both}, {k: ours[k] for k in both}, free=FREE)
    if Path(config.lm.name).expanduser().exists():
        from rsdyn.lm.source import find_lm

        now = find_lm(config.lm.name, trust_remote_code=config.lm.trust_remote_code).identity()
        then = (made.get("lm") or {}).get("identity")
        if now != then:
            found.append(f"its weights were {then} there and are {now} here")
    return found


# -- running -----------------------------------------------------------------------------------------------------------


def run_all(job: Job, say: Callable[[str], None]) -> list[Model]:
    """Measure what is not measured yet, and read all; a model that fails is one with a reason, and the rest go on.

    Raises ``UserError`` for a folder of other settings, before anything runs, and :class:`Interrupted` for a signal.
    """
    finished = check_finished(job)
    models = []
    for i, entry in enumerate(job.entries, start=1):
        head = f"{i}/{len(job.entries)}  {entry.label}"
        if entry.failure:
            say(f"{head}: skipped, {entry.failure}")
            models.append(failed(entry.label, entry.failure, name=entry.name, step=entry.step))
            continue
        folder = entry.run or job.folder_of(entry)
        if entry.run is not None or entry in finished:
            say(f"{head}: finished already, {folder}")
        else:
            started = time.monotonic()
            say(f"{head}: analyze, into {folder}")
            reason = _run(job, entry, folder)
            if reason:
                say(f"{' ' * len(head.partition('  ')[0])}  failed: {reason}")
                models.append(failed(entry.label, reason, name=entry.name, step=entry.step))
                continue
            say(f"{' ' * len(head.partition('  ')[0])}  done in {time.monotonic() - started:.0f} s")
        try:
            models.append(read_model(folder, entry.label, series=entry.series, step=entry.step))
        except UserError as error:
            say(f"{' ' * len(head.partition('  ')[0])}  failed: {error}")
            models.append(failed(entry.label, str(error), name=entry.name, step=entry.step))
    return models


def run_plan(entries: Sequence[Entry], words: Sequence[str]) -> int:
    """Print what each run would need; 2 where one of them cannot be."""
    worst = 0
    for entry in entries:
        print(f"--- {entry.label}", flush=True)
        if entry.run is not None or entry.failure:
            print(entry.failure or f"finished already, {entry.run}", flush=True)
            continue
        command = [sys.executable, "-m", "rsdyn", "analyze", "--plan", *words, *entry.words()]
        worst = max(worst, abs(subprocess.run(command, check=False).returncode))
    return worst


def _run(job: Job, entry: Entry, folder: Path) -> str:
    """Run one analysis; why it failed, empty where it did not. What it prints goes to a log beside its folder."""
    if folder.exists():
        _clear(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    words = [*job.words, *entry.words(), f"run.dir={folder}"]
    environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    tail = bytearray()
    with log.open("wb") as out, _raising(signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "rsdyn", "analyze", *words], stdout=out, stderr=subprocess.PIPE, env=environment
        )
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr.fileno(), out.fileno(), tail), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except (KeyboardInterrupt, Interrupted) as asked:
            signum = signal.SIGINT if isinstance(asked, KeyboardInterrupt) else signal.SIGTERM
            _end(process, signum)
            raise Interrupted(signum) from None
        reader.join(timeout=GRACE)
        if not reader.is_alive():  # else a process that the run started still has the other end
            process.stderr.close()
    if code == 0:
        return ""
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # Ctrl-C reached it before us
        raise Interrupted(code - 128)
    return _reason(tail.decode(errors="replace"), code)


def _clear(folder: Path) -> None:
    """Remove what a run that was killed, or failed, left of itself."""
    held = hold(folder)
    if held is None:
        raise UserError(f"{folder} belongs to a run that is still going: wait for it, or choose another run.dir.")
    held.lock.release()
    shutil.rmtree(folder)


def _pass_on(descriptor: int, log: int, tail: bytearray) -> None:
    """Write what a run says on standard error to the log, and show it to who looks; keep the last of it."""
    looks = sys.stderr.isatty()
    while chunk := os.read(descriptor, 4096):
        tail += chunk
        del tail[:-TAIL]
        os.write(log, chunk)
        if looks:
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()


def _reason(said: str, code: int) -> str:
    """Why a run failed: its own sentence, else the last line it said and how it ended."""
    found = re.findall(r"analyze\.py: error: (.+)", said)
    if found:
        return str(found[-1]).strip()
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # behind it stand its notes
    last = f": {(raised or lines)[-1][:200]}" if lines else ""
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"it {how_it_ended(code)}{hint}{last}"


def _end(process: subprocess.Popen[bytes], signum: int) -> None:
    """Ask a run to end, as we were asked; one that does not is ended."""
    process.send_signal(signum)
    try:
        process.wait(2 * GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _raising(signum: int) -> Iterator[None]:
    """Inside, a signal raises :class:`Interrupted`, as Ctrl-C raises ``KeyboardInterrupt``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    before: Any = signal.signal(signum, leave)
    try:
        yield
    finally:
        signal.signal(signum, before if before is not None else signal.SIG_DFL)
