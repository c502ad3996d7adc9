"""What a run of analyze.py shows: its curves, tables, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis import group_table
from rsdyn.analysis.finding import Finding
from rsdyn.analysis.results import AnalysisResults, ByGroup, ConditionResults, Measured
from rsdyn.tracking.log import Series, Table

Of = Callable[[ConditionResults], Measured | None]
# measure -> where it stands in the results
MEASURES: dict[str, Of] = {
    "active_share": lambda r: r.activations.density if r.activations else None,
    "participation": lambda r: r.activations.participation if r.activations else None,
    "correlation": lambda r: r.correlation.mean if r.correlation else None,
    "cosine": lambda r: r.cosine.mean if r.cosine else None,
    "speed": lambda r: r.velocity.speed if r.velocity else None,
    "relative_speed": lambda r: r.velocity.relative if r.velocity else None,
    "norm": lambda r: r.norm.mean if r.norm else None,
    "mutual_information": lambda r: r.mutual_information.mean if r.mutual_information else None,
    "components_variance": lambda r: r.pca.over_depth.explained if r.pca and r.pca.over_depth else None,
    "components_90": lambda r: r.pca.over_depth.components_90 if r.pca and r.pca.over_depth else None,
    "dimensions": lambda r: r.pca.over_depth.dimensions if r.pca and r.pca.over_depth else None,
}


def curves(conditions: Mapping[str, ConditionResults], n_units: int) -> Series:
    """The curves over depth of every condition, with what belongs to each."""
    found: Series = {}
    for condition, r in conditions.items():
        usable = n_units - len(r.flags.unusable_units)
        for measure, of in MEASURES.items():
            measured = of(r)
            if measured is None:
                continue
            information = r.mutual_information
            series: dict[str, Tensor] = {}
            whole, few = (usable, usable - len(r.flags.massive_units)) if measure == "participation" else (1, 1)
            name = measure
            if measure == "mutual_information" and information is not None:
                series[f"{condition}_null"] = information.floor
                if information.true is not None:  # the paper's sum is no information: a panel of its own
                    found.setdefault(measure, {})[condition] = _values(information.true.value)
                    name = "paper_literal"
            series[condition] = measured.value / whole
            if measured.interval is not None:
                low, high = measured.interval / whole
                series |= {f"{condition}_low": low, f"{condition}_high": high}
            if measured.without_massive is not None:
                series[f"{condition}_without_massive"] = measured.without_massive.value / few
            found.setdefault(name, {}).update({key: _values(curve) for key, curve in series.items()})
    return found


def _values(curve: Tensor) -> list[float | None]:
    return [float(v) if v.isfinite() else None for v in curve.to(torch.float64)]


# -- the runs table ----------------------------------------------------------------------------------------------------


def summary_numbers(table: Sequence[Finding]) -> dict[str, float]:
    """The findings as ``key/condition``, the key being the row's own, and the ends of their intervals."""
    found: dict[str, float] = {}
    for row in table:
        if row.detail:
            continue  # in the table of findings
        for condition, v in row.values.items():
            key = f"{row.key}/{condition}"
            found[key] = v.value
            if v.low is not None and v.high is not None:
                found |= {f"{key}_low": v.low, f"{key}_high": v.high}
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(table: Sequence[Finding], results: AnalysisResults) -> dict[str, Table]:
    """The tables of an analysis: findings, massive units, units by rotation effect size."""
    found = {"findings": findings_table(table)}
    if results.by_group is not None:
        found["by_group"] = groups_table(results.by_group)
    if results.main.activations is not None:
        found["massive_units"] = massive_table(results.conditions)
    if results.main.rotation is not None:
        found["units_by_rotation"] = rotation_table(results.conditions)
    return found


def findings_table(table: Sequence[Finding]) -> Table:
    """A row per claim, statistic and condition; ``key`` is that of the run's summary."""
    rows, claim, paper = [], "", ""
    for row in table:
        claim, paper = row.claim or claim, row.paper or paper
        for condition, v in row.values.items():
            ends = v.ends or (None, None, None)
            rows.append([claim, paper, row.statistic, condition, v.value, v.low, v.high, *ends, v.n, str(v), v.reason,
                         f"findings/{row.key}/{condition}"])  # fmt: skip
    columns = ["claim", "paper", "statistic", "condition", "value", "low", "high", "first", "middle", "last", "N",
               "in words", "undefined because", "key"]  # fmt: skip
    return Table(columns, rows)


