"""The cache against the machine: writing, shuffled reading when it is warm, and when it is cold.

    python benchmarks/bench_cache.py                                    # 32 sublayers, 512 units; about two minutes
    python benchmarks/bench_cache.py --units 4096 --sublayers 64 --sequences 1024
    python benchmarks/bench_cache.py --dir /data/tmp                    # another disk than the temporary folder's
    python benchmarks/bench_cache.py --limit 1 --times 4                # a cache larger than memory (needs root)

Prints what memory and disk give at most, then a table in Markdown for RESULTS.md. Ours and each baseline take turns and
the least seconds of each count: of CPU time for what is in memory, on one thread; of wall time where there is a disk or
there are several threads. `cold`: the kernel was asked to drop the pages of
the cache before each pass (POSIX_FADV_DONTNEED, after fsync); on a virtual disk the host may still have them in its
memory, which serves ours and the baseline alike. Memory is not limited meanwhile.

With ``--limit`` a process that may have no more than so many GB, page cache included, reads a cache of ``--times`` as
many: epochs window by window in the drawn order, in turns with the same files read in order. Nothing is dropped from
the page cache in between, since it cannot hold what it read an epoch ago.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from memory import memory_limit, peak
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsdyn.stream import datamodule
from rsdyn.stream.cache import Shard, TrajectoryCache, sequence_keys

Row = tuple[str, str, float, float, float | None]  # what, baseline, seconds of both, goal


def turns(repeats: int, *works: Callable[[], Any], cpu: bool = False) -> list[float]:
    """Least seconds of each work, wall or this process' CPU time; they take turns."""
    clock = time.process_time if cpu else time.perf_counter
    seconds = [float("inf")] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            start = clock()
            work()
            seconds[i] = min(seconds[i], clock() - start)
    return seconds


class Stream:
    """What a DataModule asks of a stream whose shards are all in the cache."""

    def __init__(self, cache: TrajectoryCache):
        self.cache, self.dtype, self.device = cache, cache.dtype, torch.device("cpu")
        self.n_sequences, self.n_sublayers, self.n_units = cache.shape
        self.shard_sequences, self.n_shards, self.bounds = cache.shard_sequences, cache.n_shards, cache.bounds
        self.shard = lambda k, on_record: cache.read(k)

    def rows_of(self, k: int, sequences: Any) -> Tensor:
        return torch.from_numpy(sequences - self.bounds(k)[0])

    def turns(self, k: int) -> None:
        return None


