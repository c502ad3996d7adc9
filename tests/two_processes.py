"""A script that forks into two processes, each of which is ended whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_in_two(script, folder, *, seconds):
    """Run the text of a script, whose argument is ``folder``; it must end well within ``seconds``."""
    path = folder / "two.py"
    path.write_text(script)
    paths = (TESTS.parent, TESTS, TESTS / "metrics")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(path), str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # both, should one be waiting for the other
        process.wait()
    assert process.returncode == 0, said.decode()
