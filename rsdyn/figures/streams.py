"""The streams that a panel compares, and the one way in which a curve over depth of theirs is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured
from rsdyn.figures.colours import WITHOUT, Look, look_of
from rsdyn.figures.over_depth import (
    SHARED_DEPTH,
    depth_axis,
    sublayer_names,
    transition_kinds,
    transition_names,
)
from rsdyn.figures.panel import Axis, Caption, Control, Line, Mark, Panel, array, brief, in_words
from rsdyn.labels import NAMES

RUNS = ("ink", "c1", "c2", "c3", "c4", "c5", "c6")  # of several runs beside each other, whose dash is their condition's
INTERVAL = "95 % interval over sequences"
Of = Callable[[ConditionResults], Measured | None]


class Analysis(NamedTuple):
    """What an analysis found, and what it is called where several stand beside each other."""

    results: AnalysisResults
    model: str = ""
    name: str = ""
    n_sequences: int | None = None


@dataclass(frozen=True)
class Stream:
    """One analysed condition of one run, and how it is drawn everywhere.

    Attributes:
        key: what controls call it.
        label: what a person reads; its look goes by it, unless it has a ``look`` of its own.
        found: what was measured of it.
        main: whether its transitions within and across layers are told apart by colour: where one model is looked at,
            its first stream, and none where several are compared.
        first: whether it is its analysis' first; the others wait in the legend where several are compared.
    """

    key: str
    label: str
    condition: str
    found: ConditionResults
    analysis: Analysis
    main: bool
    first: bool
    look: Look | None = None

    @property
    def sites(self) -> int:
        return self.analysis.results.sites_per_layer

    @property
    def n_sublayers(self) -> int:
        return self.analysis.results.n_sublayers

    @property
    def n_units(self) -> int:
        return self.analysis.results.n_units

    @property
    def n_sequences(self) -> int:
        return self.analysis.n_sequences or self.found.counts.trajectories

    @property
    def looks(self) -> Look:
        return self.look or look_of(self.label)


def streams_of(analyses: Sequence[Analysis]) -> list[Stream]:
    """Every stream of every analysis, named so that no two share a name.

    One analysis: a colour a condition. Several: a colour an analysis, a dash a condition.
    """
    several = len(analyses) > 1
    models = [a.model for a in analyses]
    found = []
    for i, analysis in enumerate(analyses):
        for j, (condition, of) in enumerate(analysis.results.conditions.items()):
            label = NAMES.get(condition, condition)
            if several:
                alike = models.count(analysis.model) > 1
                who = analysis.name if len(set(models)) == 1 else analysis.model
                who = f"{analysis.model}, {analysis.name}" if alike and len(set(models)) > 1 else who
                label = f"{who}: {label}"
            look = Look(RUNS[i % len(RUNS)], look_of(condition).dash) if several else None
            found.append(Stream(f"{i}-{j}", label, condition, of, analysis, not several and j == 0, j == 0, look))
    return found


def pick(streams: Sequence[Stream]) -> tuple[Control, ...]:
    """The control that chooses one stream, where there is a choice."""
    options = tuple((s.key, s.label) for s in streams)
    return (Control("stream", "stream", options, streams[0].key),) if len(streams) > 1 else ()


def when(stream: Stream, streams: Sequence[Stream]) -> dict[str, str]:
    """When a stream is drawn that is chosen with `pick`."""
    return {"stream": stream.key} if len(streams) > 1 else {}


def shared_depth(streams: Sequence[Stream]) -> bool:
    """Whether all streams have one depth, so that the axis can count layers."""
    return len({(s.n_sublayers, s.sites) for s in streams}) == 1


def over_depth(streams: Sequence[Stream]) -> Axis:
    """The axis of depth of some streams: layers where they have as many, else the share of the depth."""
    return depth_axis(streams[0].n_sublayers, streams[0].sites) if shared_depth(streams) else SHARED_DEPTH


def places(stream: Stream, n: int, streams: Sequence[Stream]) -> np.ndarray:
    """Where the ``n`` values of a curve are drawn: at sublayers, or, one fewer, between them."""
    at = np.arange(n) + (0.5 if n == stream.n_sublayers - 1 else 0.0)
    return at if shared_depth(streams) else at / max(stream.n_sublayers - 1, 1)


def sequences_in_words(streams: Sequence[Stream]) -> str:
    """From how many sequences a panel is."""
    counts = {s.n_sequences for s in streams}
    if len(counts) == 1:
        return f"{counts.pop():,} sequences"
    return " and ".join(dict.fromkeys(f"{s.n_sequences:,} ({s.analysis.name})" for s in streams)) + " sequences"


def _measured_on(streams: Sequence[Stream], of: Of) -> str:
    """On what a curve was measured: sequences, or some of them, or some of their tokens."""
    first, words = streams[0], sequences_in_words(streams)
    measured, n_trajectories = of(first.found), first.found.counts.trajectories
    if measured is None or len({s.n_sequences for s in streams}) > 1:
        return words
    n = n_trajectories if measured.n is None else measured.n
    if n_trajectories > first.n_sequences:
        return f"{n:,} tokens of {words}"
    return words if n == first.n_sequences or not n_trajectories else f"{n:,} of {words}"


def depth_lines(
    name: str,
    at: np.ndarray,
    value: np.ndarray,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    text: Sequence[str],
    sites: int | None,
    between: bool,
    apart: bool = False,
    look: Look | None = None,
    width: float = 0.8,
    waits: bool = False,
) -> list[Mark]:
    """A curve over depth as lines: one a kind of transition, ``apart`` under the kinds' own names and colours."""
    if not between or (sites != 2 and not apart):
        return [Line(name=name, x=at, y=value, low=low, high=high, text=tuple(text), look=look, width=width,
                     waits=waits)]  # fmt: skip
    found: list[Mark] = []
    for i, kind in enumerate(transition_kinds(sites)):
        part = kind.part
        if not len(at[part]):
            continue
        found.append(
            Line(
                name=kind.name if apart else name, x=at[part], y=value[part], text=tuple(text)[part],
                low=None if low is None else low[part], high=None if high is None else high[part],
                look=None if apart else look, legend=apart or i == 0, width=width, waits=waits, marker=kind.marker,
                size=1.0 if apart else 0.7,
            )
        )  # fmt: skip
    return found


