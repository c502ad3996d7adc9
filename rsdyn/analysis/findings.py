"""The findings table: each claim of the paper, what it reports for Llama 3.1 8B, and what this run measured.

Nothing here says whether a claim holds: the numbers and their intervals do. METHOD section 11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from rsdyn.dynamics.resampling import jackknife
from rsdyn.stream.text.positions import SINK_RATIO

Results = Mapping[str, Any]
UNDEFINED = torch.tensor(torch.nan, dtype=torch.float64)  # of a stream too short for the statistic


@dataclass(frozen=True)
class Value:
    """A measured number with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = _number(self.value) + self.unit
        if self.low is not None and self.high is not None and self.low == self.low:
            text += f" [{_number(self.low)}, {_number(self.high)}]"
        return text + self.note


@dataclass(frozen=True)
class Finding:
    """One row: the claim, the paper's number, what is measured, and its value in each condition."""

    measure: str
    claim: str
    paper: str
    statistic: str
    values: dict[str, Value] = field(default_factory=dict)


def _number(x: float) -> str:
    if x != x:
        return "not defined"
    if x == 0 or 0.001 <= abs(x) < 10000:
        digits = 2 if abs(x) >= 10 else 3
        return f"{x:.{digits}f}".rstrip("0").rstrip(".") if abs(x) >= 1000 else f"{x:.{digits}f}"
    return f"{x:.2e}"


def spearman(curve: Tensor) -> Tensor:
    """Rank correlation of a curve ``(n,)`` with depth, NaN where it has fewer than three values or never moves."""
    values = curve[curve.isfinite()].cpu().numpy()
    if len(values) < 3 or (values == values[0]).all():
        return UNDEFINED
    return torch.tensor(float(spearmanr(range(len(values)), values).statistic), dtype=torch.float64)


