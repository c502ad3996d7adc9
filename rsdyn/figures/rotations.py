"""The panels of unit rotations: portraits, each unit's place in its null, and turns over units (Fig. 2).

Every panel shows clockwise turns, -R, as the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rsdyn.analysis.results import Rotation
from rsdyn.analysis.unit_surrogates import TurnHistograms
from rsdyn.dynamics.rotation import portrait
from rsdyn.figures.colours import Look, is_series
from rsdyn.figures.over_depth import sublayer_names
from rsdyn.figures.panel import (
    Axis,
    Bars,
    Caption,
    Control,
    Distribution,
    Line,
    Mark,
    Panel,
    Path,
    Rows,
    Said,
    array,
    brief,
    counted,
    percent,
)
from rsdyn.figures.streams import Stream, pick, sequences_in_words, when
from rsdyn.labels import KEEPS, NAMES

MOST_UNITS = 1024  # whose portraits a page holds
MOST_HISTOGRAMS = 256  # units whose surrogates are drawn again
N_PORTRAITS = 3  # that turn most clockwise, and as many at random
LEADING = ("innovation_shuffle", "layer_shuffle")  # nulls of a static figure: the one for claims, and the paper's
TURNS = Axis("clockwise turns")


def chosen_units(turns: np.ndarray, most: int | None = None) -> np.ndarray:
    """The units that a page holds: all, or those that turn most each way and an even sample of the rest."""
    most = MOST_UNITS if most is None else most
    if len(turns) <= most:
        return np.arange(len(turns))
    order = np.argsort(np.nan_to_num(turns, nan=0.0), kind="stable")
    ends = most // 8
    middle = order[ends:-ends]
    some = middle[np.linspace(0, len(middle) - 1, most - 2 * ends).round().astype(int)]
    return np.sort(np.concatenate([order[:ends], some, order[-ends:]]))


def histogram_units(turns: np.ndarray) -> list[int]:
    """The units whose surrogates are drawn again: those of a page that turn most, where there are very many."""
    kept = chosen_units(turns)
    if len(kept) <= MOST_HISTOGRAMS:
        return kept.tolist()
    most = np.argsort(-np.abs(np.nan_to_num(turns[kept], nan=0.0)), kind="stable")[:MOST_HISTOGRAMS]
    return sorted(kept[most].tolist())


def portrait_units(turns: np.ndarray, units: Sequence[int] | None, seed: int) -> list[int]:
    """The units asked for, else the three that turn most clockwise and three others at random."""
    if units is not None:
        return list(units)[:12]
    ranked = np.argsort(-np.nan_to_num(turns, nan=-np.inf), kind="stable").tolist()
    rest = ranked[N_PORTRAITS:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:N_PORTRAITS]
    return [*ranked[:N_PORTRAITS], *(rest[i] for i in order.tolist())]


def rotation(
    streams: Sequence[Stream],
    *,
    units: Sequence[int] | None = None,
    seed: int = 0,
    histograms: Mapping[str, TurnHistograms] | None = None,
) -> list[Panel]:
    """Fig. 2A to C.

    Args:
        streams: those that have the measure are drawn.
        units: whose portraits a static figure shows.
        seed: chooses those that it shows otherwise.
        histograms: by null model, turns of the first stream's surrogates.
    """
    some = [s for s in streams if s.found.rotation is not None]
    if not some:
        return []
    first = some[0]
    assert first.found.rotation is not None
    turns = -array(first.found.rotation.turns)
    kept = chosen_units(turns)
    shown = portrait_units(turns, units, seed)
    kept = np.unique(np.concatenate([kept, shown]))
    ranked = kept[np.argsort(np.nan_to_num(turns[kept], nan=-np.inf), kind="stable")]
    options = tuple((str(u), f"unit {u}") for u in ranked)
    control = Control("unit", "unit", options, str(shown[0]), "unit", tuple(str(u) for u in shown))
    thinned = (
        f" Thinned: {len(kept):,} of {len(turns):,} units, those that turn most each way and an even sample."
        if len(kept) < len(turns)
        else ""
    )
    return [
        _portraits(some, kept, control, thinned),
        *_places(some, kept, control, histograms or {}),
        distribution(some),
        *_by_unit(some, kept, control, thinned),
    ]


def _found(stream: Stream) -> Rotation:
    assert stream.found.rotation is not None
    return stream.found.rotation


def _keys(kept: np.ndarray) -> Rows:
    return Rows("unit", tuple(str(u) for u in kept))


def _portraits(streams: list[Stream], kept: np.ndarray, control: Control, thinned: str) -> Panel:
    marks: list[Mark] = []
    for stream in streams:
        found = _found(stream)
        path = portrait(found.trajectory[:, kept.tolist()])
        here = when(stream, streams)
        marks.append(Path(name=stream.label, when=here, rows=_keys(kept), x=array(path.x).T, y=array(path.y).T,
                          sites=stream.sites, text=sublayer_names(stream.n_sublayers, stream.sites)))  # fmt: skip
        numbers = np.stack([kept, -array(found.turns)[kept]], axis=1)
        marks.append(Said(name="said", when=here, rows=_keys(kept), numbers=numbers, words="{1} turns ↻"))
    first = streams[0]
    turns = -array(_found(first).turns)
    most = int(np.nanargmax(turns)) if np.isfinite(turns).any() else 0
    return Panel(
        key="fig2a_portraits", figure="2A", title="Portraits of units", marks=tuple(marks),
        x=Axis("activation, from its start"), y=Axis("gradient over sublayers, from its start"),
        controls=(control, *pick(streams)), own_axes=True, columns=3, tall=1.05,
        caption=Caption(
            f"The mean trajectory of single units over {sequences_in_words(streams)}: activation against that "
            "activation's gradient over sublayers (central differences), each from its start; open ring start, full "
            "ring end. On the page: choose a unit by its number, step through them by their turns, or touch one in "
            f"Fig. 2C.{thinned}",
            "the shape behind a number of turns: a few wide loops, or many small zigzags.",
            "rotation. A path in the plane of a value and its own slope can only turn clockwise, and every reversal of "
            "the slope adds to the count: |R| counts how jagged the path is.",
        ),
        alt=f"A unit's path over {first.n_sublayers} sublayers in the plane of its activation and that one's gradient; "
        f"unit {most} makes most clockwise turns in {first.label}, {brief(turns[most])}.",
    )  # fmt: skip


def _nulls(streams: Sequence[Stream]) -> list[str]:
    return list(dict.fromkeys(null for s in streams for null in _found(s).nulls))


def _null_control(nulls: Sequence[str]) -> Control:
    options = tuple((null, NAMES.get(null, null)) for null in nulls)
    shown = tuple(null for null in LEADING if null in nulls) or (nulls[0],)
    return Control("null", "null model", options, nulls[0], shown=shown)


def _places(
    streams: list[Stream], kept: np.ndarray, control: Control, histograms: Mapping[str, TurnHistograms]
) -> list[Panel]:
    """Each unit's own turns beside those of its surrogates."""
    nulls = _nulls(streams)
    if not nulls:
        return []
    marks: list[Mark] = []
    for stream in streams:
        found = _found(stream)
        own = -array(found.turns)[kept]
        for null, test in found.nulls.items():
            here = {"null": null} | when(stream, streams)
            mean, std = -array(test.mean)[kept], array(test.std)[kept]
            top = np.ones(len(kept))
            if stream is streams[0] and (counted_ := histograms.get(null)):
                place = {u: i for i, u in enumerate(counted_.units)}
                known = [int(u) for u in kept if int(u) in place]
                at = [place[u] for u in known]
                width = (counted_.high - counted_.low)[at] / counted_.counts.shape[1]
                centres = counted_.low[at][:, None] + (np.arange(counted_.counts.shape[1]) + 0.5) * width[:, None]
                counts = counted_.counts[at]
                top[np.isin(kept, known)] = counts.max(1)
                marks.append(Bars(name="surrogates", when=here, rows=Rows("unit", tuple(map(str, known))), x=centres,
                                  height=counts, width=width))  # fmt: skip
            ends = np.stack([mean - 1.96 * std, mean, mean + 1.96 * std], axis=1)
            marks.append(Line(name="null: mean ± 1.96 SD", when=here, rows=_keys(kept), x=ends,
                              y=np.repeat(-0.05 * top[:, None], 3, axis=1), marker="circle",
                              look=Look("ink", "solid")))  # fmt: skip
            marks.append(Line(name="the unit", when=here, rows=_keys(kept), x=np.stack([own, own], axis=1),
                              y=np.stack([0 * top, 1.05 * top], axis=1), width=1.4))  # fmt: skip
            numbers = np.stack([own, mean, std, array(test.p)[kept], array(test.q_normal)[kept]], axis=1)
            marks.append(Said(name="said", when=here, rows=_keys(kept), numbers=numbers,
                              words="{0} turns, null {1} ± {2}; p = {3}, q = {4}"))  # fmt: skip
    main = _found(streams[0])
    beyond = {null: test.walks_beyond for null, test in main.nulls.items()}
    rejected = ", ".join(f"{NAMES.get(k, k)} {percent(v, 0)}" for k, v in beyond.items() if v is not None)
    keeps = "; ".join(f"{NAMES.get(null, null)}: {KEEPS[null]}" for null in nulls if null in KEEPS)
    return [
        Panel(
            key="fig2a_place_in_null",
            figure="2A",
            title="A unit's place in its null",
            marks=tuple(marks),
            x=Axis("clockwise turns"),
            y=Axis("surrogates"),
            own_axes=True,
            controls=(
                Control("unit", control.label, control.options, control.value, "unit"),
                Control(
                    "null",
                    "null model",
                    _null_control(nulls).options,
                    nulls[0],
                    shown=tuple(null for null in histograms if null in nulls)[-1:],
                ),
                *pick(streams),
            ),
            caption=Caption(
                "The turns of the unit's own surrogates under the chosen null model, and the unit's. Where the "
                "surrogates are not drawn again (nulls that need the model or take long, other streams, beyond "
                f"{MOST_HISTOGRAMS} units), their mean and 1.96 SD stand for them. p is two-sided, for this unit "
                "alone; q is the false discovery rate over all units.",
                "whether the order that this null destroys matters for this unit's turns.",
                "dynamics, from a null that keeps little: random walks of equal length, which have none, go beyond "
                f"their null at p < .05 this often: {rejected or 'not measured'}. Go by the nulls that keep most, the "
                f"first ones. What each keeps: {keeps}. A unit picked because its p is small is no evidence: go by q.",
            ),
            alt="Histogram of the turns of the surrogates of the chosen unit, with the unit's own turns as a line.",
        )
    ]


