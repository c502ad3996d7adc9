"""The panels of a stream's shape and of what it says over depth (METHOD sections 13 and 14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rsdyn.analysis.results import ConditionResults, Dimension, Measured, PhaseResults, ReadoutResults, curves
from rsdyn.dynamics.massive import range_names
from rsdyn.figures.colours import Look
from rsdyn.figures.over_depth import depth_axis, sublayer_names
from rsdyn.figures.panel import (
    Axis,
    Band,
    Caption,
    Control,
    HeatMap,
    Line,
    Mark,
    Panel,
    Rule,
    array,
    brief,
    counted,
    in_words,
)
from rsdyn.figures.streams import Stream, curve_panel, pick, places, sequences_in_words, when

RANGES = ("ink", "c1", "c3", "c4", "c6")  # of positions, in their order
CURVES = ("ink", "c1", "c2", "c3", "c4", "c5", "c6")  # that are looked at for phases together, in their order
READOUTS = {
    "kl": "KL(final || here) (nats)",
    "agreement": "share whose top token is final",
    "entropy": "entropy of the readout (nats)",
    "probability": "probability of the final top token",
}
DIMENSIONS = {
    "twonn": "intrinsic dimension (TwoNN)",
    "mle": "intrinsic dimension (likelihood)",
    "participation": "participation ratio",
    "components_90": "components for 90 %",
    "effective_rank": "effective rank",
    "matrix_entropy": "matrix entropy (nats)",
}
PLACE = "95 % of its places"
RIGHT_ANGLE = "independent steps (π/2)"
SHUFFLED = "steps shuffled over depth"
CONSTANT = "always the commonest token"


def shape(streams: Sequence[Stream]) -> list[Panel]:
    """All of them, those that were measured."""
    return [
        *_readout(streams),
        *_curvature(streams),
        *_dimension(streams),
        *_similarity(streams),
        *_phases(streams),
        *_by_position(streams),
    ]


# -- readout -----------------------------------------------------------------------------------------------------------


def _readout(streams: Sequence[Stream]) -> list[Panel]:
    some = [s for s in streams if s.found.readout is not None]
    if not some:
        return []
    found = some[0].found.readout
    assert found is not None
    of = f"through the {found.lens}, at the last token of {counted(found.kl.n or 0, 'sequence')}"
    basis = "that the stream lacks what is not read: early sublayers are read in the last one's basis."

    def curve(
        name: str, title: str, y: Axis, drawn: str, read_for: str, not_for: str = basis, behind: Sequence[Mark] = ()
    ) -> list[Panel]:
        return curve_panel(
            f"readout_{name}", "", title, some, lambda r: getattr(r.readout, name) if r.readout else None, y,
            Caption(f"{drawn}, {of}.", read_for, not_for), behind=list(behind),
        )  # fmt: skip

    constant: list[Mark] = []
    if found.commonest is not None:
        constant = [Rule(name=CONSTANT, y=float(found.commonest.value), look=Look("muted", "dash"))]

    return [
        *curve("kl", "How far the readout is from the end", Axis("KL(final || here) (nats)", from_zero=True),
               "KL divergence of each sublayer's distribution from the model's own", "where the prediction is made."),
        *curve("agreement", "Agreement with the final top token", Axis("share of sequences", limits=(0, 1),
               percent=True), "Share of sequences whose likeliest token is already the final one; rule: of a readout "
               "that always says the commonest final token",
               "from which sublayer on the top token is known, above the rule.", behind=constant),
        *curve("entropy", "Entropy of the readout", Axis("entropy (nats)", from_zero=True),
               "Entropy of each sublayer's distribution", "where the model is sure, rightly or not."),
        *curve("probability", "Probability of the final top token", Axis("probability", limits=(0, 1), percent=True),
               "Probability of the final top token at each sublayer", "how sharp the final answer is at each depth."),
        *curve_panel(
            "readout_rank", "", "Rank of the final top token", some,
            lambda r: _changed(r.readout.rank, torch.exp) if r.readout else None, Axis("rank (1 is first)", "log"),
            Caption(
                f"Rank of the final top token at each sublayer, geometric mean, {of}.",
                "how far from the top the final answer is where it is not there yet.", basis,
            ),
        ),
        _committed(some, of),
    ]  # fmt: skip


def _committed(streams: Sequence[Stream], of: str) -> Panel:
    marks: list[Mark] = []
    words = []
    for s in streams:
        assert s.found.readout is not None
        share = array(s.found.readout.committed)
        at = places(s, len(share), streams)
        names = (*sublayer_names(s.n_sublayers, s.sites), "the end")
        told = tuple(f"{where}<br>{brief(v)}" for where, v in zip(names, share, strict=True))
        marks.append(Line(name=s.label, x=at, y=share, look=s.look, width=1.1 if s.main else 0.8, text=told))
        words.append(in_words(s.label, share, names))
    return Panel(
        key="readout_committed", figure="", title="Sequences that have committed", marks=tuple(marks),
        x=depth_axis(streams[0].n_sublayers, streams[0].sites),
        y=Axis("share of sequences", limits=(0, 1), percent=True),
        caption=Caption(
            f"Share of sequences whose top token stays the final one from a sublayer on, {of}.",
            "how the depth at which the answer is settled is spread over sequences.",
            "confidence: a top token may stay with a small probability.",
        ),
        alt="Rising lines over depth. " + "; ".join(words) + ".",
    )  # fmt: skip


# -- curvature ---------------------------------------------------------------------------------------------------------


def _padded(measured: Measured | None) -> Measured | None:
    """A curve of the places between two steps, with the first and the last sublayer, which have none."""
    if measured is None:
        return None
    changed: dict[str, Any] = {
        name: torch.nn.functional.pad(value, (1, 1), value=math.nan)
        for name in ("value", "interval")
        if (value := getattr(measured, name)) is not None
    }
    return replace(measured, without_massive=_padded(measured.without_massive), **changed)


def _curvature(streams: Sequence[Stream]) -> list[Panel]:
    behind: list[Mark] = [Rule(name=RIGHT_ANGLE, y=math.pi / 2, look=Look("muted", "dash"))]
    main = streams[0].found.curvature
    if main is not None and "shuffled_steps" in main.nulls:
        behind.append(Rule(name=SHUFFLED, y=main.nulls["shuffled_steps"].mean, look=Look("c5", "dashdot")))
    panels = curve_panel(
        "curvature", "", "Angle between successive steps", streams,
        lambda r: _padded(r.curvature.angle) if r.curvature else None, Axis("angle (radians)"),
        Caption(
            "The angle between the step into a sublayer and the step out of it, mean over {sequences}. Rules: a right "
            "angle, and the mean over depth with the steps in another order.",
            "where the stream goes on as it came (below a right angle) and where it turns back (above).",
            "computation: steps that sequences share are at an angle whatever a sequence says.",
        ),
        behind=behind,
    )  # fmt: skip
    panels = [replace(panel, note="") for panel in panels]  # the ends, which have no angle, are not lost
    return panels + curve_panel(
        "curvature_tokens", "", "Angle over tokens", streams,
        lambda r: _changed(r.curvature.over_tokens, torch.rad2deg) if r.curvature else None, Axis("angle (degrees)"),
        Caption(
            "The angle between successive differences of neighbouring tokens' states at each sublayer, mean over "
            "tokens. Rule: 120 degrees, what independent states give.",
            "whether sentences grow straighter with depth (Hosseini & Fedorenko 2023).",
            "prediction: position 0 and massive units straighten it too, so look at the curve without them.",
        ),
        behind=[Rule(name="independent states (120°)", y=120.0, look=Look("muted", "dash"))],
    )  # fmt: skip


def _changed(measured: Measured | None, to: Callable[[torch.Tensor], torch.Tensor]) -> Measured | None:
    """A curve in other units, by a function that keeps the order of numbers."""
    if measured is None:
        return None
    changed: dict[str, Any] = {
        name: to(value) for name in ("value", "interval") if (value := getattr(measured, name)) is not None
    }
    return replace(measured, without_massive=_changed(measured.without_massive, to), **changed)


# -- dimension, similarity ---------------------------------------------------------------------------------------------


def _dimension(streams: Sequence[Stream]) -> list[Panel]:
    by_n = "a number to compare at another N: estimates by neighbours fall short where dimensions are high."
    spectrum = "how many directions hold most of the variance."
    flat = "the dimension of a curved sheet, which fills more directions than it has."
    panels = []
    for name, title, label, read_for, not_for in (
        ("twonn", "Intrinsic dimension, TwoNN", "dimension", "how many directions the states vary in nearby.", by_n),
        ("mle", "Intrinsic dimension, maximum likelihood", "dimension", "the same over 20 neighbours.", by_n),
        ("participation", "Participation ratio", "dimensions", spectrum, flat),
        ("components_90", "Components for 90 % of the variance", "components", spectrum, flat),
        ("effective_rank", "Effective rank", "dimensions", spectrum, flat),
        ("matrix_entropy", "Matrix entropy", "entropy (nats)", spectrum, flat),
    ):
        panels += curve_panel(
            f"dimension_{name}", "", title, streams,
            lambda r, name=name: getattr(r.dimension, name) if r.dimension else None,  # type: ignore[misc]
            Axis(label, from_zero=True),
            Caption(f"{title} of the states of each sublayer, over {{sequences}}.", read_for, not_for),
        )  # fmt: skip
    return panels


def _similarity(streams: Sequence[Stream]) -> list[Panel]:
    some = [s for s in streams if s.found.similarity is not None]
    if not some:
        return []
    marks: list[Mark] = []
    for s in some:
        assert s.found.similarity is not None
        names = sublayer_names(s.n_sublayers, s.sites)
        marks.append(
            HeatMap(name=s.label, when=when(s, some), z=array(s.found.similarity.map), x=np.arange(s.n_sublayers),
                    labels=names, columns=names, low=0.0, high=1.0, colours="shares", bar="CKA")
        )  # fmt: skip
    first = some[0].found.similarity
    assert first is not None
    floor: list[Mark] = []
    if first.floor is not None:
        value = array(first.floor)
        spread = float(np.nanquantile(value, 0.975))
        floor = [Rule(name="sequences permuted, 97.5 %", y=spread, look=Look("muted", "dot"))]
    axis = depth_axis(some[0].n_sublayers, some[0].sites)
    return [
        Panel(
            key="similarity_map", figure="", title="Similarity of sublayers", marks=tuple(marks), controls=pick(some),
            x=axis, y=Axis("sublayer", names=True), tall=1.4,
            caption=Caption(
                f"Debiased linear CKA of the states of all pairs of sublayers, over {sequences_in_words(some)}.",
                "blocks of sublayers that hold the same geometry of sequences, and where it changes.",
                "computation: a running sum resembles itself; the untrained model says how much.",
            ),
            alt=f"Heat map of {some[0].n_sublayers} by {some[0].n_sublayers} sublayers: first against last "
            f"{brief(array(first.map)[0, -1])}.",
        ),
        *curve_panel(
            "similarity_adjacent", "", "Similarity of successive sublayers", some,
            lambda r: r.similarity.adjacent if r.similarity else None, Axis("CKA", limits=(-0.05, 1.05)),
            Caption(
                "Debiased linear CKA of each sublayer with the next, over {sequences}. Rule: what permuted sequences "
                "reach once in forty times.",
                "where the geometry of sequences changes.",
                "computation: a running sum resembles itself.",
            ),
            behind=floor,
        ),
        *curve_panel(
            "similarity_with_main", "", f"Similarity with {some[0].label}", some,
            lambda r: r.similarity.with_main if r.similarity else None,
            Axis(f"CKA with {some[0].label}", limits=(-0.05, 1.05)),
            Caption(
                f"Debiased linear CKA of each sublayer with the same sublayer of the stream {some[0].label}, for the "
                "same {sequences}.",
                "how much of the geometry of sequences a control keeps, sublayer by sublayer.",
                "the size of a difference: CKA sees angles between sequences alone.",
            ),
        ),
    ]  # fmt: skip


# -- phases, positions -------------------------------------------------------------------------------------------------


def _phases(streams: Sequence[Stream]) -> list[Panel]:
    stream = next((s for s in streams if s.found.phases is not None), None)
    if stream is None or stream.found.phases is None:
        return []
    found = stream.found.phases
    known = {name: measured for name, measured in curves(stream.found) if name in found.curves}
    marks: list[Mark] = []
    shown = max(found.n, 1)
    lines: list[Mark] = []
    for i, name in enumerate(found.curves):
        value = array(known[name].value)
        n = len(value) // stream.sites
        layers = value[: n * stream.sites].reshape(n, stream.sites).mean(1)
        layers = layers[np.isfinite(layers)]
        spread = float(layers.std()) or 1.0
        told = tuple(f"layer {k}<br>{brief(v)}" for k, v in enumerate(layers))
        lines.append(
            Line(name=name.replace("/", " "), x=np.arange(len(layers)) * stream.sites,
                 y=(layers - layers.mean()) / spread, look=Look(CURVES[i], "solid"), text=told)
        )  # fmt: skip
    drawn = np.concatenate([line.y for line in lines if isinstance(line, Line)])
    for i in range(shown):
        at, low, high = ((float(t[shown - 1, i]) - 0.5) * stream.sites for t in (found.places, found.low, found.high))
        if 0 < low < high:
            ends = np.array([1.0, 1.0])
            marks.append(Band(name=PLACE, x=np.array([low, high]), low=drawn.min() * ends, high=drawn.max() * ends,
                              look=Look("c2", "solid"), legend=i == 0))  # fmt: skip
        marks.append(Rule(name="change points" if found.n else "best change point", x=at, legend=i == 0))
    return [
        Panel(
            key="phases", figure="", title="Phases over depth", marks=(*marks, *lines),
            x=depth_axis(stream.n_sublayers, stream.sites), y=Axis("curve, standardised over layers"),
            caption=Caption(
                f"The curves of {stream.label} that were analysed together, averaged over each layer and standardised. "
                f"{_said(found)}.",
                "whether curves change together, and where.",
                "phases, where p is large: any curve can be cut.",
            ),
            alt=f"{len(found.curves)} lines over layers; {found.n} change points beyond chance.",
        )
    ]  # fmt: skip


def _said(found: PhaseResults) -> str:
    k = max(found.n, 1)
    p, where = brief(float(found.p[k - 1])), []
    for i in range(k):
        at, low, high = (int(t[k - 1, i]) for t in (found.places, found.low, found.high))
        where.append(f"layer {at}" + (f" [{low}, {high}]" if low >= 0 else ""))
    told = ", ".join(where)
    told += "; in brackets: 95 % interval over documents" if "[" in told else ""
    if found.n:
        return f"Rules: {counted(found.n, 'change point')} beyond curves of the same trend and spectrum ({told}; p {p})"
    return f"Rule: the best change point ({told}), which curves of the same trend and spectrum reach as well (p {p})"


def _part(measure: str, name: str) -> Callable[[ConditionResults], torch.Tensor | None]:
    """A curve by position of a measure that has several."""

    def of(r: ConditionResults) -> torch.Tensor | None:
        found: ReadoutResults | Dimension | None = getattr(r, measure)
        return None if found is None else found.by_position.get(name)

    return of


def _by_position(streams: Sequence[Stream]) -> list[Panel]:
    stream = streams[0]
    wanted: dict[str, tuple[str, Callable[[ConditionResults], torch.Tensor | None]]] = {
        "cosine": ("cosine of successive states", lambda r: r.cosine.by_position if r.cosine else None),
        "relative": ("step / norm of the state", lambda r: r.velocity.relative_by_position if r.velocity else None),
        "angle": ("angle between steps (radians)", lambda r: r.curvature.by_position if r.curvature else None),
        **{f"readout_{name}": (words, _part("readout", name)) for name, words in READOUTS.items()},
        **{f"dimension_{name}": (words, _part("dimension", name)) for name, words in DIMENSIONS.items()},
        "similarity": ("CKA with the next sublayer", lambda r: r.similarity.by_position if r.similarity else None),
    }  # fmt: skip
    known = {name: (label, array(curves)) for name, (label, of) in wanted.items()
             if (curves := of(stream.found)) is not None}  # fmt: skip
    if not known:
        return []
    marks: list[Mark] = []
    x_axis = depth_axis(stream.n_sublayers, stream.sites)
    for name, (_, values) in known.items():
        shift = (stream.n_sublayers - values.shape[1]) / 2
        for k, words in enumerate(range_names()):
            if np.isfinite(values[k]).any():
                marks.append(Line(name=f"position {words}", when={"measure": name}, look=Look(RANGES[k], "solid"),
                                  x=np.arange(values.shape[1]) + shift, y=values[k]))  # fmt: skip
    options = tuple((name, label) for name, (label, _) in known.items())
    n = stream.found.dimension.n_by_position if stream.found.dimension is not None else 0
    of_n = f" Dimensions are those of {n:,} tokens of each range." if n else ""
    return [
        Panel(
            key="by_position", figure="", title="Curves by the token's position", marks=tuple(marks),
            x=x_axis, y=Axis(options[0][1]), axes={name: (x_axis, Axis(label)) for name, label in options},
            own_axes=True, columns=1 if len(options) < 4 else 4,
            controls=(Control("measure", "curve", options, options[0][0], shown=tuple(name for name, _ in options)),),
            caption=Caption(
                f"Over the tokens of {stream.label} at position 0, 1 to 3, 4 to 15, 16 to 63 and beyond.{of_n}",
                "whether what is said of last tokens holds for others.",
                "differences at position 0 as findings on text: it is the same token everywhere, and often massive.",
            ),
            alt="Lines over depth, one per range of positions.",
        )
    ]  # fmt: skip
