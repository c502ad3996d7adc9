"""Panels of Jacobians over depth: eigenvalues in the plane, exponents, products, and the range that is linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rsdyn.figures.colours import LIGHT, look_of
from rsdyn.figures.style import DARK, GREY, STYLE, WIDTH, as_curves, legend, log_scale


def eigenvalue_planes(eigenvalues: Mapping[str, Any], sublayers: Sequence[int], *, title: str | None = None) -> Figure:
    """Draw the eigenvalues of a Jacobian in the complex plane: a row per sublayer, a column per model or null.

    ``eigenvalues`` maps a name to (S, D) complex values. The circle is |lambda| = 1, where a rotation has them all; the
    axes of a row are the same, and show the middle 99 % of its values.

    Raises ValueError for a sublayer that is not there.
    """
    arrays = {name: np.asarray(values) for name, values in eigenvalues.items()}
    n = min(len(values) for values in arrays.values())
    wrong = [s for s in sublayers if not 0 <= s < n]
    if wrong or not sublayers:
        raise ValueError(f"sublayers is {list(sublayers)}, but must name some of 0 to {n - 1}.")
    with matplotlib.rc_context(STYLE):
        size = WIDTH / 2.6
        figure = Figure(figsize=(0.3 + size * len(arrays), 0.35 + size * len(sublayers)), layout="constrained")
        panels = figure.subplots(len(sublayers), len(arrays), squeeze=False)
        angle = np.linspace(0, 2 * np.pi, 200)
        for i, s in enumerate(sublayers):
            away = np.concatenate([np.abs(values[s] - 1) for values in arrays.values()])
            reach = 1.1 * max(np.quantile(away, 0.99), 1e-3)
            for k, (name, values) in enumerate(arrays.items()):
                axes = panels[i, k]
                axes.plot(np.cos(angle), np.sin(angle), color=GREY, linewidth=0.6)
                axes.plot(values[s].real, values[s].imag, ".", color=DARK, markersize=1.5, markeredgewidth=0)
                axes.set_xlim(1 - reach, 1 + reach)
                axes.set_ylim(-reach, reach)
                axes.set_aspect("equal")
                axes.xaxis.set_major_locator(MaxNLocator(3))
                axes.yaxis.set_major_locator(MaxNLocator(3))
                axes.tick_params(labelsize=6)
                if i == 0:
                    axes.set_title(name.replace(", ", ",\n", 1), fontsize=7)
                if k == 0:
                    axes.set_ylabel(f"sublayer {s}\nIm λ")
                if i == len(sublayers) - 1:
                    axes.set_xlabel("Re λ")
        if title:
            figure.suptitle(title, fontsize=8)
    return figure


def lyapunov_exponents(exponents: Mapping[str, Any], *, relative: bool = False, title: str | None = None) -> Figure:
    """Draw the exponents of the whole depth, falling, against their rank as a share of the units: a line per series.

    With ``relative`` they are less the growth of the stream's norm: below 0 a direction is lost against the norm.
    """
    arrays = as_curves("exponents", exponents)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6)
        for name, values in arrays.items():
            x = (np.arange(len(values)) + 0.5) / len(values)
            axes.plot(x, np.where(np.isfinite(values), values, np.nan), label=name, **_look(name))
        axes.set_xlabel("rank of the exponent, as a share of the units")
        axes.set_ylabel(f"exponent{' less growth of the norm' if relative else ''}\n(nats per layer)")
        low, high = _middle(list(arrays.values()))
        axes.set_ylim(low, high)
        legend(figure, title, ncols=2)
    return figure


def product_participation(participation: Mapping[str, Any], *, title: str | None = None) -> Figure:
    """Draw how many directions carry the product of Jacobians from each sublayer to the end: (S,) per series."""
    arrays = as_curves("participation", participation)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        for name, values in arrays.items():
            axes.plot(np.arange(len(values)), values, label=name, **_look(name))
        log_scale(axes, np.concatenate(list(arrays.values())))
        axes.set_xlabel("sublayer that the product starts from")
        axes.set_ylabel("participation ratio of $\\sigma^2$")
        legend(figure, title, ncols=2)
    return figure


def linear_range(ratios: Mapping[str, Any], sizes: Sequence[float], depths: Sequence[int]) -> Figure:
    """Draw what a displacement does over what the Jacobian predicts, against its size: a panel per direction.

    ``ratios`` maps a direction to (depths, sizes); the band is a factor of two either way.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 1.25 * len(ratios)), layout="constrained")
        panels = figure.subplots(len(ratios), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(panels, ratios.items(), strict=True):
            axes.axhspan(0.5, 2, color=GREY, alpha=0.25, linewidth=0)
            for i, (s, curve) in enumerate(zip(depths, np.asarray(values), strict=True)):
                colour = LIGHT[DEPTHS[i % len(DEPTHS)]]
                axes.plot(sizes, curve, label=f"sublayer {s}", marker="o", markersize=2, color=colour, linewidth=1)
            axes.set_xscale("log")
            log_scale(axes, np.concatenate([np.asarray(v).ravel() for v in ratios.values()]))
            axes.set_title(name, fontsize=7, loc="left")
        panels[-1].set_xlabel("size of the displacement, in norms of the state")
        figure.supylabel("displacement at the end / predicted", fontsize=8)
        handles, labels = panels[0].get_legend_handles_labels()
        legend(figure, None, handles, labels)
    return figure


DEPTHS = ("ink", "c1", "c2", "c3", "c4", "c5", "c6")  # of a curve per depth, in their order


def _look(name: str) -> dict[str, Any]:
    return {"color": look_of(name).hex, "linestyle": look_of(name).line, "linewidth": 1}


def _middle(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where nearly all values are: a few exponents of lost directions would flatten the rest."""
    values = np.concatenate([a[np.isfinite(a)] for a in arrays])
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
