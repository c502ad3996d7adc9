"""The panels of massive activations, and of findings without the largest units (METHOD sections 14 and 0.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from rsdyn.analysis.left_out import LargestUnits
from rsdyn.analysis.results import ByToken
from rsdyn.dynamics.massive import TIMES, range_names
from rsdyn.figures.colours import Look, look_of
from rsdyn.figures.over_depth import depth_axis, sublayer_names
from rsdyn.figures.panel import Axis, Caption, Control, Line, Mark, Panel, Rule, array, brief, in_words
from rsdyn.figures.streams import Stream, curve_panel, places
from rsdyn.labels import NAMES
from rsdyn.metrics.running import TOKEN_CLASSES

RANGES = ("ink", "c1", "c3", "c4", "c6")  # of positions, in their order


def massive(streams: Sequence[Stream]) -> list[Panel]:
    """The largest activations by class of token over depth, beside typical ones; norms by position, where known."""
    stream = next((s for s in streams if s.found.massive is not None), None)
    if stream is None or stream.found.massive is None:
        return []
    found = stream.found.massive
    names, x = sublayer_names(stream.n_sublayers, stream.sites), np.arange(stream.n_sublayers)
    axis = depth_axis(stream.n_sublayers, stream.sites)
    marks: list[Mark] = []
    told = []
    for k, name in enumerate(TOKEN_CLASSES):
        if not found.counts[k]:
            continue
        largest, unit = array(found.largest[k]), found.unit[k].tolist()
        words = tuple(f"{where}<br>{brief(v)}, unit {u}" for where, v, u in zip(names, largest, unit, strict=True))
        marks.append(Line(name=name, x=x, y=largest, text=words))
        typical = Look(look_of(name).colour, "dot")
        marks.append(Line(name=f"{name}, a typical one", x=x, y=array(found.typical[k]), look=typical, width=0.8))
        told.append(in_words(name, largest, names))
    panels = [
        Panel(
            key="massive_activations",
            figure="1B",
            title="Massive activations",
            marks=tuple(marks),
            x=axis,
            y=Axis("largest |activation|", "log"),
            caption=Caption(
                f"The largest activation of any token of each class over depth, {stream.label}; dotted: a typical one "
                "(the median over units of the mean |activation|).",
                "at which sublayer massive activations are written and unwritten, and at which tokens.",
                "a finding about text: they stand at the first token and at sinks, whatever these say.",
            ),
            alt="Lines over depth. " + "; ".join(told) + ".",
        )
    ]
    panels += _ratios(streams, found.normal_ratio)
    if found.norm_by_position is None:
        return panels
    ranges = [(name, array(norm)) for name, norm in zip(range_names(), found.norm_by_position, strict=True)]
    known = [(name, norm) for name, norm in ranges if np.isfinite(norm).all()]
    lines = tuple(
        Line(name=f"position {name}", x=x, y=norm, look=Look(RANGES[k % len(RANGES)], "solid"), text=tuple(
            f"{where}<br>{brief(v)}" for where, v in zip(names, norm, strict=True)))
        for k, (name, norm) in enumerate(known)
    )  # fmt: skip
    if lines:
        panels.append(
            Panel(
                key="norm_by_position",
                figure="1B",
                title="Norm of the stream by position",
                marks=lines,
                x=axis,
                y=Axis("mean norm", "log"),
                caption=Caption(
                    f"The mean norm of the state by the token's position in its text, {stream.label}.",
                    "whether the first tokens carry another norm than the rest, as sinks do.",
                    "the last token alone, which most other panels are of.",
                ),
                alt="Lines over depth. " + "; ".join(in_words(f"position {n}", v, names) for n, v in known) + ".",
            )
        )
    return panels


def _ratios(streams: Sequence[Stream], normal: float) -> list[Panel]:
    """How far the largest unit of a state stands out over depth, by class of token, in every condition."""
    panels: list[Panel] = []
    at = places(streams[0], streams[0].n_sublayers, streams)  # a line, and no rule, widens the axis
    behind: list[Mark] = [
        Line(name="massive (1,000 times)", x=at[[0, -1]], y=np.full(2, TIMES), look=Look("c5", "dash"), width=0.8),
        Rule(name="independent normal units", y=normal, look=Look("muted", "dash")),
    ]
    for f, name in zip(fields(ByToken), TOKEN_CLASSES, strict=True):
        panels += curve_panel(
            f"massive_ratio_{f.name}", "1B", f"How far the largest unit stands out, {name}", streams,
            lambda r, of=f.name: getattr(r.massive.ratio, of) if r.massive else None,  # type: ignore[misc]
            Axis("largest |activation| over the median one", "log"),
            Caption(
                "The largest |activation| of a state over the median one of the same state, geometric mean over "
                "{sequences}. Rules: 1,000 times, from which it is called massive (arXiv 2402.17762, section 2: also "
                f"over 100), and the {brief(normal)} times of as many independent normal units.",
                "at which depth single units stand out, with an interval, and whether they do untrained too.",
                "where in the text: the mean is over all tokens of the class, and a few of them may own it.",
            ),
            behind=behind,
        )  # fmt: skip
    return panels


def without_largest(found: LargestUnits | None) -> list[Panel]:
    """The findings that have a row of their own, against how many of the largest units are left out."""
    rows = [] if found is None or len(found.counts) < 2 else [row for row in found.rows if not row.under]
    if found is None or not rows:
        return []
    x = np.arange(len(found.counts))
    marks: list[Mark] = []
    for row in rows:
        here = {"finding": row.key}
        marks.append(Rule(name="zero", y=0.0, when=here, legend=False))
        for condition, values in row.values.items():
            words = tuple(f"{n} left out<br>{brief(v)}" for n, v in zip(found.counts, values, strict=True))
            marks.append(Line(name=NAMES.get(condition, condition), when=here, x=x, y=np.array(values), marker="circle",
                              size=0.7, text=words))  # fmt: skip
    options = tuple((row.key, row.statistic) for row in rows)
    units = ", ".join(f"{u} ({brief(r)} times)" for u, r in zip(found.units, found.ratios, strict=True))
    return [
        Panel(
            key="findings_without_largest",
            figure="1",
            title="Findings without the largest units",
            marks=tuple(marks),
            x=Axis(
                "largest units left out",
                ticks=tuple((float(i), str(n)) for i, n in enumerate(found.counts)),
                limits=(-0.3, len(x) - 0.7),
            ),
            y=Axis("value of the finding"),
            own_axes=True,
            columns=4,
            controls=(Control("finding", "finding", options, options[0][0], shown=tuple(v for v, _ in options)),),
            caption=Caption(
                "Each finding without some of the largest units, the same ones in every condition. The largest, "
                f"by how often the median |mean| theirs is: {units}.",
                "what the largest units make: a flat line is a finding that they do not.",
                "a threshold: none is needed here.",
            ),
            alt="Lines over the number of units left out, one finding at a time.",
        )
    ]
