"""The paper's panels: arrays or tensors in, a matplotlib Figure out.

Figures are one text column wide, in 8 pt, and made without pyplot, so that nothing is shown, kept or shared between
them. Green is a transition within a layer (over attention) and blue one across layers (over the MLP) in every panel,
as in the paper's Fig. 1E; other curves keep off these two colours. Sublayer axes are labelled with layer numbers,
counted from 0 as in the model's own module names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Wong's colour-blind safe palette (Nature Methods 8, 441, 2011).
WITHIN = "#009E73"
CROSS = "#0072B2"
OTHERS = ("#000000", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#999999"
WIDTH = 3.4  # inches: one column of a two-column paper

STYLE: Any = {  # Any, since matplotlib types this as a dict of every rc name there is
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that a figure is the same on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "svg.hashsalt": "rsdyn",
}


def latent_trajectory(
    mean: Any, samples: Any = None, *, sites_per_layer: int = 2, title: str | None = None, name: str = "latent"
) -> Figure:
    """Draw the mean path of the stream through the latent space, coloured by depth (Fig. 3B).

    ``mean`` is (S, K) and ``samples``, thin grey lines behind it, (M, S, K) or None. K = 1 is drawn against depth,
    K = 2 as a plane, K >= 3 as two planes that share the first dimension (1-2 and 1-3). The start is a white ring and
    the end a black one; with ``sites_per_layer=2`` circles are resid_pre and squares resid_mid. ``name`` is what a
    dimension is called on its axis ("latent", "PC").

    Raises ValueError for other shapes and for values that are not finite.
    """
    mean = _array("mean", mean, 2, finite=True)
    n_sublayers, n_dimensions = mean.shape
    if samples is not None:
        samples = _array("samples", samples, 3)
        if samples.shape[1:] != mean.shape:
            raise ValueError(
                f"samples has shape {samples.shape}, but must be (M, {n_sublayers}, {n_dimensions}) to go with mean: "
                "pass latents of the same sublayers and dimensions."
            )
    _check_sites(sites_per_layer)
    pairs = [(None, 0)] if n_dimensions == 1 else [(0, 1), (0, 2)][: n_dimensions - 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7 if len(pairs) == 1 else 4.4), layout="constrained")
        grid = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)
        depth = np.arange(n_sublayers) / sites_per_layer
        for axes, (x, y) in zip(grid[:, 0], pairs, strict=True):
            path = np.column_stack([np.arange(n_sublayers) if x is None else mean[:, x], mean[:, y]])
            if samples is not None:
                behind = samples[..., [y]] if x is None else samples[..., [x, y]]
                if x is None:
                    steps = np.broadcast_to(np.arange(n_sublayers)[:, None], behind.shape)
                    behind = np.concatenate([steps, behind], axis=-1)
                # A handful reads as a spread, hundreds only if each is faint.
                faint = float(np.clip(20 / len(samples), 0.12, 0.6))
                axes.add_collection(LineCollection(list(behind), colors=GREY, linewidths=0.4, alpha=faint, zorder=1))
                axes.plot([], [], color=GREY, linewidth=0.8, label="sequences")
            dots = _draw_path(axes, path, depth, sites_per_layer)
            axes.autoscale_view()
            axes.set_ylabel(f"{name} {y + 1}" if n_dimensions > 1 else name)
        if n_dimensions == 1:
            _sublayer_axis(grid[-1, 0], n_sublayers, sites_per_layer)
        else:
            grid[-1, 0].set_xlabel(f"{name} 1")
        bar = figure.colorbar(dots, ax=grid[:, 0], pad=0.02, aspect=30)
        bar.set_label("layer")
        bar.set_ticks(_layer_ticks(n_sublayers, sites_per_layer))
        bar.outline.set_linewidth(0.4)
        _legend(figure, title, *grid[0, 0].get_legend_handles_labels(), ncols=5, handlelength=0.9)
    return figure


def _draw_path(axes: Axes, path: np.ndarray, depth: np.ndarray, sites_per_layer: int) -> Any:
    """Draw one mean trajectory (S, 2): segments and markers coloured by depth, the start and the end ringed."""
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
                s=14 if len(path) < 40 else 8,
                marker=marker,
                linewidths=0,
                zorder=3,
            )
            axes.plot([], [], marker, color="#666666", label=label)  # the legend's marker: its colour means no layer
    for point, colour, label in ((path[0], "#FFFFFF", "start"), (path[-1], "#000000", "end")):
        axes.plot(
            *point, "o", markersize=7, markerfacecolor="none", markeredgecolor="#000000", markeredgewidth=0.8, zorder=4
        )
        axes.plot(*point, "o", color=colour, markeredgecolor="#000000", markeredgewidth=0.8, zorder=5, label=label)
    return dots


def latent_distance(
    distance: Any,
    spread: Any = None,
    *,
    sites_per_layer: int = 2,
    ylabel: str = "distance in latent space",
    spread_label: str = "interval",
    title: str | None = None,
) -> Figure:
    """Draw the distance between successive latents over depth (Fig. 3C).

    ``distance`` is (S - 1,), entry s from sublayer s to s + 1, drawn between the two; ``spread`` is (2, S - 1), the low
    and high end of an interval, or None. With ``sites_per_layer=1`` there is one kind of transition, layer to layer.

    Raises ValueError for other shapes.
    """
    distance = _array("distance", distance, 1)
    n_transitions = len(distance)
    if spread is not None:
        spread = _array("spread", spread, 2)
        if spread.shape != (2, n_transitions):
            raise ValueError(
                f"spread has shape {spread.shape}, but must be (2, {n_transitions}), low and high of each distance: "
                "stack the two ends along the first axis."
            )
    _check_sites(sites_per_layer)
    kinds = [(CROSS, "layer to layer", "o")]
    if sites_per_layer == 2:
        kinds = [(WITHIN, "within layer", "o"), (CROSS, "cross layer", "s")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        for first, (colour, label, marker) in enumerate(kinds):
            at = np.arange(first, n_transitions, sites_per_layer)
            if len(at) == 0:  # a single transition is within the layer, none crosses
                continue
            if spread is not None and len(at) > 1:
                axes.fill_between(at + 0.5, spread[0, at], spread[1, at], color=colour, alpha=0.2, linewidth=0)
            elif spread is not None:  # a band of one point has no width
                axes.vlines(at + 0.5, spread[0, at], spread[1, at], color=colour, alpha=0.3, linewidth=3)
            size = 3.5 if n_transitions < 40 else 2.2
            axes.plot(at + 0.5, distance[at], color=colour, marker=marker, markersize=size, label=label)
        if spread is not None:
            axes.fill_between([], [], [], color=GREY, alpha=0.4, linewidth=0, label=spread_label)
        _sublayer_axis(axes, n_transitions + 1, sites_per_layer)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(ylabel)
        _legend(figure, title)
    return figure


def explained_variance(
    curves: Mapping[str, Any],
    *,
    about: str = "each sublayer's mean",
    sites_per_layer: int = 2,
    floor: float = -0.5,
    title: str | None = None,
) -> Figure:
    """Draw how much variance each projection explains at each sublayer (Fig. 3D).

    ``curves`` maps a name to (S,) values, 1 - SSE/SST, and ``about`` says which mean SST is taken about. Such values
    have no lower bound: the axis ends at ``floor``, and a point below it is drawn there as a triangle.

    Raises ValueError when ``curves`` is empty or its lengths differ.
    """
    if not curves:
        raise ValueError("curves is empty, but must map at least one name to its (S,) values: pass one curve.")
    arrays = {key: _array(f"curves[{key!r}]", values, 1) for key, values in curves.items()}
    n_sublayers = len(next(iter(arrays.values())))
    for key, values in arrays.items():
        if len(values) != n_sublayers:
            raise ValueError(
                f"curves[{key!r}] has {len(values)} values, but the first curve has {n_sublayers}: "
                "pass curves over the same sublayers."
            )
    _check_sites(sites_per_layer)
    lowest = min((float(np.nanmin(v)) for v in arrays.values() if np.isfinite(v).any()), default=0.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3 if len(arrays) < 3 else 2.7), layout="constrained")
        axes = figure.subplots()
        at = np.arange(n_sublayers)
        clipped_any = False
        for i, (key, values) in enumerate(arrays.items()):
            colour, marker = OTHERS[i % len(OTHERS)], "os^Dv"[i % 5]
            axes.plot(at, values, color=colour, marker=marker, markersize=2.5 if n_sublayers < 40 else 1.8, label=key)
            below = values < floor
            if below.any():
                clipped_any = True
                axes.plot(at[below], np.full(below.sum(), floor), "v", color=colour, markersize=5, clip_on=False)
        axes.axhline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
        axes.set_ylim(floor if lowest < floor else min(lowest * 1.1, 0.0) - 0.02, 1.03)
        if clipped_any:
            axes.plot([], [], "v", color=GREY, markersize=5, label=f"below {floor:g}".replace("-", "\N{MINUS SIGN}"))
        _sublayer_axis(axes, n_sublayers, sites_per_layer)
        axes.set_ylabel(f"explained variance\nabout {about}")
        _legend(figure, title, ncols=3 if len(arrays) < 3 else 2)
    return figure


def loss_curves(
    train: Sequence[tuple[float, float]],
    val: Sequence[tuple[float, float]],
    best_epoch: float | None = None,
    *,
    ylabel: str = "loss (MSE)",
    title: str | None = None,
) -> Figure:
    """Draw training and validation loss over epochs, with the epoch whose weights were kept.

    ``train`` and ``val`` are (epoch, value) pairs, either may be empty. The axis is logarithmic when the positive
    values span more than a factor of ten. Raises ValueError when an entry is not a pair.
    """
    series = {}
    for key, pairs in (("train", train), ("val", val)):
        array = np.asarray(pairs, dtype=float) if len(pairs) else np.empty((0, 2))
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(
                f"{key} has shape {array.shape}, but must be (epoch, value) pairs: zip the epochs with the values."
            )
        series[key] = array
    values = np.concatenate([array[:, 1] for array in series.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        looks = (("train", "training", OTHERS[0], "-"), ("val", "validation", OTHERS[1], "--"))
        for key, label, colour, line in looks:
            if len(series[key]):
                marker = "o" if len(series[key]) < 30 else ""
                axes.plot(*series[key].T, color=colour, linestyle=line, marker=marker, markersize=2.5, label=label)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label=f"best epoch ({best_epoch:g})")
        if len(positive) and positive.max() > 10 * positive.min() and (values > 0).all():
            axes.set_yscale("log")
            if positive.max() < 300 * positive.min():  # labels at powers of ten alone would be one or two
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        _legend(figure, title)
    return figure


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write ``folder/name.png`` (200 dpi) and ``folder/name.pdf`` and return both paths; same figure, same bytes.

    Raises ValueError when ``name`` is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"name is {name!r}, but must be a file name without a folder: pass the folder as folder.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=200, metadata={"Software": None})
        figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]


def _array(argument: str, value: Any, ndim: int, finite: bool = False) -> np.ndarray:
    """Return a float64 array of ``ndim`` dimensions from an array, a tensor (any device, bf16 too) or nested lists."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    array = np.asarray(value, dtype=float)
    if array.ndim != ndim or 0 in array.shape:
        raise ValueError(
            f"{argument} has shape {array.shape}, but must have {ndim} dimension(s), none of them empty: "
            "reshape it as the function's docstring says."
        )
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{argument} holds NaN or infinities, but must be finite: leave those samples out of it.")
    return array


