"""What the null models of rotations cost on one core, beside a naive loop in numpy in the same run.

    python benchmarks/bench_rotation.py [--units 1024] [--surrogates 1000] [--sublayers 64] [--repeats 5]

The naive loop takes one unit and one surrogate at a time through `np.gradient`, `np.arctan2` and `np.unwrap`; it runs
on one unit. Ours and the loop take turns, and the least CPU time of each counts, so that a busy machine slows both. The
working set is what the peak memory of a fresh process grows by during the test, with the data already there (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.dynamics.rotation import rotations, sequence_rotations
from rsdyn.dynamics.rotation_test import (
    NULLS,
    paired_swap_test,
    regularity_test,
    rotation_and_regularity_test,
    rotation_test,
)
from rsdyn.dynamics.surrogates import POOLED, _iaaft

SHARED, OWN = 80, 15  # the goals, for the paper's null


def literal(x: np.ndarray, y: np.ndarray) -> float:
    """The paper's formulas."""
    theta = np.unwrap(np.arctan2(np.diff(y), np.diff(x)))
    return float((theta[-1] - theta[0]) / (2 * np.pi))


def of_trajectory(a: np.ndarray) -> float:
    g = np.gradient(a)
    return literal(a - a[0], g - g[0])


def iaaft(steps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ordered, amplitude, found = np.sort(steps), np.abs(np.fft.rfft(steps)), rng.permutation(steps)
    for _ in range(10):  # as many as ours
        phase = np.angle(np.fft.rfft(found))
        ranked = ordered[np.argsort(np.argsort(np.fft.irfft(amplitude * np.exp(1j * phase), len(steps))))]
        if np.array_equal(ranked, found):
            break
        found = ranked
    return found


def naive(null: str, a: np.ndarray, n: int) -> list[float]:
    """``n`` surrogates of one unit ``a`` ``(S,)``, one after another."""
    rng, steps, found = np.random.default_rng(0), np.diff(a), []
    x, y = a - a[0], np.gradient(a) - np.gradient(a)[0]
    for _ in range(n):
        if null == "layer_shuffle":
            order = rng.permutation(len(a))
            found.append(literal(x[order], y[order]))
            continue
        if null == "layer_shuffle_regradient":
            found.append(of_trajectory(rng.permutation(a)))
            continue
        new = steps.copy()
        if null == "iaaft":
            new = iaaft(steps, rng)
        elif null == "sign_flip":
            for kind in (0, 1):
                centre = steps[kind::2].mean()
                new[kind::2] = centre + rng.choice([-1, 1], len(steps[kind::2])) * (steps[kind::2] - centre)
        else:
            width = 8 if null == "increment_shuffle_windowed" else len(steps)
            for start in range(0, len(steps), width):
                for kind in (0, 1):
                    places = np.arange(start + kind, min(start + width, len(steps)), 2)
                    new[places] = rng.permutation(steps[places])
        found.append(of_trajectory(np.concatenate([a[:1], a[0] + np.cumsum(new)])))
    return found


def iaaft_by_fft(steps: Tensor, starts: Tensor) -> None:
    """Ten iterations from orders ``starts`` ``(m, T)`` of one unit, by fast Fourier transforms and an argsort."""
    ordered, amplitude, found = steps.sort().values, torch.fft.rfft(steps).abs(), steps[starts]
    for _ in range(10):
        near = torch.fft.irfft(torch.sgn(torch.fft.rfft(found)) * amplitude, n=len(steps))
        order = torch.from_numpy(near.numpy().argsort(-1))
        found = torch.empty_like(found).scatter_(1, order, ordered.expand_as(found))


def naive_swaps(a: np.ndarray, b: np.ndarray, n: int) -> list[float]:
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        swap = rng.integers(0, 2, len(a)).astype(bool)[:, None]
        found.append(of_trajectory(np.where(swap, b, a).mean(0)) - of_trajectory(np.where(swap, a, b).mean(0)))
    return found


def least(repeats: int, *works: Callable[[], Any]) -> list[float]:
    """Least CPU seconds of each work; they take turns."""
    seconds = [float("inf")] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            start = time.process_time()
            work()
            seconds[i] = min(seconds[i], time.process_time() - start)
    return seconds


def walks(sublayers: int, units: int, sequences: int = 0) -> Tensor:
    shape = (sequences, sublayers, units) if sequences else (sublayers, units)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(-2).bfloat16()


def high_water() -> float:
    """Peak resident memory of this process in MiB; ru_maxrss will not do, since a child inherits its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def working_set(args: argparse.Namespace, null: str, shared: bool, results: Any) -> None:
    """How much the peak grows in this process, sent to ``results``."""
    torch.set_num_threads(1)
    several = walks(args.sublayers, args.units, args.sequences if null == "token_shuffled" else 2)
    other = several.flip(0)

    def test(units: int, n: int) -> None:
        if null == "token_shuffled":
            paired_swap_test(several[..., :units], other[..., :units], n)
        else:
            rotation_test(several[0, :, :units], null, n, shared=shared)

    test(2, 8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of making the data, is forgotten
    before = high_water()
    test(args.units, args.surrogates)
    results.put(high_water() - before)


def peak(args: argparse.Namespace, null: str, shared: bool) -> float:
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    process = context.Process(target=working_set, args=(args, null, shared, results))
    process.start()
    process.join()
    return float(results.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=1024, help="units of ours, 64 for iaaft")
    parser.add_argument("--sublayers", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=200, help="for token_shuffled and per-sequence rotations")
    parser.add_argument("--surrogates", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = args.surrogates
    stream = walks(args.sublayers, args.units)
    unit = stream[:, 0].double().numpy()
    several, other = (
        walks(args.sublayers, args.units, args.sequences),
        walks(args.sublayers, args.units, args.sequences),
    )
    other = other.flip(0)

    print(f"{n} surrogates, {args.sublayers} sublayers, {args.units} units, one thread, {args.repeats} alternations\n")
    print("| null | surrogates | naive, ms per unit | ours, µs per unit | ratio | goal | working set, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")

    def row(name: str, kind: str, seconds: list[float], units: int, goal: str, memory: str) -> None:
        theirs, mine = seconds[0], seconds[1] / units
        ratio = f"{theirs / mine:.0f} ×"
        print(f"| {name} | {kind} | {1e3 * theirs:.1f} | {1e6 * mine:.0f} | {ratio} | {goal} | {memory} |", flush=True)

    for null in (null for null in NULLS if null not in POOLED):  # which estimate over all units: no loop takes one
        few, repeats = (stream[:, :64], 1) if null == "iaaft" else (stream, args.repeats)
        ours = [lambda s=s: rotation_test(few, null, n, shared=s) for s in (True, False)]  # noqa: B023
        loop, *times = least(repeats, lambda: naive(null, unit, n), *ours)  # noqa: B023
        for kind, taken, goal in zip(("shared", "own"), times, (SHARED, OWN), strict=True):
            goals = f"{goal} ×" if null == "layer_shuffle" else "none"
            memory = f"{peak(args, null, kind == 'shared'):.0f}" if null != "iaaft" else "not run"
            row(null, kind, [loop, taken], few.shape[1], goals, memory)

    seconds = least(
        2,
        lambda: naive_swaps(several[..., 0].double().numpy(), other[..., 0].double().numpy(), n),
        lambda: paired_swap_test(several, other, n),
    )
    row(
        f"token_shuffled, N = {args.sequences}",
        "shared",
        seconds,
        args.units,
        "none",
        f"{peak(args, 'token_shuffled', True):.0f}",
    )

    loop, each, mean = least(
        args.repeats,
        lambda: [of_trajectory(a) for a in several[..., 0].double().numpy()],
        lambda: sequence_rotations(several),
        lambda: rotations(stream),
    )
    steps = stream.float().diff(dim=0).T.contiguous()[:8]
    starts = torch.rand(len(steps), 256, args.sublayers - 1, generator=torch.Generator().manual_seed(0)).argsort(-1)
    fast, ours = least(
        args.repeats,
        lambda: [iaaft_by_fft(*unit) for unit in zip(steps, starts, strict=True)],
        lambda: _iaaft(steps, starts),
    )
    print(
        f"\nIterations of IAAFT: `torch.fft` and argsort {1e5 * fast / starts[..., 0].numel():.2f} µs, ours "
        f"{1e5 * ours / starts[..., 0].numel():.2f} µs, {fast / ours:.1f} ×."
    )
    few, options = stream[:, :256], {"n": n, "shared": True, "of_all": stream}
    for null in POOLED:
        apart, once = least(
            args.repeats,
            lambda: (rotation_test(few, null, **options), regularity_test(few, null, **options)),  # noqa: B023
            lambda: rotation_and_regularity_test(few, null, **options),  # noqa: B023
        )
        print(
            f"\nTurns and regularity against {null}, 256 units: two tests {apart:.2f} s, both on the same surrogates "
            f"{once:.2f} s, {apart / once:.1f} ×."
        )

    per = args.sequences * args.units
    print(
        f"\nRotations of one trajectory: numpy {1e6 * loop / args.sequences:.1f} µs, `sequence_rotations` (bf16) "
        f"{1e6 * each / per:.3f} µs, `rotations` (float64) {1e6 * mean / args.units:.3f} µs."
    )


if __name__ == "__main__":
    main()
