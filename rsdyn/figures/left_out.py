"""The panel of findings against the number of the largest units left out (METHOD section 0.10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rsdyn.figures.colours import look_of
from rsdyn.figures.style import GREY, STYLE, WIDTH, as_curves, legend, only_finite, wrapped

COLUMNS = 3


def findings_left_out(
    counts: Sequence[int], values: Mapping[str, Mapping[str, Any]], *, title: str | None = None
) -> Figure:
    """Draw each finding against how many of the largest units are left out of it.

    ``counts`` are the ``C`` numbers of units, rising; ``values`` maps the words of a finding to a mapping from a
    condition's name to its ``(C,)`` values. A panel per finding, three per row, each with an axis of its own; what is
    not defined leaves a gap. A flat line is a finding that the largest units do not make.

    Raises ValueError for no finding, for other lengths, and for counts that do not rise.
    """
    if not values:
        raise ValueError("values is empty, but must map at least one finding to its values: measure one.")
    if list(counts) != sorted(set(counts)):
        raise ValueError(f"counts={list(counts)}, but must rise: sort them.")
    panels = {words: as_curves(f"values[{words!r}]", curves) for words, curves in values.items()}
    for words, curves in panels.items():
        if len(next(iter(curves.values()))) != len(counts):
            raise ValueError(f"values[{words!r}] has other than {len(counts)} values: pass one per number of units.")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    n_columns = min(COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    at = np.arange(len(counts))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH, 0.6 + 1.35 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        handles: dict[str, Any] = {}
        for axes, (words, curves) in zip(grid, panels.items(), strict=False):
            for name, curve in curves.items():
                look = look_of(name)
                (handles[name],) = axes.plot(
                    at, only_finite(curve), color=look.hex, linestyle=look.line, marker="o", markersize=2, linewidth=1.0
                )
            axes.axhline(0, color=GREY, linewidth=0.4, zorder=0)
            axes.set_title(wrapped(words, 6.5, 2 * WIDTH * 72 / n_columns - 30), fontsize=6.5, loc="left", pad=3)
            axes.set_xticks(at, [str(count) for count in counts])
            axes.tick_params(labelsize=6)
        for axes in grid[max(0, len(panels) - n_columns) : len(panels)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("largest units left out", fontsize=8)
        legend(figure, title, [handles[name] for name in names], names, ncols=4)
    return figure
