"""The findings' rows on rotations: what each null model makes of the turns, and how regular the steps are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.results import AnalysisResults, ConditionResults, NullTest, Rotation
from rsdyn.analysis.settings import NULLS, STREAM_NULLS
from rsdyn.labels import NAMES

Tests = Mapping[str, tuple[ConditionResults, NullTest]]  # of one null, by condition


def rotation_rows(found: AnalysisResults) -> list[Finding]:
    """What a random walk does, then the ladder of null models from the one that keeps most, and how regular steps are.

    Under the stream's mean |R| stands that of each null's surrogates: like beside like.
    """
    turning = {c: (r, r.rotation) for c, r in found.conditions.items() if r.rotation is not None}
    walks = {c: Value(t.random_walk) for c, (_, t) in turning.items() if t.random_walk is not None}
    rows = [Finding("turns_of_random_walk", "rotation", "", "not given", "mean |R| of a random walk of equal length",
                    walks)] if walks else []  # fmt: skip
    for null in NULLS:
        tests = {c: (r, t.nulls[null]) for c, (r, t) in turning.items() if null in t.nulls}
        rows += _rows_of(null, tests) if tests else []
    return rows + _regularity_rows(turning)


def _rows_of(null: str, tests: Tests) -> list[Finding]:
    turns, p, z, beyond, beyond_fdr, rest = {}, {}, {}, {}, {}, {}
    for c, (r, test) in tests.items():
        n = r.counts.trajectories
        turns[c] = _beside(test, n)
        if test.over_units_p is not None and test.over_units_z is not None:
            p[c] = Value(test.over_units_p, n=n)
            z[c] = Value(test.over_units_z, n=n, reason="the null does not vary")
        passed = share_beyond(test, corrected=True)
        beyond[c] = Value(share_beyond(test), n=n, unit=" %", note=f" ({passed:.0f} % with q < .05)")
        beyond_fdr[c] = Value(passed, n=n, unit=" %")
        if len(r.flags.massive_units):
            rest[c] = Value(share_beyond(test, leave_out=r.flags.massive_units), n=n, unit=" %")
    about_zero, most = ("about 0, signed", "most units") if null == "layer_shuffle" else ("not given", "not given")
    turns_key, beyond_key = f"turns_{null}", f"units_beyond_{null}"
    of = "of the" if null in STREAM_NULLS else "of surrogates,"

    def row(
        key: str, paper: str, statistic: str, values: dict[str, Value], under: str, detail: bool = False
    ) -> Finding:
        return Finding(key, "rotation", "", paper, statistic, values, under=under, detail=detail, null=null)

    rows = [row(turns_key, about_zero, f"mean |R| {of} {NAMES[null]}", turns, "")]
    if p:
        name = NAMES[null]
        rows.append(row(f"{turns_key}_z", "", f"mean |R| less that of {name}, in their SD", z, turns_key, True))
        rows.append(row(f"{turns_key}_p", "", f"p of mean |R| beside {name}", p, turns_key, True))
    rows.append(row(beyond_key, most, "units beyond it, p < .05 (chance: 5 %)", beyond, turns_key))
    rows.append(row(f"{beyond_key}_fdr", "", "units beyond it, q < .05", beyond_fdr, turns_key, True))
    if rest:
        few = row(f"{beyond_key}_without_massive", "", "units beyond it, without massive units", rest, turns_key)
        rows.append(replace(few, of_main=True))
    return rows


def _beside(test: NullTest, n: int) -> Value:
    """A null's mean with, where it has surrogates, their SD, how many of it the stream lies away, and p."""
    note = ""
    if test.over_units_std is not None and test.over_units_z is not None and test.over_units_p is not None:
        spread, away = test.over_units_std, test.over_units_z
        note = f" ± {number(spread)} (stream {away:+.1f} SD, p {number(test.over_units_p)})"
    return Value(test.over_units, n=n, note=note)


def _regularity_rows(turning: Mapping[str, tuple[ConditionResults, Rotation]]) -> list[Finding]:
    """Fisher's g: what turns cannot show, an orbit that all units keep to."""
    regular = {c: (r, t.regularity) for c, (r, t) in turning.items() if t.regularity is not None}
    if not regular:
        return []
    key = "regularity"
    observed: dict[str, Value] = {}
    for c, (r, g) in regular.items():
        low, high = (float("nan") if end is None else float(end) for end in (g.mean.low, g.mean.high))
        observed[c] = Value(float(g.mean.value), low, high, n=r.counts.trajectories)
    rows = [Finding(key, "rotation", "", "not given", "regularity: largest share of a unit's steps at one frequency",
                    observed)]  # fmt: skip
    for null in NULLS:
        tests = {c: (r, g.nulls[null]) for c, (r, g) in regular.items() if null in g.nulls}
        if not tests:
            continue
        beside, beyond = {}, {}
        for c, (r, test) in tests.items():
            n = r.counts.trajectories
            beside[c] = _beside(test, n)
            passed = share_beyond(test, corrected=True)
            beyond[c] = Value(share_beyond(test), n=n, unit=" %", note=f" ({passed:.0f} % with q < .05)")
        rows.append(
            Finding(f"{key}_{null}", "rotation", "", "", f"of surrogates, {NAMES[null]}", beside, under=key, null=null)
        )
        rows.append(Finding(f"units_regular_{null}", "rotation", "", "", "units more regular, p < .05 (chance: 5 %)",
                            beyond, under=key, null=null))  # fmt: skip
    return rows


def share_beyond(test: NullTest, *, corrected: bool = False, leave_out: Tensor | None = None) -> float:
    """Percent of units that a null model does not explain, at p < .05 or at a false discovery rate of 5 %.

    Corrected, the p-values of the z-scores decide: those from ranks end at ``1 / (n + 1)``, and with few units there
    none would pass. ``leave_out``: numbers of units that do not count.
    """
    p = test.q_normal if corrected else test.p
    tested = p.isfinite()
    if leave_out is not None:
        tested = tested.clone()
        tested[leave_out.to(tested.device)] = False
    return 100 * float((p[tested] < 0.05).double().mean()) if tested.any() else float("nan")
