"""How alike two models move over depth on the same texts: dynamical similarity of their layers' states (METHOD 14).

Nothing is recorded: each run keeps its first sequences' states in a few components, and two of them are compared on
those whose text is the same. A small distance says little by itself, since every running sum moves by little more than
the identity: it is held against the same steps in another order, and a large one against two halves of one model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from rsdyn.analysis.measures.dsa import SPLITS
from rsdyn.analysis.model_similarity import LEAST_SHARED, shared_texts
from rsdyn.analysis.results import DepthStates
from rsdyn.dynamics.dynamical_similarity import dsa, dsa_at_least, halves, linear_step, rank_of, steps_shuffled

SHUFFLES = 199  # of each model's steps: the least p is .005
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class ModelDynamics:
    """Dynamical distance between two models, or a model and an untrained one; all distances in radians.

    Attributes:
        labels: theirs.
        n: how many sequences both have.
        n_layers: the number of layers of each.
        distance: what the optimiser ends at, which is at least the true one.
        at_least: what no rotation can go below.
        floor: the largest distance between two halves of the sequences of either model.
        shuffled: ``(2, n)`` what no rotation can go below where the steps of the second, and of the first, come in
            another order.
        p: how often a distance from shuffled steps is as small, by what no rotation can go below on both sides; the
            larger one of the two models'.
    """

    labels: tuple[str, str]
    n: int
    n_layers: tuple[int, int]
    distance: float
    at_least: float
    floor: float
    shuffled: Tensor
    p: float

    @property
    def told_apart(self) -> bool | None:
        """Whether the two differ by more than halves of one model; None where the optimiser leaves it open."""
        if self.at_least > self.floor:
            return True
        return False if self.distance <= self.floor else None

    @property
    def order_shared(self) -> bool:
        """Whether they are nearer to each other than to the same steps in another order."""
        return self.p <= ALPHA


class _Known:
    """A model's states, and what is made of them: once for every set of sequences that is asked for."""

    def __init__(self, kept: DepthStates, seed: int) -> None:
        self.kept, self.seed = kept, seed
        self.made: dict[tuple[str, bytes], Tensor] = {}

    def step(self, rows: Tensor) -> Tensor:
        return self._once("step", rows, linear_step)

    def shuffled(self, rows: Tensor) -> Tensor:
        """Steps ``(n, K, K)`` of the paths whose steps are shuffled."""
        return self._once(
            "shuffled",
            rows,
            lambda x: torch.stack([linear_step(y) for y in steps_shuffled(x, SHUFFLES, seed=self.seed)]),
        )

    def floor(self, rows: Tensor) -> float:
        def largest(x: Tensor) -> Tensor:
            cuts = halves(self.kept.group[rows], SPLITS, seed=self.seed)
            return torch.tensor([dsa(linear_step(x[h]), linear_step(x[~h]), seed=self.seed) for h in cuts]).amax()

        return float(self._once("floor", rows, largest))

    def _once(self, what: str, rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        key = (what, rows.numpy().tobytes())
        if key not in self.made:
            self.made[key] = make(self.kept.states[rows])
        return self.made[key]


def dynamics_between(known: Mapping[str, DepthStates], *, seed: int = 0) -> tuple[list[ModelDynamics], list[str]]:
    """The dynamical distance of every pair on the sequences that both have; of other pairs, in words, why none."""
    if len(known) > 1 and find_spec("DSA") is None:
        return [], ["the package dsa-metric is not installed: pip install dsa-metric, and run the same command again"]
    missing = []
    usable = {}
    for label, kept in known.items():
        if (rank := rank_of(kept.states)) == kept.states.shape[2]:
            usable[label] = _Known(kept, seed)
        else:
            why = f"fill {rank} of {kept.states.shape[2]} dimensions" if rank else "are one and the same behind a layer"
            missing.append(f"{label}: the states of its sequences {why}")
    found = []
    for (one, a), (other, b) in itertools.combinations(usable.items(), 2):
        rows, others = shared_texts(a.kept.texts, b.kept.texts)
        sizes = a.kept.states.shape[2], b.kept.states.shape[2]
        if sizes[0] != sizes[1]:
            missing.append(f"{one} and {other}: {sizes[0]} components of one and {sizes[1]} of the other are kept")
        elif len(rows) < LEAST_SHARED:
            missing.append(
                f"{one} and {other}: {len(rows)} of their sequences are of the same text, and {LEAST_SHARED} are needed"
            )
        else:
            found.append(_between((one, other), a, b, rows, others, seed))
    return found, missing


def _between(labels: tuple[str, str], a: _Known, b: _Known, rows: Tensor, others: Tensor, seed: int) -> ModelDynamics:
    one, other = a.step(rows), b.step(others)
    least = dsa_at_least(one, other)
    shuffled = torch.stack([dsa_at_least(one, b.shuffled(others)), dsa_at_least(a.shuffled(rows), other)])
    as_small = (shuffled <= least).sum(1)
    return ModelDynamics(
        labels=labels,
        n=len(rows),
        n_layers=(a.kept.states.shape[1] + 1, b.kept.states.shape[1] + 1),
        distance=dsa(one, other, seed=seed),
        at_least=float(least),
        floor=max(a.floor(rows), b.floor(others)),
        shuffled=shuffled,
        p=float((1 + as_small).amax()) / (1 + SHUFFLES),
    )
