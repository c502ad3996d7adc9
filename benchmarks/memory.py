"""Is memory flat in the number of trajectories? train.py and analyze.py over N of them, with a limit and without.

    python benchmarks/memory.py                        # 1,250 and 10,000 trajectories, peak memory of each
    python benchmarks/memory.py --limit 2 10000        # in a cgroup of 2 GB, page cache included (needs root)

The language model has 16 layers of 1024 units and next to no attention and MLP, so that recording costs little; 10,000
trajectories are 625 MiB in the cache, 1.2 GiB in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup")
V1 = (CGROUPS / "memory").is_dir()
CGROUP = CGROUPS / ("memory" if V1 else "") / f"rsdyn-{os.getpid()}"


def make_inputs(folder: Path, n: int) -> None:
    """A model and ``n`` texts of 100 to 500 characters."""
    import random

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import PROSE, tiny_tokenizer

    tokenizer = tiny_tokenizer(folder / "lm", add_bos_by_template=True)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=16, num_hidden_layers=16,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    words, rng = " ".join(PROSE).split(), random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(n):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=25))[:300].ljust(110, ".")}) + "\n")


@contextmanager
def memory_limit(gigabytes: float | None) -> Iterator[None]:
    """While it lasts there is a cgroup of so much memory, page cache included, for :func:`peak`; None: without one."""
    if gigabytes is not None:
        CGROUP.mkdir(exist_ok=True)
    try:
        if gigabytes is not None:
            (CGROUP / ("memory.limit_in_bytes" if V1 else "memory.max")).write_text(str(int(gigabytes * 1e9)))
        yield
    finally:
        if gigabytes is not None:
            CGROUP.rmdir()


def peak(command: list[str], *, limited: bool) -> tuple[int, dict[str, float]]:
    """Run a command; its exit code and its peak memory in MiB, its own (anonymous) and with what is mapped of files.

    ``limited`` runs it in the cgroup of :func:`memory_limit`; a command that needs more is killed, exit code -9.
    """

    def enter() -> None:
        if limited:
            (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=enter)
    most = {"anonymous": 0.0, "resident": 0.0}

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for name, field in (("anonymous", "RssAnon"), ("resident", "VmHWM")):
                if found := re.search(rf"{field}:\s+(\d+)", status):
                    most[name] = max(most[name], int(found[1]) / 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    return code, most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("n", nargs="*", type=int, default=[1250, 10_000])
    parser.add_argument("--limit", type=float, help="GB of memory that each run may have")
    arguments = parser.parse_args()
    with memory_limit(arguments.limit), tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.n, limited=arguments.limit is not None)


def measure(folder: Path, counts: list[int], *, limited: bool) -> None:
    make_inputs(folder, max(counts))
    for n in counts:
        shared = [
            f"lm.name={folder / 'lm'}", f"data.path={folder / 'text.jsonl'}", f"data.limit={n}",
            f"cache.dir={folder / f'cache-{n}'}", "tracking.mode=disabled", "trainer.accelerator=cpu",
        ]  # fmt: skip
        scripts = {
            "train.py": ["trainer.max_epochs=2", "cae.layers=2"],
            "analyze.py": [
                "analysis.samples=null", "analysis.conditions=[original]", "analysis.keep=200",
                "analysis.mi.estimator=copula", "analysis.rotation.surrogates=50",
            ],
        }  # fmt: skip
        for script, words in scripts.items():
            began = time.monotonic()
            run = folder / f"{script}-{n}"
            code, most = peak([sys.executable, str(ROOT / script), *shared, *words, f"run.dir={run}"], limited=limited)
            print(
                f"{script:10}  N {n:6d}  exit {code}  own {most['anonymous']:6.0f} MiB  "
                f"resident {most['resident']:6.0f} MiB  {time.monotonic() - began:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