def distribution(streams: list[Stream]) -> Panel:
    """Turns over units, of every stream and beside the nulls (Fig. 2B)."""
    main = streams[0]
    found = _found(main)
    rows = [(s.label, -array(_found(s).turns), s.look) for s in streams]
    per_sequence = NAMES["per_sequence"] if main.main else f"{main.label}, per sequence"
    rows.insert(1, (per_sequence, -array(found.per_sequence), None))
    for null, test in found.nulls.items():
        if test.example is not None:
            name = NAMES.get(null, null)
            rows.append((name, -array(test.example), None if is_series(name) else Look("muted", "solid")))
    rows = [row for row in rows if np.isfinite(row[1]).any()]
    told = "; ".join(f"{name}: {brief(np.nanmean(v))} ± {brief(np.nanstd(v))}" for name, v, _ in rows)
    lost = "; ".join(f"{int((~np.isfinite(v)).sum())} of {n}" for n, v, _ in rows if not np.isfinite(v).all())
    return Panel(
        key="fig2b_rotations", figure="2B", title="Turns over units, beside the nulls",
        marks=tuple(Distribution(name=name, values=values, look=look) for name, values, look in rows),
        x=Axis("clockwise turns over the sublayers"), y=Axis(""), wide=True,
        note=f"undefined: {lost}" if lost else "",
        caption=Caption(
            f"How clockwise turns are spread over units, over {sequences_in_words(streams)}: of the mean trajectory, "
            "of single sequences (mean of each unit's), of the other streams, and of one surrogate a unit of each null "
            f"(grey). Mean ± SD: {told}.",
            "which null has turns like the stream's: those keep what makes the turns.",
            "that a null with a mean near 0 proves rotation. The layer shuffle takes points out of their order, which "
            "no trajectory is like; it is far from a random walk too.",
        ),
        alt=f"Distributions over units of clockwise turns, mean and standard deviation: {told}.",
    )  # fmt: skip


