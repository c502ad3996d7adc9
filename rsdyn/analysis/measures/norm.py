"""Length of the state at each sublayer: how much the stream grows, beside which speeds and densities are read."""

from __future__ import annotations

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import mean_over_sequences
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, Norm
from rsdyn.dynamics import geometry


def norm(collected: Collected) -> Norm:
    """The mean over sequences, at each sublayer."""
    return Norm(mean_over_sequences(collected, "norm"))


def rows(found: AnalysisResults) -> list[Row[Norm]]:
    """How much the stream grows."""
    return trend("norm", "mean norm of the state", lambda r: r.mean, claim="the state grows", paper="not given",
                 relative=True)  # fmt: skip


MEASURE = Measure(lambda collected, how: norm(collected), rows, per_sequence={"norm": geometry.norm})