def _late_steepening(curve: Tensor) -> Tensor:
    """Slope over the last third less the slope before it, as a share of the curve's mean."""
    if len(curve) < 3:
        return UNDEFINED
    turn = len(curve) - 1 - max(1, (len(curve) - 1) // 3)
    late = (curve[-1] - curve[turn]) / (len(curve) - 1 - turn)
    before = (curve[turn] - curve[0]) / turn
    return (late - before) / curve.nanmean()


def _per_layer(curve: Tensor, sites_per_layer: int) -> Tensor:
    """The mean of a layer's transitions, so that a zigzag between within and across layers is not taken for a trend."""
    if sites_per_layer == 1:
        return curve
    pairs = curve[: len(curve) // 2 * 2].reshape(-1, 2)
    return pairs.nanmean(1)


def _early_fall(curve: Tensor) -> Tensor:
    if len(curve) < 3:
        return UNDEFINED
    return curve[0] - curve[len(curve) // 3 :].nanmean()


def _kinds(curve: Tensor) -> tuple[Tensor, Tensor]:
    return curve[0::2].nanmean(), curve[1::2].nanmean()


def _within_minus_cross(curve: Tensor) -> Tensor:
    within, cross = _kinds(curve)
    return within - cross


def _cross_over_within(curve: Tensor) -> Tensor:
    within, cross = _kinds(curve)
    return cross / within


# measure, claim, the paper's words or number, what is measured, name of the curve, its statistic, needs both sites
Statistic = Callable[[Tensor], Tensor]
Row = tuple[str, str, str, str, str, Statistic, bool]


def _rows(sites: int) -> list[Row]:
    def trend(curve: Tensor) -> Tensor:
        return spearman(_per_layer(curve, sites))

    depth = "rank correlation with depth"
    return [
        ("activations", "activations grow dense over the layers", "rises", f"share of active units, {depth}",
         "density", spearman, False),
        ("correlation", "units correlate from sublayer to sublayer", "above 0.8 from the start",
         "mean correlation, first transition", "r_mean", lambda c: c[0], False),
        ("correlation", "", "", "mean correlation, all transitions", "r_mean", lambda c: c.nanmean(), False),
        ("correlation", "correlations rise with depth", "rise", f"mean correlation, {depth}", "r_mean", trend, False),
        ("correlation", "within-layer correlations are higher", "within > cross", "within minus cross",
         "r_mean", _within_minus_cross, True),
        ("cosine", "successive states align more and more", "rises", f"mean cosine, {depth}", "cosine", trend, False),
        ("velocity", "the stream accelerates", "rises", f"mean speed, {depth}", "speed", trend, False),
        ("velocity", "most steeply in the last third", "steepest there", "slope there less before, of the mean",
         "speed", lambda c: _late_steepening(_per_layer(c, sites)), False),
        ("velocity", "cross-layer steps are longer", "cross > within", "cross over within",
         "speed", _cross_over_within, True),
        ("mutual_information", "information falls sharply in early layers", "falls",
         "first transition minus mean of the last two thirds, nats", "mi_mean", _early_fall, False),
        ("mutual_information", "", "", f"mean information, {depth}", "mi_mean", trend, False),
        ("mutual_information", "most at cross-layer transitions", "cross lower", "within minus cross, nats",
         "mi_mean", _within_minus_cross, True),
        ("rotation", "units rotate", "10.74 turns over 64 sublayers", "mean |R| of the mean trajectory",
         "rotation_abs_mean", lambda c: c, False),
        ("pca", "later layers need fewer components", "fewer", f"dimensions filled, {depth}",
         "dimensions", spearman, False),
    ]  # fmt: skip


def findings(results: Mapping[str, Results], measures: Sequence[str], sites_per_layer: int) -> list[Finding]:
    """The rows for what was measured; ``results`` maps a condition to its results, the first one being the main one."""
    table = []
    for measure, claim, paper, statistic, name, of, needs_both in _rows(sites_per_layer):
        if measure not in measures or (needs_both and sites_per_layer == 1):
            continue
        literal = any(r.get("mi_estimator") == "paper_literal" for r in results.values())
        if measure == "mutual_information" and literal:
            true = {c: _value(r, "mi_true_mean", of, statistic) for c, r in results.items() if "mi_true_mean" in r}
            table.append(Finding(measure, claim, paper, f"{statistic} (true, kde)", true))
            claim, paper, statistic = "", "", f"{statistic.removesuffix(', nats')}: the paper's sum, no information"
        values = {c: _value(r, name, of, statistic) for c, r in results.items() if name in r}
        table.append(Finding(measure, claim, paper, statistic, values))
        without = f"{name}_without_massive"
        rest = {c: _value(r, without, of, statistic) for c, r in results.items() if without in r}
        if rest:
            table.append(Finding(measure, "", "", "  without massive units", rest))
    if "rotation" in measures:
        table[_after(table, "rotation") : _after(table, "rotation")] = _rotation_rows(results)
    return table


def _after(table: list[Finding], measure: str) -> int:
    return 1 + max(i for i, row in enumerate(table) if row.measure == measure)


def _value(results: Results, name: str, of: Statistic, statistic: str) -> Value:
    """A statistic of a curve with its interval: by the jackknife, or for ranks, which move in steps, by simulation."""
    value = of(results[name])
    groups = results.get(f"{name}_groups")
    if groups is None:
        return Value(float(value))
    if "rank correlation" in statistic:
        low, high = _simulated(results[name], groups, of)
        return Value(float(value), low, high)
    found = jackknife(value, torch.stack([of(g) for g in groups]))
    return Value(float(found.value), float(found.low), float(found.high))


def _simulated(curve: Tensor, groups: Tensor, of: Statistic, n: int = 400) -> tuple[float, float]:
    """Ends of the middle 95 % of a statistic, over curves that scatter about the curve as the jackknife says."""
    n_groups = len(groups)
    away = (groups - groups.mean(0)) * ((n_groups - 1) / n_groups) ** 0.5
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(n, n_groups, generator=generator, dtype=torch.float64).to(away.device, away.dtype)
    found = torch.stack([of(curve + draw @ away) for draw in draws]).to(torch.float64)
    ends = torch.nanquantile(found.cpu(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _rotation_rows(results: Mapping[str, Results]) -> list[Finding]:
    """How many units beat each null model, and what a random walk would do."""
    rows = [
        Finding("rotation", "", "not given", "mean |R| of a random walk as long",
                {c: Value(float(r["rotation_random_walk"])) for c, r in results.items()})
    ]  # fmt: skip
    nulls = []
    for r in results.values():
        nulls += [
            k.removeprefix("null_").removesuffix("_mean") for k in r if k.startswith("null_") and k.endswith("_mean")
        ]
    for null in dict.fromkeys(nulls):
        here = {c: r for c, r in results.items() if f"null_{null}_mean" in r}
        turns, beyond = {}, {}
        for c, r in here.items():
            p = r.get(f"null_{null}_population_p")
            note = "" if p is None else f" (p {_number(p)})"
            turns[c] = Value(float(r[f"null_{null}_mean"].nanmean()), note=note)
            passed = share_beyond(r, null, corrected=True)
            beyond[c] = Value(share_beyond(r, null), unit=" %", note=f" ({passed:.0f} % with q < .05)")
        about_zero, most = ("about 0", "most units") if null == "layer_shuffle" else ("not given", "not given")
        rows.append(Finding("rotation", "", about_zero, f"turns under {null} (p of mean |R|)", turns))
        rows.append(Finding("rotation", "", most, "  units beyond it, p < .05 (chance: 5 %)", beyond))
        rest = {
            c: Value(share_beyond(r, null, leave_out=r["massive_units"]), unit=" %")
            for c, r in here.items()
            if len(r.get("massive_units", ()))
        }
        if rest:
            rows.append(Finding("rotation", "", "", "  without massive units", rest))
    return rows


def share_beyond(results: Results, null: str, *, corrected: bool = False, leave_out: Tensor | None = None) -> float:
    """Percent of units whose turns a null model does not explain, at p < .05 or at a false discovery rate of 5 %.

    Corrected, the p-values of the z-scores decide: those from ranks end at ``1 / (n + 1)``, and with few units there
    none would pass. ``leave_out``: numbers of units that do not count.
    """
    p = results[f"null_{null}_{'q_normal' if corrected else 'p'}"]
    tested = p.isfinite()
    if leave_out is not None:
        tested = tested.clone()
        tested[leave_out.to(tested.device)] = False
    return 100 * float((p[tested] < 0.05).to(torch.float64).mean()) if tested.any() else float("nan")


def rotation_in_words(results: Results, n_sublayers: int) -> list[str]:
    """What a reader must know before taking turns for dynamics, with this run's numbers."""
    observed, walk = float(results["rotation_abs_mean"]), float(results["rotation_random_walk"])
    lines = [
        f"Units turn {observed:.2f} times on average over {n_sublayers} sublayers; a random walk as long turns "
        f"{walk:.2f} times. A path in the plane of a value and its slope can only turn clockwise: |R| counts how "
        "jagged it is."
    ]
    explained = {
        "layer_shuffle": "the paper's null (layer order shuffled)",
        "increment_shuffle_windowed": "the increment null (steps shuffled in windows, attention and MLP apart)",
    }
    for null, words in explained.items():
        if f"null_{null}_mean" in results:
            here, passed = share_beyond(results, null), share_beyond(results, null, corrected=True)
            of_walks = 100 * float(results[f"walks_beyond_{null}"])
            lines.append(
                f"{here:.0f} % of the units go beyond {words} at p < .05, {passed:.0f} % at a false discovery rate of "
                f"5 %. Of random walks as long, which have no dynamics, {of_walks:.0f} % do at p < .05."
            )
    return lines


def plane_in_words(results: Results) -> list[str]:
    """How much of the stream the plane of PCA shows, how sure it is, and what a random walk's plane would hold."""
    held, walk = 100 * float(results["pca_ratio"][:2].sum()), 100 * float(results["control_ratio"].sum())
    line = (
        f"The plane of the first two components holds {held:.0f} % of the variance (that of a smoothed random walk "
        f"with the same steps: {walk:.0f} %)."
    )
    if "half_angles" in results:
        first, second = (float(a) for a in results["half_angles"])
        line += f" The planes of two halves of the sequences lie {first:.1f} and {second:.1f} degrees apart."
    loadings = results["pca_massive_loadings"]
    if loadings.shape[1]:
        line += f" Massive units are {100 * float(loadings[0].sum()):.0f} % of the first component."
    return [line]


def positions_in_words(results: Mapping[str, Results]) -> list[str]:
    """How many trajectories are BOS and sinks, which weigh more in every mean than the rest, for each condition."""
    counted = "; ".join(
        f"{r['n_bos']} BOS and {r['n_sinks']} sinks of {r['n_trajectories']} ({condition})"
        for condition, r in results.items()
    )
    return [
        f"Among the trajectories are {counted}. A sink's state in the middle of the depth is more than {SINK_RATIO:g} "
        "times as long as the median one, as BOS often is: such tokens weigh most in means, variances and the plane of "
        "PCA. Nothing is left out."
    ]


def flags_in_words(results: Mapping[str, Results]) -> list[str]:
    """Units that need a second look, counted and named, for each condition that has some."""
    lines = []
    if any(r.get("mi_estimator") == "paper_literal" for r in results.values()):
        lines.append(
            "analysis.mi.estimator=paper_literal is the paper's sum as printed, without the cell's area. It is not a "
            "mutual information: it changes with the unit of the activations, and falls when they grow. The rows on "
            "information above show it; the true one (kde) is in the figures and in results.npz as mi_true."
        )
    for condition, r in results.items():
        parts = []
        for name, words in (
            ("massive_units", "massive (|mean| > 100 x median)"),
            ("unusable_units", "left out for NaN or infinities"),
            ("constant_units", "constant at every sublayer"),
            ("frozen_units", "frozen by rounding in most steps"),
        ):
            units = r[name].tolist()
            if units:
                shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
                parts.append(f"{len(units)} {words} ({shown})")
        for name, words in (
            ("constant", "constant"),
            ("few_levels", "with few levels (|mean| / std > 30 in bf16)"),
        ):
            if n := int(r[name].sum()):
                parts.append(f"{n} unit-sublayers {words}")
        if parts:
            lines.append(f"Units to look at twice, {condition}: {'; '.join(parts)}.")
    return lines


def as_markdown(table: Sequence[Finding], conditions: Sequence[str]) -> str:
    """The table as ``findings.md`` has it."""
    head = ["claim of the paper", "paper, Llama 3.1 8B", "measured here", *conditions]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in table:
        cells = [row.claim or "", row.paper, row.statistic, *(str(row.values.get(c, "")) for c in conditions)]
        lines.append("| " + " | ".join(cell.replace("|R|", "\\|R\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_text(table: Sequence[Finding], conditions: Sequence[str]) -> list[str]:
    """The table for a terminal: the claim and the paper's word, then a line a statistic."""
    width = max(24, *(len(str(v)) + 2 for row in table for v in row.values.values()))
    left = max(len(row.statistic) for row in table) + 4
    lines = [" " * left + "".join(f"{c:<{width}}" for c in conditions).rstrip()]
    for row in table:
        if row.claim:
            lines.append(f"{row.claim[0].upper()}{row.claim[1:]} (paper: {row.paper})")
        cells = "".join(f"{row.values.get(c, '')!s:<{width}}" for c in conditions)
        lines.append(f"  {row.statistic:<{left - 2}}{cells}".rstrip())
    return lines


def as_json(table: Sequence[Finding]) -> list[dict[str, Any]]:
    """The table as ``summary.json`` has it."""
    return [
        {
            "measure": row.measure,
            "claim": row.claim,
            "paper": row.paper,
            "statistic": row.statistic,
            "values": {
                c: {"value": v.value, "low": v.low, "high": v.high, "text": str(v)} for c, v in row.values.items()
            },
        }
        for row in table
    ]
