"""The panels of the stream itself: activations, correlation, cosine, speed and information over depth (Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsdyn.figures.colours import look_of
from rsdyn.figures.over_depth import depth_axis, sublayer_names, transition_kinds
from rsdyn.figures.panel import (
    Axis,
    Band,
    Caption,
    Control,
    HeatMap,
    Line,
    Mark,
    Panel,
    array,
    brief,
    counted,
    percent,
)
from rsdyn.figures.streams import Stream, curve_panel, pick, places, sequences_in_words, when

MOST_ROWS = 512  # of a heat map: more than there are pixels
LITERAL = "sum of p log p / (p p), as printed (not an information)"
UNITS = Axis("units, sorted", names=True)


def _rows(order: np.ndarray, what: str) -> tuple[np.ndarray, str]:
    """The rows of a heat map that are drawn, and what must be said when they are not all."""
    if len(order) <= MOST_ROWS:
        return order, ""
    kept = order[np.linspace(0, len(order) - 1, MOST_ROWS).round().astype(int)]
    return kept, f" Thinned: {MOST_ROWS} of the {len(order):,} {what}, evenly spaced in this order."


# -- Fig. 1B -----------------------------------------------------------------------------------------------------------


def activations(streams: Sequence[Stream]) -> list[Panel]:
    """Mean activations, and two numbers for how dense they are."""
    some = [s for s in streams if s.found.activations is not None]
    if not some:
        return []
    thresholds = []
    for s in some:
        assert s.found.activations is not None
        thresholds.append(f"{s.label} {brief(s.found.activations.density_threshold)}")
    told = f" ({', '.join(thresholds)})" if len(thresholds) <= 4 else ""
    return [
        _mean_activations(some),
        *curve_panel(
            "fig1b_active_share", "1B", "Share of active units", some,
            lambda r: r.activations.density if r.activations else None,
            Axis("share of units", from_zero=True, percent=True),
            Caption(
                "The share of units whose |mean| passes a threshold at each sublayer, over {sequences}. The threshold "
                f"is each stream's own{told}: half the RMS of its means at the last sublayer, and without massive "
                "units half that of the others', unless analysis.density_threshold sets it.",
                "whether more units carry a mean of that size later on.",
                "that the stream grows dense: the threshold is the same at all depths, so the share rises whenever the "
                "norm does; and with a threshold of their own, streams compare in shape, not in level. The "
                "participation ratio does not depend on the norm; the claim needs both.",
            ),
        ),
        *curve_panel(
            "fig1b_participation", "1B", "Participation of units in the mean", some,
            lambda r: r.activations.participation if r.activations else None,
            Axis("share of units", from_zero=True, percent=True),
            Caption(
                "The participation ratio of the mean vector, (Σm²)² / Σm⁴, as a share of all units, over {sequences}: "
                "100 % if all means were of one size, next to 0 if one unit held it all.",
                "how evenly the mean is spread over units, whatever its norm.",
                "anything about single sequences: units can be active in each of them with signs that cancel in the "
                "mean. One massive unit alone can hold the ratio down.",
            ),
            per=_usable,
        ),
    ]  # fmt: skip


def _usable(stream: Stream, without: bool) -> float:
    flags = stream.found.flags
    return stream.n_units - len(flags.unusable_units) - (len(flags.massive_units) if without else 0)


def _mean_activations(streams: list[Stream]) -> Panel:
    marks: list[Mark] = []
    said = ""
    for stream in streams:
        assert stream.found.activations is not None
        mean = array(stream.found.activations.mean)
        rows, thinned = _rows(np.argsort(np.nan_to_num(mean[-1], nan=-np.inf), kind="stable"), "units")
        said = said or thinned
        size = np.abs(mean[np.isfinite(mean)])
        limit = float(np.quantile(size, 0.95)) or float(size.max(initial=0)) or 1.0
        marks.append(
            HeatMap(name=stream.label, when=when(stream, streams), z=mean[:, rows].T, x=np.arange(len(mean)),
                    labels=tuple(f"unit {u}" for u in rows), low=-limit, high=limit, colours="diverging",
                    bar="mean activation", columns=sublayer_names(stream.n_sublayers, stream.sites))
        )  # fmt: skip
    first = streams[0]
    assert first.found.activations is not None
    mean = array(first.found.activations.mean)
    known = np.where(np.isfinite(mean), mean, 0.0)
    s, u = np.unravel_index(np.abs(known).argmax(), mean.shape)
    norm = np.sqrt((known**2).sum(1))
    return Panel(
        key="fig1b_mean_activations", figure="1B", title="Mean activations", marks=tuple(marks),
        x=depth_axis(first.n_sublayers, first.sites), y=UNITS, controls=pick(streams), tall=1.4,
        axes={t.key: (depth_axis(t.n_sublayers, t.sites), UNITS) for t in streams},
        note=f"largest: unit {u}, {brief(mean[s, u])} at layer {s // first.sites}",
        caption=Caption(
            f"The mean activation of every unit over {sequences_in_words(streams)}, units sorted by their mean at the "
            f"last sublayer. Colours end at the 95th percentile of |mean|.{said}",
            "whether means are the same units' throughout (rows keep their colour) or change hands with depth.",
            "the smooth edge at the right, which the sorting makes. Stronger colours to the right are first of all a "
            "growing norm, not more active units: that is what the two panels beside it are for.",
        ),
        alt=f"Heat map of the mean activation of {counted(mean.shape[1], 'unit')} over {first.n_sublayers} sublayers, "
        f"units sorted by the last. The norm of the mean vector goes from {brief(norm[0])} to {brief(norm[-1])} in "
        f"{first.label}.",
    )  # fmt: skip


# -- by unit -----------------------------------------------------------------------------------------------------------


def unit_bands(
    key: str, figure: str, title: str, stream: Stream, values: np.ndarray, y: Axis, caption: Caption,
    floor: np.ndarray | None = None,
) -> Panel:  # fmt: skip
    """How a measure of single units is spread over transitions: bands, median and mean, a panel a kind of transition.

    What is not finite is left out where it is, and counted.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    known = ~np.isnan(finite).all(1)
    quantiles = np.full((5, len(values)), np.nan)
    quantiles[:, known] = np.nanquantile(finite[known], (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    mean = np.full(len(values), np.nan)
    mean[known] = np.nanmean(finite[known], axis=1)
    x = places(stream, len(values), [stream])
    kinds = [kind for kind in transition_kinds(stream.sites) if len(x[kind.part])]
    marks: list[Mark] = []
    for kind in kinds:
        here = {"kind": kind.name} if len(kinds) > 1 else {}
        at, (low, lower, _, upper, high) = x[kind.part], quantiles[:, kind.part]
        own = look_of(kind.name)
        marks.append(Band(name="middle 90 % of units", when=here, look=own, x=at, low=low, high=high, strength=0.18))
        marks.append(Band(name="middle 50 %", when=here, look=own, x=at, low=lower, high=upper, strength=0.3))
        for other in kinds:
            drawn = quantiles[2, other.part]
            marks.append(Line(name=f"{other.name}, median", when=here, x=x[other.part], y=drawn,
                              look=look_of(other.name), width=1.1 if other is kind else 0.6, marker=other.marker,
                              size=0.6))  # fmt: skip
        marks.append(Line(name="mean", when=here, x=at, y=mean[kind.part], width=0.8))
        if floor is not None:
            marks.append(Line(name="permuted pairs (floor)", when=here, x=at, y=floor[kind.part], width=0.8))
    lost = int((~np.isfinite(values)).sum())
    options = tuple((kind.name, kind.name) for kind in kinds)
    control = Control("kind", "transition", options, options[0][0], shown=tuple(v for v, _ in options))
    return Panel(
        key=key, figure=figure, title=title, marks=tuple(marks), x=depth_axis(stream.n_sublayers, stream.sites), y=y,
        controls=(control,) if len(kinds) > 1 else (), columns=1,
        note=f"{lost} of {values.size} values are infinite or undefined" if lost else "",
        caption=caption,
        alt=f"Bands over depth: the median over units goes from {brief(quantiles[2, 0])} to "
        f"{brief(quantiles[2, -1])}.",
    )  # fmt: skip


# -- Fig. 1C, D --------------------------------------------------------------------------------------------------------


def correlation(streams: Sequence[Stream]) -> list[Panel]:
    """Correlation from sublayer to sublayer, by unit and its mean, and of all pairs of sublayers."""
    some = [s for s in streams if s.found.correlation is not None]
    if not some:
        return []
    first = some[0]
    assert first.found.correlation is not None
    undefined = int(first.found.correlation.undefined.sum())
    left_out = f" {counted(undefined, 'value')} of constant units are left out." if undefined else ""
    of_units = unit_bands(
        "fig1c_correlation", "1C", "Correlation of each unit", first, array(first.found.correlation.units),
        Axis("correlation of a unit", "fisher"),
        Caption(
            f"Pearson's r of each unit between successive sublayers over {sequences_in_words(some[:1])}, "
            f"{first.label}: median, mean, and the middle 50 and 90 % of the units, on Fisher's scale.{left_out}",
            "how much of the order of sequences a unit keeps over attention (within) and over the MLP (cross).",
            "that correlation is learnt or a computation: a running sum correlates with itself.",
        ),
    )  # fmt: skip
    return [
        of_units,
        *curve_panel(
            "fig1c_correlation_mean", "1C", "Correlation from sublayer to sublayer", some,
            lambda r: r.correlation.mean if r.correlation else None, Axis("mean correlation over units", "fisher"),
            Caption(
                "Pearson's r of each unit between successive sublayers over {sequences}, mean over units, on Fisher's "
                "scale.",
                "how much of the order of sequences units keep over attention (within) and over the MLP (cross).",
                "that correlation is learnt or a computation: a running sum correlates with itself. What the untrained "
                "model shows needs no training; a difference from it is what there is to explain.",
            ),
        ),
        _all_pairs(some),
        _pooled_pairs(some),
    ]  # fmt: skip


def _all_pairs(streams: list[Stream]) -> Panel:
    marks: list[Mark] = []
    said = ""
    negative = []
    for stream in streams:
        found = stream.found.correlation
        assert found is not None
        total = array(found.pair_counts).sum(1) + array(found.pairs_below)
        share = array(found.pair_counts) / np.where(total > 0, total, np.nan)[:, None]
        rows, thinned = _rows(np.argsort(np.nan_to_num(array(found.unit_means), nan=-np.inf), kind="stable"), "units")
        said = said or thinned
        edges = array(found.pair_edges)
        known = share[np.isfinite(share) & (share > 0)]
        marks.append(
            HeatMap(name=stream.label, when=when(stream, streams), z=share[rows], x=(edges[1:] + edges[:-1]) / 2,
                    labels=tuple(f"unit {u}" for u in rows), low=0.0, colours="shares", bar="share of the unit's pairs",
                    high=float(np.quantile(known, 0.99)) if len(known) else 1.0)
        )  # fmt: skip
        negative.append(f"{stream.label} {percent(found.negative_pairs)}")
    first = streams[0]
    assert first.found.correlation is not None
    pairs = first.n_sublayers * (first.n_sublayers - 1) // 2
    middle = array(first.found.correlation.unit_means)
    return Panel(
        key="fig1d_correlation_density", figure="1D", title="Correlation of all pairs of sublayers",
        marks=tuple(marks), x=Axis("correlation of two sublayers", limits=(0, 1)), y=UNITS, controls=pick(streams),
        tall=1.4,
        caption=Caption(
            f"For each unit, how its correlations over all {pairs:,} pairs of sublayers are spread, units sorted by "
            f"their mean, over {sequences_in_words(streams)}. Bins of 0.02 from 0 to 1, as in the paper; negative ones "
            f"are outside it ({'; '.join(negative)}).{said}",
            "which units keep their value through the depth (mass at the right) and which are rewritten.",
            "that a row has as many independent values as pairs: all of them come from the same few sublayers.",
        ),
        alt=f"Heat map of {counted(first.n_units, 'unit')} by correlation from 0 to 1: how often each unit's "
        f"{pairs:,} pairs of sublayers have it. Median over units of the mean correlation in {first.label}: "
        f"{brief(np.nanmedian(middle) if np.isfinite(middle).any() else np.nan)}.",
    )  # fmt: skip


def _pooled_pairs(streams: list[Stream]) -> Panel:
    marks: list[Mark] = []
    for stream in streams:
        found = stream.found.correlation
        assert found is not None
        counts, edges = array(found.pair_counts).sum(0), array(found.pair_edges)
        total = counts.sum() + float(found.pairs_below.sum())
        marks.append(Line(name=stream.label, x=(edges[1:] + edges[:-1]) / 2, y=counts / max(total, 1),
                          look=stream.look, waits=stream.look is not None and not stream.first))  # fmt: skip
    return Panel(
        key="fig1d_correlation_pairs", figure="1D", title="Correlation of all pairs, all units together",
        marks=tuple(marks), x=Axis("correlation of two sublayers", limits=(0, 1)),
        y=Axis("share of all pairs", from_zero=True, percent=True),
        caption=Caption(
            f"How the correlations of all units over all pairs of sublayers are spread, over "
            f"{sequences_in_words(streams)}, in bins of 0.02.",
            "how a stream differs from its controls as a whole.",
            "near and distant pairs apart: both are in it.",
        ),
        alt="Lines over correlation from 0 to 1, one a stream.",
    )  # fmt: skip


# -- Fig. 1E, F --------------------------------------------------------------------------------------------------------


def cosine(streams: Sequence[Stream]) -> list[Panel]:
    """Fig. 1E."""
    return curve_panel(
        "fig1e_cosine", "1E", "Cosine of successive states", streams, lambda r: r.cosine.mean if r.cosine else None,
        Axis("cosine of successive states", "fisher"),
        Caption(
            "The cosine of the stream at successive sublayers, mean over {sequences}, on Fisher's scale.",
            "how far a block turns the stream, seen from the stream's origin.",
            "that states align or converge: a step of constant size turns a longer vector less, so the cosine rises "
            "when the norm grows, without any alignment. A single massive unit can hold it near 1.",
        ),
    )  # fmt: skip


def velocity(streams: Sequence[Stream]) -> list[Panel]:
    """Fig. 1F, and the speed over the norm."""
    return [
        *curve_panel(
            "fig1f_speed", "1F", "Speed", streams, lambda r: r.velocity.speed if r.velocity else None,
            Axis("speed (activation units)", from_zero=True),
            Caption(
                "The length of the step from one sublayer to the next, ‖h(s+1) − h(s)‖, mean over {sequences}.",
                "where the stream moves most.",
                "a comparison between models: it is in activation units and grows with the stream.",
            ),
            wide_log=True,
        ),
        *curve_panel(
            "fig1f_relative_speed", "1F", "Speed over the norm of the state", streams,
            lambda r: r.velocity.relative if r.velocity else None, Axis("step / norm of the state", from_zero=True),
            Caption(
                "The length of the step over that of the state it starts from, mean over {sequences}.",
                "how much of the stream each sublayer changes: what is left of a speed that rises because the norm "
                "does.",
                "a share of the state's content: steps and states need not point the same way.",
            ),
            wide_log=True,
        ),
    ]  # fmt: skip


def norm(streams: Sequence[Stream]) -> list[Panel]:
    """The length of the state over depth."""
    return curve_panel(
        "norm", "", "Norm of the state", streams, lambda r: r.norm.mean if r.norm else None,
        Axis("norm of the state", from_zero=True),
        Caption(
            "The length of the state at each sublayer, ‖h(s)‖, mean over {sequences}.",
            "how much the stream grows: what speeds, and the share of active units, are to be read beside.",
            "content: one massive unit can be most of it, as the curve without massive units shows.",
        ),
        wide_log=True,
    )  # fmt: skip


# -- Fig. 1G, H --------------------------------------------------------------------------------------------------------


def mutual_information(streams: Sequence[Stream]) -> list[Panel]:
    """Information by unit and its mean, beside its floor; the true one beside the paper's sum, which is none."""
    some = [s for s in streams if s.found.mutual_information is not None]
    if not some:
        return []
    first = some[0]
    found = first.found.mutual_information
    assert found is not None
    literal = found.estimator == "paper_literal"
    estimators: dict[str, None] = {}  # in their order, each once
    counts: dict[int, None] = {}
    for s in some:
        assert s.found.mutual_information is not None
        estimators[s.found.mutual_information.estimator] = None
        counts[s.found.mutual_information.mean.n or s.found.counts.trajectories] = None
    of = f"estimator {', '.join(estimators)}, {', '.join(f'{n:,}' for n in counts)} sequences"
    unlike = (
        " The curves are of different numbers of sequences, on which the estimate depends: do not compare them."
        if len(counts) > 1
        else ""
    )
    warning = (
        " The estimator paper_literal is the paper's sum without the area of a cell: it depends on the unit of the "
        "activations and falls when they grow; the true information stands beside it."
        if literal
        else ""
    )
    not_for = (
        "that differences near the floor mean anything. And information that falls is not information that is lost: it "
        "may have moved to other units, which this measure, unit by unit, does not see."
    )
    read_for = "how well a unit's value can be told from its value one sublayer before, nonlinear relations included."
    floors: list[Mark] = []
    for i, s in enumerate(some):
        assert s.found.mutual_information is not None
        floor = array(s.found.mutual_information.floor)
        floors.append(Line(name="permuted pairs (floor)", x=places(s, len(floor), some), y=floor, width=0.6,
                           legend=i == 0, waits=s.look is not None and not s.first))  # fmt: skip
    panels = []
    if literal and found.true is not None and found.true_units is not None:
        whole = Caption("The true mutual information (estimator kde), mean over {sequences}.", read_for, not_for)
        by_unit = Caption("The true mutual information of each unit (estimator kde).", read_for, not_for)
        panels = [
            unit_bands("fig1g_information_kde", "1G", "Mutual information of each unit, true", first,
                       array(found.true_units), Axis("mutual information of a unit (nats)"), by_unit),
            *curve_panel("fig1h_information_kde_mean", "1H", "Mutual information, true, mean over units", some,
                         lambda r: r.mutual_information.true if r.mutual_information else None,
                         Axis("mean mutual information (nats)"), whole),
        ]  # fmt: skip
    unit_axis = Axis(LITERAL, "log") if literal else Axis("mutual information of a unit (nats)")
    mean_axis = Axis(LITERAL, "log") if literal else Axis("mean mutual information over units (nats)")
    panels.append(
        unit_bands(
            "fig1g_information", "1G", "Mutual information of each unit", first, array(found.units), unit_axis,
            Caption(f"Mutual information of each unit between successive sublayers ({of}), {first.label}: median, "
                    f"mean, and the middle 50 and 90 % of the units. Dotted: the floor, what the estimator gives for "
                    f"pairs of different sequences.{warning}", read_for, not_for),
            array(found.floor),
        )
    )  # fmt: skip
    panels += curve_panel(
        "fig1h_information_mean", "1H", "Mutual information from sublayer to sublayer", some,
        lambda r: r.mutual_information.mean if r.mutual_information else None, mean_axis,
        Caption(f"Mutual information of each unit between successive sublayers ({of}), mean over units. Dotted: the "
                f"floor, what the estimator gives for pairs of different sequences.{unlike}{warning}", read_for,
                not_for),
        behind=floors,
    )  # fmt: skip
    return panels


def stream(streams: Sequence[Stream]) -> list[Panel]:
    """Everything above."""
    makers = (activations, correlation, cosine, velocity, norm, mutual_information)
    return [panel for make in makers for panel in make(streams)]
