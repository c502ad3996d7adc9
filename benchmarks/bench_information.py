"""What mutual information costs on one core, beside scipy and scikit-learn in the same run.

    python benchmarks/bench_information.py [--units 32] [--samples 1000] [--sublayers 64] [--repeats 7]

Ours is timed on a random walk over the sublayers, (samples, sublayers, units), in the cache's bfloat16; the baselines
on one pair of sublayers of one unit. Baselines and ours take turns, and the medians go into a table in Markdown. Times
are the processor's, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import gaussian_kde
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from rsdyn.dynamics import kernel_density as density
from rsdyn.dynamics.information import consecutive_information

GOALS = {"kde": 400.0, "kde_resub": 6.0, "ksg": 2.5, "copula": 200.0}
Grid = tuple[np.ndarray, tuple[np.ndarray, np.ndarray], float]


def scipy_joint(pair: np.ndarray) -> Grid:
    axes = tuple(np.linspace(row.min(), row.max(), 100) for row in pair)
    points = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")])
    joint = gaussian_kde(pair)(points).reshape(100, 100)
    return joint, (axes[0], axes[1]), float(np.prod([a[1] - a[0] for a in axes]))


def scipy_grid(pair: np.ndarray) -> float:
    joint, _, cell = scipy_joint(pair)
    mass = joint * cell
    return float(rel_entr(mass, mass.sum(1, keepdims=True) * mass.sum(0)).sum())


def scipy_paper(pair: np.ndarray) -> float:
    joint, axes, _ = scipy_joint(pair)
    x, y = (gaussian_kde(row)(axis) for row, axis in zip(pair, axes, strict=True))
    return float((joint * np.log((joint + 1e-10) / (x[:, None] * y + 1e-10))).sum())


def scipy_resubstitution(pair: np.ndarray) -> float:
    x, y = (gaussian_kde(row)(row) for row in pair)
    return float(np.log(gaussian_kde(pair)(pair) / (x * y)).mean())


def sklearn_ksg(pair: np.ndarray) -> float:
    return float(mutual_info_regression(pair[0][:, None], pair[1], n_neighbors=3, random_state=0)[0])


def power_and_product(trajectories: Tensor) -> Callable[[], None]:
    """What `kde` cannot do without: a power of 2 for every kernel and the products, on the grids that it chooses."""
    rows = trajectories.permute(2, 1, 0).double()
    data = density.pairs(rows)
    bandwidth = rows.shape[-1] ** (-1 / 6)
    axes = [density._Axis.of(data.z, bandwidth), density._Axis.of(data.rest, bandwidth)]
    transitions = list(range(rows.shape[1] - 1))
    shapes = [
        (2, len(some), count, rows.shape[-1])
        for unit in range(rows.shape[0])
        for count, chosen in density._by_count(axes, unit, transitions)
        for some in chosen.split(max(1, density._cells(rows.device) // (2 * count * rows.shape[-1])))
    ]
    flat = -62 * torch.rand(max(torch.Size(shape).numel() for shape in shapes))
    kernels = torch.empty_like(flat)

    def floor() -> None:
        for shape in shapes:
            size = torch.Size(shape).numel()
            torch.exp2(flat[:size], out=kernels[:size])
            kernel = kernels[:size].view(shape)
            torch.bmm(kernel[0], kernel[1].mT)

    return floor


def timed(work: Callable[..., object], *args: object) -> float:
    start = time.process_time()
    work(*args)
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=32, help="units for kde and copula; the slower ones take 2")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sublayers", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    noise = torch.randn(args.samples, args.sublayers, args.units, generator=torch.Generator().manual_seed(0))
    stream = noise.cumsum(1).bfloat16()
    pair = stream[:, -2:, 0].T.double().numpy()
    few = stream[:, -4:, :2]

    plan: dict[str, tuple[str, Callable[[np.ndarray], float], Tensor]] = {
        "kde": ("scipy gaussian_kde, 100 × 100", scipy_grid, stream),
        "kde_resub": ("scipy gaussian_kde at the samples", scipy_resubstitution, few),
        "ksg": ("scikit-learn mutual_info_regression", sklearn_ksg, few),
        "copula": ("scikit-learn mutual_info_regression", sklearn_ksg, stream),
        "paper_literal": ("scipy gaussian_kde, 100 × 100", scipy_paper, few),
    }
    floor = power_and_product(stream)
    baseline: dict[str, list[float]] = {name: [] for name in plan}
    ours: dict[str, list[float]] = {name: [] for name in plan}
    floors: list[float] = []
    for turn in range(args.repeats + 1):
        for name, (_, reference, data) in plan.items():
            n_pairs = (data.shape[1] - 1) * data.shape[2]
            times = timed(reference, pair), timed(consecutive_information, data, name) / n_pairs
            if turn > 0:  # the first turn warms up
                baseline[name].append(times[0])
                ours[name].append(times[1])
                if name == "kde":
                    floors.append(timed(floor) / n_pairs)

    print(f"N = {args.samples}, {args.sublayers} sublayers, {args.units} units, one thread, {args.repeats} turns\n")
    print("| measure | baseline | ours, ms per pair | baseline, ms per pair | ratio | goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (label, _, _) in plan.items():
        mine, theirs = statistics.median(ours[name]), statistics.median(baseline[name])
        goal = f"{GOALS[name]:g} ×" if name in GOALS else "none"
        print(f"| {name} | {label} | {mine:.3f} | {theirs:.1f} | {theirs / mine:.4g} × | {goal} |")
    lowest = statistics.median(floors)
    share = statistics.median(f / o for f, o in zip(floors, ours["kde"], strict=True))
    print(f"\nPowers of 2 and matrix products of `kde` alone: {lowest:.3f} ms per pair, {share:.0%} of what it takes.")


if __name__ == "__main__":
    main()
