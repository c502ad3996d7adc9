"""The whole analysis at the paper's size, 1000 sequences x 64 sublayers x 4096 units in bf16, read from a cache.

    python benchmarks/bench_analysis.py                       # half a GiB in a temporary folder; about ten minutes
    python benchmarks/bench_analysis.py --units 512           # smaller

Each line is a process of its own: everything on two threads and on one, and each measure alone on two, with its own
passes over the cache. The stream is made up: trajectories of correlated units whose steps grow with depth. Null models:
the paper's and the increment null, 1000 surrogates, each unit's own and shared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

MEASURES = ("activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca")
NULLS = ("layer_shuffle", "increment_shuffle_windowed")


def open_stream(folder: Path, n: int, s: int, d: int):
    """A stream that is complete once :func:`fill` has run, of a model without weights that is never asked for them."""
    from rsdyn.stream.text.tokens import Sequences
    from rsdyn.stream.trajectories import TrajectoryStream

    lm = SimpleNamespace(n_sublayers=s, n_units=d, label="made-up", site_names=("resid_pre", "resid_mid"))
    lm.identity, lm.trust_remote_code = lambda: "none", False
    offsets = np.arange(n + 1, dtype=np.int64)
    sequences = Sequences(np.zeros(n, np.int32), offsets, n_rows=n, n_truncated=0, bos_id=0, bos_note=None)
    stream = TrajectoryStream(lm, sequences, cache_dir=folder, dtype="bfloat16", shard_sequences=250)
    stream.open()
    return stream


def fill(folder: Path, n: int, s: int, d: int) -> None:
    """Write the shards of the stream that :func:`open_stream` opens."""
    stream = open_stream(folder, n, s, d)
    fill_shards(stream, stream.n_shards)


def fill_shards(stream: Any, n_shards: int) -> None:
    """Write a stream's first shards: a common walk, and one of each sequence in 64 shared directions and each unit."""
    from rsdyn.stream.cache import Shard

    s, d, rng = stream.n_sublayers, stream.n_units, torch.Generator().manual_seed(0)
    growth = torch.linspace(0.5, 2, s)[:, None]
    common = (torch.randn(s, d, generator=rng) * growth).cumsum(0)
    directions = torch.randn(64, d, generator=rng) / 8
    for k in range(n_shards):
        start, stop = stream.bounds(k)
        own = torch.randn(stop - start, s, 64, generator=rng) @ directions + torch.randn(
            stop - start, s, d, generator=rng
        )
        x = (common + (own * growth).cumsum(1)).to(torch.bfloat16)
        stream.cache.write(k, Shard(x, torch.arange(start, stop), torch.ones(stop - start, dtype=torch.int32)))


def work(folder: Path, shape: tuple[int, int, int], measures: list[str], threads: int) -> None:
    """One run: the passes over the cache and the measures; prints seconds and peak memory."""
    torch.set_num_threads(threads)
    import lightning as L

    from rsdyn.analysis.collected import Collected
    from rsdyn.analysis.measure import How
    from rsdyn.analysis.measures import measure_of
    from rsdyn.analysis.probe import ResidualStreamProbe
    from rsdyn.analysis.settings import AnalysisConfig, RotationConfig
    from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule

    stream = open_stream(folder, *shape)
    for k in range(stream.n_shards):  # the page cache, alike for all
        stream.cache.path(k).read_bytes()
    began = time.perf_counter()
    collected = Collected(n_sublayers=shape[1], n_units=shape[2], measures=measures)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, **quiet)
    data = TrajectoryDataModule(stream, passes=collected.n_passes)
    trainer.test(ResidualStreamProbe(collected), datamodule=data, verbose=False)
    seconds = {"passes": time.perf_counter() - began}
    how = How(AnalysisConfig(measures=measures, rotation=RotationConfig(nulls=[*NULLS])))
    for name in measures:
        start = time.perf_counter()
        measure_of(name).measure(collected, how)
        seconds[name] = time.perf_counter() - start
    total = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": total, "peak_gib": peak, "parts": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--sublayers", type=int, default=64)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--whole", action="store_true", help="everything alone, on two threads and on one")
    parser.add_argument("--work", nargs=3, metavar=("FOLDER", "MEASURES", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.sequences, options.sublayers, options.units)
    if options.work:
        folder, measures, threads = options.work
        work(Path(folder), shape, measures.split(","), int(threads))
        return
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), *shape)

        def run(measures: tuple[str, ...], threads: int) -> dict:
            words = ["--work", folder, ",".join(measures), str(threads)]
            size = [f"--{k}={v}" for k, v in zip(("sequences", "sublayers", "units"), shape, strict=True)]
            done = subprocess.run([sys.executable, __file__, *size, *words], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            return json.loads(done.stdout.splitlines()[-1])

        print("| run | threads | seconds | of which passes over the cache | peak GiB |")
        print("| --- | --- | --- | --- | --- |")
        rows = {}
        runs: list[tuple[str, tuple[str, ...], int]] = [("everything", MEASURES, 2), ("everything", MEASURES, 1)]
        runs += [] if options.whole else [(m, (m,), 2) for m in MEASURES]
        for name, measures, threads in runs:
            rows[name, threads] = found = run(measures, threads)
            numbers = f"{found['seconds']:.1f} | {found['parts']['passes']:.1f} | {found['peak_gib']:.2f}"
            print(f"| {name} | {threads} | {numbers} |", flush=True)
    two, one = rows["everything", 2]["seconds"], rows["everything", 1]["seconds"]
    print()
    if not options.whole:
        alone = sum(rows[m, 2]["seconds"] for m in MEASURES)
        print(f"- everything over the sum of its measures alone: {two / alone:.2f} (goal: at most 1.2)")
    print(f"- one thread over two: {one / two:.2f} (goal: at least 1.6)")
    print(f"- parts, two threads: {', '.join(f'{k} {v:.1f} s' for k, v in rows['everything', 2]['parts'].items())}")
    print(f"- parts, one thread: {', '.join(f'{k} {v:.1f} s' for k, v in rows['everything', 1]['parts'].items())}")


if __name__ == "__main__":
    main()
