"""The static back end: a panel as a matplotlib figure, one text column wide, and Figure 1 put together.

What a control chooses among and ``shown`` names stands beside each other here. Figures are in 8 pt and made without
pyplot, so that nothing is shown, kept or shared between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from fontTools import subset
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, SymmetricalLogLocator

from rsdyn.figures.colours import LIGHT
from rsdyn.figures.over_depth import layer_ticks
from rsdyn.figures.panel import (
    Axis,
    Band,
    Bars,
    Choice,
    Distribution,
    Flow,
    HeatMap,
    Line,
    Mark,
    Panel,
    Path,
    Paths,
    Rule,
    Said,
    brief,
    fisher,
    fisher_ticks,
    log_ticks,
    values_of,
)
from rsdyn.figures.style import STYLE, WIDTH, legend, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import SubFigure

GREY, FAINT, DARK = LIGHT["muted"], "#BBBBBB", "#444444"
SHAPING = ("GSUB", "GPOS", "GDEF", "MATH", "kern")  # a font's tables: ligatures, kerning, formulas
HEIGHT = 1.75  # inches of one option's axes
MARKERS = {"": "", "circle": "o", "square": "s", "ring": "o"}
SHARES = LinearSegmentedColormap.from_list(
    "shares", [(0, LIGHT["paper"]), (0.25, LIGHT["c4"]), (0.6, LIGHT["cross"]), (1, LIGHT["ink"])]
)
DIVERGING = LinearSegmentedColormap.from_list("diverging", [LIGHT["cross"], LIGHT["paper"], LIGHT["c1"]])
DEPTH = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.93, 256)))  # its yellow is lost on white


def save(figure: Figure | Panel, folder: str | FilePath, name: str | None = None) -> list[FilePath]:
    """Write ``folder/name.png`` (300 dpi) and ``folder/name.pdf`` and return both paths; same figure, same bytes.

    A panel is drawn first, and gives its key as the name. Raises ValueError when the name is not a plain file name.
    """
    if isinstance(figure, Panel):
        panel, figure = figure, draw(figure)
        name = name or panel.key
    if not name or FilePath(name).name != name:
        raise ValueError(f"name is {name!r}, but must be a file name without a folder: pass the folder as folder.")
    folder = FilePath(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    with matplotlib.rc_context(STYLE), _fonts_without(SHAPING), _drawn_once(figure):
        # of zlib's levels 3 takes two thirds of the time of 6, its default, for a file 6 % larger
        figure.savefig(png, dpi=300, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
        # laid out anew: text that no pixel grid rounds is up to 3 points wider, as much as the margin
        figure.savefig(pdf, dpi=300, metadata={"CreationDate": None})  # the dpi of heat maps: the rest is vectors
    return [png, pdf]


@contextmanager
def _fonts_without(tables: tuple[str, ...]) -> Iterator[None]:
    """Leave tables of a font out of what is embedded in a PDF; nothing changes where fontTools names its default anew.

    Text in a PDF is glyphs at their places, so that nothing reads the tables that shape it, and to thin them out takes
    matplotlib three quarters of the time of a font.
    """
    options: Any = subset.Options
    known = getattr(options, "_drop_tables_default", [])
    options._drop_tables_default = [*known, *tables]
    try:
        yield
    finally:
        options._drop_tables_default = known


@contextmanager
def _drawn_once(figure: Figure) -> Iterator[None]:
    """Let ``savefig`` lay a figure out without going through all that is in it, as it does to lay it out by drawing."""
    draw = figure.draw

    def lay_out_or_draw(renderer: RendererBase) -> None:
        engine = figure.get_layout_engine()  # that of the second drawing is none
        if isinstance(engine, ConstrainedLayoutEngine):
            engine.execute(figure)
        else:
            draw(renderer)

    figure.draw = lay_out_or_draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        del figure.draw


def draw(panel: Panel, title: str | None = None) -> Figure:
    """Draw a panel as a figure of its own."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_width(panel), _height(panel)), layout="constrained")
        _draw_into(figure, panel)
        handles, labels = _legend_of(panel, figure.axes)
        legend(figure, title, handles, labels, handlelength=2.0)
    return figure


