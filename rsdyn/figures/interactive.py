"""The interactive back end: a panel as Plotly's traces and layout, for the page and for W&B alike.

On the page colours are names that start with ``@``, which it turns into the light or the dark theme's, numbers travel
as base64 float32, which Plotly reads as they are, and its script chooses the traces by ``when`` and the rows by
``rows``. A figure for W&B carries every choice as traces of its own, its controls as one menu, and numbers as plain
lists, since the Plotly of a server may be older than typed arrays.
"""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

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

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Trace = dict[str, Any]
HEIGHT = 320  # pixels
MOST_CHOICES = 60  # of a menu in W&B
MOST_PATHS = 80  # single sequences: more are a grey mass, and heavy
SYMBOLS = {"circle": "circle", "square": "square", "ring": "circle-open"}
SCALES = {
    "diverging": [[0, "@cross"], [0.5, "@paper"], [1, "@c1"]],
    "shares": [[0, "@paper"], [0.25, "@c4"], [0.6, "@cross"], [1, "@ink"]],
}
SCALES["amounts"] = SCALES["shares"]
ONLY_ON_THE_PAGE = ("when", "rows", "paths", "said", "numbers", "starts", "picks")  # what its script reads


def for_page(panel: Panel) -> dict[str, Any]:
    """What the page's data holds of a panel: traces, layout and the names of its controls."""
    plain = {"traces": traces(panel), "layout": layout(panel), "controls": [c.name for c in panel.controls]}
    return _packed(plain)