def _check_sites(sites_per_layer: int) -> None:
    if sites_per_layer not in (1, 2):
        raise ValueError(
            f"sites_per_layer is {sites_per_layer}, but must be 2 (resid_pre and resid_mid) or 1 (resid_pre alone): "
            "pass what was recorded."
        )


def _legend(figure: Figure, title: str | None, *entries: Any, ncols: int = 3, handlelength: float = 1.6) -> None:
    """Put the legend above the panel, the figure's title as its heading: a suptitle would be drawn over it."""
    handles, labels = entries or figure.axes[0].get_legend_handles_labels()
    if not handles and not title:
        return
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=ncols,
        title=title,
        title_fontsize=8,
        handlelength=handlelength,
        handletextpad=0.5,
        columnspacing=1.0,
        borderpad=0.1,
    )


def _layer_ticks(n_sublayers: int, sites_per_layer: int) -> list[int]:
    """Choose at most nine layers to label; a depth of 16, 32 or 80 layers then divides evenly."""
    n_layers = -(-n_sublayers // sites_per_layer)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, n_layers) if n_layers <= 9 * step)
    return list(range(0, n_layers, step))


def _sublayer_axis(axes: Axes, n_sublayers: int, sites_per_layer: int) -> None:
    """Label a sublayer axis with layer numbers, each at its layer's resid_pre."""
    layers = _layer_ticks(n_sublayers, sites_per_layer)
    axes.xaxis.set_major_locator(FixedLocator([layer * sites_per_layer for layer in layers]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(layer) for layer in layers]))
    axes.set_xlim(-0.02 * n_sublayers - 0.2, n_sublayers - 1 + 0.02 * n_sublayers + 0.2)
    axes.set_xlabel("layer")
