"""What every panel shares: colours, sizes, legends that fit, checks of what was given, and files.

Figures are one text column wide, in 8 pt, and made without pyplot, so that nothing is shown, kept or shared between
them. Green is a transition within a layer (over attention) and blue one across layers (over the MLP) in every panel,
as in the paper's Fig. 1E; other curves keep off these two colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

from rsdyn.figures.colours import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

WITHIN, CROSS = LIGHT["within"], LIGHT["cross"]
GREY = "#999999"
DARK = "#444444"
WIDTH = 3.4  # inches: one column of a two-column paper
ROOM = WIDTH * 72 - 4  # points between the margins
MINUS = "\N{MINUS SIGN}"

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
        # laid out anew: text that no pixel grid rounds is up to 3 points wider, as much as the margin
        figure.savefig(pdf, dpi=300, metadata={"CreationDate": None})  # the dpi of heat maps: the rest is vectors
    return [png, pdf]


def as_array(argument: str, value: Any, ndim: int, finite: bool = False) -> np.ndarray:
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


def as_shape(argument: str, value: Any, shape: tuple[int, ...], partner: str) -> np.ndarray:
    """Return an array of exactly ``shape``, the one that goes with the argument ``partner``."""
    array = as_array(argument, value, len(shape))
    if array.shape != shape:
        raise ValueError(
            f"{argument} has shape {array.shape}, but must be {shape} to go with {partner}: "
            "pass values of the same sublayers and units."
        )
    return array


def as_interval(argument: str, value: Any, n: int, of: str) -> np.ndarray:
    """Return the low and the high end (2, n) of an interval about each of ``n`` values."""
    interval = as_array(argument, value, 2)
    if interval.shape != (2, n):
        raise ValueError(
            f"{argument} has shape {interval.shape}, but must be (2, {n}), low and high of each {of}: "
            "stack the two ends along the first axis."
        )
    return interval


def as_curves(argument: str, curves: Mapping[str, Any], same_length: bool = True) -> dict[str, np.ndarray]:
    """Return name -> 1-D array; raises ValueError for no curve and, unless allowed, for lengths that differ."""
    if not curves:
        raise ValueError(f"{argument} is empty, but must map at least one name to its values: pass one curve.")
    arrays = {key: as_array(f"{argument}[{key!r}]", values, 1) for key, values in curves.items()}
    first = len(next(iter(arrays.values())))
    for key, values in arrays.items():
        if same_length and len(values) != first:
            raise ValueError(
                f"{argument}[{key!r}] has {len(values)} values, but the first curve has {first}: "
                "pass curves over the same sublayers."
            )
    return arrays


def check_sites(sites_per_layer: int) -> None:
    if sites_per_layer not in (1, 2):
        raise ValueError(
            f"sites_per_layer is {sites_per_layer}, but must be 2 (resid_pre and resid_mid) or 1 (resid_pre alone): "
            "pass what was recorded."
        )


def only_finite(values: np.ndarray) -> np.ndarray:
    """The values with infinities made NaN: matplotlib leaves a gap for NaN, but stretches an axis to infinity."""
    return np.where(np.isfinite(values), values, np.nan)


def counted(n: int, noun: str) -> str:
    """A count with its noun in the right number."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def number(value: float, form: str = ".1f") -> str:
    """A number with a minus sign as long as a plus sign, and none before a zero."""
    text = format(value, form)
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def legend(
    figure: Figure | SubFigure,
    title: str | None,
    handles: Sequence[Any] | None = None,
    labels: Sequence[str] | None = None,
    *,
    ncols: int = 3,
    handlelength: float = 1.6,
    grow: bool = True,
) -> None:
    """Put the legend above the panel, the figure's title as its heading: a suptitle would be drawn over it.

    It gets ``ncols`` columns, or as many as fit between the figure's edges, and labels wider than that are wrapped.
    Lines beyond two make the figure higher, so that they take no room from the panels; not so with ``grow=False``.
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
    if grow:
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


def wrapped(text: str, size: float, room: float = ROOM) -> str:
    """The text, broken into lines of at most ``room`` points."""
    width = _text_width(text or " ", size)
    return text if width <= room else textwrap.fill(text, max(1, int(len(text) * room / width * 0.95)))


def _legend_width(labels: Sequence[str], ncols: int, handlelength: float) -> float:
    """Width in points of a legend; matplotlib fills it column by column, the first ones longer by a row."""
    widths = [_text_width(label or " ", 7) for label in labels]
    columns = [max(part) for part in np.array_split(widths, min(ncols, max(1, len(widths)))) if len(part)]
    return sum(columns) + 7 * ((handlelength + 0.5) * len(columns) + 1.0 * (len(columns) - 1) + 0.2)


def note(axes: Axes, text: str) -> None:
    """A small line over a panel, flush left: what was counted or left out."""
    axes.set_title(wrapped(text, 7, ROOM - 50), fontsize=7, color=DARK, loc="left", pad=4)


def from_zero(axes: Axes, drawn: np.ndarray) -> None:
    """Begin the value axis at 0 where that costs at most half of it: small changes of large values need the room."""
    values = drawn[np.isfinite(drawn)]
    if len(values) and 0 <= values.min() <= 0.5 * values.max():
        axes.set_ylim(bottom=0)


def log_scale(axes: Axes, drawn: np.ndarray) -> None:
    """Make the value axis logarithmic; over less than a factor of 300 it is labelled between powers of ten too."""
    positive = drawn[np.isfinite(drawn) & (drawn > 0)]
    if not len(positive):  # matplotlib fails on a logarithmic axis without a value that could be on it
        return
    axes.set_yscale("log")
    if positive.max() < 300 * positive.min():  # labels at powers of ten alone would be one or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


FISHER_TICKS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)


def fisher_scale(axes: Axes, drawn: np.ndarray) -> None:
    """Space the value axis by Fisher's z = artanh(r), so that .9 to .99 gets as much room as 0 to .8."""
    edge = 1 - 1e-6  # r = 1 itself would be at infinity
    axes.set_yscale("function", functions=(lambda r: np.arctanh(np.clip(r, -edge, edge)), np.tanh))
    z = np.arctanh(np.clip(drawn[np.isfinite(drawn)], -edge, edge))
    low, high = (z.min(), z.max()) if len(z) else (0.0, 1.0)
    pad = 0.05 * (high - low) + 1e-3
    axes.set_ylim(np.tanh(low - pad), np.tanh(high + pad))
    ticks: list[float] = []
    for r in sorted({sign * r for r in FISHER_TICKS for sign in (-1, 1)}):
        within = low - pad <= np.arctanh(r) <= high + pad
        if within and (not ticks or np.arctanh(r) - np.arctanh(ticks[-1]) > 0.12 * (high - low)):
            ticks.append(r)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent, with the space that a unit has."""
    return f"{number(100 * share, f'.{digits}f')} %"


def brief_percent(share: float) -> str:
    """A share in per cent with two digits, whole from ten on."""
    return percent(share, 0) if share >= 0.0995 else f"{100 * share:.2g} %"


def percent_ticks(axis: Axis) -> None:
    """Label an axis of shares in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
