"""How far the largest unit of a state stands out: how often p is below .05 on normal states, and what intervals hold.

python benchmarks/calibrate_massive.py                  four minutes on one core
python benchmarks/calibrate_massive.py --sets 200       a small version; tests/analysis has a smaller one

States of 64 units at three sublayers, 300 tokens of 60 documents, in 20 groups as a run makes them. Normal states obey
the null model. For the intervals one unit is massive, its size differs between documents and between tokens, and the
population's value is that of 4,000 documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from rsdyn.dynamics.massive import beyond_normal, stands_out
from rsdyn.dynamics.resampling import Interval, group_of, jackknife

S, D = 3, 64
DOCUMENTS, TOKENS = 60, 5  # tokens of each
Make = Callable[[torch.Generator, int], Tensor]


def normal(g: torch.Generator, documents: int) -> Tensor:
    """Independent normal units, whose size differs between tokens."""
    n = documents * TOKENS
    return torch.randn(n, S, D, generator=g) * torch.randn(n, 1, 1, generator=g).exp()


def unequal(g: torch.Generator, documents: int) -> Tensor:
    """Normal units of sizes that differ by half a standard deviation of their logarithm."""
    sizes = (0.5 * torch.randn(D, generator=torch.Generator().manual_seed(0))).exp()
    return torch.randn(documents * TOKENS, S, D, generator=g) * sizes


def planted(g: torch.Generator, documents: int) -> Tensor:
    """One massive unit: its logarithm varies as much between documents as within them."""
    x = normal(g, documents)
    of_document = torch.randn(documents, 1, 1, generator=g).expand(-1, TOKENS, S).reshape(-1, S)
    x[..., 7] = (6 + 0.5 * of_document + 0.5 * torch.randn(len(x), S, generator=g)).exp() * x.abs().median(-1).values
    return x


def interval_of(x: Tensor) -> tuple[Interval, int]:
    """The mean log ratio ``(S,)`` with its interval over groups of documents, and how many groups there are."""
    document = torch.arange(len(x)) // TOKENS
    group, log_ratio = group_of(document), stands_out(x.abs()).log_ratio
    groups = int(group.max()) + 1
    without = torch.stack([log_ratio[group != k].mean(0) for k in range(groups)])
    return jackknife(log_ratio.mean(0), without), groups


def rejected(make: Make, sets: int) -> float:
    """The share of p below .05, over data sets and sublayers."""
    found = [beyond_normal(*interval_of(make(torch.Generator().manual_seed(k), DOCUMENTS)), D) for k in range(sets)]
    return float((torch.stack(found) < 0.05).double().mean())


def coverage(sets: int) -> float:
    """The share of intervals that hold the population's value, at the sublayer of the largest value as rows have it."""
    truth = stands_out(planted(torch.Generator().manual_seed(10**6), 4000).abs()).log_ratio.mean(0)
    held = 0
    for k in range(sets):
        found, _ = interval_of(planted(torch.Generator().manual_seed(k), DOCUMENTS))
        s = int(found.value.argmax())
        held += bool(found.low[s] <= truth[s] <= found.high[s])
    return held / sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000, help="data sets of each row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from timing import table  # beside this file, which tests load too

    makers = {"normal units": normal, "normal units of unequal sizes": unequal, "one massive unit": planted}
    rows = [[name, f"{100 * rejected(make, args.sets):.1f}"] for name, make in makers.items()]
    print(f"p < .05 in % of {args.sets} data sets of {S} sublayers\n\n{table(['states', 'p'], rows)}\n")
    print(f"intervals of the row that hold the population's value: {100 * coverage(args.sets):.1f} % of {args.sets}")


if __name__ == "__main__":
    main()
