"""How a measured value gets its interval, its variant without massive units and those without the largest units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rsdyn.analysis.results import Measured
from rsdyn.dynamics.moments import Moments, merge, merge_comoments
from rsdyn.dynamics.resampling import N_DRAWS, jackknife, simulate, simulated

if TYPE_CHECKING:
    from rsdyn.analysis.collected import Collected

State = TypeVar("State")


def without_each(parts: Sequence[State], together: Callable[[State, State], State]) -> list[State]:
    """The merged states of all groups but one, for each group: those before it and those behind it; [] for one."""
    if len(parts) < 2:
        return []
    before = list(accumulate(parts[:-1], together))  # of the first 1, 2, ... groups
    behind = list(accumulate(reversed(parts[1:]), together))[::-1]  # of all but the first 1, 2, ...
    middle = [together(some, others) for some, others in zip(before, behind[1:], strict=False)]
    return [behind[0], *middle, before[-1]]


def means_without_each(collected: Collected) -> list[Tensor]:
    """Mean trajectories ``(S, D)`` without each group of sequences."""
    return [m.mean for m in without_each(collected.groups, merge_comoments)]


def with_interval(value: Tensor, without: Sequence[Tensor]) -> Measured:
    """A value that is smooth in the samples, with its interval and what it is without each group."""
    if len(without) < 2:
        return Measured(value)
    groups = torch.stack(list(without))
    found = jackknife(value, groups)
    return Measured(value, interval=torch.stack([found.low, found.high]), groups=groups)


def of_means(of: Callable[[Tensor], Tensor], mean: Tensor, without: Sequence[Tensor], n: int = N_DRAWS) -> Measured:
    """What jumps as the mean trajectories ``mean`` move, such as a count, with its interval by simulation.

    ``of`` takes ``(..., S, D)``.
    """
    value = of(mean)
    if len(without) < 2:
        return Measured(value)
    drawn = simulate(of, mean, torch.stack(list(without)), n=n)
    found = simulated(value, drawn)
    return Measured(value, interval=torch.stack([found.low, found.high]), draws=drawn)


def left_out(collected: Collected, of: Callable[[Tensor], Tensor]) -> Tensor:
    """``of`` a mask of units, without each number of the largest ones: ``(C, ...)``."""
    largest = collected.known_largest
    masks = [largest.without(count, ~collected.unusable) for count in largest.counts]
    return torch.stack([of(units) for units in masks])


def mean_over_sequences(collected: Collected, name: str) -> Measured:
    """The mean over trajectories of one of the curves that were collected for each, with its spread."""

    def of_groups(groups: Sequence[Moments], rest: Measured | None, without_largest: Tensor | None) -> Measured:
        total = reduce(merge, groups)
        measured = with_interval(total.mean, [m.mean for m in without_each(groups, merge)])
        return Measured(
            measured.value, measured.interval, measured.groups,
            std=total.std, left_out=without_largest, without_massive=rest,
        )  # fmt: skip

    few = collected.curves_without_massive.get(name)
    rest = None if few is None else of_groups(few, None, None)
    return of_groups(collected.curves[name], rest, collected.curves_left_out.get(name))
