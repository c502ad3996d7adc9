"""Faults for the cache that need processes of their own: killed writers, writers at once, a full disk.

    python tests/cache_faults.py kills=200 writers=20 ranks=3
    unshare --mount python tests/cache_faults.py full=20     # --map-root-user too, when not root

It prints what it counted, a line of JSON a fault. The processes that are killed are forked from this one, in which
torch, transformers and the tiny model are warm already: a start costs 0.1 s instead of 5, so that hundreds fit.
"""

import contextlib
import ctypes
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from rsdyn.errors import UserError
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.stream.cache import DamagedShardError, TrajectoryCache
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.tokens import Sequences
from rsdyn.stream.trajectories import TrajectoryStream


def random_sequences(n: int, *, longest: int = 20) -> Sequences:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, longest + 1, size=n)
    ids = rng.integers(1, 300, size=int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(ids=ids, offsets=offsets, n_rows=n, n_truncated=0, bos_id=0, bos_note=None)


class Bench:
    """A tiny model, a text, and what an uninterrupted run makes of them."""

    def __init__(self, folder: Path, *, n: int, shard_sequences: int, dtype: str = "bfloat16"):
        from tiny_models import tiny_lm

        self.folder, self.options = folder, {"shard_sequences": shard_sequences, "dtype": dtype}
        self.lm: LMSource = find_lm(str(tiny_lm(folder / "lm")))
        self.sequences = random_sequences(n)
        whole = self.stream(folder / "uninterrupted")
        whole.open()
        for k in range(whole.n_shards):
            whole.shard(k)
        self.n_shards, self.expected = whole.n_shards, self.shards(whole.cache)
        assert whole.n_recorded == n

    def stream(self, root: Path) -> TrajectoryStream:
        return TrajectoryStream(self.lm, self.sequences, cache_dir=root, **self.options)

    @staticmethod
    def shards(cache: TrajectoryCache) -> dict[int, bytes]:
        return {k: cache.path(k).read_bytes() for k in range(cache.n_shards) if cache.has(k)}


def forked(work) -> int:
    """Run ``work`` in a child, which leaves with 0, or with 1 and a traceback; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_call(number: int) -> None:
    """Have this process kill itself before its system call of that number, out of those that publish a file."""
    left = number

    def watched(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("posix_fallocate", "fdopen", "fsync", "replace", "stat"):
        setattr(os, name, watched(getattr(os, name)))


def kills(folder: Path, n: int, seed: int = 0) -> dict:
    """Kill a run that fills a cache, go on, kill it again, until ``n`` kills; new caches as they fill up."""
    bench, rng = Bench(folder, n=96 if n > 50 else 48, shard_sequences=4), random.Random(seed)
    out = {
        "kills": 0,
        "inside a write": 0,
        "caches": 0,
        "recorded": 0,
        "lost": 0,
        "corrupt": 0,
        "redone": 0,
        "strays": 0,
    }
    most_redone = 0
    while out["kills"] < n:
        root = folder / f"cache-{out['caches']}"
        cache, there, n_kills, n_records = bench.stream(root).cache, {}, 0, 0
        while True:
            reader, writer = os.pipe()
            exact, number = rng.random() < 0.5, rng.randrange(1, 40)

            def work(writer=writer, root=root, exact=exact, number=number):
                stream = bench.stream(root)
                stream.open()
                real, order = stream.cache.write, list(range(stream.n_shards))

                def write(k, shard):
                    os.write(writer, b".")  # recorded, and about to be written
                    return real(k, shard)

                stream.cache.write = write
                random.Random(os.getpid()).shuffle(order)
                if exact:
                    stream.lm.load()
                    kill_at_call(number)
                for k in order:
                    stream.shard(k)

            pid = forked(work)
            os.close(writer)
            begun = os.read(reader, 1)  # the first write is on its way, or the run has ended
            if begun:
                time.sleep(rng.random() * 0.03)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            n_records += len(begun)
            while more := os.read(reader, 4096):
                n_records += len(more)
            os.close(reader)
            was_killed = os.WIFSIGNALED(status)
            assert was_killed or os.waitstatus_to_exitcode(status) == 0
            n_kills += was_killed
            out["inside a write"] += was_killed and any(cache.folder.glob(".shard-*.tmp"))
            now = bench.shards(cache)
            out["lost"] += len(there.keys() - now.keys())
            out["corrupt"] += sum(now[k] != bench.expected[k] for k in now)
            there = now
            if not was_killed:
                break
        out["lost"] += len(bench.expected.keys() - there.keys())
        out["strays"] += len(list(cache.folder.glob(".*.tmp")))
        out["kills"] += n_kills
        out["caches"] += 1
        out["recorded"] += n_records
        out["redone"] += n_records - bench.n_shards
        most_redone = max(most_redone, n_records - bench.n_shards - n_kills)
    return out | {"shards": out["caches"] * bench.n_shards, "redone beyond one a kill": max(0, most_redone)}


def writers(folder: Path, n: int, seed: int = 0) -> dict:
    """In each of ``n`` rounds eight runs want one empty cache, four others read it, and one writer is killed."""
    bench, rng = Bench(folder, n=60, shard_sequences=5), random.Random(seed)
    truth = bench.stream(folder / "uninterrupted").cache
    values = {k: truth.read(k).activations.clone() for k in range(bench.n_shards)}
    out = {
        "rounds": n,
        "recorded": 0,
        "redone": 0,
        "overlaps": 0,
        "reads": 0,
        "partial reads": 0,
        "wrong": 0,
        "failed": 0,
    }
    taken_over = 0
    for turn in range(n):
        root, notes = folder / f"round-{turn}", folder / f"notes-{turn}"
        notes.mkdir()

        def write(number, root=root, notes=notes):
            stream = bench.stream(root)
            stream.open()
            note, real = (notes / f"writer-{number}").open("w", buffering=1), stream._record

            def record(numbers, on_record):
                note.write(f"{numbers[0] // 5} {time.monotonic_ns()} ")
                note.flush()
                shard = real(numbers, on_record)
                time.sleep(0.005)
                note.write(f"{time.monotonic_ns()}\n")
                return shard

            stream._record = record
            order = list(range(stream.n_shards))
            if number % 2:  # half of them in the same order, so that they meet
                random.Random(number).shuffle(order)
            for k in order:
                assert torch.equal(stream.shard(k).activations, values[k])

        def read(number, root=root, notes=notes):
            cache, n_reads, bad = bench.stream(root).cache, 0, 0
            with (notes / f"reader-{number}").open("w", buffering=1) as note:
                while not (notes / "over").exists():
                    for k in range(cache.n_shards):
                        cache.store._verified.clear()
                        try:
                            bad += not torch.equal(cache.read(k).activations, values[k])
                            n_reads += 1
                        except FileNotFoundError:
                            pass
                        except DamagedShardError:
                            bad += 1
                note.write(f"{n_reads} {bad}\n")

        pids = [forked(lambda i=i: write(i)) for i in range(8)]
        readers = [forked(lambda i=i: read(i)) for i in range(4)]
        time.sleep(rng.random() * 0.5)
        until = time.monotonic() + 5
        while not (busy := at_work(notes)) and time.monotonic() < until:
            time.sleep(0.0005)
        for number in busy[:1]:
            os.kill(pids[number], signal.SIGKILL)  # no child is waited for before this, so the number is still its own
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        (notes / "over").touch()
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers]
        out["failed"] += sum(code not in (0, -signal.SIGKILL) for code in codes)
        spans: dict[int, list[tuple[int, int]]] = {}
        for note in notes.glob("writer-*"):
            for line in note.read_text().splitlines():
                k, start, *end = map(int, line.split())
                spans.setdefault(k, []).append((start, end[0] if end else start))
        for seen in spans.values():
            seen.sort()
            out["overlaps"] += sum(a[1] > b[0] for a, b in itertools.pairwise(seen))
            out["recorded"] += len(seen)
            taken_over += len(seen) > 1
        out["redone"] += sum(len(seen) - 1 for seen in spans.values())
        for note in notes.glob("reader-*"):
            n_reads, bad = map(int, note.read_text().split())
            out["reads"] += n_reads
            out["partial reads"] += bad
        out["wrong"] += bench.shards(bench.stream(root).cache) != bench.expected
    return out | {"shards": n * bench.n_shards, "taken over from the dead": taken_over}


def at_work(notes: Path) -> list[int]:
    """The writers that are recording a shard under its lock: their last line has no end yet."""
    last = {int(p.name.partition("-")[2]): p.read_text().rpartition("\n")[2] for p in notes.glob("writer-*")}
    return [number for number, line in last.items() if line.strip()]


def ranks(folder: Path, n_texts: int) -> dict:
    """One to four processes of a run fill one cache, with counts that divide by nothing; ``n_texts`` of three."""
    out = {"runs": 0, "recorded": 0, "sequences": 0, "waited": 0, "wrong": 0}
    for n, per_shard in ((45, 8), (33, 4), (29, 7))[:n_texts]:
        bench = Bench(folder / str(n), n=n, shard_sequences=per_shard)
        for world in (1, 2, 3, 4):
            root, notes = folder / f"{n}-{world}", folder / f"notes-{n}-{world}"
            notes.mkdir()

            def work(rank, bench=bench, root=root, notes=notes, world=world):
                stream = bench.stream(root)
                stream.open()
                waits = []
                stream._say_waiting = lambda k, holder: waits.append(k)
                data = ResidualStreamDataModule(stream, batch_size=16, shuffle_shards=2)
                data.set_process(rank, world)
                for part in ("train", "val", "test"):
                    list(data.whole_sequences(part))
                (notes / str(rank)).write_text(f"{stream.n_recorded} {len(waits)}")

            pids = [forked(lambda rank=rank: work(rank)) for rank in range(world)]
            assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * world
            out["runs"] += 1
            out["sequences"] += n
            for note in notes.iterdir():
                recorded, waited = map(int, note.read_text().split())
                out["recorded"] += recorded
                out["waited"] += waited
            out["wrong"] += bench.shards(bench.stream(root).cache) != bench.expected
    return out


def full(folder: Path, n: int) -> dict:
    """A small tmpfs fills up with ``n`` different amounts of room left: seen before the LM starts, and not foreseen."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        return _full(folder, disk, n)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _full(folder: Path, disk: Path, n: int) -> dict:
    bench = Bench(folder, n=512, shard_sequences=128, dtype="float32")
    total = sum(map(len, bench.expected.values()))
    out = {"offsets": n, "foreseen": 0, "not foreseen": 0, "other ends": 0, "left behind": 0, "not kept": 0, "wrong": 0}

    def run(root, ballast=None):
        """Go on with the run; ``ballast`` leaves so many bytes free once the LM is at work. What it says."""
        reader, writer = os.pipe()

        def work():
            stream = bench.stream(root)
            try:
                stream.open()
                for k in range(stream.n_shards):
                    stream.shard(k, lambda n: None if ballast is None else fill(disk, ballast))
            except UserError as error:
                os.write(writer, f"{int(stream.lm_loaded)} {error}".encode())

        status = os.waitpid(forked(work), 0)[1]
        os.close(writer)
        with os.fdopen(reader) as said:
            return status, said.read()

    for i in range(n):
        left = round(total * i / n)
        for foreseen in (True, False):
            root = disk / f"cache-{i}-{int(foreseen)}"
            if foreseen:
                fill(disk, left)
                status, said = run(root)
                ok = "the disk is full" in said or "GiB more and the disk has" in said
                out["foreseen"] += status == 0 and said.startswith("0 ") and ok and "\n" not in said
            else:
                status, said = run(root, ballast=left)
                ok = said.startswith("1 ") and "disk is full" in said and "kept" in said
                out["not foreseen"] += status == 0 and ok and "\n" not in said
            out["other ends"] += status != 0
            out["left behind"] += len(list(root.glob("*/.*.tmp")))
            kept = bench.shards(bench.stream(root).cache)
            out["not kept"] += any(kept[k] != bench.expected[k] for k in kept)
            (disk / "ballast").unlink(missing_ok=True)
            status, said = run(root)  # there is space again
            out["wrong"] += status != 0 or said != "" or bench.shards(bench.stream(root).cache) != bench.expected
            subprocess.run(["rm", "-r", str(root)], check=True)
    return out


def fill(disk: Path, left: int) -> None:
    """Fill the disk up to ``left`` bytes, once."""
    if not (disk / "ballast").exists():
        with (disk / "ballast").open("wb") as file:
            file.write(bytes(max(0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left)))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    # a parent that is killed must not leave writers behind
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    faults = {"kills": kills, "writers": writers, "full": full, "ranks": ranks}
    for word in sys.argv[1:]:
        name, _, number = word.partition("=")
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out = faults[name](Path(folder), int(number))
        print(json.dumps({"fault": name, **out, "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
