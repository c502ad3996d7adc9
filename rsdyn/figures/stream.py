"""The panels of the stream itself: activations, correlation, cosine, speed and information over depth (Fig. 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import sublayer_axis
from rsdyn.figures.style import (
    DARK,
    GREY,
    STYLE,
    WIDTH,
    as_array,
    as_curves,
    as_shape,
    check_sites,
    counted,
    legend,
    note,
    number,
    only_finite,
    percent,
    percent_ticks,
)


def mean_activations(
    mean: Any, *, percentile: float = 95.0, sites_per_layer: int = 2, title: str | None = None
) -> Figure:
    """Draw the mean activation of every unit at every sublayer as a heat map (Fig. 1B).

    ``mean`` is (S, D). Units are sorted by their mean at the last sublayer, as in the paper. Colours end at the
    ``percentile`` of all magnitudes, since a few massive units would leave the rest without colour; the largest is
    named above the panel. Means that are NaN or infinite are grey, and counted.

    Raises ValueError for other shapes, and when ``percentile`` is not above 0 and at most 100.
    """
    mean = as_array("mean", mean, 2)
    check_sites(sites_per_layer)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}, but must be above 0 and at most 100: pass 95, say.")
    n_sublayers, n_units = mean.shape
    ordered = mean[:, np.argsort(mean[-1], kind="stable")].T
    size = np.abs(mean[np.isfinite(mean)])
    limit = (float(np.percentile(size, percentile)) or float(size.max()) or 1.0) if len(size) else 1.0
    clipped = (size > limit).any()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad=GREY)
        extent = (-0.5, n_sublayers - 0.5, -0.5, n_units - 0.5)
        image = axes.imshow(
            ordered, aspect="auto", origin="lower", extent=extent, cmap=colours, vmin=-limit, vmax=limit
        )
        sublayer_axis(axes, n_sublayers, sites_per_layer)
        axes.set_xlim(-0.5, n_sublayers - 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel("units, sorted by mean at the last sublayer")
        bar = figure.colorbar(image, pad=0.02, aspect=30, extend="both" if clipped else "neither")
        bar.set_label(f"mean activation\n(colours end at percentile {percentile:g} of |mean|)")
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
        words = []
        if len(size):
            s, u = np.unravel_index(np.nanargmax(np.abs(only_finite(mean))), mean.shape)
            words.append(f"largest: unit {u}, {number(mean[s, u], '.3g')} at layer {s // sites_per_layer}")
        undefined = int((~np.isfinite(mean)).any(0).sum())
        if undefined:
            words.append(f"{counted(undefined, 'unit')} not finite somewhere (grey)")
        note(axes, "; ".join(words))
        legend(figure, title, [], [])
    return figure


def density(
    fraction: Any,
    participation: Any,
    *,
    threshold: float | Sequence[float],
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw how dense mean activations are at each sublayer: two numbers for what Fig. 1B shows.

    ``fraction`` (S,) is the share of units whose mean passes ``threshold`` in magnitude (several: each curve's own, in
    their order), drawn above; ``participation`` (S,) the participation ratio of the mean vector as a share of the
    units, drawn below. Each may also be a mapping from a name ("all units", "without massive units") to such values; a
    name has one colour in both.

    Raises ValueError for other shapes, lengths that differ, and values outside 0 to 1.
    """
    curves = {}
    for key, value in (("fraction", fraction), ("participation", participation)):
        curves[key] = as_curves(key, value) if isinstance(value, Mapping) else {"": as_array(key, value, 1)}
        extremes = [v for values in curves[key].values() for v in values[np.isfinite(values)]]
        if extremes and not (min(extremes) >= 0 and max(extremes) <= 1 + 1e-6):
            raise ValueError(
                f"{key} runs from {min(extremes):g} to {max(extremes):g}, but must be shares from 0 to 1: "
                "divide it by the number of units."
            )
    n_sublayers = len(next(iter(curves["fraction"].values())))
    n_below = len(next(iter(curves["participation"].values())))
    if n_below != n_sublayers:
        raise ValueError(
            f"participation has {n_below} values, but fraction has {n_sublayers}: pass both over the same sublayers."
        )
    check_sites(sites_per_layer)
    names = list(dict.fromkeys([*curves["fraction"], *curves["participation"]]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        each = ", ".join(f"{t:.3g}" for t in ([threshold] if isinstance(threshold, int | float) else threshold))
        labels = (f"share of units with\n|mean| > {each}", "participation ratio\n/ number of units")
        for axes, key, label in zip(panels, curves, labels, strict=True):
            for name, values in curves[key].items():
                i = names.index(name)
                drawn = look_of(name or "all units")
                look: Any = {"color": drawn.hex, "linestyle": drawn.line, "clip_on": False}
                look["linewidth"] = 0.8 if i else 1.4
                # markers that touch would hide the dashes
                marker = "os^Dv"[i % 5] if n_sublayers < 40 else ""
                axes.plot(only_finite(values), marker=marker, markersize=2.5, label=name, **look)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        sublayer_axis(panels[-1], n_sublayers, sites_per_layer)
        handles = {h.get_label(): h for axes in panels for h in axes.lines if h.get_label() in names and names != [""]}
        legend(figure, title, list(handles.values()), [str(name) for name in handles])
    return figure


def correlation_density(
    counts: Any, edges: Any, *, below: Any = None, bins_label: str = "correlation r", title: str | None = None
) -> Figure:
    """Draw a histogram of its correlations for every unit, units sorted by their mean correlation (Fig. 1D).

    ``counts`` is (D, bins), how many of a unit's sublayer pairs fall between the ``edges`` (bins + 1,), which rise; the
    paper's are 0 to 1. ``below`` (D,) counts those under the first edge: they are part of a unit's total, and their
    share is stated. Colour is the share of a unit's pairs in a bin; above it is the histogram of all units together. A
    unit without any pair (constant) is grey, sorted last, and counted.

    Raises ValueError for other shapes, negative counts, and edges that do not rise.
    """
    counts = as_array("counts", counts, 2, finite=True)
    n_units, n_bins = counts.shape
    edges = as_shape("edges", edges, (n_bins + 1,), "counts")
    below = np.zeros(n_units) if below is None else as_shape("below", below, (n_units,), "counts")
    if not (np.diff(edges) > 0).all():
        raise ValueError("edges do not rise, but each must be above the one before it: sort them.")
    if (counts < 0).any() or not (below >= 0).all():
        raise ValueError("counts holds values below 0, but must hold numbers of pairs: pass a histogram's counts.")
    total = counts.sum(1) + below
    empty = total == 0
    share = counts / np.where(empty, np.nan, total)[:, None]
    # pairs under the first edge have no bin: the edge itself stands for them in the mean
    mean_r = (share @ ((edges[:-1] + edges[1:]) / 2)) + below / np.where(empty, np.nan, total) * edges[0]
    share = share[np.argsort(mean_r, kind="stable")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.5))
        pooled = counts.sum(0) / max(total.sum(), 1)
        top.stairs(pooled, edges, color=DARK, fill=True)
        top.set_ylabel("share of\nall pairs")
        percent_ticks(top.yaxis)
        colours = matplotlib.colormaps["magma_r"].with_extremes(bad="#CCCCCC")
        rows = np.arange(n_units + 1) - 0.5
        shown = share[np.isfinite(share)]
        limit = float(np.percentile(shown[shown > 0], 99)) if (shown > 0).any() else 1.0
        image = axes.pcolormesh(edges, rows, share, cmap=colours, vmin=0, vmax=limit, rasterized=True)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(rows[0], rows[-1])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(bins_label)
        axes.set_ylabel("units, sorted by mean r")
        bar = figure.colorbar(
            image, ax=axes, pad=0.02, aspect=25, extend="max" if shown.max(initial=0) > limit else "neither"
        )
        bar.set_label("share of the unit's pairs")
        percent_ticks(bar.ax.yaxis)
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
        lost = percent(below.sum() / max(total.sum(), 1), 2)
        words = [f"{counted(int(total.sum()), 'pair')}, {lost} below {number(edges[0], 'g')}"]
        if empty.any():
            words.append(f"{counted(int(empty.sum()), 'unit')} undefined")
        note(top, "; ".join(words))
        legend(figure, title, [], [])
    return figure