def assembled(panels: Sequence[Panel]) -> Figure:
    """Draw several panels as one figure with letters, two in a row: the paper's Figure 1.

    A letter is the last of the panel's ``figure``; several panels of one letter carry it once.
    """
    n_rows = -(-len(panels) // 2)
    heights = [max(_height(p) for p in panels[2 * i : 2 * i + 2]) + 0.35 for i in range(n_rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH + 0.2, sum(heights)), layout="constrained")
        grid = figure.subfigures(n_rows, 2, squeeze=False, height_ratios=heights, wspace=0.03).ravel()
        seen: set[str] = set()
        for part, panel in zip(grid, panels, strict=False):
            _draw_into(part, panel)
            handles, labels = _legend_of(panel, part.axes)
            legend(part, panel.title, handles, labels, handlelength=2.0)
            letter = panel.figure[-1:]
            if letter not in seen:
                seen.add(letter)
                part.text(0.005, 0.995, letter, fontsize=11, fontweight="bold", va="top", ha="left")
    return figure


def _grid(panel: Panel) -> tuple[int, int]:
    """Rows and columns of axes: options beside each other, or those of two controls down and across."""
    several = [len(c.shown) for c in panel.controls if len(c.shown) > 1]
    if len(several) > 2:
        raise ValueError(f"panel {panel.key!r} shows options of {len(several)} controls, and a figure has two ways.")
    if len(several) == 2:
        return several[0], several[1]
    n = several[0] if several else 1
    columns = min(panel.columns, n)
    return -(-n // columns), columns


def _width(panel: Panel) -> float:
    """One column, or two for what goes both down and across, or more than three across."""
    return WIDTH * (2 if _grid(panel)[1] > 3 else 1)


def _height(panel: Panel) -> float:
    rows, columns = _grid(panel)
    if panel.square:
        return 0.9 + rows * ((_width(panel) - 0.5) / columns + 0.25)
    if n := _rows_of(panel):
        lying = any(isinstance(m, Bars) for m in panel.marks)
        return 0.75 + n * (0.2 if lying else 0.36)
    small = 0.72 if rows * columns > 2 else 1.0
    return 0.55 + rows * HEIGHT * panel.tall * small


def _rows_of(panel: Panel) -> int:
    """How many rows stand below each other: distributions, or what lying bars belong to."""
    n = sum(isinstance(m, Distribution) for m in panel.marks)
    return n or len({x for m in panel.marks if isinstance(m, Bars) and m.start is not None for x in m.x.tolist()})


def _draw_into(figure: Figure | SubFigure, panel: Panel) -> None:
    rows, columns = _grid(panel)
    choices = list(panel.choices())
    shared = not panel.own_axes
    flows = any(isinstance(m, Flow) for m in panel.marks)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared and flows, sharey=shared)
    # a SubFigure's subplots are a plain array too; what is left over stays empty
    for axes in grid.ravel()[len(choices) :]:
        axes.remove()
    several = [c for c in panel.controls if len(c.shown) > 1]
    scales = _value_scales(panel, choices)
    bars: list[Any] = []
    everything = [m for c in choices for m in panel.drawn(c)]
    for i, (choice, axes) in enumerate(zip(choices, grid.ravel(), strict=False)):
        marks = panel.drawn(choice)
        for mark in marks:
            bars.append(DRAW[type(mark)](axes, mark, scales))
        x, y = panel.axes_at(choice)
        of = marks if panel.own_axes else everything
        _axis(axes, "x", x, values_of(of, "x"), _rows_of(panel), _width(panel) / columns)
        _axis(axes, "y", y, values_of(of, "y"), _rows_of(panel))
        if panel.square:
            axes.set_aspect("equal", adjustable="box")
        if several:
            heads = [c.label_of(choice[c.name]) for c in several]
            axes.set_xlabel("")
            axes.set_ylabel("")
            axes.tick_params(labelsize=6)
            size = 6 if panel.own_axes else 7
            if len(heads) == 2:  # down and across
                if i % columns == 0:
                    axes.set_ylabel(heads[0], fontsize=7)
                heads = heads[1:] if i < columns else []
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_locator(MaxNLocator(3))
            said = [m.told() for m in marks if isinstance(m, Said)]
            words = "\n".join([*heads, *said])
            room = (_width(panel) * 72 - 60) / columns - 10
            if words:
                axes.set_title(wrapped(words, size, room), fontsize=size, pad=3)
            below = i + columns < len(choices)
            if not below and shared and flows:
                axes.tick_params(labelbottom=True)
    if several:  # what all are called; where they differ, their heads say it
        across, down = ({axis.label for axis in axes} for axes in zip(*map(panel.axes_at, choices), strict=True))
        figure.supxlabel(across.pop() if len(across) == 1 else "", fontsize=8)
        figure.supylabel(down.pop() if len(down) == 1 else "", fontsize=8)
    elif panel.note:
        grid[0, 0].set_title(wrapped(panel.note, 7, WIDTH * 72 - 60), fontsize=7, color=DARK, loc="left", pad=4)
    known = [bar for bar in bars if bar is not None]
    if known:
        _colour_bar(figure, known[-1], grid.ravel()[: len(choices)], low=flows)


def _colour_bar(figure: Any, bar: tuple[Any, str, list[int] | None], grid: Any, low: bool) -> None:
    mappable, label, ticks = bar
    where: dict[str, Any] = {"location": "bottom", "aspect": 40, "shrink": 0.9} if low else {"pad": 0.02, "aspect": 30}
    drawn = figure.colorbar(mappable, ax=list(grid), **where)
    drawn.set_label(label, fontsize=8)
    if ticks is not None:
        drawn.set_ticks(ticks)
    elif isinstance(mappable.norm, LogNorm):
        known = log_ticks(np.array([mappable.norm.vmin, mappable.norm.vmax]))
        if known:
            drawn.set_ticks(known[1], labels=[f"{t:g}" for t in known[1]])
            drawn.ax.minorticks_off()
    drawn.outline.set_linewidth(0.4)


def _value_scales(panel: Panel, choices: Sequence[Choice]) -> dict[str, Any]:
    """What all options share: the colours of flows, and the bins of distributions."""
    scales: dict[str, Any] = {"n": len(choices)}
    marks = [m for c in choices for m in panel.drawn(c)]
    flows = [m for m in marks if isinstance(m, Flow)]
    if flows:
        values = np.concatenate([m.value for m in flows])
        known = values[np.isfinite(values)]
        positive = known[known > 0]
        norm: Normalize = Normalize(float(known.min(initial=0)), float(known.max(initial=0)) or 1.0)
        if len(positive) and positive.max() > 8 * positive.min():
            norm = LogNorm(float(np.percentile(positive, 1)), float(positive.max()), clip=True)
        scales["flow"] = matplotlib.cm.ScalarMappable(norm, DEPTH)
        every = np.concatenate([m.start for m in flows] + [np.column_stack([m.x, m.y]) for m in marks
                               if isinstance(m, Line)])  # fmt: skip
        every = every[np.isfinite(every).all(1)]
        scales["span"] = np.maximum(np.ptp(every, axis=0), 1e-12) if len(every) else np.ones(2)
        low, high = (every.min(0), every.max(0)) if len(every) else (np.zeros(2), np.ones(2))
        room = np.where(high > low, 0.12 * (high - low), 1.0)
        scales["limits"] = low - room, high + room
    spread = [m for m in marks if isinstance(m, Distribution) and len(m.known)]
    if spread:
        low, high = min(m.known.min() for m in spread), max(m.known.max() for m in spread)
        pad = 0.02 * (high - low) + 1e-3
        bins = int(np.clip(2 * min(len(m.known) for m in spread) ** 0.5, 12, 80))
        scales["edges"] = np.linspace(low - pad, high + pad, bins + 1)
        scales["order"] = [m.name for m in spread]
        scales["mean"] = spread[0].known.mean()
    return scales


# -- axes --------------------------------------------------------------------------------------------------------------


def _axis(axes: Axes, which: str, axis: Axis, values: np.ndarray, n_rows: int, room: float | None = None) -> None:
    own: Any = axes.xaxis if which == "x" else axes.yaxis
    set_limits: Any = axes.set_xlim if which == "x" else axes.set_ylim
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(wrapped(axis.label, 8, 72 * HEIGHT * 0.95)
                                                          if which == "y" else axis.label)  # fmt: skip
    if axis.names:
        own.set_major_locator(MaxNLocator(5, integer=True))
        return
    if axis.scale == "fisher":
        (axes.set_xscale if which == "x" else axes.set_yscale)("function", functions=(fisher, np.tanh))
        (low, high), ticks = fisher_ticks(values)
        set_limits(np.tanh(low), np.tanh(high))
        own.set_major_locator(FixedLocator(ticks))
        own.set_major_formatter(FixedFormatter([f"{t:g}".replace("-", "\N{MINUS SIGN}") for t in ticks]))
    elif axis.scale == "log" and (found := log_ticks(values)):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        (low, high), ticks = found
        set_limits(10**low, 10**high)
        own.set_major_locator(FixedLocator(ticks))
        own.set_major_formatter(FixedFormatter([brief(t) if abs(np.log10(t)) < 4 else f"$10^{{{round(np.log10(t))}}}$"
                                                for t in ticks]))  # fmt: skip
        own.set_minor_locator(FixedLocator([]))
    elif axis.scale == "symlog":
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=axis.linear_to)
        own.set_major_locator(SymmetricalLogLocator(base=10, linthresh=axis.linear_to))
        own.set_major_formatter(FuncFormatter(lambda v, _: brief(v)))
    elif axis.from_zero and len(values) and 0 <= values.min() <= 0.5 * values.max():
        set_limits(0, None)
    if axis.limits is not None and axis.scale == "linear":
        set_limits(*axis.limits)
    if axis.ticks:
        own.set_major_locator(FixedLocator([at for at, _ in axis.ticks]))
        own.set_major_formatter(FixedFormatter([label for _, label in axis.ticks]))
    elif axis.scale == "linear" and not n_rows:
        n = (5 if which == "x" else 6) if room is None or room > 1.2 else 3
        own.set_major_locator(MaxNLocator(n, integer=axis.whole, min_n_ticks=1))
    if axis.percent:
        own.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))


