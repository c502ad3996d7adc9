"""The findings' rows on rotations: what each null model makes of the turns, and what a random walk would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rsdyn.analysis.finding import Finding, Value, number

Results = Mapping[str, Any]


def nulls_of(results: Results) -> list[str]:
    """The null models that a condition's rotations were tested against."""
    found = (k.removeprefix("null_").removesuffix("_mean") for k in results if k.startswith("null_"))
    return [null for null in found if f"null_{null}_mean" in results]


def rotation_rows(results: Mapping[str, Results]) -> list[Finding]:
    """How many units beat each null model, and what a random walk would do."""
    walks = {c: Value(float(r["rotation_random_walk"])) for c, r in results.items()}
    rows = [Finding("turns_of_random_walk", "rotation", "", "not given", "mean |R| of a random walk of equal length",
                    walks)]  # fmt: skip
    for null in dict.fromkeys(null for r in results.values() for null in nulls_of(r)):
        rows += _rows_of(null, {c: r for c, r in results.items() if f"null_{null}_mean" in r})
    return rows


def _rows_of(null: str, results: Mapping[str, Results]) -> list[Finding]:
    turns, p, beyond, beyond_fdr, rest = {}, {}, {}, {}, {}
    for c, r in results.items():
        n = r.get("n_trajectories")
        population_p = r.get(f"null_{null}_population_p")
        note = "" if population_p is None else f" (p {number(float(population_p))})"
        turns[c] = Value(float(r[f"null_{null}_mean"].nanmean()), n=n, note=note)
        if population_p is not None:
            p[c] = Value(float(population_p), n=n)
        passed = share_beyond(r, null, corrected=True)
        beyond[c] = Value(share_beyond(r, null), n=n, unit=" %", note=f" ({passed:.0f} % with q < .05)")
        beyond_fdr[c] = Value(passed, n=n, unit=" %")
        if len(r.get("massive_units", ())):
            rest[c] = Value(share_beyond(r, null, leave_out=r["massive_units"]), n=n, unit=" %")
    about_zero, most = ("about 0", "most units") if null == "layer_shuffle" else ("not given", "not given")
    turns_key, beyond_key = f"turns_{null}", f"units_beyond_{null}"

    def row(
        key: str, paper: str, statistic: str, values: dict[str, Value], under: str, detail: bool = False
    ) -> Finding:
        return Finding(key, "rotation", "", paper, statistic, values, under=under, detail=detail)

    rows = [row(turns_key, about_zero, f"turns under {null} (p of mean |R|)", turns, "")]
    if p:
        rows.append(row(f"{turns_key}_p", "", f"p of mean |R| beside {null}", p, turns_key, True))
    rows.append(row(beyond_key, most, "units beyond it, p < .05 (chance: 5 %)", beyond, turns_key))
    rows.append(row(f"{beyond_key}_fdr", "", "units beyond it, q < .05", beyond_fdr, turns_key, True))
    if rest:
        rows.append(row(f"{beyond_key}_without_massive", "", "units beyond it, without massive units", rest, turns_key))
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
