"""Figure 1 of the page: mean activations, correlation, cosine, speed, mutual information."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rsdyn.report import plots
from rsdyn.report.plots import Plot, band, counted, number, packed
from rsdyn.report.streams import Stream, curve, over_depth, pick, places, sequences_in_words, shared_depth

MOST_ROWS = 512  # of a heat map: more than there are pixels
INTERVAL = "The band about each line is its 95 % interval over sequences (jackknife)."


def figure1(streams: Sequence[Stream]) -> list[Plot]:
    """The panels of what was measured, in the paper's order."""
    makers: list[tuple[str, Callable[[list[Stream]], list[Plot]]]] = [
        ("activations", lambda some: [_mean_activations(some), _density(some), _participation(some)]),
        ("correlation", lambda some: [_correlation(some), _all_pairs(some)]),
        ("cosine", lambda some: [_cosine(some)]),
        ("velocity", lambda some: [_speed(some), *_relative_speed(some)]),
        ("mutual_information", lambda some: [_information(some)]),
    ]
    panels = []
    for measure, make in makers:
        some = [s for s in streams if s.measured(measure)]
        if some:
            panels += make(some)
    return panels


def _rows(order: np.ndarray, what: str) -> tuple[np.ndarray, str]:
    """The rows of a heat map that are drawn, and what must be said when they are not all."""
    if len(order) <= MOST_ROWS:
        return order, ""
    kept = order[np.linspace(0, len(order) - 1, MOST_ROWS).round().astype(int)]
    return kept, f" Thinned: {MOST_ROWS} of the {len(order):,} {what}, evenly spaced in this order."