# -- marks -------------------------------------------------------------------------------------------------------------


def _finite(values: np.ndarray) -> np.ndarray:
    """Infinities as NaN: matplotlib leaves a gap for NaN, but stretches an axis to infinity."""
    return np.where(np.isfinite(values), values, np.nan)


def _area(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, alpha: float) -> None:
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() > 1:
        axes.fill_between(x, _finite(low), _finite(high), color=colour, alpha=alpha, linewidth=0)
    else:  # a band of one point has no width
        axes.vlines(x[known], low[known], high[known], color=colour, alpha=alpha + 0.1, linewidth=3)


def _line(axes: Axes, mark: Line, scales: Mapping[str, Any]) -> None:
    look = mark.looks
    if mark.low is not None and mark.high is not None:
        _area(axes, mark.x, mark.low, mark.high, look.hex, 0.2)
    few = len(mark.x) < 40
    size = mark.size * (3.2 if few or not mark.line else 2.2)
    marker = MARKERS[mark.marker]
    alone = np.isfinite(mark.y).sum() == 1 and not marker
    more: dict[str, Any] = {"markerfacecolor": "none"} if mark.marker == "ring" else {}
    axes.plot(
        _finite(mark.x),
        _finite(mark.y),
        color=look.hex,
        linestyle=look.line if mark.line else "",
        linewidth=1.1 * mark.width,
        marker="o" if alone else marker,
        markersize=size,
        markeredgewidth=0.8 if mark.marker == "ring" else 0,
        rasterized=not mark.line and len(mark.x) > 2000,
        label=mark.name if mark.legend else "_" + mark.name,
        **more,
    )


