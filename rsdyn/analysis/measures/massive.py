"""The largest activations by class of token, and where they are written (Sun et al. 2024, arXiv 2402.17762)."""

from __future__ import annotations

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.results import AnalysisResults, MassiveActivations
from rsdyn.dynamics import massive as largest_of
from rsdyn.metrics.running import TOKEN_CLASSES

N_MASSIVE = 4  # units whose curves are told
CLAIM = "a few activations are a thousand times larger than the rest, at the first token and a few others"
PAPER = "arXiv 2402.17762: over 100, and about 1,000 times the median"


def massive(collected: Collected) -> MassiveActivations:
    """The largest activations, the units they are of, where these are written, norms by position.

    Classes are those of :data:`rsdyn.metrics.running.TOKEN_CLASSES`; a class without tokens is NaN.
    """
    assert collected.extremes is not None
    found = collected.extremes.compute()
    units = largest_of.largest_units(found.largest, found.typical, N_MASSIVE)
    curves = found.largest[..., units].movedim(-1, 1)  # (C, units, S)
    places = largest_of.written(curves.nan_to_num(nan=0.0))
    largest = found.largest.nan_to_num(nan=-1.0).max(-1)
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
        norm_by_position=None if found.norms.isnan().all() else found.norms,
    )


def rows(found: AnalysisResults) -> list[Finding]:
    """The largest activation of each class of token, over a typical one where it stands."""
    rows: list[Finding] = []
    for k, name in enumerate(TOKEN_CLASSES):
        values = {c: _most(r.massive, k) for c, r in found.conditions.items() if r.massive and r.massive.counts[k]}
        if values:
            first = not rows
            rows.append(
                Finding(
                    f"massive_{name.replace(' ', '_')}", "massive", CLAIM if first else "", PAPER if first else "",
                    f"largest activation over the median one of its sublayer, {name}", values,
                )
            )  # fmt: skip
    return rows


def _most(found: MassiveActivations, k: int) -> Value:
    ratio = (found.largest[k] / found.typical[k]).nan_to_num(nan=-1.0)
    s = int(ratio.argmax())
    where = f" (unit {int(found.unit[k, s])}, {number(float(found.largest[k, s]))} at sublayer {s})"
    return Value(float(ratio[s]), n=int(found.counts[k]), note=where)


MEASURE = Measure(lambda collected, how: massive(collected), more=rows)
