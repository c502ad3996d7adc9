"""The panels of perturbed streams: teleported points in the plane (Fig. 4D), and whether they come back over depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, StrMethodFormatter, SymmetricalLogLocator

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import draw_band
from rsdyn.figures.style import (
    DARK,
    GREY,
    MINUS,
    STYLE,
    WIDTH,
    as_array,
    as_curves,
    as_interval,
    brief_percent,
    counted,
    fisher_scale,
    from_zero,
    legend,
    log_scale,
    only_finite,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def teleports(
    reference: Any,
    teleported: Mapping[Any, Any],
    *,
    n_steps: int = 12,
    ratio: Any = None,
    name: str = "PC",
    title: str | None = None,
) -> Figure:
    """Draw where points put into the plane go next, a panel a layer of injection (Fig. 4D).

    ``reference`` is (S, K), the latents of the unperturbed trajectory, K >= 2: the grey line, ringed where it is at the
    sublayer of the injection. ``teleported`` maps a layer (a number, or a name) to latents (P, S', K) from the
    injection on, the first being the points as they were put, the last at the reference's last sublayer. Arrows show
    the mean displacement a sublayer over the next ``n_steps`` sublayers, or as many as there are, which the panel then
    says. Their colour is its length, on one scale for all panels, logarithmic when the largest is over 8 times the
    median; lengths on paper are scaled to each panel's longest. ``ratio`` (K,) is the share of the variance along each
    component, written on its axis, and ``name`` what a dimension is called there. Points that are not finite are left
    out and counted over their panel.

    Raises ValueError for other shapes, no layer, fewer than two dimensions, a reference that is not finite, more
    sublayers than the reference has, and ``n_steps`` below 1.
    """
    path = as_array("reference", reference, 2, finite=True)
    if path.shape[1] < 2:
        raise ValueError(f"reference has shape {path.shape}, but needs 2 dimensions for a plane: keep two.")
    if not teleported:
        raise ValueError("teleported is empty, but must map at least one layer to its points: pass one layer.")
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}, but must be at least 1: pass 12 for the paper's figure.")
    labels = [f"{name} 1", f"{name} 2"]
    if ratio is not None:
        shares = as_array("ratio", ratio, 1)
        if len(shares) < 2:
            raise ValueError("ratio has 1 value, but must have one a component: pass (K,) shares.")
        labels = [f"{label} ({brief_percent(share)})" for label, share in zip(labels, shares[:2], strict=True)]
    points = {layer: _points(layer, values, path) for layer, values in teleported.items()}
    steps = {layer: _mean_step(x, n_steps) for layer, x in points.items()}
    lengths = np.concatenate([np.hypot(*step.T) for step in steps.values()])
    low, high = _limits(path[:, :2], points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.15), layout="constrained")
        colours = _colours(lengths[np.isfinite(lengths)])
        for i, (layer, axes) in enumerate(_panels(figure, points, 1.4, sharex=True)):
            axes.plot(*path[:, :2].T, color=GREY, linewidth=0.9, zorder=1)
            at = path[len(path) - points[layer].shape[1], :2]
            axes.plot(*at, "o", markersize=4.5, markerfacecolor="none", markeredgecolor=DARK, zorder=4)
            axes.set_title(_heading(layer, points[layer], steps[layer], n_steps), fontsize=7, pad=3)
            _draw_arrows(axes, points[layer][:, 0], steps[layer], colours, high - low)
            if i == 0:
                axes.set_xlim(low[0], high[0])
                axes.set_ylim(low[1], high[1])
                axes.xaxis.set_major_locator(MaxNLocator(4))
                axes.yaxis.set_major_locator(MaxNLocator(4))
            if i >= len(points) - 2:  # the lowest of each column; a label for both would lie below the colour bar
                axes.set_xlabel(labels[0])
        figure.supylabel(labels[1], fontsize=8)
        extend = "min" if isinstance(colours.norm, LogNorm) else "neither"
        bar = figure.colorbar(colours, ax=figure.axes, location="bottom", aspect=40, shrink=0.9, extend=extend)
        bar.set_label(f"displacement per sublayer, over the next {n_steps}", fontsize=8)
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
        if isinstance(colours.norm, LogNorm):  # ticks at powers of ten alone would be one or two
            bar.locator = LogLocator(subs=(1, 2, 5))
            bar.formatter = StrMethodFormatter("{x:g}")
        ring = Line2D([], [], linestyle="", marker="o", markersize=4.5, markerfacecolor="none", markeredgecolor=DARK)
        legend(figure, title, [Line2D([], [], color=GREY), ring], ["unperturbed", "at the injection"])
    return figure


def recovery_curves(
    curves: Mapping[Any, Mapping[str, Any]],
    intervals: Mapping[Any, Mapping[str, Any]] | None = None,
    *,
    ylabel: str = "distance to the reference / its norm",
    interval_label: str = "interval",
    log: bool = False,
    fisher: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw a measure of recovery against sublayers since the injection, a panel a layer, beside its controls.

    ``curves`` maps a layer of injection (a number, or a name) to its conditions: name -> (S',), entry 0 being the state
    as it was put. The first name is the solid line; the others (random directions, a swapped-in state, frozen
    attention) are dashed. ``intervals`` maps layers and names to (2, S'), low and high, for as many of them as there
    are. A dotted line carries the first curve's value as put through its panel: what does not pass it has not
    recovered. The value axis is shared, and linear, logarithmic, or with ``fisher`` (cosines) spaced by artanh. Values
    that cannot be drawn leave a gap and are counted over their panel.

    Raises ValueError for other shapes, no layer or no curve, and an interval that belongs to no curve.
    """
    if not curves:
        raise ValueError("curves is empty, but must map at least one layer to its curves: pass one layer.")
    if log and fisher:
        raise ValueError("log and fisher are both True, but an axis has one scale: pass one of them.")
    arrays = {layer: as_curves(f"curves[{layer!r}]", found) for layer, found in curves.items()}
    bands = _bands(intervals or {}, arrays)
    names = list(dict.fromkeys(name for found in arrays.values() for name in found))
    looks = {name: _look(name, i) for i, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75), layout="constrained")
        for layer, axes in _panels(figure, arrays, 1.2):
            found = arrays[layer]
            axes.axhline(next(iter(found.values()))[0], color=GREY, linewidth=0.6, linestyle=":", zorder=0)
            for name, values in found.items():
                since = np.arange(len(values))
                if name in bands[layer]:
                    low, high = bands[layer][name]
                    draw_band(axes, since, low, high, looks[name]["color"], 0.15)
                dots: Any = {"marker": "o", "markersize": 2} if len(values) < 8 else {}
                axes.plot(since, only_finite(values), label=name, **looks[name], **dots)
            everything = np.concatenate(list(found.values()))
            lost = int((~np.isfinite(everything) | ((everything <= 0) & log)).sum())
            axes.set_title(_layer(layer) + (f", {lost} not drawn" if lost else ""), fontsize=7, pad=3)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.margins(x=0.03)
        drawn = [values for found in arrays.values() for values in found.values()]
        drawn += [ends.ravel() for found in bands.values() for ends in found.values()]
        scale = log_scale if log else fisher_scale if fisher else from_zero
        scale(figure.axes[0], np.concatenate(drawn))
        figure.supxlabel("sublayers since the injection", fontsize=8)
        figure.supylabel(ylabel, fontsize=8)
        handles: list[Any] = [Line2D([], [], **looks[name]) for name in names]
        labels = [*names, "as put"]
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, linestyle=":"))
        if any(bands.values()):
            handles.append(Patch(color=GREY, alpha=0.4, linewidth=0))
            labels.append(interval_label)
        legend(figure, title, handles, labels, handlelength=2.2)
    return figure


