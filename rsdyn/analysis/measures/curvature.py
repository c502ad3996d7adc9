"""The measure ``curvature``: how curved and how long trajectories are over depth, beside null models of their steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.over_sequences import mean_of, over_sequences
from rsdyn.analysis.results import Curvature, Measured, StepNull
from rsdyn.dynamics.step_nulls import (
    STEP_NULLS,
    StepProducts,
    StepTest,
    curvature_of,
    curvature_test,
    path_length_of,
    step_products,
    step_sizes,
    straightness_of,
    straightness_test,
)
from rsdyn.metrics.processes import from_all

LEAST_SUBLAYERS = 3


def curvature(collected: Collected, *, sites_per_layer: int, seed: int) -> Curvature:
    """Curvature, straightness and length of the trajectories that were kept, on every process."""
    share = collected.share
    assert share is not None
    group = collected.group_of(share.sequence)
    usable = ~collected.unusable
    counts = collected.known_largest.counts
    found = _without_largest(collected, usable)
    products, left_out = found[0], [found[count] for count in counts]
    scale = step_sizes(products)
    few = found[int(collected.known_largest.massive.sum())] if collected.massive.any() else None

    def measured(of: Callable[[StepProducts], Tensor], *, counted: bool = False) -> Measured:
        without = None if few is None else mean_of(of(few), group, n=len(group))
        by_count = torch.stack([of(p).nanmean(0) for p in left_out]) if counted else None
        return mean_of(of(products), group, without_massive=without, left_out=by_count, n=len(group))

    def scaled(p: StepProducts) -> Tensor:
        return straightness_of(p, scale if p is products else step_sizes(p))

    def nulls(p: StepProducts) -> dict[str, StepNull]:
        options = {"sites_per_layer": sites_per_layer, "seed": seed}
        return {null: _kept(curvature_test(p, null, **options)) for null in STEP_NULLS}

    over_tokens = None
    if collected.token_curvature:
        apart = over_sequences(collected.token_curvature_apart)
        over_tokens = replace(over_sequences(collected.token_curvature), without_massive=apart)
    straight = [null for null in STEP_NULLS if null != "shuffled_steps"]
    return Curvature(
        angle=measured(curvature_of),
        mean_angle=measured(lambda p: curvature_of(p).mean(1), counted=True),
        straightness=measured(straightness_of, counted=True),
        scaled_straightness=measured(scaled),
        length=measured(path_length_of),
        nulls=nulls(products),
        nulls_without_massive={} if few is None else nulls(few),
        straightness_nulls={null: _kept(straightness_test(products, null)) for null in straight},
        scaled_straightness_nulls={null: _kept(straightness_test(products, null, scale=scale)) for null in straight},
        over_tokens=over_tokens,
        by_position=None if collected.by_position is None else collected.by_position.curvature,
    )


def _kept(test: StepTest) -> StepNull:
    return StepNull(*test)


def _products(collected: Collected, units: Tensor) -> StepProducts:
    """Of some units of all processes; a sum over their shares."""
    share = collected.share
    assert share is not None
    own = units[share.first_unit : share.first_unit + share.x.shape[-1]]
    return reduce(add, from_all(step_products(share.x, None if own.all() else own), share.x.device))


def _without_largest(collected: Collected, usable: Tensor) -> dict[int, StepProducts]:
    """Without the largest units, by how many: none, each of ``collected.largest.counts``, and all massive ones.

    Sums over the units that always stay, to which those of the others are added from the smallest up.
    """
    largest = collected.known_largest
    counts = sorted({0, *largest.counts, int(largest.massive.sum())}, reverse=True)
    by_size = largest.by_size[: counts[0]]
    rest = usable.clone()
    rest[by_size] = False
    found, total = {}, _products(collected, rest)
    for count, before in zip(counts, [counts[0], *counts], strict=False):
        some = torch.zeros_like(usable)
        some[by_size[count:before]] = True
        some &= usable
        if some.any():
            total = total + _products(collected, some)
        found[count] = total
    return found


MEASURE = Measure(
    lambda collected, how: curvature(collected, sites_per_layer=how.sites_per_layer, seed=how.seed), keeps_samples=True
)