def groups_table(found: ByGroup) -> Table:
    """A row per finding and group, then one per finding and contrast, which has p; ``key`` is the finding's."""
    rows = []
    for key, row in found.rows.items():
        for g, name in enumerate(found.names):
            v = group_table.value_of(row, g)
            rows.append([key, row.statistic, name, v.value, v.low, v.high, v.n, None, None])
        for c, name in enumerate(found.contrasts):
            v = group_table.difference_of(row, c)
            rows.append([key, row.statistic, name, v.value, v.low, v.high, None, float(row.p[c]), float(row.p_holm[c])])
    return Table(["key", "statistic", "group", "value", "low", "high", "N", "p", "Holm"], rows)


def group_numbers(found: ByGroup) -> dict[str, float]:
    """The findings as ``key/group``, those of contrasts as ``key/<first>-<second>`` with ``_p_holm``; no details."""
    numbers: dict[str, float] = {}
    for key, row in found.rows.items():
        if row.detail:
            continue
        for g, name in enumerate(found.names):
            numbers[f"{key}/{in_key(name)}"] = float(row.value[g])
        for c, (first, second) in enumerate(zip(found.first, found.second, strict=True)):
            contrast = f"{key}/{in_key(first)}-{in_key(second)}"
            numbers |= {contrast: float(row.difference[c]), f"{contrast}_p_holm": float(row.p_holm[c])}
    return numbers


def in_key(name: str) -> str:
    """A group's name as a part of a key: letters, digits and ``_.`` alone."""
    return re.sub(r"[^\w.]+", "_", name)[:40].strip("_") or "_"


def claims_table(found: Mapping[str, Any]) -> Table:
    """The claims of arXiv 2605.14258, a row per claim and series, from what ``summary.json`` has of the Jacobians."""
    rows = []
    for claim in found["claims"]:
        for series, v in claim["values"].items():
            of = [claim["key"], claim["claim"], claim["paper"], claim["statistic"], found["series"][series]]
            rows.append([*of, v["value"], v["low"], v["high"], v["n"], claim["bound"], claim["verdict"]])
    heads = ["key", "claim", "paper", "statistic", "series", "value", "low", "high", "texts", "holds if", "verdict"]
    return Table(heads, rows)


def massive_table(conditions: Mapping[str, ConditionResults]) -> Table:
    """Massive units of each condition, the largest first."""
    rows = []
    for condition, r in conditions.items():
        if r.activations is None:
            continue
        mean = r.activations.mean
        size = mean.abs()
        over = size / size.nanmedian(dim=1, keepdim=True).values
        found = []
        for u in r.flags.massive_units.tolist():
            s = int(over[:, u].nan_to_num(0.0, posinf=0.0).argmax())
            found.append([condition, u, float(mean[s, u]), s, float(over[s, u]), float(mean[-1, u])])
        rows += sorted(found, key=lambda row: -row[4])
    return Table(["condition", "unit", "mean there", "sublayer", "times the median", "mean at the end"], rows)


def rotation_table(conditions: Mapping[str, ConditionResults]) -> Table:
    """One row per unit and null model, those first whose turns differ most from their null, in its standard deviations.

    Turns are clockwise, as the paper shows them. The false discovery rate to go by is ``q_normal``, from the z-scores:
    no p by rank is below 1 / (surrogates + 1), so with few surrogates ``q_ranks`` of many units is large in any case.
    """
    blocks = []
    for condition, r in conditions.items():
        for null, test in r.rotation.nulls.items() if r.rotation is not None else ():
            assert r.rotation is not None
            ranks = torch.full_like(test.p, torch.nan) if test.q is None else test.q
            columns = [-r.rotation.turns, -test.mean, test.std, -test.z, test.p, test.q_normal, ranks]
            values = torch.stack([c.to(torch.float64) for c in columns], dim=1)
            order = values[:, 3].abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
            blocks.append([[condition, null, u, *values[u].tolist()] for u in order.tolist()])
    # the strongest of every null model and condition come first, so that a table cut at its end keeps those of all
    rows = [row for together in zip(*blocks, strict=True) for row in together]
    return Table(["condition", "null", "unit", "turns", "null mean", "null std", "z", "p", "q_normal", "q_ranks"], rows)