def _mean_activations(streams: list[Stream]) -> Plot:
    traces, said = [], ""
    for stream in streams:
        mean = stream.arrays["mean"]
        order = np.argsort(np.nan_to_num(mean[-1], nan=-np.inf), kind="stable")
        rows, thinned = _rows(order, "units")
        said = said or thinned
        limit = float(np.nanquantile(np.abs(mean), 0.995)) or 1.0
        names = plots.sublayer_names(len(mean), stream.sites)
        trace = {
            "type": "heatmap",
            "z": packed(mean[:, rows].T),
            "x": names,
            "y": [f"unit {u}" for u in rows],
            "zmin": -limit,
            "zmax": limit,
            "colorscale": [[0, "@cross"], [0.5, "@paper"], [1, "@c1"]],
            "colorbar": {"title": {"text": "mean", "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9},
            "hovertemplate": "%{y}, %{x}<br>mean %{z:.3g}<extra></extra>",
            "hoverongaps": False,
        }
        traces.append(plots.merge_when(trace, {"stream": stream.key} if len(streams) > 1 else {}))
    axes = {s.key: {"xaxis": _layers(s)} for s in streams}
    first = streams[0]
    mean = first.arrays["mean"]
    norm = np.sqrt(np.nansum(mean**2, axis=1))
    return Plot(
        "fig1b-mean",
        "Fig. 1B  Mean activations",
        f"Heat map of the mean activation of {counted(mean.shape[1], 'unit')} over {first.n_sublayers} sublayers, "
        f"units sorted by the last. The norm of the mean vector goes from {number(norm[0])} to {number(norm[-1])} in "
        f"{first.label}.",
        (
            f"The mean activation of every unit over {sequences_in_words(streams)}, units sorted by their mean at the "
            f"last sublayer. Colours end at the 99.5th percentile of |mean|.{said}",
            "whether means are the same units' throughout (rows keep their colour) or change hands with depth.",
            "the smooth edge at the right, which the sorting makes. Stronger colours to the right are first of all a "
            "growing norm, not more active units: that is what the two panels beside it are for.",
        ),
        traces,
        {
            "yaxis": {"title": {"text": "units, sorted"}, "showticklabels": False, "ticks": "", "type": "category"},
            **axes[first.key],
            "versions": {"stream": axes},
        },
        pick("stream", "stream", streams),
    )


def _layers(stream: Stream) -> dict[str, Any]:
    """The axis of a heat map, whose columns are called as their sublayers are."""
    names, sites = plots.sublayer_names(stream.n_sublayers, stream.sites), stream.sites or 1
    ticks = [layer * sites for layer in plots.layer_ticks(stream.n_sublayers, sites)]
    depth = plots.axis("layer" if stream.sites else "sublayer", type="category")
    return depth | {"tickvals": [names[t] for t in ticks], "ticktext": [str(t // sites) for t in ticks]}


def _density(streams: list[Stream]) -> Plot:
    traces, controls, _, words = curve(streams, "density", form=".1%")
    thresholds = ", ".join(f"{s.label} {number(s.scalar('density_threshold'))}" for s in streams)
    thresholds = f" ({thresholds})" if len(streams) <= 4 else ""
    return Plot(
        "fig1b-density",
        "Fig. 1B  Share of active units",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"The share of units whose |mean| passes a threshold at each sublayer, over {sequences_in_words(streams)}. "
            f"The threshold is each stream's own{thresholds}: half the RMS of its means at the last sublayer, "
            "and without massive units half that of the others', unless analysis.density_threshold sets it. "
            f"{INTERVAL}",
            "whether more units carry a mean of that size later on.",
            "that the stream grows dense: the threshold is the same at all depths, so the share rises whenever the "
            "norm does; and with a threshold of their own, streams compare in shape, not in level. The participation "
            "ratio does not depend on the norm; the claim needs both.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.axis("share of units", rangemode="tozero", tickformat=".0%")},
        controls,
    )


def _participation(streams: list[Stream]) -> Plot:
    def usable(stream: Stream, key: str) -> float:
        n = stream.arrays["mean"].shape[1] - len(stream.arrays["unusable_units"])
        return float(n - len(stream.arrays["massive_units"]) if key.endswith("_without_massive") else n)

    traces, controls, _, words = curve(streams, "participation", per=usable, form=".1%")
    return Plot(
        "fig1b-participation",
        "Fig. 1B  Participation of units in the mean",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"The participation ratio of the mean vector, (Σm²)² / Σm⁴, as a share of all units, over "
            f"{sequences_in_words(streams)}: 100 % if all means were of one size, next to 0 if one unit held it all. "
            f"{INTERVAL}",
            "how evenly the mean is spread over units, whatever its norm.",
            "anything about single sequences: units can be active in each of them with signs that cancel in the mean. "
            "One massive unit alone can hold the ratio down.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.axis("share of units", rangemode="tozero", tickformat=".0%")},
        controls,
    )


def _spread_of_units(stream: Stream, values: np.ndarray, transform: Any, normalised: bool) -> list[dict[str, Any]]:
    """The middle 90 % of units behind the mean, for the stream whose transitions are told apart."""
    if not stream.main:
        return []
    finite = np.where(np.isfinite(values), values, np.nan)
    low, high = np.nanquantile(finite, [0.05, 0.95], axis=1)
    x = places(stream, len(values), normalised)
    parts = [(slice(0, None, 2), "@within", "within layer"), (slice(1, None, 2), "@cross", "cross layer")]
    if stream.sites != 2:
        parts = [(slice(None), stream.colour, "")]
    found = []
    for part, colour, kind in parts:
        group = f"{stream.key} {stream.label}{', ' + kind if kind else ''}"
        found.append(band(x[part], transform(low[part]), transform(high[part]), colour, group, 10))
    return found


def _correlation(streams: list[Stream]) -> Plot:
    traces, controls, drawn, words = curve(streams, "r_mean", transform=plots.fisher, form=".4f")
    normalised = not shared_depth(streams)
    spread = [t for s in streams for t in _spread_of_units(s, s.arrays["r"], plots.fisher, normalised)]
    paler = " The paler band is the middle 90 % of units." if spread else ""
    undefined = sum(int(s.arrays["r_undefined"].sum()) for s in streams)
    left_out = (
        f" {counted(undefined, 'unit-transition')} without a correlation (constant) are left out." if undefined else ""
    )
    return Plot(
        "fig1c",
        "Fig. 1C  Correlation from sublayer to sublayer",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"Pearson's r of each unit between successive sublayers over {sequences_in_words(streams)}; lines are "
            f"means over units, on Fisher's scale. {INTERVAL}{paler}{left_out}",
            "how much of the order of sequences a unit keeps over attention (within) and over the MLP (cross).",
            "that correlation is learnt or a computation: a running sum correlates with itself. What the untrained "
            "model shows needs no training; a difference from it is what there is to explain.",
        ),
        spread + traces,
        {"xaxis": over_depth(streams), "yaxis": plots.fisher_axis("mean correlation", drawn)},
        controls,
    )


def _all_pairs(streams: list[Stream]) -> Plot:
    traces, said = [], ""
    for stream in streams:
        counts = stream.arrays["r_all_counts"]
        total = counts.sum(1) + stream.arrays["r_all_below"]
        share = counts / np.where(total > 0, total, np.nan)[:, None]
        order = np.argsort(np.nan_to_num(stream.arrays["r_all_unit_mean"], nan=-np.inf), kind="stable")
        rows, thinned = _rows(order, "units")
        said = said or thinned
        edges = stream.arrays["r_all_edges"]
        trace = {
            "type": "heatmap",
            "z": packed(share[rows]),
            "x": packed((edges[1:] + edges[:-1]) / 2),
            "y": [f"unit {u}" for u in rows],
            "zmin": 0,
            "zmax": float(np.nanquantile(share, 0.995)) or 1.0,
            "colorscale": [[0, "@paper"], [0.25, "@c4"], [0.6, "@cross"], [1, "@ink"]],
            "colorbar": {"title": {"text": "share of pairs", "side": "right"}, "thickness": 10, "outlinewidth": 0,
                         "tickformat": ".0%", "len": 0.9},
            "hovertemplate": "%{y}, r about %{x:.2f}<br>%{z:.1%} of its pairs<extra></extra>",
        }  # fmt: skip
        traces.append(plots.merge_when(trace, {"stream": stream.key} if len(streams) > 1 else {}))
    negative = "; ".join(f"{s.label} {100 * float(s.arrays['r_all_negative']):.1f} %" for s in streams)
    first = streams[0]
    pairs = first.n_sublayers * (first.n_sublayers - 1) // 2
    return Plot(
        "fig1d",
        "Fig. 1D  Correlation of all pairs of sublayers",
        f"Heat map of {counted(first.arrays['r'].shape[1], 'unit')} by correlation from 0 to 1: how often each unit's "
        f"{pairs:,} pairs of sublayers have it. Median over units of the mean correlation in {first.label}: "
        f"{number(np.nanmedian(first.arrays['r_all_unit_mean']))}.",
        (
            f"For each unit, how its correlations over all {pairs:,} pairs of sublayers are spread, units sorted by "
            f"their mean, over {sequences_in_words(streams)}. Bins of 0.02 from 0 to 1, as in the paper; negative ones "
            f"are outside it ({negative}).{said}",
            "which units keep their value through the depth (mass at the right) and which are rewritten.",
            "that a row has as many independent values as pairs: all of them come from the same few sublayers.",
        ),
        traces,
        {
            "xaxis": plots.axis("correlation of two sublayers", range=[0, 1]),
            "yaxis": {"title": {"text": "units, sorted"}, "showticklabels": False, "ticks": "", "type": "category"},
        },
        pick("stream", "stream", streams),
    )


def _cosine(streams: list[Stream]) -> Plot:
    traces, controls, drawn, words = curve(streams, "cosine", transform=plots.fisher, form=".4f")
    return Plot(
        "fig1e",
        "Fig. 1E  Cosine of successive states",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"The cosine of the stream at successive sublayers, mean over {sequences_in_words(streams)}, on Fisher's "
            f"scale. {INTERVAL}",
            "how far a block turns the stream, seen from the stream's origin.",
            "that states align or converge: a step of constant size turns a longer vector less, so the cosine rises "
            "when the norm grows, without any alignment. A single massive unit can hold it near 1.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.fisher_axis("cosine", drawn)},
        controls,
    )


def _speed(streams: list[Stream]) -> Plot:
    traces, controls, drawn, words = curve(streams, "speed")
    every = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in drawn])
    many = len(every) and every.max() > 50 * every.min()
    name = "speed (activation units)"
    scale = plots.log_axis(name, every) if many else plots.axis(name, rangemode="tozero")
    return Plot(
        "fig1f",
        "Fig. 1F  Speed",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"The length of the step from one sublayer to the next, ‖h(s+1) − h(s)‖, mean over "
            f"{sequences_in_words(streams)}{', on a logarithmic scale' if many else ''}. {INTERVAL}",
            "where in depth the stream is changed most, in units of activation.",
            "a comparison between models or widths: the unit of activation is each model's own. Where the norm grows "
            "as fast as the speed, later steps are no larger for what they are added to.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": scale},
        controls,
    )


def _relative_speed(streams: list[Stream]) -> list[Plot]:
    some = [s for s in streams if "relative_speed" in s.arrays]
    if not some:
        return []
    traces, controls, drawn, words = curve(some, "relative_speed")
    every = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in drawn])
    name = "step / norm of the state"
    scale = plots.axis(name, rangemode="tozero")
    if len(every) and every.max() > 50 * every.min():
        scale = plots.log_axis(name, every)
    plot = Plot(
        "fig1f-relative",
        "To Fig. 1F  Speed over the norm of the state",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"The length of the step over that of the state it starts from, mean over {sequences_in_words(some)}. "
            f"{INTERVAL}",
            "how much of the stream each sublayer changes: what is left of a speed that rises because the norm does.",
            "a share of the state's content: steps and states need not point the same way.",
        ),
        traces,
        {"xaxis": over_depth(some), "yaxis": scale},
        controls,
    )
    return [plot]


