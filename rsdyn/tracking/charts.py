"""Plotly figures for W&B: curves over depth with what belongs to them, and the report page's plots.

A figure carries all of its conditions; where the page has a control, it has a menu. Numbers travel as plain lists,
since the Plotly of a server may be older than typed arrays.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rsdyn.figures.colours import LIGHT, look_of
from rsdyn.labels import NAMES
from rsdyn.tracking.keys import SUFFIXES, Panel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from rsdyn.report.plots import Plot
    from rsdyn.tracking.log import Curves

COLOURS = {f"@{name}": colour for name, colour in LIGHT.items()}  # the page's names of colours, in its light theme
LAYERS = tuple(LIGHT[name] for name in ("ink", "c1", "c2", "c3", "c4", "within", "cross"))
MOST_CHOICES = 60  # of a menu
ONLY_ON_THE_PAGE = ("when", "paths")  # what its script reads of a trace


def curve_charts(curves: Curves, panels: Sequence[Panel], layer_names: Sequence[str]) -> dict[str, Figure]:
    """A chart of each measure: a line a series, with its interval as a band, and nulls dashed.

    ``layer_names`` are what the sublayers are called under the pointer.
    """
    return {p.measure: curve_chart(curves[p.measure], p, layer_names) for p in panels if p.measure in curves}


def curve_chart(series: Mapping[str, Sequence[float | None]], panel: Panel, layer_names: Sequence[str]) -> Figure:
    """The chart of one measure; see `curve_charts`."""
    traces: list[dict[str, Any]] = []
    mains = [name for name in series if not name.endswith(SUFFIXES)]
    for name, colour, dashed in zip(mains, *_looks(mains), strict=True):
        label = NAMES.get(name, name.replace("_", " "))
        if f"{name}_low" in series:
            traces.append(_band(series[f"{name}_low"], series[f"{name}_high"], colour, name))
        parts = [("", label, dashed), ("_null", f"{label}: null", "dash")]
        parts.append(("_without_massive", f"{label}: without massive units", "dot"))
        for suffix, called, dash in parts:
            if f"{name}{suffix}" in series:
                y = series[f"{name}{suffix}"]
                traces.append({
                    "type": "scatter", "mode": "lines", "x": list(range(len(y))), "y": shortened(y), "name": called,
                    "legendgroup": name, "line": {"color": colour, "dash": dash, "width": 1.5 if suffix else 2},
                    "text": list(layer_names[: len(y)]),
                    "hovertemplate": "%{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
                })  # fmt: skip
    about = f"<br><sup>bands: {panel.interval}</sup>" if any(t.get("fill") for t in traces) else ""
    return _figure(
        traces,
        {
            "title": {"text": f"Fig. {panel.figure}  {panel.title}{about}"},
            "xaxis": {"title": {"text": "sublayer"}},
            "yaxis": {"title": {"text": panel.ylabel}} | ({"type": "log"} if panel.log else {}),
        },
    )


def _looks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Colours and dashes by the names of series; of perturb.py a colour per layer, and a dash for what is put there."""
    parts = [re.fullmatch(r"(layer\d+)_(.+)", name) for name in names]
    looks = [look_of(part[2].replace("_", " ") if part else name) for part, name in zip(parts, names, strict=True)]
    layers = list(dict.fromkeys(part[1] for part in parts if part))
    colours = [
        look.hex if part is None else LAYERS[layers.index(part[1]) % len(LAYERS)]
        for part, look in zip(parts, looks, strict=True)
    ]
    # beside a condition stand its null and what is without massive units, in its colour: there the dash tells which
    return colours, ["solid" if part is None else look.dash for part, look in zip(parts, looks, strict=True)]


def _band(low: Sequence[float | None], high: Sequence[float | None], colour: str, group: str) -> dict[str, Any]:
    known = [i for i, ends in enumerate(zip(low, high, strict=True)) if None not in ends]
    return {
        "type": "scatter", "mode": "lines", "x": known + known[::-1],
        "y": shortened([high[i] for i in known] + [low[i] for i in known[::-1]]),
        "fill": "toself", "fillcolor": _rgba(colour, 18), "line": {"width": 0}, "hoverinfo": "skip",
        "legendgroup": group, "showlegend": False, "name": f"{group} interval",
    }  # fmt: skip


