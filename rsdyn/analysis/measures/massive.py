"""The largest activations by class of token, and where they are written (Sun et al. 2024, arXiv 2402.17762)."""

from __future__ import annotations

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.results import MassiveActivations
from rsdyn.dynamics import massive as largest_of

N_MASSIVE = 4  # units whose curves are told


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


MEASURE = Measure(lambda collected, how: massive(collected))
