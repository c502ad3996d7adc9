"""Correlation and PCA on one core, against torchmetrics, numpy and scikit-learn in the same run.

    python benchmarks/bench_moments.py                       # the paper's size, about 1.5 GB and two minutes
    python benchmarks/bench_moments.py --units 512           # a smaller stream

Prints a table in Markdown for RESULTS.md. Ours and the baseline take turns, and the best time of each counts, so that
a busy machine slows both; seconds are of CPU time. A baseline marked `1/16` was run on that share of the units,
neighbours, since those share cache lines, and scaled.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.decomposition import PCA as SklearnPCA
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchmetrics import PearsonCorrCoef

from rsdyn.dynamics.moments import correlation
from rsdyn.dynamics.projection import PCA


def best_of(repeats: int, *works: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Least CPU seconds, since everything runs on one thread, and last result of each work; they take turns."""
    seconds, results = [float("inf")] * len(works), [None] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            start = time.process_time()
            results[i] = work()
            seconds[i] = min(seconds[i], time.process_time() - start)
    return seconds, results


def row(name: str, baseline: str, seconds: Sequence[float], goal: float, agreement: str) -> dict[str, str]:
    ours, theirs = seconds
    print(name, "done", file=sys.stderr)
    return {
        "measure": name,
        "baseline": baseline,
        "ours, s": f"{ours:.2f}",
        "baseline, s": f"{theirs:.2f}",
        "ratio": f"{theirs / ours:.1f}",
        "goal": f"{goal:g}",
        "agreement": agreement,
    }


def stream(sequences: int, sublayers: int, units: int) -> Tensor:
    """Random walks over depth in float32, means a few times their spread."""
    x = torch.randn(sequences, sublayers, units, generator=torch.Generator().manual_seed(0))
    for s in range(1, sublayers):
        x[:, s] += x[:, s - 1]
    return x.add_(torch.linspace(-20, 20, units))


def consecutive(x: Tensor, repeats: int) -> dict[str, str]:
    def baseline() -> Tensor:
        found = []
        for s in range(x.shape[1] - 1):
            metric = PearsonCorrCoef(num_outputs=x.shape[2])
            metric.update(x[:, s], x[:, s + 1])
            found.append(metric.compute())
        return torch.stack(found)

    seconds, (ours, theirs) = best_of(repeats, lambda: correlation(x), baseline)
    difference = float((ours - theirs).abs().max())
    name = f"correlation, {x.shape[1] - 1} consecutive pairs, {' x '.join(map(str, x.shape))}"
    return row(name, "torchmetrics `PearsonCorrCoef`", seconds, 6, f"{difference:.0e} in r")


def all_pairs(x: Tensor, repeats: int, share: int) -> dict[str, str]:
    some = x.numpy()[..., : max(1, x.shape[2] // share)]  # a view: the baseline reads the strided stream as it lies

    def baseline() -> list[np.ndarray]:
        return [np.corrcoef(some[..., u].T) for u in range(some.shape[2])]

    (ours_s, theirs_s), (ours, theirs) = best_of(repeats, lambda: correlation(x, "all"), baseline)
    scale = x.shape[2] / some.shape[2]
    first, second = np.triu_indices(x.shape[1], 1)
    difference = np.abs(ours[:, : some.shape[2]].numpy() - np.stack(theirs, axis=-1)[first, second]).max()
    name = f"correlation, all {len(first)} pairs, {' x '.join(map(str, x.shape))}"
    baseline_name = "`np.corrcoef` per unit" + (f", 1/{share}" if share > 1 else "")
    return row(name, baseline_name, (ours_s, theirs_s * scale), 4, f"{difference:.0e} in r")


def _sklearn_pca(x: np.ndarray, components: int) -> SklearnPCA:
    return SklearnPCA(n_components=components, svd_solver="full").fit(x)


def pca(rows: int, units: int, components: int, repeats: int) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1, units + 1).pow(-0.5)  # eigenvalues fall as 1 / k
    mixed = torch.linalg.qr(torch.randn(units, units, generator=generator)).Q
    x = (torch.randn(rows, units, generator=generator) * scale) @ mixed + torch.linspace(-3, 3, units)
    out = []
    expected = None  # sklearn's in float64: in float32 it is itself 1e-6 off
    for data, precision in ((x.double(), "float64"), (x, "float32")):
        works = partial(PCA.fit, data, components), partial(_sklearn_pca, data.numpy(), components)
        seconds, (ours, theirs) = best_of(repeats, *works)
        if expected is None:
            expected = theirs.explained_variance_ * (rows - 1) / rows
        difference = np.abs(ours.variance.numpy() / expected - 1).max()
        name = f"PCA, {components} components, {rows} x {units}, {precision}"
        out.append(row(name, 'sklearn `PCA(svd_solver="full")`', seconds, 4, f"{difference:.0e} of an eigenvalue"))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Correlation and PCA on one core against their peers.")
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--sublayers", type=int, default=64)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--share", type=int, default=16, help="np.corrcoef runs on one unit of so many")
    parser.add_argument("--pca-rows", type=int, default=16_000)
    parser.add_argument("--pca-units", type=int, default=1024)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    with threadpool_limits(1):
        x = stream(args.sequences, args.sublayers, args.units)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        correlation(x, "all")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        rows = [consecutive(x, args.repeats), all_pairs(x, args.repeats, args.share)]
        del x
        rows += pca(args.pca_rows, args.pca_units, args.components, args.repeats)
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for r in rows:
        print("| " + " | ".join(r.values()) + " |")
    mib = grown / (2**20 if sys.platform == "darwin" else 2**10)
    versions = f"torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}"
    print(f"\nThe correlation of all pairs took {mib:.0f} MiB beside the stream. One thread, {versions}.")


if __name__ == "__main__":
    main()
