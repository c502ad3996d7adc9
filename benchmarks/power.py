"""Which statistic sees which orbit: power of turns and of regularity, per unit, on sinusoids planted in a walk.

    python benchmarks/power.py [--units 200] [--surrogates 199] [--out power.json]

Steps are independent and normal, with SmolLM2's step sizes (``smollm2_steps.json``); each unit's has a sinusoid of its
own phase added, of a period of 4 to 32 sublayers and an amplitude in standard deviations of a step, before the sizes.
Printed are the mean |R|, and per statistic and null the share of units with p <= .05 (chance: 5 %), and p of all units
together.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from calibration import SIZES
from torch import Tensor

from rsdyn.dynamics.rotation_test import regularity_test, rotation_test

PERIODS, AMPLITUDES = (4, 5, 6, 7, 8, 10, 12, 16, 24, 32), (0.5, 1.0, 2.0, 4.0)
COLUMNS = tuple(product(("turns", "regularity"), ("increment_shuffle_scaled", "innovation_shuffle")))


def orbits(seed: int, units: int, period: float, amplitude: float) -> Tensor:
    """Walks ``(60, units)`` float64 of SmolLM2's step sizes, with a sinusoid in each unit's steps."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, units)
    wave = np.cos(2 * np.pi / period * np.arange(len(SIZES))[:, None] + phase)
    steps = (rng.standard_normal((len(SIZES), units)) + amplitude * wave) * SIZES[:, None]
    return torch.from_numpy(np.concatenate([np.zeros((1, units)), steps.cumsum(0)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--surrogates", type=int, default=199)
    parser.add_argument("--out", type=Path, default=Path("power.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, list[float]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    print("| period | amplitude | turns | " + " | ".join(f"{s}, {n}" for s, n in COLUMNS) + " |")
    print("|" + " --- |" * (3 + len(COLUMNS)))
    for period, amplitude in product(PERIODS, AMPLITUDES):
        a = orbits(period, args.units, period, amplitude)
        cells = []
        for statistic, null in COLUMNS:
            key = f"{statistic} {null} {period} {amplitude}"
            if key not in done:
                test = rotation_test if statistic == "turns" else regularity_test
                found = test(a, null, args.surrogates, shared=True)
                turned = float(found.population_observed[0])
                done[key] = [float((found.p <= 0.05).double().mean()), found.population_p, turned]
                args.out.write_text(json.dumps(done))
            cells.append(f"{100 * done[key][0]:.0f} ({done[key][1]:.3f})")
        turned = done[f"turns {COLUMNS[0][1]} {period} {amplitude}"][2]
        print(f"| {period} | {amplitude:g} | {turned:.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
