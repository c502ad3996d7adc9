"""The panels of what is measured between one sublayer and the next: curves, and bands over units (Figs. 1C, E-H)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import draw_band, draw_transitions, sublayer_axis, transition_kinds
from rsdyn.figures.style import (
    GREY,
    STYLE,
    WIDTH,
    as_array,
    as_interval,
    as_shape,
    check_sites,
    fisher_scale,
    from_zero,
    legend,
    log_scale,
    note,
    only_finite,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def transition_curve(
    values: Any,
    interval: Any = None,
    *,
    others: Mapping[str, Any] | None = None,
    ylabel: str = "value",
    interval_label: str = "interval",
    log: bool = False,
    fisher: bool = False,
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw a measure of each transition over depth: cosine (Fig. 1E), speed (1F), mean information (1H).

    ``values`` is (S - 1,), entry s from sublayer s to s + 1, drawn between the two; ``interval`` (2, S - 1) is the low
    and high end about each, or None. ``others`` maps the name of a condition (another text, a control, a floor) to
    values of the same length: thin lines of one colour and dash, the markers telling within-layer from cross-layer.
    The axis begins at 0 where that costs at most half of it; with ``log`` it is logarithmic, with ``fisher`` (cosines,
    correlations) spaced by artanh, which gives .9 to .99 the room of 0 to .8. Values that cannot be drawn (NaN,
    infinite, or not above 0 on a logarithmic axis) leave a gap and are counted above the panel.

    Raises ValueError for other shapes.
    """
    values = as_array("values", values, 1)
    n_transitions = len(values)
    interval = None if interval is None else only_finite(as_interval("interval", interval, n_transitions, "value"))
    curves = {
        name: as_shape(f"others[{name!r}]", curve, (n_transitions,), "values") for name, curve in (others or {}).items()
    }
    check_sites(sites_per_layer)
    if log and fisher:
        raise ValueError("log and fisher are both True, but an axis has one scale: pass one of them.")
    everything = np.concatenate([values, *curves.values()])
    drawable = np.isfinite(everything) & ((everything > 0) | (not log))
    values, curves = only_finite(values), {name: only_finite(curve) for name, curve in curves.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        draw_transitions(axes, values, interval, sites_per_layer)
        if interval is not None:
            axes.fill_between([], [], [], color=GREY, alpha=0.4, linewidth=0, label=interval_label)
        for i, (name, curve) in enumerate(curves.items()):
            look: Any = {"color": look_of(name).hex, "linestyle": look_of(name).line, "linewidth": 0.8}
            for kind in transition_kinds(n_transitions, sites_per_layer):
                # a few markers tell the kind; one at every point would hide the dashes
                every = max(1, len(kind.at) // 6)
                axes.plot(
                    kind.at + 0.5,
                    curve[kind.at],
                    marker=kind.marker,
                    markersize=2.5,
                    markerfacecolor="white",
                    markeredgewidth=0.6,
                    markevery=(i % every, every),
                    zorder=1.5,
                    label=name if kind.at[0] == 0 else "_" + name,  # one entry in the legend
                    **look,
                )
        sublayer_axis(axes, n_transitions + 1, sites_per_layer)
        drawn = [values, *curves.values(), *([] if interval is None else [interval])]
        _scale(axes, drawn, log, fisher)
        axes.set_ylabel(ylabel)
        if not drawable.all():
            note(axes, f"{(~drawable).sum()} of {len(drawable)} values cannot be drawn")
        legend(figure, title)
    return figure


def unit_correlations(r: Any, *, fisher: bool = True, sites_per_layer: int = 2, title: str | None = None) -> Figure:
    """Draw how the correlations of single units between successive sublayers are spread, over depth (Fig. 1C).

    ``r`` is (S - 1, D), entry s from sublayer s to s + 1. A panel each for within-layer and cross-layer transitions:
    the middle 90 % and 50 % of the units as bands, their median and mean as lines, and the other panel's median, thin.
    The axis is spaced by artanh r (Fisher's z), since most correlations crowd below 1; ``fisher=False`` is linear.
    Undefined values (constant units) are left out where they occur; the units concerned are counted above the panel.

    Raises ValueError for other shapes.
    """
    r = as_array("r", r, 2)
    undefined = int((~np.isfinite(r)).any(0).sum())
    words = f"{undefined} of {r.shape[1]} units undefined somewhere (constant)" if undefined else ""
    return _unit_bands(r, "correlation of a unit", words, None, False, fisher, sites_per_layer, title)


def unit_information(
    mi: Any,
    *,
    floor: Any = None,
    ylabel: str = "mutual information\nof a unit (nats)",
    log: bool = False,
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw how the mutual information of single units between successive sublayers is spread, over depth (Fig. 1G).

    ``mi`` is (S - 1, D) in nats, entry s from sublayer s to s + 1, drawn as `unit_correlations` draws correlations;
    ``floor`` (S - 1,) is what permuted pairs give, or None. Infinite values (a unit that was only copied) and NaN (a
    constant one) are left out of the bands and counted above the panel. Pass a ``ylabel`` for any estimator that does
    not give nats, the paper's literal sum above all.

    Raises ValueError for other shapes.
    """
    mi = as_array("mi", mi, 2)
    infinite, undefined = int(np.isinf(mi).sum()), int(np.isnan(mi).sum())
    parts = [f"{n} {word}" for n, word in ((infinite, "infinite"), (undefined, "undefined")) if n]
    words = f"{' and '.join(parts)} of {mi.size} values left out" if parts else ""
    if floor is not None:
        floor = as_shape("floor", floor, (len(mi),), "mi")
    return _unit_bands(mi, ylabel, words, floor, log, False, sites_per_layer, title)


def _scale(axes: Axes, drawn: list[np.ndarray], log: bool, fisher: bool) -> None:
    values = np.concatenate([part.ravel() for part in drawn])
    if log:
        log_scale(axes, values)
    elif fisher:
        fisher_scale(axes, values)
    else:
        from_zero(axes, values)


def _unit_bands(
    values: np.ndarray,
    ylabel: str,
    words: str,
    floor: np.ndarray | None,
    log: bool,
    fisher: bool,
    sites_per_layer: int,
    title: str | None,
) -> Figure:
    """A panel a kind of transition: quantile bands, median and mean over the units with a finite value."""
    check_sites(sites_per_layer)
    n_transitions = len(values)
    summary = np.full((len(QUANTILES) + 1, n_transitions), np.nan)
    for s, row in enumerate(values):
        finite = row[np.isfinite(row)]
        if len(finite):
            summary[:, s] = *np.quantile(finite, QUANTILES), finite.mean()
    low, lower, median, upper, high, mean = summary
    kinds = transition_kinds(n_transitions, sites_per_layer)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.45 * len(kinds)), layout="constrained")
        panels = figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, kind in zip(panels, kinds, strict=True):
            at, x = kind.at, kind.at + 0.5
            marker = kind.marker if len(at) < 40 else ""
            draw_band(axes, x, low[at], high[at], kind.colour, 0.18)
            draw_band(axes, x, lower[at], upper[at], kind.colour, 0.35)
            axes.plot(x, median[at], color=kind.colour, marker=marker, markersize=2, label="median")
            axes.plot(x, mean[at], color="#000000", linestyle="--", linewidth=0.8, label="mean")
            for other in kinds:
                if other is not kind:
                    axes.plot(
                        other.at + 0.5, median[other.at], color=other.colour, linewidth=0.7, label="the other's median"
                    )
            if floor is not None:
                axes.plot(
                    x, only_finite(floor)[at], color=look_of("floor").hex, linestyle=":", label="floor (permuted pairs)"
                )
            axes.set_ylabel(kind.label, color=kind.colour)
        shown = [summary] if floor is None else [summary, floor]
        _scale(panels[0], shown, log, fisher)
        sublayer_axis(panels[-1], n_transitions + 1, sites_per_layer)
        figure.supylabel(ylabel, fontsize=8)
        note(panels[0], words)
        handles, labels = panels[0].get_legend_handles_labels()
        for alpha, label in ((0.4, "middle 90 % of units"), (0.8, "middle 50 %")):
            handles.append(panels[0].fill_between([], [], [], color=GREY, alpha=alpha, linewidth=0))
            labels.append(label)
        legend(figure, title, handles, labels)
    return figure
