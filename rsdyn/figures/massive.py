"""The panel of massive activations: the largest by class of token over depth, and norms by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rsdyn.figures.colours import look_of
from rsdyn.figures.depth import sublayer_axis
from rsdyn.figures.style import STYLE, WIDTH, as_curves, check_sites


def massive_activations(
    largest: Mapping[str, Any],
    typical: Mapping[str, Any],
    norms: Mapping[str, Any],
    *,
    sites_per_layer: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw the largest |activation| of each class of tokens over depth, dashed a typical one, and norms by position.

    ``largest`` and ``typical`` map a class to (S,); ``norms`` a range of positions to (S,), and may be empty, when only
    the first panel is drawn.

    Raises ValueError for curves of different lengths.
    """
    curves, below = as_curves("largest", largest), as_curves("typical", typical)
    by_position = as_curves("norms", norms) if norms else {}
    check_sites(sites_per_layer)
    n = len(next(iter(curves.values())))
    x = np.arange(n)
    with matplotlib.rc_context(STYLE):
        rows = 1 + bool(by_position)
        figure = Figure(figsize=(WIDTH, 2.3 * rows), layout="constrained")
        panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
        for name, values in curves.items():
            look = look_of(name)
            panels[0].plot(x, values, color=look.hex, linestyle=look.line, label=name)
            panels[0].plot(x, below[name], color=look.hex, linestyle=":", linewidth=0.9)
        panels[0].set_ylabel("largest |activation|;\ndotted: a typical one")
        panels[0].legend(title="token", frameon=False, fontsize=6, title_fontsize=6)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(by_position)))
        for colour, (name, values) in zip(colours, by_position.items(), strict=True):
            panels[1].plot(x, values, color=colour, label=name)
        if by_position:
            panels[1].set_ylabel("mean norm")
            panels[1].legend(title="position", frameon=False, fontsize=6, title_fontsize=6)
        for axes in panels:
            axes.set_yscale("log")
            sublayer_axis(axes, n, sites_per_layer)
        if title:
            figure.suptitle(title, fontsize=8)
    return figure