def _band(axes: Axes, mark: Band, scales: Mapping[str, Any]) -> None:
    _area(axes, mark.x, mark.low, mark.high, mark.looks.hex, mark.strength)


def _rule(axes: Axes, mark: Rule, scales: Mapping[str, Any]) -> None:
    look: Any = {"color": mark.looks.hex, "linestyle": mark.looks.line, "linewidth": 0.8, "zorder": 0}
    look["label"] = mark.name if mark.legend else "_" + mark.name
    if mark.x is not None:
        axes.axvline(mark.x, **look)
    if mark.y is not None:
        axes.axhline(mark.y, **look)


def _path(axes: Axes, mark: Path, scales: Mapping[str, Any]) -> Any:
    """Line and markers coloured by depth, the start and the end ringed; gives what the colour bar is of."""
    n, sites = len(mark.x), mark.sites
    small = 0.5 if scales["n"] > 2 else 1.0
    depth = np.arange(n) / sites
    x, y = _finite(mark.x), _finite(mark.y)
    axes.plot(x, y, color=DARK, linewidth=0.6, zorder=2, label="_" + mark.name)
    dots = None
    for first, (marker, label) in enumerate((("o", "resid_pre"), ("s", "resid_mid"))[:sites]):
        dots = axes.scatter(
            x[first::sites], y[first::sites], c=depth[first::sites], cmap=DEPTH, vmin=0, vmax=max(depth[-1], 1e-9),
            s=(14 if n < 40 else 8) * small, marker=marker, linewidths=0, zorder=3,
        )  # fmt: skip
        axes.plot([], [], marker, color="#666666", markersize=3.5, label=label)  # in the legend its colour is no layer
    for at, colour, label in ((0, "#FFFFFF", "start"), (-1, "#000000", "end")):
        edge: Any = {"markeredgecolor": "#000000", "markeredgewidth": 0.8 * small**0.5}
        axes.plot(x[at], y[at], "o", markersize=7 * small**0.5, markerfacecolor="none", zorder=4, **edge)
        axes.plot(x[at], y[at], "o", markersize=3.5 * small**0.5, color=colour, zorder=5, label=label, **edge)
    return dots, "layer", layer_ticks(n, sites)


