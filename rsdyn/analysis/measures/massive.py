"""The largest activations by class of token, and where they are written (Sun et al. 2024, arXiv 2402.17762)."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.results import AnalysisResults, ByToken, MassiveActivations, Measured
from rsdyn.dynamics import massive as largest_of
from rsdyn.dynamics.resampling import jackknife
from rsdyn.metrics.running import TOKEN_CLASSES, Extremes

N_MASSIVE = 4  # units whose curves are told
CLAIM = "very few activations are far larger than the others of their state, at the first token and a few others"
PAPER = "arXiv 2402.17762, section 2: over 100, and at least or around 1,000 times the median"


def massive(collected: Collected) -> MassiveActivations:
    """The largest activations, the units they are of, where these are written, how far they stand out, norms.

    Classes are those of :data:`rsdyn.metrics.running.TOKEN_CLASSES`; a class without tokens is NaN.
    """
    assert collected.extremes is not None
    found = collected.extremes.compute()
    units = largest_of.largest_units(found.largest, found.typical, N_MASSIVE)
    curves = found.largest[..., units].movedim(-1, 1)  # (C, units, S)
    places = largest_of.written(curves.nan_to_num(nan=0.0))
    largest = found.largest.nan_to_num(nan=-1.0).max(-1)
    normal = largest_of.normal_states(collected.n_units)
    ratios = [_ratio(found, k, collected.n_units) for k in range(len(TOKEN_CLASSES))]
    return MassiveActivations(
        largest=found.largest.amax(-1),
        unit=largest.indices,
        typical=found.typical,
        counts=found.counts,
        top=units,
        curves=curves,
        onset=places.onset,
        before=places.before,
        after=places.after,
        unwritten=places.unwritten,
        ratio=ByToken(*(r.ratio for r in ratios)),
        massive=found.massive,
        normal_ratio=math.exp(normal.mean_log),
        normal_quantile=normal.quantile,
        normal_p=torch.stack([r.p for r in ratios]),
        norm_by_position=None if found.norms.isnan().all() else found.norms,
    )


class _Ratio(NamedTuple):
    ratio: Measured | None
    p: Tensor


def _ratio(found: Extremes, k: int, n_units: int) -> _Ratio:
    """How far the largest unit stands out in states of one class of tokens; groups without any do not count."""
    known = found.group_counts[k] > 0
    sums, counts = found.log_ratios[k][known], found.group_counts[k][known][:, None]
    undefined = torch.full(sums.shape[1:], torch.nan, dtype=torch.float64)
    if not len(sums):
        return _Ratio(None, undefined)
    mean, n = sums.sum(0) / counts.sum(), int(counts.sum())
    if len(sums) < 2:
        return _Ratio(Measured(mean.exp(), n=n), undefined)
    without = (sums.sum(0) - sums) / (counts.sum() - counts)
    interval = jackknife(mean, without)
    ends = torch.stack([interval.low, interval.high]).exp()
    p = largest_of.beyond_normal(interval, len(sums), n_units).to(mean.device)
    return _Ratio(Measured(mean.exp(), ends, without.exp(), n=n), p)


def rows(found: AnalysisResults) -> list[Finding]:
    """How far the largest activation of a state stands out, by class of token, where it does so most."""
    rows: list[Finding] = []
    results = {c: r.massive for c, r in found.conditions.items() if r.massive is not None}
    for k, (name, f) in enumerate(zip(TOKEN_CLASSES, fields(ByToken), strict=True)):
        known = {c: (r, ratio) for c, r in results.items() if (ratio := getattr(r.ratio, f.name)) is not None}
        if known:
            first, key = not rows, f"massive_{f.name}"
            rows.append(
                Finding(
                    key, "massive", CLAIM if first else "", PAPER if first else "",
                    f"largest |activation| over the median one of its state, geometric mean, {name}",
                    {c: _most(r, ratio, k) for c, (r, ratio) in known.items()},
                )
            )  # fmt: skip
            rows.append(
                Finding(
                    f"{key}_normal", "massive", "", "", "of independent normal units",
                    {c: _normal(r, k) for c, (r, _) in known.items()}, under=key, null="normal",
                )
            )  # fmt: skip
    return rows


def _most(found: MassiveActivations, ratio: Measured, k: int) -> Value:
    if ratio.value.isnan().all():
        return Value(math.nan, reason="the median activation of a state is 0 at every sublayer")
    s = int(ratio.value.nan_to_num(nan=-1.0).argmax())
    low, high = (None, None) if ratio.interval is None else (float(end[s]) for end in ratio.interval)
    unit, largest = int(found.unit[k, s]), float(found.largest[k, s])
    share = 100 * float(found.massive[k, s])
    note = (
        f" (at sublayer {s}; beyond both thresholds in {share:.0f} % of tokens; up to {number(largest)}, unit {unit})"
    )
    seeds = () if ratio.seeds is None else tuple(float(seed.nan_to_num(nan=-1.0).max()) for seed in ratio.seeds)
    return Value(float(ratio.value[s]), low, high, n=ratio.n, seeds=seeds, note=note)


def _normal(found: MassiveActivations, k: int) -> Value:
    """What independent normal units give; p for all sublayers together (Bonferroni), none where all states are one."""
    p = found.normal_p[k]
    known = p[~p.isnan()]
    said = ""
    if len(known):
        least = min(1.0, len(known) * float(known.min()))
        said = f"; p {number(least) if least else 'below 1e-300'}"
    return Value(found.normal_ratio, note=f" (95 % of states below {number(found.normal_quantile)}{said})")


MEASURE = Measure(lambda collected, how: massive(collected), more=rows)