class Vectors(Dataset):
    """One vector an item, over the same memory map: how a map-style dataset of a cache is usually written."""

    def __init__(self, cache: TrajectoryCache, rows: Tensor):
        self.shards = [cache.read(k) for k in range(cache.n_shards)]
        self.rows, self.per_shard, self.n_sublayers = rows.tolist(), cache.shard_sequences, cache.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        sequence, sublayer = divmod(self.rows[i], self.n_sublayers)
        shard = self.shards[sequence // self.per_shard]
        return shard.activations[sequence % self.per_shard, sublayer], sublayer, sequence


def new_cache(folder: Path, name: str, n: int, args: argparse.Namespace, per_shard: int) -> TrajectoryCache:
    sizes = {"n_sublayers": args.sublayers, "n_units": args.units, "shard_sequences": per_shard}
    keys = sequence_keys((np.array([i]) for i in range(n)), (b"last" for _ in range(n)))
    cache = TrajectoryCache(folder, {"bench": name}, label=name, keys=keys, **sizes)
    cache.open()
    return cache


def shard_of(cache: TrajectoryCache, k: int, x: Tensor) -> Shard:
    start, stop = cache.bounds(k)
    return Shard(x[: stop - start], torch.arange(start, stop), torch.full((stop - start,), 70, dtype=torch.int32))


def filled_cache(folder: Path, args: argparse.Namespace) -> TrajectoryCache:
    cache = new_cache(folder, "reading", args.sequences, args, 256)
    x = torch.randn(256, args.sublayers, args.units).bfloat16()
    for k in range(cache.n_shards):
        cache.write(k, shard_of(cache, k, x))
    return cache


def writing(folder: Path, args: argparse.Namespace, mib: int) -> tuple[list[float], int]:
    """Seconds to write a shard of about so many MiB, ours and raw, and its bytes."""
    per_shard = max(1, (mib << 20) // (args.sublayers * args.units * 2))
    cache = new_cache(folder, f"writing-{mib}", per_shard, args, per_shard)
    x = torch.randn(per_shard, args.sublayers, args.units).bfloat16()
    shard, raw = shard_of(cache, 0, x), x.flatten().view(torch.uint8).numpy().data

    def write_raw() -> None:
        with (folder / "raw").open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        (folder / "raw").unlink()

    def write_ours() -> None:
        cache.write(0, shard)
        cache.discard(0)

    return turns(args.repeats, write_ours, write_raw), len(raw)


def data_of(cache: TrajectoryCache, args: argparse.Namespace, kept: int) -> Any:
    """A DataModule in the middle of training, which keeps so many bytes in memory."""
    datamodule.KEPT_BYTES = kept
    data = datamodule.ResidualStreamDataModule(Stream(cache), batch_size=args.batch)  # type: ignore[arg-type]
    data.trainer = trainer_at(0)
    for _ in data.train_dataloader():  # the epoch that checks the shards and takes their statistics
        pass
    data.trainer = trainer_at(1)
    return data


def trainer_at(epoch: int) -> Any:
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(current_epoch=epoch, fit_loop=loop)


def walk(data: Any) -> int:
    return sum(len(batch.x) for batch in data.train_dataloader())


def one_by_one(cache: TrajectoryCache, args: argparse.Namespace) -> float:
    """Seconds for some vectors out of a map-style dataset; its maps are gone afterwards, since they keep pages."""
    chosen = torch.randperm(args.sequences * args.sublayers)[: args.items]
    items = DataLoader(Vectors(cache, chosen), batch_size=args.batch, shuffle=True)
    return turns(2, lambda: sum(len(x) for x, _, _ in items), cpu=args.threads == 1)[0]


def shuffled(cache: TrajectoryCache, args: argparse.Namespace, warm: Any, windows: Any) -> list[Row]:
    """Rows of the table about vectors in a drawn order out of memory."""
    n = walk(warm)
    assert n == walk(windows)
    source, target = (torch.ones(n, args.units, dtype=torch.bfloat16) for _ in range(2))
    works = (lambda: walk(warm), lambda: walk(windows), lambda: target.copy_(source))
    kept, by_windows, memcpy = turns(3 * args.repeats, *works, cpu=args.threads == 1)
    per_item = one_by_one(cache, args) * n / args.items
    name = f"shuffled vectors of {args.units} units"
    goal = 25 if args.units <= 512 else None  # larger rows are bound by memory either way: memcpy itself is 10 × there
    rows: list[Row] = [
        (f"{name}, kept in memory", "memcpy", kept, memcpy, 0.4),
        (f"{name}, kept in memory", "per-item dataset", kept, per_item, goal),
        (f"{name}, window by window", "memcpy", by_windows, memcpy, None),
        (f"{name}, window by window", "per-item dataset", by_windows, per_item, goal),
    ]
    print(f"{name}: {n / kept / 1e3:.0f} thousand a second kept, {n / by_windows / 1e3:.0f} by windows.")
    return rows


def evict(cache: TrajectoryCache) -> None:
    for k in range(cache.n_shards):
        descriptor = os.open(cache.path(k), os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(cache: TrajectoryCache) -> None:
    block = bytearray(1 << 22)
    for k in range(cache.n_shards):
        with cache.path(k).open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def timed_cold(cache: TrajectoryCache, repeats: int, *works: Callable[[], Any]) -> list[float]:
    seconds = [float("inf")] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            evict(cache)
            seconds[i] = min(seconds[i], turns(1, work)[0])
    return seconds


def larger_than_memory(folder: Path, args: argparse.Namespace) -> None:
    """Write the cache, and have a process with little memory read it; prints a table."""
    per_sequence = args.sublayers * args.units * 2
    args.sequences = round(args.limit * 1e9 * args.times / per_sequence)
    cache = filled_cache(folder, args)
    evict(cache)
    stored = sum(cache.path(k).stat().st_size for k in range(cache.n_shards))
    names = ("units", "sublayers", "sequences", "batch", "repeats", "threads")
    words = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    with memory_limit(args.limit):
        command = [sys.executable, __file__, *words, "--inside", str(folder)]
        code, most = peak(command, limited=True)
    if code:
        raise SystemExit(f"the reading process ended with {code}; -9 is the kernel's, for want of memory")
    seconds = json.loads((folder / "seconds.json").read_text())
    shares = [a / b for a, b in zip(seconds["in order"], seconds["windows"], strict=True)]
    verdict = "reached" if max(shares) >= 0.7 else "missed"
    print(f"A cache of {stored / 1e9:.2f} GB in {cache.n_shards} shards, read with {args.limit:g} GB of memory.\n")
    print("| what | " + " | ".join(f"turn {i + 1}" for i in range(args.repeats)) + " |")
    print("|" + " --- |" * (args.repeats + 1))
    for name, values in seconds.items():
        print(f"| {name}, GB/s | " + " | ".join(f"{stored / value / 1e9:.2f}" for value in values) + " |")
    print("| ratio | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    print(
        f"\nThe best of the turns: {max(shares):.2f} (goal 0.7, {verdict}). Own memory {most['anonymous']:.0f} MiB, "
        f"resident {most['resident']:.0f}."
    )


def read_inside(folder: Path, args: argparse.Namespace) -> None:
    """What the process with little memory does: epochs by windows and passes in order, in turns."""
    cache = new_cache(folder, "reading", args.sequences, args, 256)
    data = data_of(cache, args, kept=0)
    seconds: dict[str, list[float]] = {"in order": [], "windows": []}
    for _ in range(args.repeats):
        for name, work in (("in order", lambda: read_all(cache)), ("windows", lambda: walk(data))):
            seconds[name].append(turns(1, work)[0])
    (folder / "seconds.json").write_text(json.dumps(seconds))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writing and reading the cache, against memory and disk.")
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--sublayers", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=4864)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--write-mib", type=int, default=128, help="the larger of the two shards that are written")
    parser.add_argument("--items", type=int, default=20_000, help="vectors that the per-item dataset gives, scaled up")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--wide-sequences", type=int, default=640, help="of 64 sublayers, 4096 units; 0 leaves them out"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where the cache is made and removed")
    parser.add_argument("--limit", type=float, help="GB of memory for a process that reads a cache of --times as many")
    parser.add_argument("--times", type=float, default=4)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.inside:
        read_inside(args.inside, args)
        return
    if args.limit:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            larger_than_memory(Path(scratch), args)
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        folder = Path(scratch)
        cache = filled_cache(folder, args)
        warm, windows = data_of(cache, args, kept=1 << 62), data_of(cache, args, kept=0)
        n = walk(warm)
        assert n == walk(windows)
        source, target = (torch.ones(n, args.units, dtype=torch.bfloat16) for _ in range(2))
        target_bytes = 2 * n * args.units
        evict(cache)
        (disk,) = timed_cold(cache, args.repeats, lambda: read_all(cache))
        (memcpy,) = turns(args.repeats, lambda: target.copy_(source))
        stored = sum(cache.path(k).stat().st_size for k in range(cache.n_shards))
        print(f"{n:,} training vectors, {target_bytes / 2**20:.0f} MiB of a cache of {stored / 2**20:.0f} MiB in")
        print(
            f"{cache.n_shards} shards. memcpy {target_bytes / memcpy / 1e9:.1f} GB/s, one way; the disk, read in order,"
        )
        print(f"{stored / disk / 1e9:.2f} GB/s; {args.threads} thread(s), torch {torch.__version__}.\n")

        for mib in (16, args.write_mib):
            (ours, raw), size = writing(folder, args, mib)
            name = f"writing a shard of {size / 2**20:.0f} MiB, crash-safe"
            rows.append((name, "raw write, fsync", ours, raw, 0.6 if mib == args.write_mib else None))
        rows += shuffled(cache, args, warm, windows)
        cold = timed_cold(cache, args.repeats, lambda: walk(windows), lambda: read_all(cache))
        rows.append(("shuffled vectors, cold, window by window", "the disk, read in order", *cold, 0.7))

        def first() -> None:
            fresh = new_cache(folder, "reading", args.sequences, args, 256)
            data_of(fresh, args, kept=0)

        cold = timed_cold(cache, args.repeats, first, lambda: read_all(cache))
        rows.append(("the same in a run's first epoch, checksums, statistics", "the disk, read in order", *cold, None))
        if args.wide_sequences:
            wide = argparse.Namespace(**{**vars(args), "units": 4096, "sublayers": 64})
            wide.sequences, wide.items = args.wide_sequences, min(args.items, 4096)
            cache = filled_cache(folder / "wide", wide)
            rows += shuffled(cache, wide, data_of(cache, wide, kept=1 << 62), data_of(cache, wide, kept=0))
    columns = ("what", "baseline", "ours, s", "baseline, s", "ratio", "goal", "")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for name, baseline, ours, theirs, goal in rows:
        ratio = theirs / ours
        verdict = "" if goal is None else "reached" if ratio >= goal else "missed"
        asked = "none" if goal is None else f"{goal:g}"
        print(f"| {name} | {baseline} | {ours:.4f} | {theirs:.4f} | {ratio:.2f} | {asked} | {verdict} |")
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"\nPeak {highest:.0f} MiB.")


if __name__ == "__main__":
    main()
