"""What a measure is: how a stream is read for it, how its results are made, and which rows of the findings it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from torch import Tensor

from rsdyn.analysis.finding import Finding
from rsdyn.analysis.results import AnalysisResults, Measured
from rsdyn.analysis.settings import AnalysisConfig
from rsdyn.analysis.statistics import fitted_change, per_layer, relative_change, spearman

if TYPE_CHECKING:
    from rsdyn.analysis.collected import Collected

T = TypeVar("T")
Statistic = Callable[[Tensor], Tensor]
PerSequence = Callable[[Tensor, Tensor | None], Tensor]
"""Of trajectories ``(n, S, D)`` and a mask ``(D,)`` of the units that count, or None for all: ``(n, S)`` or
``(n, S - 1)``, a curve per trajectory."""


class How(NamedTuple):
    """How a stream is measured.

    Attributes:
        settings: the keys under ``analysis``.
        sites_per_layer: 1 or 2.
        seed: of everything random.
        nulls: whether rotations and dimensions are tested against null models made of the stream itself.
        main: the run's main stream, where this is another one.
    """

    settings: AnalysisConfig
    sites_per_layer: int = 2
    seed: int = 0
    nulls: bool = True
    main: Collected | None = None


@dataclass(frozen=True)
class Row(Generic[T]):
    """A row of the findings that is a statistic of something measured.

    Attributes:
        key, statistic, claim, paper, under, detail: as in :class:`~rsdyn.analysis.finding.Finding`.
        curve: what the statistic is of, in a measure's results; None where that was not measured.
        of: the statistic, of a curve or a number; of many curves ``(..., n)`` at once where it is ranked, or by group.
        both_sites: whether it needs both sites of a layer.
        ranked: whether it moves in steps, so that its interval is by simulation.
        why: why it is undefined, where the row itself knows.
        shown: what of the curve's values are shown beside it as first, middle and last; None shows none.
    """

    key: str
    statistic: str
    curve: Callable[[T], Measured | None]
    of: Statistic
    claim: str = ""
    paper: str = ""
    both_sites: bool = False
    ranked: bool = False
    shown: Statistic | None = None
    why: str = ""
    under: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Measure(Generic[T]):
    """A measure of a stream.

    Attributes:
        measure: its results, from what was collected of a stream, on all processes alike.
        rows: its rows of the findings.
        more: rows that are no statistic of one curve, which stand behind the others.
        per_sequence: curves whose means over trajectories it needs, by their names in
            :class:`rsdyn.dynamics.geometry.Curves`.
        keeps_samples: whether it needs every sample of a unit at once.
    """

    measure: Callable[[Collected, How], T]
    rows: Callable[[AnalysisResults], Sequence[Row[T]]] = lambda found: ()
    more: Callable[[AnalysisResults], Sequence[Finding]] = lambda found: ()
    per_sequence: Mapping[str, PerSequence] = field(default_factory=dict)
    keeps_samples: bool = False


DEPTH = "rank correlation with depth"
FITTED = "fitted change from first to last layer"


def trend(
    key: str,
    what: str,
    curve: Callable[[T], Measured | None],
    *,
    sites: int = 1,
    claim: str = "",
    paper: str = "",
    relative: bool = False,
) -> list[Row[T]]:
    """Rank correlation of a curve with depth, and the fitted change beside it: one says whether, the other how much.

    Args:
        key: the rows are ``<key>_trend`` and ``<key>_change``.
        what: the curve, in words.
        curve: the curve, in a measure's results.
        sites: of a curve over transitions, the sites per layer, so that each layer's transitions count together; of one
            over sublayers 1, which takes it as it is.
        claim, paper: as in :class:`Row`.
        relative: whether the change is a share of the curve's mean, for a curve that has a zero and no end.
    """

    def layers(values: Tensor) -> Tensor:
        return per_layer(values, sites)

    change, words = (relative_change, f"{FITTED}, of the mean") if relative else (fitted_change, FITTED)
    return [
        Row(f"{key}_trend", f"{what}, {DEPTH}", curve, lambda c: spearman(layers(c)), claim, paper, ranked=True,
            shown=layers),
        Row(f"{key}_change", words, curve, lambda c: change(layers(c)), under=f"{key}_trend", detail=True),
    ]  # fmt: skip
