"""The front door, ``rsdyn`` and ``python -m rsdyn``: what there is and where it lies, or one of the programs.

``rsdyn PROGRAM ...`` runs a program, whose file is read only then. Without one it says what there is: it answers
without torch, in a fraction of a second, and reads small files only. What in the folder of runs or of caches is not
ours is passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import os
import stat
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import rsdyn

CHECKOUT = Path(__file__).parent.parent
SCRIPTS = ("train", "analyze", "perturb")
RUNS = Path("runs")  # beside the scripts, or wherever they were started
MAX_BYTES = 1 << 22  # what a run or a cache says of itself is a few kilobytes; more is not ours

# What ``rsdyn PROGRAM`` runs: the module whose main() takes the words behind it; the scripts share one main().
PROGRAMS = {
    **dict.fromkeys(SCRIPTS, "rsdyn.commands"),
    "compare": "rsdyn.commands.compare",
    "check": "rsdyn.commands.check",
    "lens": "rsdyn.commands.lens",
    "claims": "rsdyn.commands.claims",
    "report": "rsdyn.report.__main__",
    "cache": "rsdyn.stream.cache.__main__",
    "workspace": "rsdyn.tracking.workspace.__main__",
}

# Other commands, what each does, and the file of the checkout that it needs.
COMMANDS = (
    ("python -m rsdyn check MODEL", "verify a language model, line by line; --json for machines", None),
    ("python -m rsdyn compare MODEL MODEL", "measure several models or checkpoints, on one page; resumes", None),
    ("python -m rsdyn lens MODEL --texts 100", "fit a Jacobian lens, in the published layout; resumes", None),
    ("python -m rsdyn claims MODEL", "what other papers claim of streams, tested on it; -o writes the table", None),
    ("python -m rsdyn.report RUN [RUN ...] -o page.html", "one page of several runs, without a network", None),
    ("python -m rsdyn.stream.cache list", "what is in the cache; also: verify, prune", None),
    ("python -m rsdyn.tracking.workspace", "save the layout for Weights & Biases; --print shows it", None),
    ("wandb sweep configs/sweep-cae.yaml", "vary the autoencoder's settings", "configs/sweep-cae.yaml"),
    ("jupyter lab examples/tour.ipynb", "from a stream to the findings", "examples/tour.ipynb"),
)


class FoundRun(NamedTuple):
    """A folder that one of our scripts left: when it started (UTC, ISO 8601), and whether it came to its end."""

    folder: Path
    script: str
    started: str
    finished: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first word names; without one print what there is, as ``--help`` does."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        return run_program(words[0], words[1:])
    if words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], PROGRAMS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        print(f"rsdyn: error: {words[0]}: no such program. {hint}There are {', '.join(PROGRAMS)}.", file=sys.stderr)
        return 2
    shown = "\n".join(overview(CHECKOUT, RUNS, cache_dir()))
    parser = argparse.ArgumentParser(
        prog="rsdyn",
        usage="rsdyn [--help] [--version] [PROGRAM ...]",
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rsdyn {rsdyn.__version__}")
    parser.parse_args(words)
    print(shown)
    return 0


def run_program(name: str, words: Sequence[str]) -> int:
    """Run one of the programs with the words behind its name, and return its exit code."""
    module = import_module(PROGRAMS[name])
    if name in SCRIPTS:
        return int(module.main(name, words))
    return int(module.main(words))


def overview(checkout: Path, runs: Path, caches: Path) -> list[str]:
    """The lines that ``python -m rsdyn`` prints, of a checkout (or what holds the package), of runs and of caches."""
    lines = [f"rsdyn {rsdyn.__version__}", ""]
    scripts = find_scripts(checkout)
    if scripts:
        lines.append("Scripts (python <script> --help shows every setting):")
        lines += _columns([(f"{name}.py", about) for name, about in scripts.items()])
    else:
        lines += [
            "Scripts: train.py, analyze.py and perturb.py do not come with the installed package. Run them from a",
            "checkout of its repository, which has the presets, too.",
        ]
    presets = find_presets(checkout)
    if presets:
        lines += ["", "Presets (--config NAME; several merge left to right):", *_columns(list(presets.items()))]
    lines += ["", "Other commands:"]
    lines += _columns([(command, about) for command, about, needs in COMMANDS if not needs or _has(checkout, needs)])
    return [*lines, "", *describe_runs(runs), *describe_caches(caches)]


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows) + 4
    lines = []
    for left, right in rows:
        lines += textwrap.wrap(
            right, 118, initial_indent=f"  {left}".ljust(width), subsequent_indent=" " * width, break_on_hyphens=False
        )
    return lines


def _shown(path: Path | str) -> str:
    """A path as a terminal can print it, whatever bytes are in its name."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


