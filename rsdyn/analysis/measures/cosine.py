"""Cosine of successive states (paper 2.3, Fig. 1E)."""

from __future__ import annotations

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import mean_over_sequences
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, Cosine
from rsdyn.dynamics import geometry


def cosine(collected: Collected) -> Cosine:
    """The mean over sequences, from each sublayer to the next."""
    at = collected.by_position
    return Cosine(mean_over_sequences(collected, "cosine"), None if at is None else at.cosine)


def rows(found: AnalysisResults) -> list[Row[Cosine]]:
    """Whether successive states align."""
    return trend("cosine", "mean cosine", lambda r: r.mean, sites=found.sites_per_layer,
                 claim="successive states align more and more", paper="rises")  # fmt: skip


MEASURE = Measure(lambda collected, how: cosine(collected), rows, per_sequence={"cosine": geometry.cosine})
