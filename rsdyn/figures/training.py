"""The panels of a trained autoencoder: the latent path, its steps, what it explains, and the losses (Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import depth_bar, draw_path, draw_samples, draw_transitions, sublayer_axis
from rsdyn.figures.style import (
    GREY,
    MINUS,
    STYLE,
    WIDTH,
    as_array,
    as_curves,
    as_interval,
    check_sites,
    legend,
    log_scale,
)


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
    mean = as_array("mean", mean, 2, finite=True)
    n_sublayers, n_dimensions = mean.shape
    samples = samples_of("samples", samples, mean)
    check_sites(sites_per_layer)
    pairs = [(None, 0)] if n_dimensions == 1 else [(0, 1), (0, 2)][: n_dimensions - 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7 if len(pairs) == 1 else 4.4), layout="constrained")
        grid = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)
        for axes, (x, y) in zip(grid[:, 0], pairs, strict=True):
            path = np.column_stack([np.arange(n_sublayers) if x is None else mean[:, x], mean[:, y]])
            if samples is not None:
                behind = samples[..., [y]] if x is None else samples[..., [x, y]]
                if x is None:
                    steps = np.broadcast_to(np.arange(n_sublayers)[:, None], behind.shape)
                    behind = np.concatenate([steps, behind], axis=-1)
                draw_samples(axes, behind)
            dots = draw_path(axes, path, sites_per_layer)
            axes.autoscale_view()
            axes.set_ylabel(f"{name} {y + 1}" if n_dimensions > 1 else name)
        if n_dimensions == 1:
            sublayer_axis(grid[-1, 0], n_sublayers, sites_per_layer)
        else:
            grid[-1, 0].set_xlabel(f"{name} 1")
        depth_bar(figure, dots, grid[:, 0], n_sublayers, sites_per_layer)
        legend(figure, title, *grid[0, 0].get_legend_handles_labels(), ncols=5, handlelength=0.9)
    return figure


def samples_of(argument: str, samples: Any, mean: np.ndarray) -> np.ndarray | None:
    """Return the samples (M, S, K) that go with a mean path (S, K), or None for none."""
    if samples is None:
        return None
    samples = as_array(argument, samples, 3)
    if samples.shape[1:] != mean.shape:
        raise ValueError(
            f"{argument} has shape {samples.shape}, but must be (M, {mean.shape[0]}, {mean.shape[1]}) to go with its "
            "mean: pass latents of the same sublayers and dimensions."
        )
    return samples


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
    distance = as_array("distance", distance, 1)
    spread = None if spread is None else as_interval("spread", spread, len(distance), "distance")
    check_sites(sites_per_layer)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        draw_transitions(axes, distance, spread, sites_per_layer)
        if spread is not None:
            axes.fill_between([], [], [], color=GREY, alpha=0.4, linewidth=0, label=spread_label)
        sublayer_axis(axes, len(distance) + 1, sites_per_layer)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(ylabel)
        legend(figure, title)
    return figure


def explained_variance(
    curves: Mapping[str, Any],
    *,
    about: str = "each sublayer's mean",
    sites_per_layer: int = 2,
    floor: float = -0.5,
    title: str | None = None,
) -> Figure:
    """Draw how much variance each projection explains at each sublayer (Figs. 3D and 4C).

    ``curves`` maps a name to (S,) values, 1 - SSE/SST, and ``about`` says which mean SST is taken about. Such values
    have no lower bound: the axis ends at ``floor``, and a point below it is drawn there as a triangle.

    Raises ValueError when ``curves`` is empty or its lengths differ.
    """
    arrays = as_curves("curves", curves)
    n_sublayers = len(next(iter(arrays.values())))
    check_sites(sites_per_layer)
    lowest = min((float(np.nanmin(v)) for v in arrays.values() if np.isfinite(v).any()), default=0.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3 if len(arrays) < 3 else 2.7), layout="constrained")
        axes = figure.subplots()
        at = np.arange(n_sublayers)
        clipped_any = False
        for i, (key, values) in enumerate(arrays.items()):
            look, marker = look_of(key), "os^Dv"[i % 5]
            colour, size = look.hex, 2.5 if n_sublayers < 40 else 1.8
            axes.plot(at, values, color=colour, linestyle=look.line, marker=marker, markersize=size, label=key)
            below = values < floor
            if below.any():
                clipped_any = True
                axes.plot(at[below], np.full(below.sum(), floor), "v", color=colour, markersize=5, clip_on=False)
        axes.axhline(0, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
        axes.set_ylim(floor if lowest < floor else min(lowest * 1.1, 0.0) - 0.02, 1.03)
        if clipped_any:
            axes.plot([], [], "v", color=GREY, markersize=5, label=f"below {floor:g}".replace("-", MINUS))
        sublayer_axis(axes, n_sublayers, sites_per_layer)
        axes.set_ylabel(f"explained variance\nabout {about}")
        legend(figure, title, ncols=3 if len(arrays) < 3 else 2)
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
        for key, label in (("train", "training"), ("val", "validation")):
            if len(series[key]):
                marker = "o" if len(series[key]) < 30 else ""
                look: Any = {"color": look_of(label).hex, "linestyle": look_of(label).line}
                axes.plot(*series[key].T, marker=marker, markersize=2.5, label=label, **look)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label=f"best epoch ({best_epoch:g})")
        if len(positive) and positive.max() > 10 * positive.min() and (values > 0).all():
            log_scale(axes, values)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        legend(figure, title)
    return figure
