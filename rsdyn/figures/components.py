"""The panels of principal components: paths, variance explained, components needed, and loadings (Fig. 4A-C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import depth_bar, draw_path, draw_samples, sublayer_axis
from rsdyn.figures.style import (
    GREY,
    STYLE,
    WIDTH,
    as_array,
    as_curves,
    brief_percent,
    check_sites,
    counted,
    legend,
    log_scale,
    note,
    only_finite,
)
from rsdyn.figures.training import samples_of


def pca_trajectory(
    mean: Any,
    samples: Any = None,
    *,
    ratio: Any = None,
    control_mean: Any = None,
    control_samples: Any = None,
    control_ratio: Any = None,
    control_name: str = "smoothed random walk",
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw single sequences and their mean in the plane of the first two components, coloured by depth (Fig. 4A).

    ``mean`` is (S, K) with K >= 2 and ``samples``, thin grey lines behind it, (M, S, K) or None; components after the
    second are not drawn. ``ratio`` (K,) is the share of the variance along each component, written on its axis. The
    control, in its own components, is drawn below: curved paths in a plane are what any smooth random walk gives.

    Raises ValueError for other shapes, fewer than two components, and a mean that is not finite.
    """
    panels = [("", mean, samples, ratio)]
    if control_mean is not None:
        panels.append(("control_", control_mean, control_samples, control_ratio))
    elif control_samples is not None or control_ratio is not None:
        raise ValueError("control_mean is None, but must go with the control's samples and ratio: pass it too.")
    check_sites(sites_per_layer)
    drawn = []
    for prefix, path, behind, shares in panels:
        path = as_array(f"{prefix}mean", path, 2, finite=True)
        if path.shape[1] < 2:
            raise ValueError(f"{prefix}mean has shape {path.shape}, but needs 2 components for a plane: keep two.")
        behind = samples_of(f"{prefix}samples", behind, path)
        labels = ["PC 1", "PC 2"]
        if shares is not None:
            shares = as_array(f"{prefix}ratio", shares, 1)
            if len(shares) < 2:
                raise ValueError(f"{prefix}ratio has 1 value, but must have one a component: pass (K,) shares.")
            labels = [f"{label} ({brief_percent(share)})" for label, share in zip(labels, shares[:2], strict=True)]
        drawn.append((path[:, :2], None if behind is None else behind[..., :2], labels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7 if len(drawn) == 1 else 4.8), layout="constrained")
        grid = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (path, behind, labels) in zip(grid, drawn, strict=True):
            if behind is not None:
                draw_samples(axes, only_finite(behind))
            dots = draw_path(axes, path, sites_per_layer)
            axes.autoscale_view()
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
            depth_bar(figure, dots, axes, len(path), sites_per_layer)
        if len(drawn) > 1:
            note(grid[0], "residual stream")
            note(grid[1], f"control: {control_name}")
        legend(figure, title, *grid[0].get_legend_handles_labels(), ncols=5, handlelength=0.9)
    return figure


