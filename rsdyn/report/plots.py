"""One plot of the page: traces and layout as Plotly takes them, what can be switched, and the words beside it.

Colours are names that start with ``@`` and that the page turns into the light or the dark theme's (``@ink``,
``@within``, ``@c1``; ``@within/25`` at 25 % opacity). A trace's ``when`` says at which settings of the controls it is
drawn. Numbers travel as base64 float32, which Plotly reads as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

# of several runs beside each other; what is of one run is drawn by its name (rsdyn.figures.colours)
RUNS = ("@ink", "@c1", "@c2", "@c3", "@c4", "@c5", "@c6")
FISHER_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)


@dataclass(frozen=True)
class Control:
    """Something to switch: controls of one name on the page move together.

    ``kind`` is ``select``, ``slider``, ``switch`` (its options are off and on) or ``unit``.
    """

    name: str
    label: str
    options: Sequence[tuple[str, str]]
    value: str
    kind: str = "select"


@dataclass
class Plot:
    """One figure of the page.

    ``caption`` is what is drawn, what a reader may conclude, and what not. ``widget`` names the code of the page that
    draws it from ``source``, an entry of the page's shared data; without it the traces are drawn as they are.
    """

    name: str
    title: str
    alt: str
    caption: tuple[str, str, str]
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    controls: list[Control] = field(default_factory=list)
    widget: str = ""
    source: str = ""
    wide: bool = False


def packed(values: Any, dtype: str = "f4") -> dict[str, str]:
    """An array as Plotly's typed array: ``dtype``, base64 ``bdata`` and, beyond one dimension, ``shape``."""
    array = np.ascontiguousarray(np.asarray(values), dtype=f"<{dtype}")
    found = {"dtype": dtype, "bdata": base64.b64encode(array.tobytes()).decode("ascii")}
    if array.ndim > 1:
        found["shape"] = ", ".join(map(str, array.shape))
    return found


def flat(text: str) -> str:
    """A name from a run's files as Plotly must be given it: it would take ``<`` and ``&`` for markup."""
    return escape(text, quote=False)


def line(x: Any, y: Any, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """A curve with its hover text ``text`` a point, if given."""
    look = {"color": colour, "width": more.pop("width", 2), "dash": more.pop("dash", "solid")}
    form = more.pop("form", ".4g")
    label = "%{text}<br>" if "text" in more else ""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": packed(x),
        "y": packed(y),
        "name": flat(name),
        "line": look,
        "hovertemplate": f"{label}%{{y:{form}}}<extra>%{{fullData.name}}</extra>",
        **more,
    }


def band(x: Any, low: Any, high: Any, colour: str, group: str, opacity: int = 18, **more: Any) -> dict[str, Any]:
    """The area between two curves, that comes and goes with the curve of its legend group."""
    x, low, high = (np.asarray(v, dtype=float) for v in (x, low, high))
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": packed(np.concatenate([x, x[::-1]])),
        "y": packed(np.concatenate([high, low[::-1]])),
        "fill": "toself",
        "fillcolor": f"{colour}/{opacity}",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "legendgroup": group,
        "showlegend": False,
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def fisher(values: Any) -> np.ndarray:
    """Fisher's z of correlations and cosines, so that .9 to .99 gets as much room as 0 to .8."""
    edge = 1 - 1e-6
    return np.arctanh(np.clip(np.asarray(values, dtype=float), -edge, edge))


def fisher_axis(title: str, values: Sequence[Any]) -> dict[str, Any]:
    """An axis in Fisher's z, labelled with the correlations or cosines themselves."""
    every = np.concatenate([fisher(v).ravel() for v in values])
    every = every[np.isfinite(every)]
    low, high = (every.min(), every.max()) if len(every) else (0.0, 1.0)
    pad = 0.05 * (high - low) + 1e-3
    ticks: list[float] = []
    for r in sorted({*FISHER_TICKS, *(-r for r in FISHER_TICKS[1:])}):
        z = float(np.arctanh(r))
        if low - pad <= z <= high + pad and (not ticks or z - np.arctanh(ticks[-1]) > 0.09 * (high - low)):
            ticks.append(r)
    text = [f"{r:g}".replace("-", "\N{MINUS SIGN}") for r in ticks]
    return axis(
        title, tickvals=[float(np.arctanh(r)) for r in ticks], ticktext=text, range=[low - pad, high + pad],
        zeroline=False,
    )  # fmt: skip


