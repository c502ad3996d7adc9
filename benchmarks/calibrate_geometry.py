"""How often each p of curvature, straightness, phases and dimensions is below .05 on data that obey its null model.

python benchmarks/calibrate_geometry.py                  some minutes on one core
python benchmarks/calibrate_geometry.py --sets 200       a small version; tests/dynamics has smaller ones

Paths: 20 sequences, 13 sublayers, 64 units, steps that grow 30 x. Curves: 30 layers, 4 curves that move together.
States for dimensions: 200 sequences, 6 sublayers, 64 units whose variances fall as 1 / i, as those of real streams do.
The last rows are data that disobey: what is rejected there is power, or a null model that is too weak.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import table
from torch import Tensor

from rsdyn.dynamics.dimension import against_mixed, of_mixed
from rsdyn.dynamics.phases import phases
from rsdyn.dynamics.step_nulls import STEP_NULLS, StepNull, curvature_test, step_products, straightness_test

N, S, D = 20, 13, 64
SIZES = torch.logspace(0, 1.5, S - 1)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def path(steps: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(steps), 1, steps.shape[-1]), steps.cumsum(1)], 1)


def walk(g: torch.Generator) -> Tensor:
    """Independent steps."""
    return path(normal(g, N, S - 1, D) * SIZES[:, None])


def rotation(g: torch.Generator) -> Tensor:
    """Uniform over all; the Q of a QR decomposition alone is not, and two of them share a direction."""
    q, r = torch.linalg.qr(normal(g, D, D))
    return q * r.diagonal().sign()


def turned(g: torch.Generator) -> Tensor:
    """Steps that sequences largely share, each sublayer's turned by a rotation of its own."""
    steps = normal(g, N, S - 1, D) * torch.linspace(3, 0.1, D) + 3 * normal(g, 1, 1, D)
    for s in range(S - 1):
        steps[:, s] = steps[:, s] @ rotation(g)
    return path(steps * SIZES[:, None])


def exchangeable(g: torch.Generator) -> Tensor:
    """Steps that share a direction over depth, in no order."""
    along = normal(g, 1, S - 1, 1).abs() * normal(g, 1, 1, D)
    return path(normal(g, N, S - 1, D) + normal(g, N, 1, D) + along)


def bending(g: torch.Generator) -> Tensor:
    """Steps of which each goes on a tenth as the one before it."""
    steps = normal(g, N, S - 1, D)
    for s in range(1, S - 1):
        steps[:, s] += 0.1 * steps[:, s - 1]
    return path(steps)


def autoregressive(rate: float, drift: float) -> Callable[[torch.Generator], Tensor]:
    def make(g: torch.Generator) -> Tensor:
        shocks = normal(g, 49, 4) @ (0.5 * torch.eye(4) + 0.25)
        steps = torch.zeros_like(shocks)
        for t in range(1, len(shocks)):
            steps[t] = rate * steps[t - 1] + shocks[t]
        return (steps[20:] + drift).cumsum(0)

    return make


def three_phases(g: torch.Generator) -> Tensor:
    level = 3 * normal(g, 3, 4)
    parts = zip(level, (8, 12, 10), strict=True)
    return torch.cat([of.expand(n, -1) + 0.5 * normal(g, n, 4) for of, n in parts])


def of_curvature(null: StepNull) -> Callable[[Tensor, int], float]:
    return lambda x, seed: curvature_test(step_products(x), null, n=199, seed=seed).p


def of_straightness(null: StepNull) -> Callable[[Tensor, int], float]:
    return lambda x, seed: straightness_test(step_products(x), null).p


def normal_states(g: torch.Generator) -> Tensor:
    """A Gaussian walk over depth, in directions of unequal sizes."""
    return (normal(g, 200, 6, D) / torch.arange(1, D + 1).sqrt()).cumsum(1)


def heavy_tailed(g: torch.Generator) -> Tensor:
    """The same, each sequence by a length of its own: Student's t with 5 degrees of freedom."""
    return normal_states(g) / (normal(g, 5, 200, 1, 1).square().mean(0)).sqrt()


def of_topics(g: torch.Generator) -> Tensor:
    """The same, about twenty centres as far apart as states are."""
    topic = torch.randint(20, (200,), generator=g)
    return normal_states(g) + normal_states(g)[topic]


def of_dimension(column: int) -> Callable[[Tensor, int], float]:
    def p(x: Tensor, seed: int) -> float:
        found = torch.stack([of_mixed(x[:, s], seed=seed) for s in range(x.shape[1])]).mean(0)
        return against_mixed(found[:, column]).p

    return p


def share(make: Callable[[torch.Generator], Tensor], p: Callable[[Tensor, int], float], sets: int) -> str:
    generator = torch.Generator().manual_seed(1)
    below = sum(p(make(generator), seed) < 0.05 for seed in range(sets)) / sets
    return f"{100 * below:.1f} ± {100 * (max(below, 0.01) * (1 - below) / sets) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000, help="data sets of each row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"independent steps": walk, "turned per sublayer": turned, "in no order": exchangeable,
              "each goes on a tenth as the last": bending}  # fmt: skip
    rows = []
    for name, make in makers.items():
        row = [name]
        row += [share(make, of_curvature(null), args.sets) for null in STEP_NULLS]
        row += [share(make, of_straightness(null), args.sets) for null in STEP_NULLS[1:]]
        rows.append(row)
    columns = ["steps", *(f"curvature, {n}" for n in STEP_NULLS), *(f"straightness, {n}" for n in STEP_NULLS[1:])]
    print(f"p < .05 in % of {args.sets} data sets\n\n{table(columns, rows)}\n")
    curves = {"walk": autoregressive(0.0, 0.0), "steps with lag .5": autoregressive(0.5, 0.0),
              "lag -.5, on a ramp": autoregressive(-0.5, 0.3), "three phases": three_phases}  # fmt: skip
    sets = args.sets // 4
    rows = [[name, share(make, lambda x, seed: float(phases(x, n=399, seed=seed).p.min()), sets)]
            for name, make in curves.items()]  # fmt: skip
    print(f"any change point with p < .05, in % of {sets} data sets\n\n{table(['curves', 'phases'], rows)}\n")
    states = {"normal": normal_states, "heavy tails": heavy_tailed, "twenty topics": of_topics}
    rows = [[name, *(share(make, of_dimension(k), args.sets) for k in range(2))] for name, make in states.items()]
    print(f"p < .05 in % of {args.sets} data sets\n\n{table(['states', 'TwoNN', 'maximum likelihood'], rows)}")


if __name__ == "__main__":
    main()
