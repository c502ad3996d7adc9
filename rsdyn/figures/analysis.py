"""All panels of an analysis, in the paper's order, and its Figure 1 as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rsdyn.analysis.left_out import LargestUnits
from rsdyn.analysis.unit_surrogates import TurnHistograms
from rsdyn.figures.components import components
from rsdyn.figures.groups import groups
from rsdyn.figures.massive import massive, without_largest
from rsdyn.figures.panel import Panel
from rsdyn.figures.rotations import rotation
from rsdyn.figures.shape import shape
from rsdyn.figures.stream import stream
from rsdyn.figures.streams import Stream

FIGURE_1 = (
    "fig1b_mean_activations", "fig1c_correlation", "fig1c_correlation_mean", "fig1d_correlation_density",
    "fig1e_cosine", "fig1f_speed", "fig1g_information", "fig1h_information_mean",
)  # fmt: skip


def analysis_panels(
    streams: Sequence[Stream],
    *,
    largest: LargestUnits | None = None,
    units: Sequence[int] | None = None,
    seed: int = 0,
    histograms: Mapping[str, TurnHistograms] | None = None,
) -> list[Panel]:
    """The panels of what was measured.

    Args:
        streams: of one analysis, or of several beside each other.
        largest: the findings without the largest units, of one analysis.
        units, seed, histograms: as for :func:`rsdyn.figures.rotations.rotation`.
    """
    analyses = {id(s.analysis.results): s.analysis.results for s in streams}
    one = next(iter(analyses.values())) if len(analyses) == 1 else None
    by_group = [] if one is None else groups(one.by_group, n_sublayers=one.n_sublayers, sites=one.sites_per_layer)
    return [
        *stream(streams),
        *rotation(streams, units=units, seed=seed, histograms=histograms),
        *components(streams),
        *massive(streams),
        *shape(streams),
        *without_largest(largest),
        *by_group,
    ]


def figure_1(panels: Sequence[Panel]) -> list[Panel]:
    """Those that the paper's Figure 1 is put together of."""
    known = {panel.key: panel for panel in panels}
    return [known[key] for key in FIGURE_1 if key in known]
