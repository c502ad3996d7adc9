"""All measures of one stream, in the order in which an analysis takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import How
from rsdyn.analysis.measures import OF_STREAM, measure_of
from rsdyn.analysis.results import ConditionResults, Counts, Flags
from rsdyn.dynamics.moments import Moments, few_levels


def measure_stream(
    collected: Collected, how: How, dtype: torch.dtype, done: Callable[[str], object] = lambda measure: None
) -> ConditionResults:
    """What was asked for of a stream that was stored in ``dtype``; ``done`` is told of each measure that is ready."""
    if not collected.n_passes:
        return ConditionResults(counts(collected), _nothing_known())
    found: dict[str, Any] = {}
    for name in OF_STREAM:
        if name in how.settings.measures:
            found[name] = measure_of(name).measure(collected, how)
            done(name)
    return ConditionResults(counts(collected), flags(collected, dtype), **found)


def counts(collected: Collected) -> Counts:
    """How many trajectories were measured, and how many of them are BOS and sinks (``rsdyn.stream.text.positions``)."""
    groups, was_read = collected.sequence_groups, collected.n_passes > 0
    return Counts(
        trajectories=collected.n_trajectories if was_read else 0,
        bos=collected.n_bos if was_read else 0,
        sinks=collected.n_sinks if was_read else 0,
        groups=len(collected.groups) if was_read else collected.n_groups,
        intervals_over="sequences" if groups is None else groups.counted(),
        intervals_note="" if groups is None else groups.too_few,
    )


def flags(collected: Collected, dtype: torch.dtype) -> Flags:
    """Units that a reader must know of: massive, unusable (NaN), constant, frozen by rounding, with few levels."""
    total, largest = collected.total, collected.known_largest
    return Flags(
        largest_units=largest.order,
        largest_ratios=largest.ratios[largest.order],
        left_out_counts=torch.tensor(largest.counts),
        massive_units=collected.massive.nonzero().flatten(),
        massive_ratios=largest.ratios[collected.massive],
        unusable_units=collected.unusable.nonzero().flatten(),
        constant=collected.constant.sum(1),
        constant_units=collected.constant.all(0).nonzero().flatten(),
        few_levels=few_levels(Moments(total.n, total.mean, total.m2), dtype).sum(1),
        frozen_steps=collected.frozen.mean(1),
        frozen_units=(collected.frozen.mean(0) > 0.5).nonzero().flatten(),
    )


def _nothing_known() -> Flags:
    """Of a stream that was not recorded."""
    none = {f.name: torch.empty(0, dtype=torch.int64) for f in fields(Flags)}
    return Flags(**none | dict.fromkeys(("largest_ratios", "massive_ratios", "frozen_steps"), torch.empty(0)))
