"""Speed of the stream, raw and relative to the norm of the state (paper 2.4, Fig. 1F; METHOD section 0.12)."""

from __future__ import annotations

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import mean_over_sequences
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, Velocity
from rsdyn.analysis.statistics import cross_over_within, late_steepening, per_layer
from rsdyn.dynamics import geometry


def velocity(collected: Collected) -> Velocity:
    """The mean length of the step from each sublayer to the next, and over the norm of the state it starts from."""
    at = collected.by_position
    return Velocity(
        speed=mean_over_sequences(collected, "speed"),
        relative=mean_over_sequences(collected, "relative_speed"),
        by_position=None if at is None else at.speed,
        relative_by_position=None if at is None else at.relative_speed,
    )


def rows(found: AnalysisResults) -> list[Row[Velocity]]:
    """Whether the stream accelerates, and where."""
    sites = found.sites_per_layer
    return [
        *trend("speed", "mean speed", lambda r: r.speed, sites=sites, claim="the stream accelerates", paper="rises",
               relative=True),
        *trend("relative_speed", "mean speed over the state's norm", lambda r: r.relative, sites=sites, relative=True),
        Row("speed_late_steepening", "mean speed, slope there less before, of the mean", lambda r: r.speed,
            lambda c: late_steepening(per_layer(c, sites)), "most steeply in the last third", "steepest there"),
        Row("speed_cross_over_within", "mean speed, cross over within", lambda r: r.speed, cross_over_within,
            "cross-layer steps are longer", "cross > within", both_sites=True),
    ]  # fmt: skip


MEASURE = Measure(
    lambda collected, how: velocity(collected),
    rows,
    per_sequence={"speed": geometry.speed, "relative_speed": geometry.relative_speed},
)
