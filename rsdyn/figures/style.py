"""What every static figure shares: sizes, fonts, and legends that fit."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

WIDTH = 3.4  # inches: one column of a two-column paper
ROOM = WIDTH * 72 - 4  # points between the margins

_OF_THE_MACHINE = ("backend", "interactive", "toolbar", "webagg", "tk.", "keymap", "savefig.directory", "date.epoch")
STYLE: Any = {  # Any, since matplotlib types this as a dict of every rc name there is
    # matplotlib's own defaults first, where somebody's matplotlibrc says otherwise: LaTeX, which may not be there,
    # another layout, other files
    **{
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if not name.startswith(_OF_THE_MACHINE) and matplotlib.rcParams[name] != value
    },
    "text.usetex": False,
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


def legend(
    figure: Figure | SubFigure,
    title: str | None,
    handles: Sequence[Any] | None = None,
    labels: Sequence[str] | None = None,
    *,
    ncols: int = 3,
    handlelength: float = 1.6,
) -> None:
    """Put the legend above the panel, the figure's title as its heading: a suptitle would be drawn over it.

    It gets ``ncols`` columns, or as many as fit between the figure's edges, and labels wider than that are wrapped.
    Lines beyond two make the figure higher, so that they take no room from the panels; a part of one stays as it is.
    """
    if handles is None or labels is None:
        handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles and not title:
        return
    labels = [wrapped(label, 7, ROOM - 7 * (handlelength + 0.5)) for label in labels]
    while ncols > 1 and _legend_width(labels, ncols, handlelength) > ROOM:
        ncols -= 1
    title = title and wrapped(title, 8)
    columns = np.array_split(np.array([label.count("\n") + 1 for label in labels], dtype=int), ncols)
    n_lines = max(int(column.sum()) for column in columns) + (title.count("\n") if title else 0)
    if isinstance(figure, Figure):
        figure.set_figheight(figure.get_figheight() + 0.155 * max(0, n_lines - 2))
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


def _text_width(text: str, size: float) -> float:
    """Width in points of the widest line."""
    font = FontProperties(family=["DejaVu Sans"], size=size)
    return max(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n"))


class _Wrapper(textwrap.TextWrapper):
    """Breaks what is longer than a line, such as a model's name, behind ``/``, ``_``, ``-`` or ``.`` if it can."""

    def _split(self, text: str) -> list[str]:
        found: list[str] = []
        for chunk in super()._split(text):
            found += re.findall(r"[^/_.-]*[/_.-]+|[^/_.-]+$", chunk) if len(chunk) > self.width else [chunk]
        return found


def wrapped(text: str, size: float, room: float = ROOM) -> str:
    """The text, broken into lines of at most ``room`` points."""
    lines = []
    for line in text.split("\n"):
        width = _text_width(line or " ", size)
        lines.append(line if width <= room else _Wrapper(max(1, int(len(line) * room / width * 0.95))).fill(line))
    return "\n".join(lines)


def _legend_width(labels: Sequence[str], ncols: int, handlelength: float) -> float:
    """Width in points of a legend; matplotlib fills it column by column, the first ones longer by a row."""
    widths = [_text_width(label or " ", 7) for label in labels]
    columns = [max(part) for part in np.array_split(widths, min(ncols, max(1, len(widths)))) if len(part)]
    return sum(columns) + 7 * ((handlelength + 0.5) * len(columns) + 1.0 * (len(columns) - 1) + 0.2)