# --- the checkout -----------------------------------------------------------------------------------------------------


def _has(checkout: Path, name: str) -> bool:
    """Whether a file lies in ``checkout``, and that is ours: beside an installed package lies anybody's train.py."""
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return False
    return project.get("name") == "rsdyn" and (checkout / name).is_file()


def find_scripts(checkout: Path) -> dict[str, str]:
    """Each script that lies in ``checkout``, and the first line of its docstring."""
    found = {}
    for name in SCRIPTS:
        if _has(checkout, f"{name}.py"):
            text = (checkout / f"{name}.py").read_text(encoding="utf-8")
            found[name] = text.partition('"""')[2].partition("\n")[0]
    return found


def find_presets(checkout: Path) -> dict[str, str]:
    """The presets of ``configs/``, and the first sentence of each; a sweep there is none."""
    found = {}
    for path in sorted((checkout / "configs").glob("*.yaml"), key=lambda path: path.stem):
        if path.name.startswith("sweep-") or not _has(checkout, f"configs/{path.name}"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is the command
        comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
        words = " ".join(line.lstrip("# ") for line in comments)
        found[path.stem] = words.strip().partition(". ")[0].rstrip(".") + "."
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


def describe_runs(root: Path) -> list[str]:
    """How many runs of which script lie in ``root``, and the newest; one line where there are none."""
    runs = find_runs(root)
    if not runs:
        return [f"Runs: none yet in {_shown(root.absolute())} (run.dir puts one elsewhere)"]
    counts = Counter(run.script for run in runs)
    unfinished = sum(not run.finished for run in runs)
    by_script = ", ".join(f"{counts[script]} of {script}.py" for script in SCRIPTS if counts[script])
    newest = max(runs, key=lambda run: (run.started, run.folder.name))
    state = "" if newest.finished else ", not finished"
    if unfinished:
        by_script += f"; {unfinished} not finished"
    return [
        f"Runs: {len(runs)} in {_shown(root.absolute())}: {by_script}",
        f"      the newest is {_shown(newest.folder.name)}{state}",
    ]


def find_runs(root: Path) -> list[FoundRun]:
    """The run folders right in ``root``: those whose ``provenance.json`` names one of our scripts."""
    found = []
    for folder in _folders(root):
        made_by = _read_json(folder / "provenance.json")
        script = made_by.get("script")
        if script in SCRIPTS:
            finished = (folder / "summary.json").is_file()
            found.append(FoundRun(folder, script, str(made_by.get("started") or ""), finished))
    return found


# --- caches -----------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder of the cache where ``cache.dir`` is not set; as ``rsdyn.stream.cache.default_cache_dir``."""
    if named := os.environ.get("RSDYN_CACHE"):  # the other cannot be asked: its package imports torch
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "rsdyn"


def describe_caches(root: Path) -> list[str]:
    """How many caches lie in ``root``, and how large they are."""
    caches = [folder for folder in _folders(root) if "made_from" in _read_json(folder / "manifest.json")]
    if not caches:
        return [f"Cache: none yet in {_shown(root)} (cache.dir puts it elsewhere)"]
    size = sum(map(_size, caches))
    words = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
    return [f"Cache: {len(caches)} recorded stream{'s' * (len(caches) > 1)}, {words}, in {_shown(root)}"]


def _size(folder: Path) -> int:
    """Bytes of the shards of a cache; links are not followed."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # another process may be pruning it
        for entry in entries:
            if entry.name.endswith(".safetensors") and entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total


# --- what may be anything ---------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    """The folders right in ``root`` that can be looked into; none where there is no such folder."""
    try:
        with os.scandir(root) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping from a small file of JSON; empty where it is anything else, since then it is not ours."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            return {}
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
