"""What a run of analyze.py shows: its curves, tables, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis.finding import Finding
from rsdyn.analysis.findings import Results
from rsdyn.analysis.rotation_rows import nulls_of
from rsdyn.tracking.log import Curves, Table

# results -> measure; a _interval, a _without_massive and a null or floor go with each that has one
MEASURES = {
    "density": "active_share",
    "participation": "participation",
    "r_mean": "correlation",
    "cosine": "cosine",
    "speed": "speed",
    "relative_speed": "relative_speed",
    "mi_mean": "mutual_information",
    "ev": "components_variance",
    "components_90": "components_90",
    "dimensions": "dimensions",
}
NULLS = {"mi_mean": "mi_floor"}


def curves(results: Mapping[str, Results]) -> Curves:
    """The curves over depth of every condition, with what belongs to each."""
    found: Curves = {}
    for condition, r in results.items():
        for key, measure in MEASURES.items():
            if key not in r:
                continue
            if key == "mi_mean" and r["mi_estimator"] == "paper_literal":  # not an information: a panel of its own
                found.setdefault("mutual_information", {})[condition] = _values(r["mi_true_mean"])
                measure = "paper_literal"
            whole, few = _n_units(r) if key == "participation" else (1, 1)
            series = {condition: r[key] / whole}
            if (interval := r.get(f"{key}_interval")) is not None:
                series |= {f"{condition}_low": interval[0] / whole, f"{condition}_high": interval[1] / whole}
            if NULLS.get(key) in r:
                series[f"{condition}_null"] = r[NULLS[key]]
            if (without := r.get(f"{key}_without_massive")) is not None:
                series[f"{condition}_without_massive"] = without / few
            found.setdefault(measure, {}).update({name: _values(curve) for name, curve in series.items()})
    return found


def _values(curve: Tensor) -> list[float | None]:
    return [float(v) if v.isfinite() else None for v in curve.to(torch.float64)]


def _n_units(r: Results) -> tuple[int, int]:
    """Usable units, and those of them that are not massive."""
    usable = r["mean"].shape[1] - len(r["unusable_units"])
    return usable, usable - len(r["massive_units"])


# -- the runs table ----------------------------------------------------------------------------------------------------


def summary_numbers(table: Sequence[Finding]) -> dict[str, float]:
    """The findings as ``key/condition``, the key being the row's own."""
    return {f"{row.key}/{c}": v.value for row in table for c, v in row.values.items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(table: Sequence[Finding], results: Mapping[str, Results]) -> dict[str, Table]:
    """The tables of an analysis: findings, massive units, units by rotation effect size."""
    found = {"findings": findings_table(table)}
    first = next(iter(results.values()))
    if "mean" in first:
        found["massive_units"] = massive_table({c: (r["mean"], r["massive_units"]) for c, r in results.items()})
    if "rotation" in first:
        found["units_by_rotation"] = rotation_table(results)
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


def claims_table(found: Mapping[str, Any]) -> Table:
    """The claims of arXiv 2605.14258, a row per claim and series, from what ``summary.json`` has of the Jacobians."""
    rows = []
    for claim in found["claims"]:
        for series, v in claim["values"].items():
            of = [claim["key"], claim["claim"], claim["paper"], claim["statistic"], found["series"][series]]
            rows.append([*of, v["value"], v["low"], v["high"], v["n"], claim["bound"], claim["verdict"]])
    heads = ["key", "claim", "paper", "statistic", "series", "value", "low", "high", "texts", "holds if", "verdict"]
    return Table(heads, rows)


def massive_table(of: Mapping[str, tuple[Tensor, Tensor]]) -> Table:
    """Massive units of each condition, from ``mean`` ``(S, D)`` and their numbers, the largest first."""
    rows = []
    for condition, (mean, units) in of.items():
        size = mean.abs()
        over = size / size.nanmedian(dim=1, keepdim=True).values
        found = []
        for u in units.tolist():
            s = int(over[:, u].nan_to_num(0.0, posinf=0.0).argmax())
            found.append([condition, u, float(mean[s, u]), s, float(over[s, u]), float(mean[-1, u])])
        rows += sorted(found, key=lambda row: -row[4])
    return Table(["condition", "unit", "mean there", "sublayer", "times the median", "mean at the end"], rows)


def rotation_table(results: Mapping[str, Results]) -> Table:
    """A row a unit and null model, those first whose turns differ most from their null, in its standard deviations.

    Turns are clockwise, as the paper shows them. The false discovery rate to go by is ``q_normal``, from the z-scores:
    no p by rank is below 1 / (surrogates + 1), so with few surrogates ``q_ranks`` of many units is large in any case.
    """
    blocks = []
    for condition, r in results.items():
        for null in nulls_of(r):
            columns = [-r["rotation"], -r[f"null_{null}_mean"], r[f"null_{null}_std"], -r[f"null_{null}_z"]]
            columns += [r[f"null_{null}_{name}"] for name in ("p", "q_normal", "q")]
            values = torch.stack([c.to(torch.float64) for c in columns], dim=1)
            order = values[:, 3].abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
            blocks.append([[condition, null, u, *values[u].tolist()] for u in order.tolist()])
    # the strongest of every null model and condition come first, so that a table cut at its end keeps those of all
    rows = [row for together in zip(*blocks, strict=True) for row in together]
    return Table(["condition", "null", "unit", "turns", "null mean", "null std", "z", "p", "q_normal", "q_ranks"], rows)
