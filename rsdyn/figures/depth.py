"""How depth is drawn: as an axis, as the two kinds of transition along it, and as the colour of a path.

Sublayer axes are labelled with layer numbers, counted from 0 as in the model's own module names. Entry s of anything
taken between sublayers belongs to the step from s to s + 1 and is drawn between the two; with both sites of a layer
recorded, even entries are within a layer and odd ones across layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import FixedFormatter, FixedLocator

from rsdyn.figures.style import CROSS, GREY, WITHIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layer_ticks(n_sublayers: int, sites_per_layer: int) -> list[int]:
    """Choose at most nine layers to label; a depth of 16, 32 or 80 layers then divides evenly."""
    n_layers = -(-n_sublayers // sites_per_layer)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, n_layers) if n_layers <= 9 * step)
    return list(range(0, n_layers, step))


def sublayer_axis(axes: Axes, n_sublayers: int, sites_per_layer: int) -> None:
    """Label a sublayer axis with layer numbers, each at its layer's resid_pre."""
    layers = layer_ticks(n_sublayers, sites_per_layer)
    axes.xaxis.set_major_locator(FixedLocator([layer * sites_per_layer for layer in layers]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(layer) for layer in layers]))
    axes.set_xlim(-0.02 * n_sublayers - 0.2, n_sublayers - 1 + 0.02 * n_sublayers + 0.2)
    axes.set_xlabel("layer")


class Kind(NamedTuple):
    """A kind of transition: its colour, its name, its marker, and the entries ``at`` that belong to it."""

    colour: str
    label: str
    marker: str
    at: np.ndarray


def transition_kinds(n_transitions: int, sites_per_layer: int) -> list[Kind]:
    """The kinds there are among the transitions: a single one is within the layer, and none crosses."""
    kinds = [(CROSS, "layer to layer", "o")]
    if sites_per_layer == 2:
        kinds = [(WITHIN, "within layer", "o"), (CROSS, "cross layer", "s")]
    found = [Kind(*kind, np.arange(first, n_transitions, sites_per_layer)) for first, kind in enumerate(kinds)]
    return [kind for kind in found if len(kind.at)]


def draw_band(axes: Axes, at: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, alpha: float = 0.2) -> None:
    """Shade the interval low to high along ``at``."""
    if len(at) > 1:
        axes.fill_between(at, low, high, color=colour, alpha=alpha, linewidth=0)
    else:  # a band of one point has no width
        axes.vlines(at, low, high, color=colour, alpha=alpha + 0.1, linewidth=3)


def draw_transitions(axes: Axes, values: np.ndarray, interval: np.ndarray | None, sites_per_layer: int) -> None:
    """Draw values (S - 1,) in the colour of each kind, with the interval (2, S - 1) behind them."""
    for kind in transition_kinds(len(values), sites_per_layer):
        if interval is not None:
            draw_band(axes, kind.at + 0.5, interval[0, kind.at], interval[1, kind.at], kind.colour)
        size = 3.5 if len(values) < 40 else 2.2
        axes.plot(
            kind.at + 0.5, values[kind.at], color=kind.colour, marker=kind.marker, markersize=size, label=kind.label
        )


def draw_samples(axes: Axes, samples: np.ndarray) -> None:
    """Draw the paths (M, S, 2) of single sequences as thin grey lines."""
    # A handful reads as a spread, hundreds only if each is faint.
    faint = float(np.clip(20 / len(samples), 0.12, 0.6))
    axes.add_collection(LineCollection(list(samples), colors=GREY, linewidths=0.4, alpha=faint, zorder=1))
    axes.plot([], [], color=GREY, linewidth=0.8, label="sequences")


def draw_path(axes: Axes, path: np.ndarray, sites_per_layer: int, size: float = 1.0) -> Any:
    """Draw one path (S, 2): line and markers coloured by depth, the start and the end ringed; returns the markers.

    ``size`` shrinks the markers for small panels.
    """
    depth = np.arange(len(path)) / sites_per_layer
    axes.plot(*path.T, color="#444444", linewidth=0.6, zorder=2)
    shapes = [("o", "resid_pre"), ("s", "resid_mid")] if sites_per_layer == 2 else [("o", "resid_pre")]
    dots = None
    for first, (marker, label) in enumerate(shapes):
        if len(path) > first:
            dots = axes.scatter(
                path[first::sites_per_layer, 0],
                path[first::sites_per_layer, 1],
                c=depth[first::sites_per_layer],
                cmap="viridis",
                vmin=0,
                vmax=max(depth[-1], 1e-9),
                s=(14 if len(path) < 40 else 8) * size,
                marker=marker,
                linewidths=0,
                zorder=3,
            )
            axes.plot([], [], marker, color="#666666", label=label)  # the legend's marker: its colour means no layer
    width, ring, dot = 0.8 * size**0.5, 7 * size**0.5, 3.5 * size**0.5
    for point, colour, label in ((path[0], "#FFFFFF", "start"), (path[-1], "#000000", "end")):
        edge: Any = {"markeredgecolor": "#000000", "markeredgewidth": width}
        axes.plot(*point, "o", markersize=ring, markerfacecolor="none", zorder=4, **edge)
        axes.plot(*point, "o", markersize=dot, color=colour, zorder=5, label=label, **edge)
    return dots


def depth_bar(figure: Figure, dots: Any, axes: Any, n_sublayers: int, sites_per_layer: int) -> None:
    """The colour bar of a path, labelled with layers."""
    bar = figure.colorbar(dots, ax=axes, pad=0.02, aspect=30)
    bar.set_label("layer")
    bar.set_ticks(layer_ticks(n_sublayers, sites_per_layer))
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]
