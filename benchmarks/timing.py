"""What the benchmarks share: works that take turns, and the memory a piece of work adds to its process."""

from __future__ import annotations

import gc
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def least(turns: int, works: Mapping[str, Callable[[], object]], *, cpu: bool = True) -> dict[str, float]:
    """Least seconds of each work; they take turns, after one turn to warm up.

    ``cpu`` counts this process' CPU time, which others on the machine lengthen less; right for one thread alone.
    """
    clock = time.process_time if cpu else time.perf_counter
    seconds = dict.fromkeys(works, float("inf"))
    order = random.Random(0)
    for turn in range(turns + 1):
        for name, work in order.sample([*works.items()], len(works)):  # what ran just before leaves its memory behind
            gc.collect()  # the garbage of one work is not the next one's to clear
            start = clock()
            work()
            if turn > 0:
                seconds[name] = min(seconds[name], clock() - start)
    return seconds


def anonymous_mib() -> float:
    """Memory of this process that no file backs, which mapped weights and shards are not."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def peak_memory(every: float = 0.002) -> Iterator[dict[str, float]]:
    """How much more memory the context takes than there was before it: ``added_mib``, looked at every few ms."""
    before, found, done = anonymous_mib(), {"added_mib": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(every):
            found["added_mib"] = max(found["added_mib"], anonymous_mib() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def in_a_child(script: str, words: list[str]) -> Any:
    """Run a script in a process of its own, and return what its last line says in JSON."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