def curves(
    streams: Sequence[Stream], of: Of, per: Callable[[Stream, bool], float] | None = None
) -> tuple[list[Mark], list[str], list[np.ndarray]]:
    """The lines of one curve of every stream with their intervals, its words for each, and its values.

    Args:
        streams: those that have it are drawn.
        of: what is drawn of a stream's results.
        per: what a stream's values are divided by; the second argument is whether they are without massive units.
    """
    marks: list[Mark] = []
    words: list[str] = []
    drawn: list[np.ndarray] = []
    several = any(s.look for s in streams)
    for stream in sorted(streams, key=lambda s: s.main):  # the main one in front
        measured = of(stream.found)
        if measured is None:
            continue
        for without in (True, False):
            one = measured.without_massive if without else measured
            if one is None:
                continue
            by = 1.0 if per is None else per(stream, without)
            value = array(one.value) / by
            ends = None if one.interval is None else array(one.interval) / by
            between = len(value) == stream.n_sublayers - 1
            names = (transition_names if between else sublayer_names)(stream.n_sublayers, stream.sites)
            label = (WITHOUT if stream.main else f"{stream.label}, {WITHOUT}") if without else stream.label
            look = (
                None if stream.look is None else Look(stream.look.colour, "longdash" if without else stream.look.dash)
            )
            marks += depth_lines(
                label, places(stream, len(value), streams), value,
                low=None if ends is None else ends[0], high=None if ends is None else ends[1],
                text=[f"{where}<br>{_told(value[i], None if ends is None else ends[:, i])}"
                      for i, where in enumerate(names)],
                sites=stream.sites, between=between, apart=stream.main and between and not without, look=look,
                width=1.1 if stream.main and not without else 0.8,
                waits=(without and not stream.main) or (several and not stream.first),
            )  # fmt: skip
            drawn.append(value)
            words.append(in_words(label, value, names))
    return marks, words[::-1], drawn


def _told(value: float, ends: np.ndarray | None) -> str:
    text = brief(value, 4)
    return text + (
        f"  [{brief(ends[0], 4)}, {brief(ends[1], 4)}]" if ends is not None and np.isfinite(ends).all() else ""
    )


def curve_panel(
    key: str,
    figure: str,
    title: str,
    streams: Sequence[Stream],
    of: Of,
    y: Axis,
    caption: Caption,
    *,
    per: Callable[[Stream, bool], float] | None = None,
    behind: Sequence[Mark] = (),
    wide_log: bool = False,
) -> list[Panel]:
    """A curve over depth of every stream that has it, with its interval and without massive units: a panel, or none.

    Args:
        key, figure, title: as in :class:`~rsdyn.figures.panel.Panel`.
        streams: all of them.
        of: what is drawn of a stream's results, such as ``lambda r: r.cosine and r.cosine.mean``.
        y: the axis of its values.
        caption: with ``{sequences}`` for what it was measured on, such as ``60 sequences``.
        per: what a stream's values are divided by, and whether they are without massive units.
        behind: further marks, drawn behind.
        wide_log: whether the axis is logarithmic where the values span more than a factor of 50.
    """
    some = [s for s in streams if of(s.found) is not None]
    if not some:
        return []
    marks, words, drawn = curves(some, of, per)
    every = np.concatenate(drawn)
    every = every[np.isfinite(every) & (every > 0)]
    if wide_log and len(every) and every.max() > 50 * every.min():
        y = Axis(y.label, "log")
    lost = sum(int((~np.isfinite(v)).sum()) for v in drawn)
    note = f"{lost} of {sum(map(len, drawn))} values cannot be drawn" if lost else ""
    told = [part.format(sequences=_measured_on(some, of)) for part in caption]
    return [
        Panel(key=key, figure=figure, title=title, marks=(*behind, *marks), x=over_depth(some), y=y, note=note,
              bands=INTERVAL, caption=Caption(*told), alt="Lines over depth. " + "; ".join(words) + ".")
    ]  # fmt: skip
