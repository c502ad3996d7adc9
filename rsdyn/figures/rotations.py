"""The panels of unit rotations: portraits, and turns beside what surrogates give (Fig. 2).

Rotations R are passed as measured, counter-clockwise positive; every panel shows clockwise turns, -R, as the paper
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from rsdyn.figures.colours import LIGHT, is_series, look_of
from rsdyn.figures.depth import depth_bar, draw_path
from rsdyn.figures.style import (
    DARK,
    GREY,
    STYLE,
    WIDTH,
    as_array,
    as_shape,
    check_sites,
    legend,
    note,
    number,
    only_finite,
    percent,
    wrapped,
)

COLUMNS, MOST_PORTRAITS = 3, 12
TURNS = "clockwise turns over the sublayers"


def portraits(
    x: Any,
    y: Any,
    names: Sequence[str],
    rotations: Any,
    *,
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw units in the plane of activation and gradient, coloured by depth, with their clockwise turns (Fig. 2A).

    ``x`` and ``y`` are (S, U), activation and gradient less their values at the first sublayer, ``names`` the U names
    and ``rotations`` (U,) the signed R of each; at most 12 units, three a row. Axes are each unit's own. Points that
    are not finite are left out, and a rotation that is not is called undefined.

    Raises ValueError for other shapes and for more units than fit.
    """
    x = as_array("x", x, 2)
    y = as_shape("y", y, x.shape, "x")
    n_sublayers, n_units = x.shape
    rotations = as_shape("rotations", rotations, (n_units,), "x")
    if len(names) != n_units:
        raise ValueError(f"names has {len(names)} names, but x has {n_units} units: pass one name a unit.")
    if n_units > MOST_PORTRAITS:
        raise ValueError(
            f"x has {n_units} units, but at most {MOST_PORTRAITS} portraits can be read in one column: choose some."
        )
    check_sites(sites_per_layer)
    n_columns = min(COLUMNS, n_units)
    n_rows = -(-n_units // n_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 1.15 * n_rows * (1 if n_columns > 1 else 2)), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        for axes in grid.ravel()[n_units:]:
            axes.set_axis_off()
        dots = None
        for u, axes in enumerate(grid.ravel()[:n_units]):
            axes.axhline(0, color=GREY, linewidth=0.4, zorder=0)
            axes.axvline(0, color=GREY, linewidth=0.4, zorder=0)
            path = only_finite(np.column_stack([x[:, u], y[:, u]]))
            dots = draw_path(axes, path, sites_per_layer, size=0.5)
            turns = -rotations[u]
            words = f"{number(turns)} turns ↻" if np.isfinite(turns) else "turns undefined"
            axes.set_title(f"{names[u]}\n{words}", fontsize=7, pad=3)
            axes.tick_params(labelsize=6, length=2, pad=1.5)
            for axis, values in ((axes.xaxis, path[:, 0]), (axes.yaxis, path[:, 1])):
                axis.set_major_locator(FixedLocator([0, _round_extreme(values)]))
                axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, "g")))
        figure.get_layout_engine().set(w_pad=0.01, wspace=0.0)  # type: ignore[union-attr, call-arg]
        depth_bar(figure, dots, grid, n_sublayers, sites_per_layer)
        figure.supxlabel("activation, from its start", fontsize=8)
        figure.supylabel("gradient over sublayers, from its start", fontsize=8)
        legend(figure, title, *grid[0, 0].get_legend_handles_labels(), ncols=4, handlelength=0.9)
    return figure


def _round_extreme(values: np.ndarray) -> float:
    """The value furthest from 0, cut to one digit: beside the 0 of the start, all the ticks there is room for."""
    finite = values[np.isfinite(values)]
    extreme = finite[np.abs(finite).argmax()] if len(finite) else 0.0
    if extreme == 0:
        return 0.0
    unit = 10.0 ** np.floor(np.log10(abs(extreme)))
    return float(np.trunc(extreme / unit + np.sign(extreme) * 1e-9) * unit)


