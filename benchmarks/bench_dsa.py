"""What the dynamical distances of a comparison rest on: time, random starts, delays, nulls.

    python benchmarks/bench_dsa.py runs/<time>-compare-.../models/*

Takes finished analyses with ``dsa`` among their measures. Prints the seconds per distance; how far distances spread
over random starts; what a second delay predicts; what permuted depth refuses beside steps in another order; and how
often random walks are called nearer than their steps in another order, which should be 5 %.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from rsdyn.analysis.model_dynamics import dynamics_between
from rsdyn.dynamics.dynamical_similarity import (
    _optimised,
    at_unit_size,
    dsa,
    dsa_at_least,
    linear_step,
    steps_shuffled,
)
from rsdyn.report.compared import read_model

STARTS, ORDERS, WALKS = 5, 199, 200


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    known = {}
    for model in (read_model(folder) for folder in folders if Path(folder).is_dir()):
        for condition, kept in model.states.items():
            name = model.label if condition == model.conditions[0] else f"{model.label}-{condition}"
            # checkpoints of one training have one twin
            if not any(torch.equal(kept.states, other.states) for other in known.values()):
                known[name] = kept
    cpu, wall = time.process_time(), time.perf_counter()
    found, missing = dynamics_between(known)
    print(f"{len(known)} streams, {len(found)} pairs: {time.process_time() - cpu:.1f} s of CPU, "
          f"{time.perf_counter() - wall:.1f} s; not compared: {missing or 'none'}")  # fmt: skip
    states = {label: kept.states.to(torch.float64) for label, kept in known.items()}
    starts(states)
    delays(states)
    orders(states)
    walks()


def starts(states: dict[str, Tensor]) -> None:
    """Spread over random starts, as it comes and with signs aligned, and what 1500 iterations at .005 add."""
    steps = {label: linear_step(x) for label, x in states.items()}
    pairs = list(itertools.combinations(steps.values(), 2))
    cpu = time.process_time()
    mine = torch.tensor([[dsa(a, b, seed=seed) for seed in range(STARTS)] for a, b in pairs])
    each = (time.process_time() - cpu) / mine.numel()
    alone = torch.tensor([[_optimised(a, b, seed, 100, 0.02) for seed in range(STARTS)] for a, b in pairs])
    print(f"a distance takes {each:.3f} s of CPU")
    for name, of in (("one start as it comes", alone), ("the smaller of two starts", mine)):
        spread = of.amax(1) - of.amin(1)
        print(f"{name}: {STARTS} seeds spread by {spread.mean():.4f} in the mean, {spread.amax():.4f} at most")
    least = torch.minimum(mine.amin(1), alone.amin(1))
    above = mine[:, 0] - torch.tensor([float(dsa_at_least(a, b)) for a, b in pairs])
    print(f"above the least of all {2 * STARTS}: {(mine[:, 0] - least).amax():.4f} at most")
    print(f"above the bound: {above.median():.4f} in the median, {above.amax():.4f} at most")
    some = pairs[:: max(1, len(pairs) // 10)][:10]
    long = [dsa(a, b, iterations=1500, rate=0.005) for a, b in some]
    short = [dsa(a, b) for a, b in some]
    lower = max(s - x for s, x in zip(short, long, strict=True))
    print(f"1500 iterations at .005 on {len(some)} pairs end lower by {lower:.4f} at most")


def delays(states: dict[str, Tensor]) -> None:
    """Variance of the next state that one, two and three delays predict, of sequences left out of the fit."""
    for label, x in states.items():
        x = at_unit_size(x)
        told = []
        for n in (1, 2, 3):
            before = torch.cat([x[:, 2 - k : x.shape[1] - 1 - k] for k in range(n)], dim=-1)
            a, b = before[::2].flatten(0, 1), x[::2, 3:].flatten(0, 1)
            fitted = torch.linalg.lstsq(a, b).solution
            a, b = before[1::2].flatten(0, 1), x[1::2, 3:].flatten(0, 1)
            told.append(1 - float((b - a @ fitted).square().sum() / b.square().sum()))
        print(f"delays 1, 2, 3: {told[0]:.4f} {told[1]:.4f} {told[2]:.4f}  {label}")


def orders(states: dict[str, Tensor]) -> None:
    """How many pairs are nearer than depth permuted, and than steps in another order, p at most .05."""
    steps, permuted, shuffled = {}, {}, {}
    for label, x in states.items():
        generator = torch.Generator().manual_seed(0)
        steps[label] = linear_step(x)
        places = [torch.randperm(x.shape[1], generator=generator) for _ in range(ORDERS)]
        permuted[label] = torch.stack([linear_step(x[:, order]) for order in places])
        shuffled[label] = torch.stack([linear_step(y) for y in steps_shuffled(x, ORDERS)])
    kinds: dict[str, list[tuple[bool, bool]]] = {}
    for a, b in itertools.combinations(states, 2):
        n_twins = sum(label.endswith("-untrained") for label in (a, b))
        least = dsa_at_least(steps[a], steps[b])
        refused = []
        for null in (permuted, shuffled):
            as_small = [int((dsa_at_least(steps[x], null[y]) <= least).sum()) for x, y in ((a, b), (b, a))]
            refused.append((1 + max(as_small)) / (1 + ORDERS) <= 0.05)
        kinds.setdefault(("trained", "one untrained", "both untrained")[n_twins], []).append(tuple(refused))
    for kind, of in kinds.items():
        print(f"{kind}: of {len(of)} pairs {sum(x for x, _ in of)} nearer than depth permuted, "
              f"{sum(y for _, y in of)} nearer than steps in another order")  # fmt: skip


def walks() -> None:
    """The share of pairs of random walks, of five components and 14 growing steps, whose p is at most .05."""
    growth = torch.linspace(1, 6, 14, dtype=torch.float64)[:, None]
    one, both = 0, 0
    for k in range(WALKS):
        a, b = (
            (torch.randn(100, 14, 5, generator=torch.Generator().manual_seed(2 * k + i), dtype=torch.float64) * growth)
            .cumsum(1)
            for i in (0, 1)
        )  # fmt: skip
        mine, other = linear_step(a), linear_step(b)
        least, p = dsa_at_least(mine, other), []
        for fixed, x in ((mine, b), (other, a)):
            null = dsa_at_least(fixed, torch.stack([linear_step(y) for y in steps_shuffled(x, 99, seed=k)]))
            p.append((1 + int((null <= least).sum())) / 100)
        one, both = one + (p[0] <= 0.05), both + (max(p) <= 0.05)
    print(f"{WALKS} pairs of walks: {100 * one / WALKS:.1f} % against one model's orders, {100 * both / WALKS:.1f} % "
          "against both")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