def cumulative_variance(ratios: Mapping[str, Any], *, share: float = 0.9, title: str | None = None) -> Figure:
    """Draw how much variance the first components explain together (Fig. 4B).

    ``ratios`` maps a condition's name to (K,) shares of the variance, largest first; K may differ. A dot marks where a
    curve first reaches ``share``, and the legend says with how many components, or that all of them do not.

    Raises ValueError when ``ratios`` is empty, for other shapes, and when ``share`` is not between 0 and 1.
    """
    curves = {name: np.cumsum(values) for name, values in as_curves("ratios", ratios, same_length=False).items()}
    _check_share(share)
    goal = f"{100 * share:.3g} %"
    most = max(len(values) for values in curves.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.axhline(share, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
        for name, values in curves.items():
            look = look_of(name)
            reached = np.flatnonzero(values >= share - 1e-12)  # a sum of shares may end an ulp short of 1
            words = f"{reached[0] + 1} for {goal}" if len(reached) else f"{goal} not reached"
            count = np.arange(1, len(values) + 1)
            axes.plot(count, only_finite(values), color=look.hex, linestyle=look.line, label=f"{name} ({words})")
            if len(reached):
                axes.plot(reached[0] + 1, values[reached[0]], "o", color=look.hex, markersize=5, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(0.9, max(most, 2) * 1.1)
        ticks = [m * 10**e for e in range(5) for m in ((1, 2, 5) if most < 500 else (1,)) if m * 10**e <= most]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("number of components")
        axes.set_ylabel("cumulative explained variance")
        legend(figure, title, ncols=2)
    return figure


def components_needed(
    counts: Mapping[str, Any], *, share: float = 0.9, sites_per_layer: int = 2, title: str | None = None
) -> Figure:
    """Draw how many components each sublayer needs for a share of its own variance (the claim beside Fig. 4C).

    ``counts`` maps a condition's name to (S,) numbers of components; NaN where the share is not reached, or nothing
    varies, leaves a gap and is counted. The axis is logarithmic when the counts span more than a factor of 20.

    Raises ValueError when ``counts`` is empty, lengths differ, and when ``share`` is not between 0 and 1.
    """
    arrays = {name: only_finite(values) for name, values in as_curves("counts", counts).items()}
    _check_share(share)
    check_sites(sites_per_layer)
    n_sublayers = len(next(iter(arrays.values())))
    everything = np.concatenate(list(arrays.values()))
    finite = everything[np.isfinite(everything)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(arrays.items()):
            look: Any = {"color": look_of(name).hex, "linestyle": look_of(name).line, "linewidth": 0.9 if i else 1.2}
            marker = "os^Dv"[i % 5] if n_sublayers < 40 else ""  # markers that touch would hide the dashes
            axes.plot(values, marker=marker, markersize=2.5, label=name, **look)
        if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
            log_scale(axes, finite)
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        sublayer_axis(axes, n_sublayers, sites_per_layer)
        axes.set_ylabel(f"components for {100 * share:.3g} %\nof a sublayer's variance")
        if len(finite) < len(everything):
            note(axes, f"{len(everything) - len(finite)} of {len(everything)} values undefined or not reached")
        legend(figure, title)
    return figure


def loadings(
    loadings: Any, massive: Sequence[int] = (), *, n_components: int = 10, n_units: int = 3, title: str | None = None
) -> Figure:
    """Draw which units make up each principal component: squared loadings of its largest few, by name (Fig. 4A).

    ``loadings`` is (K, D), a component of length 1 a row (`PCA.components` transposed), so that a row's squared
    loadings sum to 1. The bar is split among its ``n_units`` largest units, named at the right, largest first, with
    their sum; ``massive`` units are orange and starred, and a diamond marks what all of them hold together. The first
    ``n_components`` rows are drawn.

    Raises ValueError for other shapes, rows that are not of length 1, and unit numbers out of range.
    """
    rows = as_array("loadings", loadings, 2, finite=True)
    lengths = np.linalg.norm(rows, axis=1)
    if np.abs(lengths - 1).max() > 0.02:  # bf16 rounds each loading to 1 in 256
        raise ValueError(
            f"loadings has rows of length {lengths.min():.3g} to {lengths.max():.3g}, but each must be a component of "
            "length 1: pass (K, D), the components in rows."
        )
    known = {int(u) for u in massive}
    strange = sorted(u for u in known if not 0 <= u < rows.shape[1])
    if strange:
        raise ValueError(f"massive holds unit {strange[0]}, but units run from 0 to {rows.shape[1] - 1}: check it.")
    squared = rows[:n_components] ** 2
    names = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.19 * len(squared)), layout="constrained")
        axes = figure.subplots()
        for k, row in enumerate(squared):
            largest = np.argsort(-row, kind="stable")[:n_units]
            left = 0.0
            for u in largest:
                colour = look_of("without_massive").hex if int(u) in known else "#BBBBBB"
                axes.barh(k, row[u], left=left, height=0.7, color=colour, edgecolor="white", linewidth=0.6)
                left += row[u]
            if known:
                axes.plot(row[sorted(known)].sum(), k, "D", color="#000000", markersize=3, zorder=3, clip_on=False)
            starred = ", ".join(f"{u}*" if int(u) in known else f"{u}" for u in largest)
            names.append(f"{starred}: {brief_percent(left)}")
        axes.set_yticks(range(len(squared)), [f"PC {k + 1}" for k in range(len(squared))])
        axes.set_ylim(len(squared) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("squared loading (share of the component)")
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(squared)), names)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
        handles: list[Any] = [Patch(color="#BBBBBB")]
        labels = [f"the {n_units} largest units"]
        if known:
            (diamond,) = axes.plot([], [], "D", color="#000000", markersize=3)
            handles += [Patch(color=look_of("without_massive").hex), diamond]
            labels += ["massive (*)", f"sum of {counted(len(known), 'massive unit')}"]
        legend(figure, title, handles, labels)
    return figure


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be above 0 and at most 1: pass 0.9 for 90 %.")
