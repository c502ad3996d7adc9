"""analyze.py as a program of its own, from its words to what it leaves in its folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def argv_of(words, **more):
    return [f"{key}={value}" for key, value in {**words, **more}.items()]


def run_analyze(words, folder, **more):
    """Run it, which must succeed; the folder and what it said."""
    command = [sys.executable, str(ROOT / "analyze.py"), *argv_of(words, **{"run.dir": folder}, **more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def arrays_of(folder):
    with np.load(folder / "results.npz") as file:
        return {name: file[name] for name in file.files}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())