# -- the report page's plots -------------------------------------------------------------------------------------------


def figure_of(plot: Plot) -> Figure:
    """A plot of the report page as a figure of its own: its controls become one menu.

    Raises ValueError for a plot that only the page's script can draw.
    """
    if not plot.traces:
        raise ValueError(f"plot {plot.name!r} has no traces: the page's script draws it from shared data.")
    traces = [{k: _plain(v) for k, v in t.items() if k not in ONLY_ON_THE_PAGE} for t in plot.traces]
    layout = {k: _plain(v) for k, v in plot.layout.items() if k != "versions"}
    versions = plot.layout.get("versions", {})
    controls = [c for c in plot.controls if any(c.name in t.get("when", {}) for t in plot.traces) or c.name in versions]
    names = [c.name for c in controls]
    choices = list(itertools.product(*([value for value, _ in c.options] for c in controls)))[:MOST_CHOICES]
    labels = {c.name: dict(c.options) for c in controls}
    buttons = []
    first = tuple(c.value for c in controls)
    for choice in choices:
        here = dict(zip(names, choice, strict=True))
        shown = [all(here.get(k) == v for k, v in t.get("when", {}).items()) for t in plot.traces]
        patch: dict[str, Any] = {}
        for name, value in here.items():
            patch |= _plain(versions.get(name, {}).get(value, {}))
        if choice == first:
            layout |= patch
            for trace, visible in zip(traces, shown, strict=True):
                trace["visible"] = visible and trace.get("visible", True)
        if controls:
            said = ", ".join(f"{c.label}: {labels[c.name][here[c.name]]}" for c in controls)
            buttons.append({"label": said, "method": "update", "args": [{"visible": shown}, patch]})
    if len(buttons) > 1:
        layout["updatemenus"] = [{"buttons": buttons, "active": choices.index(first) if first in choices else 0,
                                  "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}]  # fmt: skip
    layout |= {"title": {"text": plot.title}, "legend": {"orientation": "h", "y": -0.2}}  # off the bar of colours
    return _figure(traces, layout)


def _figure(traces: list[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    from plotly.graph_objects import Figure

    rule, muted = COLOURS["@rule"], COLOURS["@muted"]
    axes = {
        name: {"gridcolor": rule, "linecolor": muted, "zerolinecolor": rule, "automargin": True} | layout.get(name, {})
        for name in ("xaxis", "yaxis")
    }
    looks = {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff", "font": {"color": COLOURS["@ink"]}}
    # without the default template, which would be in each figure
    return Figure({"data": traces, "layout": {"template": {}, **looks, **layout, **axes}})


def _plain(value: Any) -> Any:
    """Typed arrays as lists, and the page's names of colours as colours."""
    if isinstance(value, Mapping):
        return unpacked(value) if "bdata" in value else {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"@[a-z]+\d?(/\d+)?", value):
        name, _, percent = value.partition("/")
        return _rgba(COLOURS[name], int(percent)) if percent else COLOURS[name]
    return value


def unpacked(value: Mapping[str, str]) -> list[Any]:
    """A typed array of the page (`rsdyn.report.plots.packed`) as lists, None where a number is not finite."""
    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=f"<{value['dtype']}")
    if "shape" in value:
        rows = array.reshape([int(n) for n in value["shape"].split(",")])
        return [shortened(row.tolist()) for row in rows]
    return shortened(array.tolist())


def shortened(values: Sequence[float | None]) -> list[float | None]:
    """Numbers with the six digits that a picture can show; None for those that are not finite."""
    return [v if isinstance(v, int) else None if v is None or not np.isfinite(v) else float(f"{v:.6g}") for v in values]


def _rgba(colour: str, percent: int) -> str:
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{percent / 100:g})"