def _paths(axes: Axes, mark: Paths, scales: Mapping[str, Any]) -> None:
    # a handful reads as a spread, hundreds only if each is faint
    faint = float(np.clip(20 / max(1, len(mark.x)), 0.12, 0.6))
    lines = np.stack([_finite(mark.x), _finite(mark.y)], axis=-1)
    axes.add_collection(LineCollection(list(lines), colors=GREY, linewidths=0.4, alpha=faint, zorder=1))
    axes.plot([], [], color=GREY, linewidth=0.8, label=mark.name)
    axes.autoscale_view()


def _heat_map(axes: Axes, mark: HeatMap, scales: Mapping[str, Any]) -> Any:
    colours = (DIVERGING if mark.colours == "diverging" else SHARES).with_extremes(bad="#CCCCCC")
    step = (mark.x[-1] - mark.x[0]) / max(1, len(mark.x) - 1) or 1.0
    extent = (mark.x[0] - step / 2, mark.x[-1] + step / 2, -0.5, len(mark.z) - 0.5)
    image = axes.imshow(
        np.ma.masked_invalid(mark.z), aspect="auto", origin="lower", extent=extent, cmap=colours, vmin=mark.low,
        vmax=mark.high, interpolation="nearest",
    )  # fmt: skip
    axes.set_xlim(extent[:2])
    return image, mark.bar, None


