"""What a run of analyze.py shows: its curves, tables, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rsdyn.analysis.findings import Finding, Results, share_beyond
from rsdyn.tracking.log import Curves, Table

# results -> measure; a _interval, a _without_massive and a null or floor go with each that has one
MEASURES = {
    "density": "active_share",
    "participation": "participation",
    "r_mean": "correlation",
    "cosine": "cosine",
    "speed": "speed",
    "mi_mean": "mutual_information",
    "ev": "components_variance",
    "components_90": "components_90",
    "dimensions": "dimensions",
}
NULLS = {"mi_mean": "mi_floor"}

# A row of the findings table by what it measures, as figure, claim and row of a key; see `finding_key`.
STATISTICS = {
    "share of active units, rank correlation with depth": "1b_active_share/trend",
    "mean correlation, first transition": "1c_correlation/first",
    "mean correlation, all transitions": "1c_correlation/mean",
    "mean correlation, rank correlation with depth": "1c_correlation/trend",
    "within minus cross": "1c_correlation/within_minus_cross",
    "mean cosine, rank correlation with depth": "1e_cosine/trend",
    "mean speed, rank correlation with depth": "1f_speed/trend",
    "slope there less before, of the mean": "1f_speed/late_steepening",
    "cross over within": "1f_speed/cross_over_within",
    "first transition minus mean of the last two thirds, nats": "1h_information/early_fall",
    "mean information, rank correlation with depth": "1h_information/trend",
    "within minus cross, nats": "1h_information/within_minus_cross",
    "mean |R| of the mean trajectory": "2_rotation/turns",
    "mean |R| of a random walk as long": "2_rotation/turns_of_random_walk",
    "dimensions filled, rank correlation with depth": "4_dimensions/trend",
}
WITHOUT, TRUE, LITERAL = "  without massive units", " (true, kde)", ": the paper's sum, no information"


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


def finding_key(statistic: str, above: str | None) -> str | None:
    """The key of a row by what it measures: figure, claim and row; None for rows on null models.

    ``above`` is the key of the row above, which a row "without massive units" goes with.
    """
    if statistic == WITHOUT:
        return f"{above}_without_massive" if above else None
    if statistic.startswith(("turns under ", "  units beyond it")):
        return None  # `rotation_numbers` has them, with their p-values
    literal, statistic = statistic.endswith(LITERAL), statistic.removesuffix(LITERAL).removesuffix(TRUE)
    if literal and f"{statistic}, nats" in STATISTICS:
        statistic += ", nats"
    key = STATISTICS.get(statistic) or f"other/{re.sub('[^a-z0-9]+', '_', statistic.lower()).strip('_')}"
    return key.replace("1h_information", "1h_paper_literal") if literal else key


def keyed(table: Sequence[Finding]) -> Iterator[tuple[Finding, str | None]]:
    """Each row with its key."""
    key: str | None = None
    for row in table:
        key = finding_key(row.statistic, key)
        yield row, key


def summary_numbers(table: Sequence[Finding], results: Mapping[str, Results]) -> dict[str, float]:
    """The findings as ``figure_claim/row/condition``: short, stable, and sorted as the paper's figures are."""
    numbers = {f"{key}/{c}": v.value for row, key in keyed(table) if key for c, v in row.values.items()}
    return numbers | {f"2_rotation/{key}": value for key, value in rotation_numbers(results).items()}


def nulls_of(r: Results) -> list[str]:
    """The null models that a condition's rotations were tested against."""
    return [k.removeprefix("null_").removesuffix("_mean") for k in r if k.startswith("null_") and k.endswith("_mean")]


def rotation_numbers(results: Mapping[str, Results]) -> dict[str, float]:
    """Turns under each null model, p of mean |R|, and the share of units beyond it, by key."""
    found: dict[str, float] = {}
    for condition, r in results.items():
        for null in nulls_of(r):
            found[f"{null}_turns/{condition}"] = float(r[f"null_{null}_mean"].nanmean())
            if (p := r.get(f"null_{null}_population_p")) is not None:
                found[f"{null}_p/{condition}"] = float(p)
            found[f"{null}_beyond/{condition}"] = share_beyond(r, null) / 100
            found[f"{null}_beyond_fdr/{condition}"] = share_beyond(r, null, corrected=True) / 100
    return found


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
    """A row a claim, statistic and condition; ``key`` is that of the run's summary."""
    rows, claim, paper = [], "", ""
    for row, key in keyed(table):
        claim, paper = row.claim or claim, row.paper or paper
        for condition, v in row.values.items():
            rows.append([claim, paper, row.statistic.strip(), condition, v.value, v.low, v.high, str(v),
                         f"findings/{key}/{condition}" if key else None])  # fmt: skip
    columns = ["claim", "paper", "statistic", "condition", "value", "low", "high", "in words", "key"]
    return Table(columns, rows)


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
