"""The findings' rows on rotations: what each null model makes of the turns, and how regular the steps are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.settings import NULLS, STREAM_NULLS
from rsdyn.labels import NAMES

Results = Mapping[str, Any]


def nulls_of(results: Results) -> list[str]:
    """The null models that a condition's rotations were tested against."""
    found = (k.removeprefix("null_").removesuffix("_mean") for k in results if k.startswith("null_"))
    return [null for null in found if f"null_{null}_mean" in results]


def rotation_rows(results: Mapping[str, Results]) -> list[Finding]:
    """What a random walk does, then the ladder of null models from the one that keeps most, and how regular steps are.

    Under the stream's mean |R| stands that of each null's surrogates: like beside like.
    """
    walks = {c: Value(float(r["rotation_random_walk"])) for c, r in results.items()}
    rows = [Finding("turns_of_random_walk", "rotation", "", "not given", "mean |R| of a random walk of equal length",
                    walks)]  # fmt: skip
    there = {null for r in results.values() for null in nulls_of(r)}
    for null in [n for n in NULLS if n in there]:
        rows += _rows_of(null, {c: r for c, r in results.items() if f"null_{null}_mean" in r})
    return rows + _regularity_rows({c: r for c, r in results.items() if "regularity_mean" in r})


def _rows_of(null: str, results: Mapping[str, Results]) -> list[Finding]:
    turns, p, z, beyond, beyond_fdr, rest = {}, {}, {}, {}, {}, {}
    for c, r in results.items():
        n = r.get("n_trajectories")
        turns[c] = _beside(r, f"null_{null}_turns", f"null_{null}_population_p", n)
        if f"null_{null}_population_p" in r:
            p[c] = Value(float(r[f"null_{null}_population_p"]), n=n)
            z[c] = Value(float(r[f"null_{null}_turns_z"]), n=n, reason="the null does not vary")
        passed = share_beyond(r, null, corrected=True)
        beyond[c] = Value(share_beyond(r, null), n=n, unit=" %", note=f" ({passed:.0f} % with q < .05)")
        beyond_fdr[c] = Value(passed, n=n, unit=" %")
        if len(r.get("massive_units", ())):
            rest[c] = Value(share_beyond(r, null, leave_out=r["massive_units"]), n=n, unit=" %")
    about_zero, most = ("about 0, signed", "most units") if null == "layer_shuffle" else ("not given", "not given")
    turns_key, beyond_key = f"turns_{null}", f"units_beyond_{null}"
    of = "of the" if null in STREAM_NULLS else "of surrogates,"

    def row(
        key: str, paper: str, statistic: str, values: dict[str, Value], under: str, detail: bool = False
    ) -> Finding:
        return Finding(key, "rotation", "", paper, statistic, values, under=under, detail=detail)

    rows = [row(turns_key, about_zero, f"mean |R| {of} {NAMES[null]}", turns, "")]
    if p:
        name = NAMES[null]
        rows.append(row(f"{turns_key}_z", "", f"mean |R| less that of {name}, in their SD", z, turns_key, True))
        rows.append(row(f"{turns_key}_p", "", f"p of mean |R| beside {name}", p, turns_key, True))
    rows.append(row(beyond_key, most, "units beyond it, p < .05 (chance: 5 %)", beyond, turns_key))
    rows.append(row(f"{beyond_key}_fdr", "", "units beyond it, q < .05", beyond_fdr, turns_key, True))
    if rest:
        rows.append(row(f"{beyond_key}_without_massive", "", "units beyond it, without massive units", rest, turns_key))
    return rows


def _beside(results: Results, mean: str, p: str, n: int | None, std: str = "", z: str = "") -> Value:
    """A null's mean with, where it has surrogates, their SD, how many of it the stream lies away, and p."""
    note = ""
    if p in results:
        spread, away = float(results[std or f"{mean}_std"]), float(results[z or f"{mean}_z"])
        note = f" ± {number(spread)} (stream {away:+.1f} SD, p {number(float(results[p]))})"
    return Value(float(results[mean]), n=n, note=note)


def _regularity_rows(results: Mapping[str, Results]) -> list[Finding]:
    """Fisher's g: what turns cannot show, an orbit that all units keep to."""
    if not results:
        return []
    key = "regularity"
    observed: dict[str, Value] = {}
    for c, r in results.items():
        low, high = (float(x) for x in r.get("regularity_mean_interval", (torch.nan, torch.nan)))
        observed[c] = Value(float(r["regularity_mean"]), low, high, n=r.get("n_trajectories"))
    rows = [Finding(key, "rotation", "", "not given", "regularity: largest share of a unit's steps at one frequency",
                    observed)]  # fmt: skip
    for null in NULLS:
        there = {c: r for c, r in results.items() if f"regularity_{null}_population" in r}
        if not there:
            continue
        beside, beyond = {}, {}
        for c, r in there.items():
            name, n = f"regularity_{null}", r.get("n_trajectories")
            numbers = {"mean": r[f"{name}_population"].mean(), "std": r[f"{name}_population"].std()}
            numbers |= {"z": r[f"{name}_population_z"], "p": r[f"{name}_population_p"]}
            beside[c] = _beside(numbers, "mean", "p", n, "std", "z")
            p = r[f"{name}_p"]
            share = 100 * float((p[p.isfinite()] < 0.05).double().mean())
            passed = 100 * float((r[f"{name}_q_normal"][p.isfinite()] < 0.05).double().mean())
            beyond[c] = Value(share, n=n, unit=" %", note=f" ({passed:.0f} % with q < .05)")
        rows.append(Finding(f"{key}_{null}", "rotation", "", "", f"of surrogates, {NAMES[null]}", beside, under=key))
        rows.append(Finding(f"units_regular_{null}", "rotation", "", "", "units more regular, p < .05 (chance: 5 %)",
                            beyond, under=key))  # fmt: skip
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
    return 100 * float((p[tested] < 0.05).double().mean()) if tested.any() else float("nan")