def _distribution(axes: Axes, mark: Distribution, scales: Mapping[str, Any]) -> None:
    """A histogram scaled to its own peak, its mean marked and written beside it; dashed, the first row's mean."""
    if not len(mark.known):
        return
    order, edges = scales["order"], scales["edges"]
    base = len(order) - 1 - order.index(mark.name)
    heights = np.histogram(mark.known, edges)[0]
    first = mark.name == order[0]
    axes.stairs(base + 0.85 * heights / heights.max(), edges, baseline=base, fill=True, color=mark.looks.hex,
                label="_" + mark.name)  # fmt: skip
    mean = mark.known.mean()
    axes.plot([mean, mean], [base, base + 0.85], color="#FFFFFF" if first else "#000000", linewidth=1.2)
    words = f"{brief(mean)} ± {brief(mark.known.std())}"
    axes.text(1.02, base + 0.4, words, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
    if first:
        axes.axvline(mean, color=DARK, linestyle="--", linewidth=0.8, zorder=3)
        axes.text(1.02, len(order) - 0.05, "mean ± SD", transform=axes.get_yaxis_transform(), fontsize=7, color=DARK)
        axes.set_yticks([len(order) - 0.6 - i for i in range(len(order))], [wrapped(name, 7, 80) for name in order])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, len(order))
        axes.set_xlim(edges[0], edges[-1])


def _bars(axes: Axes, mark: Bars, scales: Mapping[str, Any]) -> None:
    look: Any = {"color": mark.looks.hex, "edgecolor": "white", "linewidth": 0.5}
    if mark.start is None:
        axes.bar(mark.x, mark.height, width=float(mark.width), **look)
    else:
        axes.barh(mark.x, mark.height, left=mark.start, height=float(mark.width), **look)
        axes.invert_yaxis() if not axes.yaxis_inverted() else None


def _flow(axes: Axes, mark: Flow, scales: Mapping[str, Any]) -> Any:
    """Arrows from the starts; the longest is about as long as neighbours of a square grid are apart."""
    way = mark.end - mark.start
    known = np.isfinite(way).all(1)
    low, high = scales["limits"]
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    start, way, value = mark.start[known], way[known], mark.value[known]
    if len(way) and np.hypot(*way.T).max() > 0:
        longest = np.hypot(*(way / scales["span"]).T).max() or 1.0
        axes.quiver(
            *start.T, *way.T, value, angles="xy", scale_units="xy", scale=longest / min(0.25, 1.1 / np.sqrt(len(way))),
            cmap=scales["flow"].cmap, norm=scales["flow"].norm, width=0.007, headwidth=4, headlength=4,
            headaxislength=3.6, zorder=3,
        )  # fmt: skip
    else:
        axes.plot(*_finite(mark.start).T, ".", color=GREY, markersize=2)
    return scales["flow"], mark.bar, None


def _said(axes: Axes, mark: Said, scales: Mapping[str, Any]) -> None:
    """Words go into the title of the axes."""


DRAW: dict[type[Mark], Callable[[Axes, Any, Mapping[str, Any]], Any]] = {
    Line: _line,
    Band: _band,
    Rule: _rule,
    Path: _path,
    Paths: _paths,
    HeatMap: _heat_map,
    Distribution: _distribution,
    Bars: _bars,
    Flow: _flow,
    Said: _said,
}


def _legend_of(panel: Panel, axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """One entry a name, in the order of the marks, then what bands are."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    marks = [m for c in panel.choices() for m in panel.drawn(c)]
    for mark in marks:
        if isinstance(mark, Bars) and mark.legend:
            found.setdefault(mark.name, Patch(color=mark.looks.hex))
        if isinstance(mark, Band) and mark.legend:
            found.setdefault(mark.name, Patch(color=GREY, alpha=2 * mark.strength, linewidth=0))
    if len(found) == 1 and len(marks) == 1:
        found = {}  # a title says it
    banded = [m for m in marks if isinstance(m, Line) and m.low is not None and np.isfinite(m.low).any()]
    if panel.bands and banded:
        found[panel.bands] = Patch(color=GREY, alpha=0.4, linewidth=0)
    return list(found.values()), list(found)
