"""What the main job costs: first and second run, memory at N and 4 N sequences, one and two processes.

    python benchmarks/train_run.py [key=value ...]       # further settings for every run, such as data.l_max=300

Each run is `train.py` in a process of its own, on the embedded model and text unless settings say otherwise. Peak
memory is the operating system's account of the largest process. Prints a table in Markdown for RESULTS.md.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, words: list[str]) -> dict[str, float]:
    """Run `train.py` with ``words`` and return wall seconds, peak MiB and some of its summary."""
    command = [sys.executable, str(ROOT / "train.py"), "tracking.mode=disabled", f"run.dir={folder}", *words]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status != 0:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "train.py failed")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "sequences": sum(summary["n_sequences"].values()),
        "recorded": summary["sequences_recorded"],
        "processes": summary["processes"],
        "epochs": summary["epochs"],
        "seconds": round(seconds, 1),
        "fit": round(summary["seconds"]["fit"], 1),
        "peak MiB": round(peak_mib(usage)),
        "test MSE": round(summary["test"]["test_mse"], 6),
        "PCA test MSE": round(summary["test"]["test_mse_pca"], 9),
    }


def peak_mib(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    words = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        cache = f"cache.dir={place / 'cache'}"
        plan = [
            ("default, first run", [cache]),
            ("default, second run", [cache]),
            ("N = 1000, first run", [cache, "data.limit=1000"]),
            ("N = 4000, first run", [cache, "data.limit=4000"]),
            (
                "two processes, first run",
                [f"cache.dir={place / 'two'}", "trainer.devices=2", "trainer.accelerator=cpu"],
            ),
        ]
        for i, (name, more) in enumerate(plan):
            rows.append({"run": name, **run(place / f"run{i}", [*more, *words])})
            print(name, "done", file=sys.stderr)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[c]) for c in columns) + " |")


if __name__ == "__main__":
    main()
