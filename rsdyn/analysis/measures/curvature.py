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
    products = _products(collected, usable)
    scale = step_sizes(products)
    few = _products(collected, usable & ~collected.massive) if collected.massive.any() else None
    left_out = _left_out(collected, usable)

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


def _left_out(collected: Collected, usable: Tensor) -> list[StepProducts]:
    """Without each number of the largest units, in the order of ``collected.largest.counts``."""
    largest = collected.largest
    assert largest is not None
    order = largest.order[usable[largest.order]]
    found = {}
    rest = usable.clone()
    rest[order] = False
    total, before = _products(collected, rest), len(order)
    for count in sorted(largest.counts, reverse=True):
        some = torch.zeros_like(usable)
        some[order[count:before]] = True
        if some.any():
            total = total + _products(collected, some)
        found[count], before = total, min(before, count)
    return [found[count] for count in largest.counts]


MEASURE = Measure(
    lambda collected, how: curvature(collected, sites_per_layer=how.sites_per_layer, seed=how.seed), keeps_samples=True
)