def rotation_distribution(
    observed: Any,
    nulls: Mapping[str, Any],
    *,
    observed_name: str = "observed",
    bins: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw how clockwise turns are spread over units, and what each null model gives (Fig. 2B).

    ``observed`` (U,) is the signed R of each unit; ``nulls`` maps a null's name to its R in any shape: a row each,
    every histogram scaled to its own peak, the mean marked and written beside it with the SD. The dashed line carries
    the observed mean through all rows. Values that are not finite are left out, and counted above the panel.

    Raises ValueError for other shapes, for no null, and when no value of a row is finite.
    """
    rows = {observed_name: as_array("observed", observed, 1)}
    if not nulls:
        raise ValueError("nulls is empty, but the observed turns mean nothing alone: pass at least one null's R.")
    for name, values in nulls.items():
        if name == observed_name:
            raise ValueError(f"nulls has {name!r}, which is observed_name too: rename one of them.")
        flat = values.reshape(-1) if hasattr(values, "reshape") else np.ravel(values)
        rows[name] = as_array(f"nulls[{name!r}]", flat, 1)
    turns = {name: -values[np.isfinite(values)] for name, values in rows.items()}
    for name, values in turns.items():
        if not len(values):
            raise ValueError(f"{name!r} holds no finite value, but a distribution needs some: leave it out.")
    low = min(values.min() for values in turns.values())
    high = max(values.max() for values in turns.values())
    pad = 0.02 * (high - low) + 1e-3
    if bins is None:  # a bin of a few units is a spike, not a shape
        bins = int(np.clip(2 * min(len(values) for values in turns.values()) ** 0.5, 12, 80))
    edges = np.linspace(low - pad, high + pad, bins + 1)
    missing = {name: len(rows[name]) - len(turns[name]) for name in rows if len(turns[name]) < len(rows[name])}
    labels = [wrapped(name, 7, 80) for name in rows]
    height = max(0.36, 0.04 + 0.125 * max(label.count("\n") + 1 for label in labels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + height * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(turns.items()):
            base = len(rows) - 1 - i
            heights = np.histogram(values, edges)[0]
            colour = look_of("original").hex if i == 0 else look_of(name).hex if is_series(name) else GREY
            axes.stairs(
                base + 0.85 * heights / heights.max(), edges, baseline=base, fill=True, color=colour, label=name
            )
            mean = values.mean()
            axes.plot([mean, mean], [base, base + 0.85], color="#000000" if i else "#FFFFFF", linewidth=1.2)
            words = f"{number(mean)} ± {number(values.std())}"
            axes.text(1.02, base + 0.4, words, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
        axes.axvline(turns[observed_name].mean(), color=DARK, linestyle="--", linewidth=0.8, zorder=3)
        axes.text(1.02, len(rows) - 0.05, "mean ± SD", transform=axes.get_yaxis_transform(), fontsize=7, color=DARK)
        axes.set_yticks([len(rows) - 1 - i + 0.4 for i in range(len(rows))], labels)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, len(rows))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(TURNS)
        if missing:
            note(axes, "left out: " + ", ".join(f"{n} of {name}" for name, n in missing.items()))
        legend(figure, title, [], [])
    return figure


def rotations_by_unit(
    observed: Any, null_mean: Any, null_std: Any, *, p: Any, null_name: str = "null", title: str | None = None
) -> Figure:
    """Draw every unit's clockwise turns, sorted, beside its own null's mean and 95 % band (Fig. 2C).

    ``observed``, ``null_mean`` and ``null_std`` are (U,), R as measured; the band is the mean ± 1.96 SD. ``p`` (U,) are
    the units' p-values, of which the share below .05 is stated, as everywhere: 5 % if the null were true. (It is not
    quite the share outside the band, since turns come in steps and no null is Gaussian.) Units with a value that is
    not finite are left out, and counted.

    Raises ValueError for other shapes.
    """
    observed = as_array("observed", observed, 1)
    shape = observed.shape
    null_mean, null_std = (
        as_shape(key, value, shape, "observed") for key, value in (("null_mean", null_mean), ("null_std", null_std))
    )
    p = as_shape("p", p, shape, "observed")
    tested = np.isfinite(p)
    known = np.isfinite(observed) & np.isfinite(null_mean) & np.isfinite(null_std)
    order = np.flatnonzero(known)[np.argsort(-observed[known], kind="stable")]
    turns, centre, half = -observed[order], -null_mean[order], 1.96 * null_std[order]
    rank = np.arange(len(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        band = axes.fill_between(rank, centre - half, centre + half, color=GREY, alpha=0.45, linewidth=0)
        # dots, since a line through unordered values of thousands of units is a black mass
        size = 2.0 if len(order) < 300 else 0.7
        axes.plot(rank, centre, "o", color=LIGHT["muted"], markersize=size, markeredgewidth=0, rasterized=True)
        (key,) = axes.plot([], [], "o", color=LIGHT["muted"], markersize=2)
        (line,) = axes.plot(rank, turns, color=look_of("original").hex, linewidth=1.4)
        axes.set_xlabel("units, sorted by their turns")
        axes.set_ylabel("clockwise turns")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        words = []
        if tested.any():
            beyond = percent((p[tested] < 0.05).mean())
            words.append(f"{beyond} of {tested.sum()} units have p < .05 (5 % if the null held)")
        if len(order) < len(observed):
            words.append(f"{len(observed) - len(order)} undefined")
        note(axes, "; ".join(words))
        legend(figure, title, [line, key, band], ["observed", f"{null_name}: mean", "± 1.96 SD"])
    return figure