def log_axis(title: str, values: Any, **more: Any) -> dict[str, Any]:
    """A logarithmic axis with at least some labels: at powers of ten, or between them where there are too few."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        return axis(title, **more)
    low, high = float(np.log10(known.min())), float(np.log10(known.max()))
    pad = 0.04 * (high - low) + 0.01
    powers = range(int(np.floor(low - pad)), int(np.ceil(high + pad)) + 1)
    ticks: list[float] = []
    for steps in ((1.0,), (1, 2, 5)):
        found = [step * 10.0**power for power in powers for step in steps]
        ticks = [t for t in found if low - pad <= np.log10(t) <= high + pad]
        if len(ticks) >= 4:
            break
    else:  # over less than a decade, labels that are evenly spaced in value
        found = [float(t) for t in MaxNLocator(5).tick_values(10 ** (low - pad), 10 ** (high + pad)) if t > 0]
        ticks = [t for t in found if low - pad <= np.log10(t) <= high + pad]
    ticks = ticks[:: max(1, -(-len(ticks) // 12))]
    return axis(
        title, type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], range=[low - pad, high + pad], **more
    )


def layer_ticks(n_sublayers: int, sites: int) -> list[int]:
    """At most nine layers to label."""
    n_layers = -(-n_sublayers // sites)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, n_layers) if n_layers <= 9 * step)
    return list(range(0, n_layers, step))


def depth_axis(n_sublayers: int | None, sites: int | None) -> dict[str, Any]:
    """The axis of depth: layers; sublayers, where nobody says how many make a layer; 0 to 1 for several models."""
    if n_sublayers is None:
        return axis("depth, from the first sublayer to the last", range=[-0.02, 1.02], zeroline=False)
    pad = 0.02 * n_sublayers
    looks: dict[str, Any] = {"range": [-pad, n_sublayers - 1 + pad], "zeroline": False}
    if sites is None:
        return axis("sublayer", **looks)
    layers = layer_ticks(n_sublayers, sites)
    return axis("layer", tickvals=[layer * sites for layer in layers], ticktext=[str(n) for n in layers], **looks)


def sublayer_names(n_sublayers: int, sites: int | None) -> list[str]:
    """What each sublayer is called under the pointer."""
    if sites is None:
        return [f"sublayer {s}" for s in range(n_sublayers)]
    site = ("resid_pre", "resid_mid") if sites == 2 else ("resid_pre",)
    return [f"layer {s // sites}, {site[s % sites]}" for s in range(n_sublayers)]


def transition_names(n_sublayers: int, sites: int | None) -> list[str]:
    """What the step from each sublayer to the next is called under the pointer."""
    if sites == 2:
        return [
            f"within layer {s // 2}" if s % 2 == 0 else f"layer {s // 2} to {s // 2 + 1}"
            for s in range(n_sublayers - 1)
        ]
    unit = "layer" if sites == 1 else "sublayer"
    return [f"{unit} {s} to {s + 1}" for s in range(n_sublayers - 1)]


def number(value: Any, digits: int = 3) -> str:
    """A number as it is read: few digits, a true minus sign, and a dash for what is not defined."""
    if value is None or not np.isfinite(value):
        return "not defined"
    if 1000 <= abs(value) < 1e7:
        return f"{float(value):,.0f}".replace("-", "\N{MINUS SIGN}")
    text = f"{float(value):.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def curve_in_words(name: str, values: Any, where: Sequence[str]) -> str:
    """A curve for someone who cannot see it: where it starts and ends, its least and its largest value."""
    values = np.asarray(values, dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return f"{name}: not defined anywhere"
    first, last = known[0], known[-1]
    low, high = known[values[known].argmin()], known[values[known].argmax()]
    return (
        f"{name}: {number(values[first])} at {where[first]}, {number(values[last])} at {where[last]}, "
        f"least {number(values[low])} at {where[low]}, largest {number(values[high])} at {where[high]}"
    )


def merge_when(trace: dict[str, Any], when: Mapping[str, str]) -> dict[str, Any]:
    return trace | {"when": {**trace.get("when", {}), **when}} if when else trace