def _by_unit(streams: list[Stream], kept: np.ndarray, unit: Control, thinned: str) -> list[Panel]:
    """Every unit's turns, sorted, beside its own null's mean and 95 % band (Fig. 2C)."""
    nulls = _nulls(streams)
    if not nulls:
        return []
    marks: list[Mark] = []
    for stream in streams:
        found = _found(stream)
        turns = -array(found.turns)[kept]
        order = np.argsort(turns, kind="stable")[: int(np.isfinite(turns).sum())]
        at = np.arange(len(order)) + 1.0
        names = [str(u) for u in kept[order]]
        for null, test in found.nulls.items():
            here = {"null": null} | when(stream, streams)
            mean, std = -array(test.mean)[kept][order], array(test.std)[kept][order]
            marks.append(Line(name="the null", when=here, x=at, y=mean, low=mean - 1.96 * std, high=mean + 1.96 * std,
                              line=False, marker="circle", size=0.5))  # fmt: skip
            marks.append(Line(name="units", when=here, x=at, y=turns[order], marker="circle", size=0.6, picks="unit",
                              picked=tuple(names)))  # fmt: skip
            tested = array(test.p)[np.isfinite(array(test.p))]
            if len(tested):
                beyond = np.array([100 * (tested < 0.05).mean(), len(tested)])
                marks.append(Said(name="said", when=here, numbers=beyond,
                                  words="{0} % of {1} units have p < .05 (5 % if the null held)"))  # fmt: skip
        marks.append(Line(name="the chosen unit", when=when(stream, streams), rows=Rows("unit", tuple(names)),
                          x=at[:, None], y=turns[order][:, None], line=False, marker="ring"))  # fmt: skip
    main = _found(streams[0])
    turns = -array(main.turns)
    walk = "" if main.random_walk is None else f" A random walk of equal length makes {brief(main.random_walk)} turns."
    return [
        Panel(
            key="fig2c_rotations_by_unit",
            figure="2C",
            title="Turns of all units, beside their nulls",
            marks=tuple(marks),
            x=Axis("units, sorted by their turns"),
            y=TURNS,
            bands="± 1.96 SD of the null",
            controls=(
                _null_control(nulls),
                Control("unit", unit.label, unit.options, unit.value, "unit"),
                *pick(streams),
            ),
            columns=1,
            wide=True,
            caption=Caption(
                f"Clockwise turns of each unit's mean trajectory over {sequences_in_words(streams)}, sorted, beside "
                "the mean and the band of ± 1.96 SD of its own surrogates under the null model. On the page: touch a "
                f"unit to see its portrait.{thinned}{walk}",
                "how many units have p < .05: 5 % would if the null held for every unit.",
                "that units outside rotate: they differ from what this null keeps, no more. The bands are of single "
                "units; the findings table has the test of all units together, whose surrogates keep their "
                "correlation.",
            ),
            alt=f"Turns of {counted(len(kept), 'unit')}, sorted, with each one's null mean and band. In "
            f"{streams[0].label} they go from {brief(np.nanmin(turns))} to {brief(np.nanmax(turns))} clockwise, mean "
            f"size {brief(np.nanmean(np.abs(turns)))}.",
        )
    ]
