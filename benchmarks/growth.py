"""How time and memory grow: extraction, analysis, training and perturbation against N, D, S, and processes.

    python benchmarks/growth.py                       # about ten minutes; prints the table, draws growth.png
    python benchmarks/growth.py extraction training   # some of them

N is sequences (of a perturbation, points), D units, S sublayers. Each point is a process of its own, on one thread;
time is that of the work alone, without imports, models and inputs, and memory what the work adds beside them, without
what it maps from files. The exponent is the slope of a line through the logarithms, of all points and of the last two:
where a constant share weighs at the small end, the second is nearer to the truth.

The language model has the 8B's ratios and random weights; the cached stream of analysis and training is made up, as
bench_analysis.py makes it. Analysis has every measure; training is one epoch of the paper's autoencoder at batch 512.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import random_llama, sequences, thin_llama
from timing import in_a_child, peak_memory, table

HERE = Path(__file__).parent
ROOT = HERE.parent
# of each work: where all axes cross, and the values of each axis
AXES: dict[str, tuple[dict[str, int], dict[str, list[int]]]] = {
    "extraction": (
        {"N": 32, "D": 128, "S": 16},
        {"N": [64, 256, 1024, 4096], "D": [128, 256, 512, 1024], "S": [4, 16, 64, 256]},
    ),
    "analysis": (
        {"N": 500, "D": 128, "S": 16},
        {"N": [250, 1000, 4000, 16000], "D": [128, 256, 512, 1024], "S": [4, 16, 64, 256]},
    ),
    "training": (
        {"N": 500, "D": 128, "S": 16},
        {"N": [500, 2000, 8000], "D": [128, 256, 512, 1024], "S": [4, 16, 64, 256]},
    ),
    "perturbation": (
        {"N": 100, "D": 128, "S": 16},
        {"N": [100, 400, 1600, 6400], "D": [128, 256, 512, 1024], "S": [4, 16, 64, 256]},
    ),
}
# what each must cost: an axis that is not named here is linear in time and constant in memory
MUST = {
    ("extraction", "D"): ("2, the products", "between 0 and 1"),
    ("analysis", "D"): ("1, and 3 for the eigenvectors of PCA", "1, and 2 for the covariances of PCA"),
    ("training", "D"): ("2, the widest layers", "2, weights and Adam"),
    ("perturbation", "D"): ("2, the products", "1, the curves of all points"),
    ("perturbation", "N"): ("1", "1, the curves of all points"),
    ("perturbation", "S"): ("1", "1, the curves of all points"),
    ("analysis", "S"): ("1", "1"),
}


def extraction(n: int, d: int, s: int, folder: Path) -> Callable[[], object]:
    """Recording into shards of 64 sequences, which are let go one after another as the cache does."""
    lm, texts = random_llama(d, s // 2), sequences(n)
    lm.record(texts[:2])  # what is done once

    def work() -> None:
        for start in range(0, n, 64):
            lm.record(texts[start : start + 64], dtype=torch.bfloat16)

    return work


def cached_stream(n: int, d: int, s: int, folder: Path) -> Any:
    from bench_analysis import fill, open_stream

    fill(folder, n, s, d)
    stream = open_stream(folder, n, s, d)
    for k in range(stream.n_shards):
        stream.shard(k)  # verified, and in the page cache
    return stream


RESOLUTION = 1.0  # MiB: less is not told from the allocator's own ways
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def analysis(n: int, d: int, s: int, folder: Path) -> Callable[[], object]:
    import lightning as L
    from bench_analysis import MEASURES, NULLS

    from rsdyn.analysis.collected import Collected
    from rsdyn.analysis.measure import How
    from rsdyn.analysis.probe import ResidualStreamProbe
    from rsdyn.analysis.settings import AnalysisConfig, RotationConfig
    from rsdyn.analysis.streams import measure_stream
    from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule

    stream = cached_stream(n, d, s, folder)

    def work() -> None:
        collected = Collected(n_sublayers=s, n_units=d, measures=MEASURES)
        trainer = L.Trainer(accelerator="cpu", devices=1, **QUIET)
        data = TrajectoryDataModule(stream, passes=collected.n_passes)
        trainer.test(ResidualStreamProbe(collected), datamodule=data, verbose=False)
        rotation = RotationConfig(nulls=[*NULLS], surrogates=100)
        measure_stream(collected, How(AnalysisConfig(measures=[*MEASURES], rotation=rotation)), stream.dtype)

    return work


def training(n: int, d: int, s: int, folder: Path) -> Callable[[], object]:
    import lightning as L

    from rsdyn.autoencoder.training import LitAutoencoder
    from rsdyn.stream.datamodule import ResidualStreamDataModule

    stream = cached_stream(n, d, s, folder)

    def work() -> None:
        model = LitAutoencoder(autoencoder={"d_in": d, "n_sublayers": s, "standardise": "unit"}, n_sublayers=s)
        datamodule = ResidualStreamDataModule(stream)
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0, use_distributed_sampler=False, **QUIET
        )
        trainer.fit(model, datamodule=datamodule)

    return work


def perturbation(n: int, d: int, s: int, folder: Path) -> Callable[[], object]:
    from rsdyn.lm.continuing.continuation import continue_all, run_reference

    lm = random_llama(d, s // 2, head=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (32,), generator=generator)
    reference = run_reference(lm, ids)
    sublayers = sorted({2 * round(f * (lm.n_layers - 1)) for f in (0, 7 / 31, 15 / 31, 23 / 31, 1)})
    states = [(k, reference.stream[k] + torch.randn(n, d, generator=generator)) for k in sublayers]
    continue_all(lm, reference, [(k, x[:2]) for k, x in states])

    def work() -> None:
        for _ in continue_all(lm, reference, states):
            pass

    return work


WORKS = {"extraction": extraction, "analysis": analysis, "training": training, "perturbation": perturbation}


def point(name: str, n: int, d: int, s: int) -> dict[str, float]:
    """Seconds and added memory of one work at one size, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = WORKS[name](n, d, s, Path(folder))
        with peak_memory() as found:
            start = time.process_time()
            work()
            seconds = time.process_time() - start
    return {"seconds": seconds, "mib": found["added_mib"]}


