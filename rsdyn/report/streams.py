"""The streams that a page compares, and the curves over depth that they share a panel with (Figs. 1, 3D, 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsdyn.analysis.flat import flat_results
from rsdyn.analysis.settings import JACOBIAN
from rsdyn.figures.colours import look_of
from rsdyn.labels import NAMES
from rsdyn.report import plots
from rsdyn.report.plots import RUNS, Control, band, line
from rsdyn.report.reading import RunFiles

MASSIVE = Control("massive", "massive units", [("with", "with"), ("without", "without")], "with", kind="switch")


@dataclass(frozen=True)
class Stream:
    """One analysed condition of one run, and how it is drawn everywhere on the page.

    ``main`` is the stream whose transitions within and across layers are told apart by colour: there is one when one
    model is looked at, and none when several are compared. ``first`` is an analysis' first stream.
    """

    key: str
    label: str
    condition: str
    run: RunFiles
    arrays: Mapping[str, np.ndarray]
    colour: str
    dash: str
    main: bool
    first: bool

    @property
    def sites(self) -> int | None:
        return self.run.sites_per_layer

    @property
    def n_sublayers(self) -> int:
        return self.run.n_sublayers

    @property
    def n_sequences(self) -> int:
        return int(self.run.summary["n_sequences"])

    def measured(self, measure: str) -> bool:
        return measure in self.run.summary["measures"]

    def scalar(self, name: str) -> Any:
        found = self.arrays.get(name)
        return None if found is None else found.item()


def streams_of(runs: Sequence[RunFiles]) -> list[Stream]:
    """Every stream of every analysis, named so that no two share a name.

    One analysis: a colour a condition. Several: a colour an analysis, a dash a condition.
    """
    analyses = [run for run in runs if run.script == "analyze"]
    models = {run.model for run in analyses}
    found: list[Stream] = []
    for i, run in enumerate(analyses):
        for j, condition in enumerate(run.summary["conditions"]):
            label = NAMES.get(condition, condition)
            if len(analyses) > 1:
                alike = sum(other.model == run.model for other in analyses) > 1
                who = run.name if len(models) == 1 else f"{run.model}, {run.name}" if alike else run.model
                label = f"{who}: {label}"
            one = len(analyses) == 1
            found.append(
                Stream(
                    key=f"{i}-{j}",
                    label=label,
                    condition=condition,
                    run=run,
                    arrays=_arrays(run, condition),
                    colour=look_of(condition).token if one else RUNS[i % len(RUNS)],
                    dash=look_of(condition).dash,
                    main=one and j == 0,
                    first=j == 0,
                )
            )
    return found


def _arrays(run: RunFiles, condition: str) -> dict[str, np.ndarray]:
    if run.summary["measures"] == [JACOBIAN]:
        return {}
    return {name: np.asarray(x) for name, x in flat_results(run.results.conditions[condition]).items()}


def pick(name: str, label: str, streams: Sequence[Stream]) -> list[Control]:
    """A control that chooses one stream, where there is a choice."""
    return [Control(name, label, [(s.key, s.label) for s in streams], streams[0].key)] if len(streams) > 1 else []


def shared_depth(streams: Sequence[Stream]) -> bool:
    """Whether all streams have one depth, so that the axis can count layers."""
    return len({(s.n_sublayers, s.sites) for s in streams}) == 1


def over_depth(streams: Sequence[Stream]) -> dict[str, Any]:
    first = streams[0]
    return plots.depth_axis(first.n_sublayers, first.sites) if shared_depth(streams) else plots.depth_axis(None, None)


def places(stream: Stream, n: int, normalised: bool) -> np.ndarray:
    """Where the ``n`` values of a curve are drawn: at sublayers, or, one fewer, between them."""
    at = np.arange(n) + (0.5 if n == stream.n_sublayers - 1 else 0.0)
    return at / max(stream.n_sublayers - 1, 1) if normalised else at


def with_and_without(streams: Sequence[Stream], name: str) -> list[tuple[Stream, str, dict[str, str]]]:
    """Each stream with the array to draw and the setting of the switch at which to draw it.

    A stream without massive units is the same either way.
    """
    other = f"{name}_without_massive"
    found: list[tuple[Stream, str, dict[str, str]]] = []
    for stream in streams:
        if other in stream.arrays:
            found += [(stream, name, {"massive": "with"}), (stream, other, {"massive": "without"})]
        else:
            found.append((stream, name, {}))
    return found


def switch(found: Sequence[tuple[Stream, str, dict[str, str]]]) -> list[Control]:
    """The switch of massive units, where any stream has some."""
    return [MASSIVE] if any(when for _, _, when in found) else []


def curve(
    streams: Sequence[Stream], name: str, *, transform: Any = None, per: Any = None, form: str = ".4g"
) -> tuple[list[dict[str, Any]], list[Control], list[np.ndarray], list[str]]:
    """Traces of one curve of every stream, with intervals; the switch of massive units, if any; values; words.

    ``transform`` maps values to the axis (Fisher's z); ``per`` divides a stream's values by its own number.
    """
    normalised = not shared_depth(streams)
    traces: list[dict[str, Any]] = []
    drawn: list[np.ndarray] = []
    words: list[str] = []
    several = len({s.run.folder for s in streams}) > 1
    found = with_and_without(streams, name)
    for stream, key, when in found:
        by = 1.0 if per is None else per(stream, key)
        values = np.asarray(stream.arrays[key], dtype=float) / by
        interval = np.asarray(stream.arrays[f"{key}_interval"]) / by if f"{key}_interval" in stream.arrays else None
        x = places(stream, len(values), normalised)
        between = len(values) == stream.n_sublayers - 1
        names = (plots.transition_names if between else plots.sublayer_names)(stream.n_sublayers, stream.sites)
        some = _parts(stream, between)
        # of several runs the other streams wait in the legend: six lines with intervals are a tangle
        shown: dict[str, Any] = {"visible": "legendonly"} if several and not stream.first else {}
        for part, label, colour, marker in some:
            at = np.arange(len(values))[part]
            to_axis = transform or (lambda v: v)
            group = f"{stream.key} {label}"
            if interval is not None:
                traces.append(
                    plots.merge_when(
                        band(x[at], to_axis(interval[0, at]), to_axis(interval[1, at]), colour, group, **shown),
                        when,
                    )
                )
            text = [f"{names[i]}<br>{_told(values[i], None if interval is None else interval[:, i], form)}" for i in at]
            trace = line(x[at], to_axis(values[at]), label, colour, text=text, legendgroup=group,
                         dash=stream.dash, width=2 if stream.main else 1.6, **shown)  # fmt: skip
            trace["hovertemplate"] = "%{text}<extra>%{fullData.name}</extra>"
            if marker:
                trace |= {"mode": "lines+markers", "marker": {"symbol": marker, "size": 5, "color": colour}}
            traces.append(plots.merge_when(trace, when))
        drawn.append(values)
        suffix = " without massive units" if key != name else ""
        words.append(plots.curve_in_words(stream.label + suffix, values, names))
    return traces, switch(found), drawn, words


def _parts(stream: Stream, between: bool) -> list[tuple[slice, str, str, str]]:
    """Which entries of a curve make a line of their own: name, colour, marker."""
    if not (stream.main and between and stream.sites == 2):
        return [(slice(None), stream.label, stream.colour, "")]
    return [
        (slice(0, None, 2), f"{stream.label}, within layer", "@within", "circle"),
        (slice(1, None, 2), f"{stream.label}, cross layer", "@cross", "square"),
    ]


def _told(value: float, interval: Any, form: str) -> str:
    text = format(value, form)
    if interval is not None and np.isfinite(interval).all():
        text += f"  [{format(interval[0], form)}, {format(interval[1], form)}]"
    return text.replace("-", "\N{MINUS SIGN}")


def sequences_in_words(streams: Sequence[Stream]) -> str:
    """From how many sequences a panel is."""
    counts = {s.n_sequences for s in streams}
    if len(counts) == 1:
        return f"{counts.pop():,} sequences"
    each = dict.fromkeys(f"{s.n_sequences:,} ({s.run.name})" for s in streams)
    return " and ".join(each) + " sequences"