def by_layer(
    layers: Sequence[int],
    curves: Mapping[str, Any],
    intervals: Mapping[str, Any] | None = None,
    *,
    xlabel: str,
    ylabel: str,
    interval_label: str = "interval",
    log: bool = False,
    symlog: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one number a layer that was perturbed, beside its controls.

    ``curves`` maps names to (L,) for the ``layers``, ``intervals`` some of them to (2, L), low and high. The value axis
    is linear from zero, logarithmic, or with ``symlog`` linear up to that size and logarithmic beyond it on both sides.
    Values that cannot be drawn leave a gap.

    Raises ValueError for other shapes, no curve, and an interval that belongs to no curve.
    """
    arrays = as_curves("curves", curves)
    bands = _bands({None: intervals or {}}, {None: arrays})[None]
    if any(len(values) != len(layers) for values in arrays.values()):
        raise ValueError(f"curves must have a value for each of the {len(layers)} layers: check them.")
    looks = {name: _look(name, i) for i, name in enumerate(arrays)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        for name, values in arrays.items():
            if name in bands:
                low, high = bands[name]
                draw_band(axes, np.asarray(layers), low, high, looks[name]["color"], 0.15)
            axes.plot(layers, only_finite(values), label=name, marker="o", markersize=2.2, **looks[name])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        drawn = np.concatenate([*arrays.values(), *(ends.ravel() for ends in bands.values())])
        if symlog is not None:
            axes.axhline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
            axes.set_yscale("symlog", linthresh=symlog)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=symlog))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}".replace("-", MINUS)))
        else:
            (log_scale if log else from_zero)(axes, drawn)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        handles: list[Any] = [Line2D([], [], **looks[name]) for name in arrays]
        labels = [*arrays]
        if any(np.isfinite(ends).any() for ends in bands.values()):
            handles.append(Patch(color=GREY, alpha=0.4, linewidth=0))
            labels.append(interval_label)
        legend(figure, title, handles, labels, handlelength=2.2)
    return figure


def _panels(
    figure: Figure, layers: Mapping[Any, Any], height: float, sharex: bool = False
) -> Iterator[tuple[Any, Axes]]:
    """Two panels a row, each ``height`` inches, added to the figure's height; the cells left over stay empty."""
    n_columns = min(2, len(layers))
    n_rows = -(-len(layers) // n_columns)
    figure.set_figheight(figure.get_figheight() + height * n_rows * (1.4 if n_columns == 1 else 1))
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=sharex, sharey=True).ravel()
    for axes in grid[len(layers) :]:
        axes.remove()
    if sharex and len(layers) % n_columns:  # its own tick labels, with no panel below
        grid[len(layers) - n_columns].tick_params(labelbottom=True)
    yield from zip(layers, grid, strict=False)


def _layer(layer: Any) -> str:
    return layer if isinstance(layer, str) else f"layer {layer}"


def _points(layer: Any, values: Any, path: np.ndarray) -> np.ndarray:
    """The points (P, S', 2) of one layer; the sublayer of the injection is what the reference has more."""
    argument = f"teleported[{layer!r}]"
    points = as_array(argument, values, 3)
    if points.shape[1] > len(path) or points.shape[2] != path.shape[1]:
        raise ValueError(
            f"{argument} has shape {points.shape}, but must be (P, S', {path.shape[1]}) with S' at most {len(path)} to "
            "go with reference: pass latents from the injection to the reference's last sublayer."
        )
    return points[..., :2]


def _mean_step(points: np.ndarray, n_steps: int) -> np.ndarray:
    """Mean displacement a sublayer (P, 2) over the next sublayers; NaN where a point is not finite or nothing follows.

    The mean of successive steps: what lies between is only a detour, so first and last point are all that counts.
    """
    last = min(n_steps, points.shape[1] - 1)
    finite = np.isfinite(points[:, : last + 1]).all((1, 2))
    if last == 0:
        return np.full(points[:, 0].shape, np.nan)
    with np.errstate(invalid="ignore"):
        return np.where(finite[:, None], (points[:, last] - points[:, 0]) / last, np.nan)


def _heading(layer: Any, points: np.ndarray, step: np.ndarray, n_steps: int) -> str:
    last = points.shape[1] - 1
    if last == 0:
        return f"{_layer(layer)}: nothing follows"
    lost = int((~np.isfinite(step).all(1)).sum())
    parts = [f"next {counted(last, 'sublayer')}"] * (last < n_steps) + [f"{lost} left out"] * (lost > 0)
    return _layer(layer) + (": " + ", ".join(parts) if parts else "")


def _limits(path: np.ndarray, points: Mapping[Any, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of a plane that holds the control and all points as put, with room for the arrows."""
    put = np.concatenate([path, *(x[:, 0] for x in points.values())])
    put = put[np.isfinite(put).all(1)]
    low, high = put.min(0), put.max(0)
    room = np.where(high > low, 0.12 * (high - low), 1.0)
    return low - room, high + room


def _colours(lengths: np.ndarray) -> Any:
    """What maps lengths to colours in every panel: viridis without its yellow, which is lost on white."""
    scale = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
    largest = float(lengths.max(initial=0.0)) or 1.0
    norm: Normalize = Normalize(0, largest)
    positive = lengths[lengths > 0]
    if len(positive) and largest > 8 * np.median(lengths):
        norm = LogNorm(min(float(np.percentile(positive, 3)), 0.5 * largest), largest, clip=True)
    return matplotlib.cm.ScalarMappable(norm, scale)


def _draw_arrows(axes: Axes, put: np.ndarray, step: np.ndarray, colours: Any, span: np.ndarray) -> None:
    """Arrows from the points as put; the longest is about as long as neighbours of a square grid are apart."""
    keep = np.isfinite(step).all(1)
    if not keep.any():
        axes.plot(*only_finite(put).T, ".", color=GREY, markersize=2)
        return
    put, step = put[keep], step[keep]
    longest = np.hypot(*(step / span).T).max() or 1.0
    axes.quiver(
        *put.T,
        *step.T,
        np.hypot(*step.T),
        angles="xy",
        scale_units="xy",
        scale=longest / min(0.25, 1.1 / np.sqrt(len(keep))),
        cmap=colours.cmap,
        norm=colours.norm,
        width=0.007,
        headwidth=4,
        headlength=4,
        headaxislength=3.6,
        zorder=3,
    )


def _look(name: str, i: int) -> dict[str, Any]:
    """How a curve is drawn: by its name; the first one is the heavier."""
    look = look_of(name)
    return {"color": look.hex, "linestyle": look.line, "linewidth": 0.9 if i else 1.2}


def _bands(
    intervals: Mapping[Any, Mapping[str, Any]], arrays: Mapping[Any, Mapping[str, np.ndarray]]
) -> dict[Any, dict[str, np.ndarray]]:
    """The interval (2, S') of each curve that has one, by layer and name."""
    bands: dict[Any, dict[str, np.ndarray]] = {layer: {} for layer in arrays}
    for layer, found in intervals.items():
        for name, values in found.items():
            argument = f"intervals[{layer!r}][{name!r}]"
            if name not in arrays.get(layer, {}):
                raise ValueError(f"{argument} belongs to no curve: pass it under the layer and the name of one.")
            bands[layer][name] = only_finite(as_interval(argument, values, len(arrays[layer][name]), "value"))
    return bands