def slopes(x: list[int], y: list[float], resolution: float = 0.0) -> tuple[float, float]:
    """Of the line through all logarithms, and between the last two; NaN where a value is below the resolution."""
    found = np.array([v if v > resolution else np.nan for v in y])
    a, b = np.log(x), np.log(found)
    return float(np.polyfit(a, b, 1)[0]) if np.isfinite(b).all() else math.nan, float((b[-1] - b[-2]) / (a[-1] - a[-2]))


WIDE = (1000, 32, 1024)  # the stream that analyze.py shares out: sequences, sublayers, units


def made_up_stream(folder: Path) -> list[str]:
    """Words that have analyze.py read a made-up stream of the ``WIDE`` shape, all of it in the cache."""
    from bench_analysis import fill_shards

    from rsdyn.config.command_line import load_config
    from rsdyn.run.opening import find_source, make_stream
    from rsdyn.run.run import Run

    n, s, d = WIDE
    words = [f"lm.name={thin_llama(folder / 'model', d, s // 2)}", f"cache.dir={folder / 'cache'}"]
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run("analyze", load_config([*words, "analysis.conditions=[original]"], "analyze"), folder, time.time())
        stream = make_stream(run, find_source(run), "original")
    stream.open()
    fill_shards(stream, stream.shards_of(n))
    return words


def on_processes(n: int, script: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds of a script on ``n`` processes of one thread each, in all and as its summary has them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), f"run.dir={folder}", "tracking.mode=disabled"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu", f"trainer.devices={n}", *words],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads((folder / "summary.json").read_text())["seconds"]
    return {**found, "in all": time.perf_counter() - start}