def figure(panel: Panel) -> Figure:
    """The panel as a Plotly figure by itself, for W&B or a notebook: its controls are one menu."""
    from plotly.graph_objects import Figure

    looks = layout(panel)
    versions = looks.pop("versions", {})
    controls = panel.controls
    choices = _choices(panel)
    found: list[Trace] = []
    shown_at: list[set[int]] = []
    place: dict[str, int] = {}
    for i, choice in enumerate(choices):
        for mark in panel.drawn(choice, waiting=True):
            for trace in _traces_of(mark, panel):
                if "said" in trace:
                    continue
                key = repr(trace) if len(choices) == 1 else _signature(trace)
                if key not in place:
                    place[key] = len(found)
                    found.append({k: _plain(v) for k, v in trace.items() if k not in ONLY_ON_THE_PAGE})
                    shown_at.append(set())
                shown_at[place[key]].add(i)
    first = choices.index(panel.first) if panel.first in choices else 0
    buttons = []
    for i, choice in enumerate(choices):
        patch: dict[str, Any] = {}
        for name, value in choice.items():
            patch |= _plain(versions.get(name, {}).get(value, {}))
        visible = [
            (trace.get("visible", True) if i in at else False) for trace, at in zip(found, shown_at, strict=True)
        ]
        said = ", ".join(f"{c.label}: {c.label_of(choice[c.name])}" for c in controls)
        buttons.append({"label": said, "method": "update", "args": [{"visible": visible}, patch]})
        if i == first:
            looks |= patch
    for trace, at in zip(found, shown_at, strict=True):
        if first not in at:
            trace["visible"] = False
    if len(buttons) > 1:
        looks["updatemenus"] = [{"buttons": buttons, "active": first, "x": 0, "xanchor": "left", "y": 1.02,
                                 "yanchor": "bottom"}]  # fmt: skip
    about = f"<br><sup>bands: {escape(panel.bands, quote=False)}</sup>" if panel.bands else ""
    head = f"Fig. {panel.figure}  {panel.title}" if panel.figure else panel.title
    rule, muted = LIGHT["rule"], LIGHT["muted"]
    ruled = {"gridcolor": rule, "linecolor": muted, "zerolinecolor": rule, "automargin": True}
    looks |= {"title": {"text": head + about}, "legend": {"orientation": "h", "y": -0.2}}  # off the bar of colours
    looks |= {name: ruled | looks.get(name, {}) for name in ("xaxis", "yaxis")}
    base = {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff", "font": {"color": LIGHT["ink"]}}
    # without the default template, which would be in each figure
    return Figure({"data": found, "layout": {"template": {}, **base, **_plain(looks)}})


def _choices(panel: Panel) -> list[dict[str, str]]:
    """The settings of the controls that W&B's menu has, as many as it may have; of units those that are shown."""
    options = {}
    for control in panel.controls:
        every = [value for value, _ in control.options]
        options[control.name] = list(control.shown) if control.kind == "unit" else every
    while math.prod(map(len, options.values())) > MOST_CHOICES:  # the longest gives way, evenly, but for what is shown
        control = max(panel.controls, key=lambda c: len(options[c.name]))
        every = options[control.name]
        kept = set(every[::2]) | {control.value}
        if len(kept) == len(every):
            break
        options[control.name] = [value for value in every if value in kept]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _signature(trace: Trace) -> str:
    """What tells two traces apart, its numbers included."""
    return repr({k: (v.tobytes() if isinstance(v, np.ndarray) else v) for k, v in trace.items()})


# -- traces ------------------------------------------------------------------------------------------------------------


def traces(panel: Panel) -> list[Trace]:
    """All traces of a panel, each with ``when`` it is drawn, and ``rows`` where its arrays have one per option."""
    found = []
    for mark in panel.marks:
        for trace in _traces_of(mark, panel):
            if mark.when:
                trace["when"] = dict(mark.when)
            if mark.rows is not None:
                trace["rows"] = mark.rows._asdict()
            if mark.waits:
                trace["visible"] = "legendonly"
            found.append(trace)
    return found


def _traces_of(mark: Mark, panel: Panel) -> list[Trace]:
    found = MAKE[type(mark)](mark, panel)
    for trace in found:
        if mark.waits:
            trace["visible"] = "legendonly"
    return found


def flat(text: str) -> str:
    """A name from a run's files as Plotly must be given it: it would take ``<`` and ``&`` for markup."""
    return escape(text, quote=False)


def _y(values: np.ndarray, panel: Panel) -> np.ndarray:
    return fisher(values) if panel.y.scale == "fisher" else _symlog(values, panel.y)


def _symlog(values: np.ndarray, axis: Axis) -> np.ndarray:
    if axis.scale != "symlog":
        return values
    t = axis.linear_to
    size = np.abs(values)
    return np.sign(values) * np.where(size <= t, size / t, 1 + np.log10(np.maximum(size, t) / t))


def _line(mark: Line, panel: Panel) -> list[Trace]:
    look = mark.looks
    group = mark.name + ("" if mark.marker != "square" else " ")  # kinds of a condition come and go by themselves
    found: list[Trace] = []
    if mark.low is not None and mark.high is not None:
        found.append(_area(mark.x, _y(mark.low, panel), _y(mark.high, panel), look.token, group, mark.name))
    mode = "+".join(["lines"] * mark.line + ["markers"] * bool(mark.marker))
    trace: Trace = {
        "type": "scatter", "mode": mode or "markers", "x": mark.x, "y": _y(mark.y, panel), "name": flat(mark.name),
        "legendgroup": flat(group), "line": {"color": look.token, "width": 2 * mark.width, "dash": look.dash},
        "hovertemplate": "%{x:.4g}, %{y:.4g}<extra>%{fullData.name}</extra>",
    }  # fmt: skip
    if mark.text:
        trace |= {"text": list(mark.text), "hovertemplate": "%{text}<extra>%{fullData.name}</extra>"}
    if mark.marker:
        size = (5 if mark.marker != "ring" else 13) * mark.size
        trace["marker"] = {"symbol": SYMBOLS[mark.marker], "size": size, "color": look.token}
        if mark.marker == "ring":
            trace["marker"]["line"] = {"width": 3}
    if not mark.line:
        del trace["line"]
    if not mark.legend:
        trace["showlegend"] = False
    if mark.picks:
        hover = f"{mark.picks} %{{customdata}}<br>%{{y:.4g}}<extra>%{{fullData.name}}</extra>"
        trace |= {"customdata": list(mark.picked), "picks": mark.picks, "hovertemplate": hover}
    return [*found, trace]


def _area(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, group: str, name: str, strength: float = 0.18
) -> Trace:
    """The area between two curves, that comes and goes with the curve of its legend group."""
    if low.ndim == 1:
        known = np.isfinite(low) & np.isfinite(high)
        x, low, high = (x if x.ndim > 1 else x[known]), low[known], high[known]
    if x.ndim < low.ndim:
        x = np.broadcast_to(x, low.shape)
    return {
        "type": "scatter", "mode": "lines", "x": np.concatenate([x, x[..., ::-1]], axis=-1),
        "y": np.concatenate([high, low[..., ::-1]], axis=-1), "fill": "toself",
        "fillcolor": f"{colour}/{round(100 * strength)}", "line": {"width": 0}, "hoverinfo": "skip",
        "legendgroup": flat(group), "name": flat(name), "showlegend": False,
    }  # fmt: skip


def _band(mark: Band, panel: Panel) -> list[Trace]:
    low, high = _y(mark.low, panel), _y(mark.high, panel)
    trace = _area(mark.x, low, high, mark.looks.token, mark.name, mark.name, mark.strength)
    return [trace | {"showlegend": mark.legend}]


def _rule(mark: Rule, panel: Panel) -> list[Trace]:
    """Rules are lines of the layout: see `layout`."""
    return []


def _depth_bar(n: int, sites: int) -> dict[str, Any]:
    ticks = layer_ticks(n, sites)
    bar = {"title": {"text": "layer", "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9}
    return bar | {"tickvals": ticks, "ticktext": [str(t) for t in ticks]}


def _path(mark: Path, panel: Panel) -> list[Trace]:
    n, sites = mark.x.shape[-1], mark.sites
    depth = np.arange(n) / sites
    look = {
        "color": depth, "colorscale": "Viridis", "cmin": 0, "cmax": float(max(depth[-1], 1e-9)), "size": 7,
        "symbol": ["square" if sites == 2 and s % 2 else "circle" for s in range(n)], "line": {"width": 0},
        "colorbar": _depth_bar(n, sites),
    }  # fmt: skip
    found: list[Trace] = [{
        "type": "scatter", "mode": "lines+markers", "x": mark.x, "y": mark.y, "line": {"color": "@ink", "width": 1},
        "marker": look, "name": flat(mark.name), "text": list(mark.text), "showlegend": False,
        "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra>%{fullData.name}</extra>",
    }]  # fmt: skip
    for at, name in ((0, "start"), (-1, "end (bold)")):
        ring = {"size": 13, "symbol": "circle-open", "color": "@ink", "line": {"width": 2.5 if at else 1}}
        x, y = (v[..., [at]] for v in (mark.x, mark.y))
        found.append({"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "marker": ring,
                      "hoverinfo": "skip"})  # fmt: skip
    return found


def _paths(mark: Paths, panel: Panel) -> list[Trace]:
    """One trace with gaps; the page draws the one under the pointer again, in colour."""
    kept = np.arange(len(mark.x))
    if len(kept) > MOST_PATHS:
        kept = np.linspace(0, len(mark.x) - 1, MOST_PATHS).round().astype(int)
    gap = np.full((len(kept), 1), np.nan)
    x, y = (np.concatenate([v[kept], gap], axis=1).ravel() for v in (mark.x, mark.y))
    where = [*mark.text, ""]
    return [{
        "type": "scatter", "mode": "lines", "x": x, "y": y, "line": {"color": f"{mark.looks.token}/45", "width": 0.8},
        "name": flat(mark.name), "customdata": [i for i in range(len(kept)) for _ in where],
        "text": [f"{mark.labels[i]}, {place}" for i in kept for place in where],
        "hovertemplate": "%{text}<extra></extra>", "paths": len(where),
    }]  # fmt: skip


def _heat_map(mark: HeatMap, panel: Panel) -> list[Trace]:
    bar = {"title": {"text": mark.bar, "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9}
    if mark.colours == "shares":
        bar["tickformat"] = ".0%"
    names = {"text": [list(mark.columns)] * len(mark.z)} if mark.columns and len(mark.z) <= 1 else {}
    column = "%{customdata}" if names else "%{x:.3g}"
    value = "%{z:.1%}" if mark.colours == "shares" else "%{z:.3g}"
    trace: Trace = {
        "type": "heatmap", "z": mark.z, "x": mark.x, "y": list(mark.labels), "zmin": mark.low, "zmax": mark.high,
        "colorscale": SCALES[mark.colours], "colorbar": bar, "hoverongaps": False, "name": flat(mark.name),
        "hovertemplate": f"%{{y}}, {column}<br>{value}<extra></extra>",
    }  # fmt: skip
    if mark.columns:
        trace["x"] = list(mark.columns)
        trace["hovertemplate"] = f"%{{y}}, %{{x}}<br>{value}<extra></extra>"
    return [trace]


def _distribution(mark: Distribution, panel: Panel) -> list[Trace]:
    name, colour = flat(mark.name), mark.looks.token
    return [{
        "type": "violin", "x": mark.known, "y0": name, "name": name, "orientation": "h", "side": "negative",
        "width": 1.7, "points": False, "meanline": {"visible": True}, "line": {"color": colour, "width": 1.2},
        "fillcolor": f"{colour}/35", "spanmode": "hard", "hoveron": "violins", "hoverinfo": "x+name",
        "showlegend": False,
    }]  # fmt: skip


def _bars(mark: Bars, panel: Panel) -> list[Trace]:
    look: Trace = {"type": "bar", "name": flat(mark.name), "marker": {"color": mark.looks.token, "line": {"width": 0}},
                   "width": float(np.ravel(mark.width)[0]), "showlegend": mark.legend}  # fmt: skip
    if mark.width.ndim:  # of rows
        look["width"] = mark.width
    if mark.start is None:
        look |= {"x": mark.x, "y": mark.height}
    else:
        look |= {"x": mark.height, "y": mark.x, "base": mark.start, "orientation": "h"}
        look["marker"]["line"] = {"width": 1, "color": "@paper"}
    words = "%{text}" if mark.text else "%{x:.4g}, %{y:.4g}"
    return [look | ({"text": list(mark.text), "textposition": "none"} if mark.text else {})
            | {"hovertemplate": f"{words}<extra>%{{fullData.name}}</extra>"}]  # fmt: skip


def _flow(mark: Flow, panel: Panel) -> list[Trace]:
    """The ways, one trace with gaps, and a disc at each end; of rows the page's script makes the ways itself."""
    x, y = mark.end[..., 0], mark.end[..., 1]
    values = np.log10(np.where(mark.value > 0, mark.value, np.nan))
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    ticks = [t for t in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0) if low - 0.01 <= t <= high + 0.01]
    ticks = ticks if len(ticks) > 1 else [low, high]
    bar = {"title": {"text": mark.bar, "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9,
           "tickvals": ticks, "ticktext": [brief(10**t, 2) for t in ticks]}  # fmt: skip
    ways: Trace = {"type": "scatter", "mode": "lines", "line": {"color": "@muted/60", "width": 0.9},
                   "hoverinfo": "skip", "showlegend": False, "name": flat(mark.name)}  # fmt: skip
    if mark.end.ndim == 2:
        gap = np.full_like(mark.end, np.nan)
        way = np.stack([mark.start, mark.end, gap], axis=1).reshape(-1, 2)
        ways |= {"x": way[:, 0], "y": way[:, 1]}
    else:
        ways |= {"x": x, "y": y, "starts": {"x": mark.start[:, 0], "y": mark.start[:, 1]}}
    ends: Trace = {
        "type": "scatter", "mode": "markers", "x": x, "y": y, "name": flat(mark.name), "showlegend": False,
        "marker": {"size": 7, "color": values, "colorscale": "Viridis", "cmin": low, "cmax": high,
                   "line": {"width": 0}, "colorbar": bar},
        "text": list(mark.text), "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }  # fmt: skip
    return [ways, ends]


def _said(mark: Said, panel: Panel) -> list[Trace]:
    return [{"said": mark.words, "numbers": mark.numbers}]


MAKE: dict[type[Mark], Callable[[Any, Panel], list[Trace]]] = {
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


# -- layout ------------------------------------------------------------------------------------------------------------


def layout(panel: Panel) -> dict[str, Any]:
    """The axes, rules and height; under ``versions`` what of them changes with a control."""
    first = panel.first
    marks = panel.drawn(first, waiting=True)
    if not panel.own_axes:
        marks = [one for mark in panel.marks for one in _at_all(mark)]
    looks: dict[str, Any] = _axes(panel, first, marks)
    n_rows = sum(isinstance(m, Distribution) for m in panel.marks)
    lying = any(isinstance(m, Bars) and m.start is not None for m in panel.marks)
    if n_rows:
        looks |= {"height": 90 + 42 * n_rows, "violingap": 0}
        looks["yaxis"] |= {"autorange": "reversed", "type": "category", "ticks": ""}
    elif panel.tall != 1:
        looks["height"] = round(HEIGHT * panel.tall)
    if lying:
        looks["barmode"] = "overlay"
        looks["yaxis"] |= {"autorange": "reversed"}
    if panel.square:
        looks["yaxis"] |= {"scaleanchor": "x", "scaleratio": 1}
        looks["height"] = 440
    if panel.note:
        looks["annotations"] = [{"text": flat(panel.note), "xref": "paper", "yref": "paper", "x": 0, "y": -0.18,
                                 "yanchor": "top", "xanchor": "left", "showarrow": False,
                                 "font": {"size": 11, "color": "@muted"}}]  # fmt: skip
    shapes = [_shape(mark, panel) for mark in panel.marks if isinstance(mark, Rule)]
    if shapes:
        looks["shapes"] = shapes
    own: dict[str, Any] = {}
    for control in panel.controls[:1] if panel.axes or panel.own_axes else ():
        own[control.name] = {
            value: _axes(panel, first | {control.name: value}, panel.drawn(first | {control.name: value}, waiting=True))
            for value, _ in control.options
        }
    return looks | ({"versions": own} if own else {})


def _at_all(mark: Mark) -> list[Mark]:
    """A mark at all of its rows."""
    if mark.rows is None:
        return [mark]
    found = (mark.at(dict(mark.when) | {mark.rows.control: key}) for key in mark.rows.keys)
    return [one for one in found if one is not None]


def _axes(panel: Panel, choice: Choice, marks: Sequence[Mark]) -> dict[str, Any]:
    x, y = panel.axes_at(choice)
    return {"xaxis": _axis(x, values_of(marks, "x")), "yaxis": _axis(y, values_of(marks, "y"))}


def _axis(axis: Axis, values: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": axis.label}, "zeroline": False}
    if axis.names:
        return found | {"showticklabels": False, "ticks": "", "type": "category"}
    if axis.scale == "fisher":
        (low, high), at = fisher_ticks(values)
        ticks = [f"{r:g}".replace("-", "\N{MINUS SIGN}") for r in at]
        return found | {"tickvals": [float(np.arctanh(r)) for r in at], "ticktext": ticks, "range": [low, high]}
    if axis.scale == "symlog":
        reach = max(float(np.abs(values).max(initial=0)), axis.linear_to)
        sizes = [axis.linear_to * 10.0**k for k in range(int(np.ceil(np.log10(reach / axis.linear_to))) + 1)]
        at = [s for size in sizes for s in (-size, size) if not len(values) or values.min() * 1.3 <= s]
        at = sorted([0.0, *at])
        return found | {"tickvals": _symlog(np.array(at), axis).tolist(), "ticktext": [brief(t) for t in at],
                        "zeroline": True}  # fmt: skip
    if axis.scale == "log" and (known := log_ticks(values)):
        (low, high), at = known
        return found | {"type": "log", "tickvals": at, "ticktext": [brief(t) for t in at], "range": [low, high]}
    if axis.ticks:
        found |= {"tickvals": [at for at, _ in axis.ticks], "ticktext": [label for _, label in axis.ticks]}
    if axis.limits is not None:
        found["range"] = list(axis.limits)
    elif axis.from_zero and len(values) and 0 <= values.min() <= 0.5 * values.max():
        found["rangemode"] = "tozero"
    if axis.percent:
        found["tickformat"] = ".0%"
    return found


def _shape(mark: Rule, panel: Panel) -> dict[str, Any]:
    line = {"color": mark.looks.token, "width": 1, "dash": mark.looks.dash}
    if mark.x is not None:
        return {"type": "line", "x0": mark.x, "x1": mark.x, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    y = float(_y(np.array(mark.y), panel))
    return {"type": "line", "y0": y, "y1": y, "x0": 0, "x1": 1, "xref": "paper", "line": line}


# -- numbers and colours -----------------------------------------------------------------------------------------------


def packed(values: Any, dtype: str = "f4") -> dict[str, str]:
    """An array as Plotly's typed array: ``dtype``, base64 ``bdata`` and, beyond one dimension, ``shape``."""
    array = np.ascontiguousarray(np.asarray(values), dtype=f"<{dtype}")
    found = {"dtype": dtype, "bdata": base64.b64encode(array.tobytes()).decode("ascii")}
    if array.ndim > 1:
        found["shape"] = ", ".join(map(str, array.shape))
    return found


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return packed(value)
    if isinstance(value, Mapping):
        return {k: _packed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(v) for v in value]
    return value


WORDS = ("text", "name", "customdata", "y0", "hovertemplate", "ticktext", "legendgroup")


def _plain(value: Any) -> Any:
    """Arrays as lists of the six digits that a picture can show, and the page's names of colours as colours."""
    if isinstance(value, np.ndarray):
        return [_plain(row) for row in value] if value.ndim > 1 else shortened(value.tolist())
    if isinstance(value, Mapping):
        return {k: v if k in WORDS else _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"@[a-z]+\d?(/\d+)?", value):
        name, _, percent = value[1:].partition("/")
        return rgba(LIGHT[name], int(percent)) if percent else LIGHT[name]
    return value


def shortened(values: Sequence[float | None]) -> list[float | None]:
    """Numbers with six digits; None for those that are not finite."""
    return [v if isinstance(v, int) else None if v is None or not np.isfinite(v) else float(f"{v:.6g}") for v in values]


def rgba(colour: str, percent: int) -> str:
    """A colour ``#rrggbb`` with an opacity in percent, as Plotly takes it."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{percent / 100:g})"