def _information(streams: list[Stream]) -> Plot:
    traces, controls, drawn, words = curve(streams, "mi_mean")
    normalised = not shared_depth(streams)
    spread = [t for s in streams for t in _spread_of_units(s, s.arrays["mi"], lambda v: v, normalised)]
    paler = " The paler one is the middle 90 % of units." if spread else ""
    floors = []
    for i, stream in enumerate(streams):
        floor = stream.arrays["mi_floor"]
        colour = stream.colour if len(streams) > 1 else "@muted"
        floors.append(
            plots.line(places(stream, len(floor), normalised), floor, "floors", colour, width=1, dash="dot",
                       text=[f"floor of {plots.flat(stream.label)}, {where}" for where in
                             plots.transition_names(stream.n_sublayers, stream.sites)],
                       form=".3f", legendgroup="floors", legendrank=2000, showlegend=i == 0)
        )  # fmt: skip
    estimators = dict.fromkeys(str(s.scalar("mi_estimator")) for s in streams)
    samples = dict.fromkeys(f"{int(s.scalar('mi_samples') or 0):,}" for s in streams)
    literal = "paper_literal" in estimators
    unlike = (
        " The curves are of different numbers of sequences, on which the estimate depends: do not compare them."
        if len(samples) > 1
        else ""
    )
    unit = "sum as printed (not an information)" if literal else "mutual information (nats)"
    scale = plots.log_axis(unit, np.concatenate(drawn)) if literal else plots.axis(unit)
    warning = (
        " The estimator paper_literal is the paper's sum without the area of a cell: it depends on the unit of the "
        "activations and falls when they grow; the true information is in results.npz as mi_true."
        if literal
        else ""
    )
    return Plot(
        "fig1gh",
        "Fig. 1G, H  Mutual information from sublayer to sublayer",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"Mutual information of each unit between successive sublayers (estimator {', '.join(estimators)}, "
            f"{', '.join(samples)} sequences), mean over units. The band about each line is its 95 % interval over "
            f"sequences (jackknife, of 32 units).{paler} Dotted: the floor, what the "
            f"estimator gives for pairs of different sequences.{unlike}{warning}",
            "how well a unit's value can be told from its value one sublayer before, relations that are not linear "
            "included.",
            "that differences near the floor mean anything. And information that falls is not information that is "
            "lost: it may have moved to other units, which this measure, unit by unit, does not see.",
        ),
        spread + floors + traces,
        {"xaxis": over_depth(streams), "yaxis": scale},
        controls,
    )