def processes() -> list[list[str]]:
    """The scripts on one process and on two of one thread each: seconds of the whole, and of analyze.py's parts."""
    rows = []

    def row(title: str, one: float, two: float) -> None:
        rows.append([title, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f} ×"])

    with tempfile.TemporaryDirectory() as scratch:
        embedded = f"cache.dir={scratch}/train-1-cache"
        for title in ("recording", "cached"):
            found = []
            for n in (1, 2):
                cache = embedded if n == 1 or title == "cached" else f"cache.dir={scratch}/train-2-cache"
                words = ["trainer.max_epochs=3", cache]
                found.append(on_processes(n, "train.py", words, Path(scratch) / f"train-{title}-{n}")["fit"])
            row(f"train.py, three epochs, {title}", *found)
        n, s, d = WIDE
        streams = {
            "embedded model": [embedded],
            f"{n} x {s} x {d}, made up": made_up_stream(Path(scratch) / "made-up"),
        }
        for title, words in streams.items():
            words = [*words, "analysis.conditions=[original]", "analysis.rotation.surrogates=200"]
            folder = Path(scratch) / f"analyze-{len(rows)}"
            one, two = (on_processes(n, "analyze.py", words, folder / str(n)) for n in (1, 2))
            row(f"analyze.py, {title}, cached, in all", one["in all"], two["in all"])
            # the interpreter and its imports come before the run's own clock starts
            starts = [run["in all"] - run["total"] + run["parts"].pop("start") for run in (one, two)]
            row("- of that until the first pass", *starts)
            row("- the rest", *(run["in all"] - start for run, start in zip((one, two), starts, strict=True)))
            for part in one["parts"]:
                if one["parts"][part] > 0.5:
                    row(f"- - {part}", one["parts"][part], two["parts"][part])
            row("- - findings, report, end", *(run["in all"] - start - sum(run["parts"].values())
                                               for run, start in zip((one, two), starts, strict=True)))  # fmt: skip
    return rows


def draw(found: dict[str, dict[str, list[tuple[int, float, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, panels = plt.subplots(2, len(found), figsize=(3.1 * len(found), 5.6), squeeze=False, layout="constrained")
    colours = {"N": "#0072b2", "D": "#d55e00", "S": "#009e73"}
    for column, (name, axes) in enumerate(found.items()):
        for row, what in enumerate(("seconds", "MiB added")):
            panel = panels[row][column]
            for axis, points in axes.items():
                x = [p[0] for p in points]
                y = [p[1 + row] for p in points]
                last = slopes(x, y, RESOLUTION if row else 0)[1]
                said = f"slope {last:.2f} at the end" if math.isfinite(last) else "too small to tell"
                panel.loglog(x, y, "o-", color=colours[axis], label=f"{axis}: {said}", ms=4)
            panel.set_title(name if row == 0 else "")
            panel.set_ylabel(what if column == 0 else "")
            panel.set_xlabel("N, D or S" if row else "")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(0.1 if row else None, panel.get_ylim()[1] * 12)  # room for the words
            panel.legend(fontsize=7, frameon=False, loc="upper left")
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(AXES)}, processes; default all")
    parser.add_argument("--point", nargs=4, metavar=("WORK", "N", "D", "S"), help=argparse.SUPPRESS)
    parser.add_argument("--points", type=Path, help="a JSON file: what it has is not measured again")
    parser.add_argument("--picture", type=Path, default=HERE / "growth.png")
    options = parser.parse_args()
    if options.point:
        name, *size = options.point
        print(json.dumps(point(name, *map(int, size))))
        return
    wanted = options.works or [*AXES, "processes"]
    known = json.loads(options.points.read_text()) if options.points and options.points.exists() else {}
    found: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    rows = []
    for name in [w for w in wanted if w in AXES]:
        base, axes = AXES[name]
        found[name] = {}
        for axis, values in axes.items():
            points = []
            for value in values:
                size = {**base, axis: value}
                key = " ".join([name, *(f"{k}={size[k]}" for k in "NDS")])
                if key not in known:
                    known[key] = in_a_child(__file__, ["--point", name, *(str(size[k]) for k in "NDS")])
                    if options.points:
                        options.points.write_text(json.dumps(known, indent=1))
                got = known[key]
                points.append((value, got["seconds"], got["mib"]))
                print(f"{name} {axis}={value}: {got['seconds']:.2f} s, {got['mib']:.0f} MiB", file=sys.stderr)
            found[name][axis] = points
            cells = [name, axis, ", ".join(str(p[0]) for p in points), ", ".join(f"{p[1]:.2g}" for p in points)]
            cells.append("{:.2f}, {:.2f}".format(*slopes(values, [p[1] for p in points])))
            cells.append(", ".join(f"{p[2]:.0f}" for p in points))
            memory = slopes(values, [p[2] for p in points], RESOLUTION)
            cells.append("{:.2f}, {:.2f}".format(*memory) if all(math.isfinite(m) for m in memory) else "-")
            cells.extend(MUST.get((name, axis), ("1", "0")))
            rows.append(cells)
    if rows:
        columns = ["work", "against", "values", "CPU seconds", "exponent: all, last two", "MiB added"]
        columns += ["exponent: all, last two", "time must be", "memory must be"]
        print(table(columns, rows))
        draw(found, options.picture)
    if "processes" in wanted:
        print()
        print(table(["work", "one process, s", "two processes, s", "ratio"], processes()))


if __name__ == "__main__":
    main()
