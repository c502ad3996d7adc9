"""What geometry over depth asks of a stream, and the phases of all its curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from rsdyn.analysis.measures.curvature import LEAST_SUBLAYERS
from rsdyn.analysis.measures.dsa import LEAST_LAYERS, LEAST_SEQUENCES
from rsdyn.analysis.phases import CURVES, n_places, phases_of
from rsdyn.analysis.results import AnalysisResults
from rsdyn.dynamics.dimension import LEAST_STATES
from rsdyn.dynamics.phases import LEAST_PLACES
from rsdyn.dynamics.similarity import LEAST
from rsdyn.errors import UserError

NEEDS = {
    "dimension": ("skdim", "scikit-dimension"),
    "phases": ("ruptures", "ruptures"),
    "dsa": ("DSA", "dsa-metric"),
}


def check_installed(measures: Sequence[str]) -> None:
    """Raise ``UserError`` for a measure whose package is not installed, naming the key and the cure."""
    for measure, (module, package) in NEEDS.items():
        if measure in measures and find_spec(module) is None:
            raise UserError(f"measures: {measure} needs the package {package}: pip install {package}, or leave it out.")


def check_shape(measures: Sequence[str], *, n_trajectories: int, n_sublayers: int, sites_per_layer: int = 2) -> None:
    """Raise ``UserError`` for what this stream or this installation cannot give, naming the key and the cure."""
    check_installed(measures)
    n_layers = n_sublayers // sites_per_layer
    if "dsa" in measures and n_layers < LEAST_LAYERS:
        raise UserError(
            f"measures: dsa needs at least {LEAST_LAYERS} layers, and this model has {n_layers}. Leave it out."
        )
    if "curvature" in measures and n_sublayers < LEAST_SUBLAYERS:
        raise UserError(
            f"measures: curvature needs at least {LEAST_SUBLAYERS} sublayers, and this model has "
            f"{n_sublayers}. Leave it out."
        )
    for measure, least in (("similarity", LEAST), ("dimension", LEAST_STATES), ("dsa", LEAST_SEQUENCES)):
        if measure in measures and n_trajectories < least:
            raise UserError(
                f"measures: {measure} needs at least {least} sequences and gets {n_trajectories}. Raise "
                "`samples`, `keep` or `limit`, or leave it out."
            )
    sources = list(dict.fromkeys(name.split("/")[0] for name in CURVES))
    if "phases" in measures and not set(measures) & set(sources):
        raise UserError(
            "measures: phases look at the curves of other measures, and none of those is asked for. Add one "
            f"of {', '.join(sources)}."
        )
    looked_at = [curve for curve in CURVES if "phases" in measures and curve.split("/")[0] in measures]
    places = {curve: n_places(curve, n_sublayers, sites_per_layer) for curve in looked_at}
    fewest = min(places, key=places.__getitem__, default=None)
    if fewest is not None and places[fewest] < LEAST_PLACES:
        raise UserError(
            f"measures: phases need curves over at least {LEAST_PLACES} layers, and {fewest.split('/')[0]} has "
            f"{places[fewest]} in this model of {n_layers}. Leave phases out."
        )


def with_phases(found: AnalysisResults, seed: int) -> AnalysisResults:
    """Results with the phases of all curves of each stream together."""
    conditions = {
        name: replace(of, phases=phases_of(of, sites_per_layer=found.sites_per_layer, seed=seed))
        for name, of in found.conditions.items()
    }
    return replace(found, conditions=conditions)
