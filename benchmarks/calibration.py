"""How often each null model of rotations rejects units that turn by chance: calibration at 5 %.

    python benchmarks/calibration.py [--sets 200] [--units 160] [--surrogates 199] [--out calibration.json]

Data sets of walks with the real step sizes of SmolLM2-135M-Instruct (``smollm2_steps.json``: RMS over units of each of
59 steps), each unit at a scale of its own. Steps are normal or Student's t with 3 degrees of freedom; independent
between units, or with a factor that all share for a correlation of .5 or .9; autoregressive over depth, with a
correlation of 0, -.115 (SmolLM2's own), -.3 or .3 between successive steps. Printed are the share of data sets whose
mean |R| over units (or mean regularity) has p <= .05, and the share of units that have. What is done is kept in
``--out``, and a second start resumes there.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from rsdyn.dynamics.rotation_test import NULLS, regularity_test, rotation_test

SIZES = np.array(json.loads((Path(__file__).parent / "smollm2_steps.json").read_text())["step_rms"])
TAILS, CORRELATIONS, LAGS = ("normal", "t3"), (0.0, 0.5, 0.9), (0.0, -0.115, -0.3, 0.3)
LEVEL = 0.05
# the null that claims rest on, of units and of all units; the one for units whose steps are independent over depth; and
# the rest of the ladder, which is shown
LADDER = tuple(null for null in NULLS if not null.startswith("layer_shuffle"))


def walks(seed: int, units: int, tail: str = "normal", correlation: float = 0.0, lag: float = 0.0) -> Tensor:
    """Trajectories ``(60, units)`` float64 that start at 0, whose steps obey a linear process of SmolLM2's sizes."""
    rng = np.random.default_rng(seed)

    def noise(width: int) -> np.ndarray:
        shape = (len(SIZES) + 20, width)
        return rng.standard_normal(shape) if tail == "normal" else rng.standard_t(3, shape) / math.sqrt(3)

    steps = math.sqrt(1 - correlation) * noise(units) + math.sqrt(correlation) * noise(1)
    steps = lfilter([1.0], [1.0, -lag], steps, axis=0)[-len(SIZES) :] * SIZES[:, None]
    steps *= np.exp(rng.standard_normal(units))
    return torch.from_numpy(np.concatenate([np.zeros((1, units)), steps.cumsum(0)]))


def rejected(null: str, a: Tensor, n: int, seed: int, statistic: str = "turns") -> tuple[float, float]:
    """Whether the population has p up to 5 %, 1 or 0, and the share of units that have; surrogates are shared."""
    test = rotation_test if statistic == "turns" else regularity_test
    found = test(a, null, n, seed, shared=True)
    return float(found.population_p <= LEVEL), float((found.p <= LEVEL).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--ladder-sets", type=int, default=40, help="data sets for nulls that are shown, not used")
    parser.add_argument("--units", type=int, default=160)
    parser.add_argument("--surrogates", type=int, default=199)
    parser.add_argument("--out", type=Path, default=Path("calibration.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, list[tuple[float, float]]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    columns = [(null, "turns", args.sets if null == LADDER[0] else args.ladder_sets) for null in LADDER]
    columns += [(null, "regularity", args.ladder_sets) for null in LADDER[:2]]
    grid = list(product(CORRELATIONS, LAGS, TAILS))
    for null, statistic, sets in columns:
        for correlation, lag, tail in grid:
            found = done.setdefault(f"{null} {statistic} {correlation} {lag} {tail}", [])
            while len(found) < sets:
                a = walks(len(found), args.units, tail, correlation, lag)
                found.append(rejected(null, a, args.surrogates, len(found), statistic))
            args.out.write_text(json.dumps(done))
    print(f"% rejected at 5 %, {args.units} units, {args.surrogates} surrogates; in brackets the Monte Carlo error\n")
    for which, title in ((0, "All units together"), (1, "Single units")):
        print(f"{title}:\n")
        print("| units correlated | lag 1 | steps | " + " | ".join(f"{n}, {s}" for n, s, _ in columns) + " |")
        print("|" + " --- |" * (3 + len(columns)))
        for correlation, lag, tail in grid:
            cells = []
            for null, statistic, _ in columns:
                shares = 100 * np.array(done[f"{null} {statistic} {correlation} {lag} {tail}"])[:, which]
                cells.append(f"{shares.mean():.1f} ({shares.std(ddof=1) / math.sqrt(len(shares)):.1f})")
            print(f"| {correlation:g} | {lag:g} | {tail} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
