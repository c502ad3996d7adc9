"""The findings: each claim of the paper, what it reports for Llama 3.1 8B, and what this run measured.

Nothing here says whether a claim holds: the numbers and their intervals do. METHOD sections 0 and 11. A row has one
``key``, set where its measure is, by which the table, the page, W&B and ``summary.json`` know it; nobody finds a row by
its words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.measure import Row
from rsdyn.analysis.measures import OF_STREAM, measure_of
from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured
from rsdyn.analysis.statistics import ends_of
from rsdyn.dynamics.resampling import Interval, jackknife, simulate, simulated


def findings(found: AnalysisResults) -> list[Finding]:
    """The rows for what was measured, in the order of the measures."""
    table: list[Finding] = []
    for name in _asked(found):
        for row in _rows_of(name, found):
            table += _finding(name, row, found)
        table += measure_of(name).more(found)
    return table


def rows(found: AnalysisResults) -> list[tuple[str, Row[Any]]]:
    """The rows of everything that was asked for that are a statistic of a curve, each with its measure."""
    return [(name, row) for name in _asked(found) for row in _rows_of(name, found)]


def _asked(found: AnalysisResults) -> list[str]:
    return [name for name in OF_STREAM if name in found.measures]


def _rows_of(name: str, found: AnalysisResults) -> list[Row[Any]]:
    return [row for row in measure_of(name).rows(found) if found.sites_per_layer == 2 or not row.both_sites]


def of_row(
    measure: str, row: Row[Any], found: AnalysisResults, part: Callable[[Measured], Measured | None] = lambda m: m
) -> dict[str, tuple[ConditionResults, Measured]]:
    """What a row is a statistic of, in each condition that has it; ``part`` takes a variant of it."""
    there = {}
    for condition, r in found.conditions.items():
        of = getattr(r, measure)
        curve = None if of is None else row.curve(of)
        some = None if curve is None else part(curve)
        if some is not None:
            there[condition] = (r, some)
    return there


def _finding(measure: str, row: Row[Any], found: AnalysisResults) -> list[Finding]:
    """A row and, where there are massive units, the row without them; none where nobody measured it."""
    there = of_row(measure, row, found)
    if not there:
        return []
    values = {c: measured(curve, row, r, found.n_units) for c, (r, curve) in there.items()}
    head = Finding(
        row.key, measure, row.claim, row.paper, row.statistic, values, row.under, row.detail, both_sites=row.both_sites
    )
    rest = of_row(measure, row, found, lambda curve: curve.without_massive)
    if not rest:
        return [head]
    words = f"{row.statistic}, without massive units" if row.under else "without massive units"
    few = {c: measured(curve, row, r, found.n_units) for c, (r, curve) in rest.items()}
    key = f"{row.key}_without_massive"
    under = row.under or row.key
    rest_row = replace(head, key=key, claim="", paper="", statistic=words, values=few, under=under, of_main=True)
    return [head, rest_row]


def measured(curve: Measured, row: Row[Any], r: ConditionResults, n_units: int) -> Value:
    """A row's statistic of a curve with its interval, the curve's ends, N, and why it is undefined."""
    n = r.counts.trajectories if curve.n is None else curve.n
    value = float(row.of(curve.value))
    seeds = () if curve.seeds is None else tuple(float(row.of(other)) for other in curve.seeds)
    shown = row.shown(curve.value) if row.shown is not None else None
    ends = ends_of(shown) if shown is not None and len(shown) else None
    if value != value:
        reason = row.why or why_undefined(curve.value, r, n_units, shown)
        return Value(value, ends=ends, n=n, seeds=seeds, reason=reason)
    interval, few = _interval(row, curve), r.counts.intervals_note
    if interval is None:
        alone = f" (no interval: {few})" if r.counts.groups == 1 and few else ""
        return Value(value, ends=ends, n=n, seeds=seeds, note=alone)
    note = f" ({few})" if few else ""
    return Value(value, float(interval.low), float(interval.high), ends, n, seeds, note=note)


def _interval(row: Row[Any], curve: Measured) -> Interval | None:
    """The 95 % interval: by the jackknife or, for ranks, shares and turns, which move in steps, by simulation."""
    value = row.of(curve.value)
    if curve.draws is not None:
        of_drawn = row.of(curve.draws) if row.ranked else torch.stack([row.of(c) for c in curve.draws])
        return simulated(value, of_drawn)
    if curve.groups is None:
        return None
    if row.ranked:
        return simulated(value, simulate(row.of, curve.value, curve.groups))
    return jackknife(value, torch.stack([row.of(g) for g in curve.groups]))


def why_undefined(curve: Tensor, r: ConditionResults, n_units: int, shown: Tensor | None = None) -> str:
    """Why a statistic of a curve is not a number, in words."""
    undefined = (~curve.isfinite()).nonzero().flatten().tolist() if curve.ndim == 1 else []
    if undefined and int(r.flags.constant[0]) == n_units:
        return "all sequences are one state at the first sublayer, since they end in the same token: nothing varies"
    if undefined:
        where = "the first transition" if undefined == [0] else f"{len(undefined)} of {len(curve)} places"
        return f"the curve itself is not defined at {where}"
    values = curve if shown is None else shown
    if values.ndim and len(values) < 3:
        return f"it needs at least 3 values over depth, and there are {len(values)}"
    return "the curve never moves" if values.ndim and bool((values == values[0]).all()) else "nothing was measured"
