"""What a reader must know of an analysis beside its findings, in sentences with this run's numbers."""

from __future__ import annotations

from rsdyn.analysis.collected import MASSIVE
from rsdyn.analysis.finding import number
from rsdyn.analysis.results import (
    AnalysisResults,
    ConditionResults,
    Flags,
    MassiveActivations,
    PrincipalComponents,
    Rotation,
)
from rsdyn.analysis.rotation_rows import share_beyond
from rsdyn.metrics.running import TOKEN_CLASSES
from rsdyn.stream.text.positions import SINK_RATIO


def rotation_in_words(found: Rotation, n_sublayers: int) -> list[str]:
    """What a reader must know before taking turns for dynamics, with this run's numbers."""
    observed, walk = float(found.mean_abs.value), found.random_walk
    beside = "" if walk is None else f"; a random walk of equal length turns {walk:.2f} times"
    lines = [
        f"Units turn {observed:.2f} times on average over {n_sublayers} sublayers{beside}. A path in the plane of a "
        "value and its slope can only turn clockwise: |R| counts how jagged it is."
    ]
    lead = found.nulls.get("innovation_shuffle")
    if lead is not None and lead.over_units_p is not None and lead.over_units_z is not None:
        away, p = lead.over_units_z, lead.over_units_p
        verdict = "explain the turns" if p >= 0.05 else "do not explain the turns"
        lines.append(
            f"Surrogates that keep most (a linear process with this stream's own step sizes, the correlation of its "
            f"near steps and of its units) turn {lead.over_units:.2f} ± {lead.over_units_std:.2f} times: the stream "
            f"lies {abs(away):.1f} SD {'above' if away > 0 else 'below'} (p {number(p)}), so these facts {verdict}. "
            "Claims rest on this null; the others are the ladder down to the paper's, and each keeps less."
        )
    explained = {
        "innovation_shuffle": "that null",
        "layer_shuffle": "the paper's null (layer order shuffled)",
    }
    for null, words in explained.items():
        if (test := found.nulls.get(null)) is not None and test.walks_beyond is not None:
            here, passed = share_beyond(test), share_beyond(test, corrected=True)
            lines.append(
                f"{here:.0f} % of the units go beyond {words} at p < .05, {passed:.0f} % at a false discovery rate of "
                f"5 %. Of random walks of equal length, which have no dynamics, {100 * test.walks_beyond:.0f} % do at "
                "p < .05."
            )
    regular = found.regularity
    if regular is not None and (scaled := regular.nulls.get("increment_shuffle_scaled")) is not None:
        lines.append(
            "Turns cannot show every orbit: one of period 5 or 6 makes as many as a walk. Regularity shows one from an "
            "amplitude of about one step's SD on. The largest share of a unit's steps at one frequency is "
            f"{float(regular.mean.value):.3f}, and {scaled.over_units:.3f} once they are shuffled in windows and "
            "scaled."
        )
    return lines


def plane_in_words(found: PrincipalComponents) -> list[str]:
    """How much of the stream the plane of PCA shows, how sure it is, and what a random walk's plane would hold."""
    held, walk = 100 * float(found.ratio.value[:2].sum()), 100 * float(found.control.ratio.sum())
    line = (
        f"The plane of the first two components holds {held:.0f} % of the variance (that of a smoothed random walk "
        f"with the same steps: {walk:.0f} %)."
    )
    if found.half_angles is not None:
        first, second = (float(a) for a in found.half_angles)
        line += f" The planes of two halves of the sequences lie {first:.1f} and {second:.1f} degrees apart."
    if found.massive_loadings.shape[1]:
        line += f" Massive units are {100 * float(found.massive_loadings[0].sum()):.0f} % of the first component."
    return [line]


def massive_in_words(found: MassiveActivations, sites_per_layer: int) -> list[str]:
    """The unit that stands out most in each class of tokens: how large it is, and where it is written and unwritten."""
    lines = []
    for k, name in enumerate(TOKEN_CLASSES):
        if not found.counts[k]:
            continue
        curve = found.largest[k]
        s = int(curve.argmax())
        unit, value = int(found.unit[k, s]), float(curve[s])
        line = (
            f"Largest activation, {name} ({int(found.counts[k])}): {_size(value)}, unit {unit} at "
            f"{_place(s, sites_per_layer)}, {value / float(found.typical[k, s]):,.0f} times a typical one"
        )
        units = found.top.tolist()
        if unit in units:
            u = units.index(unit)
            before, after, onset = (float(x[k, u]) for x in (found.before, found.after, found.onset))
            line += f"; written by {_writer(int(onset), sites_per_layer)}, from {_size(before)} to {_size(after)}"
            fallen = int(found.unwritten[k, u])
            line += f", below half of its peak from {_place(fallen, sites_per_layer)} on" if fallen >= 0 else ""
        lines.append(f"{line}.")
    if found.norm_by_position is None:
        lines.append(
            "Of each sequence the last token alone was recorded, and massive activations stand at the first one and at "
            "sinks: positions=all shows them."
        )
    return lines


def _size(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _writer(s: int, sites_per_layer: int) -> str:
    """What adds to the stream just before sublayer ``s``."""
    layer, site = divmod(s, sites_per_layer)
    if sites_per_layer == 1:
        return f"layer {layer - 1}"
    return f"the attention of layer {layer}" if site else f"the MLP of layer {layer - 1}"


def _place(s: int, sites_per_layer: int) -> str:
    layer, site = divmod(s, sites_per_layer)
    return f"sublayer {s} ({('resid_pre', 'resid_mid')[site]} of layer {layer})"


def positions_in_words(found: AnalysisResults) -> list[str]:
    """How many trajectories are BOS and sinks, which weigh more in every mean than the rest, for each condition."""
    counts = {condition: r.counts for condition, r in found.conditions.items()}
    counted = "; ".join(f"{n.bos} BOS and {n.sinks} sinks of {n.trajectories} ({c})" for c, n in counts.items())
    return [
        f"Among the trajectories are {counted}. A sink's state in the middle of the depth is more than {SINK_RATIO:g} "
        "times as long as the median one, as BOS often is: such tokens weigh most in means, variances and the plane of "
        "PCA. Nothing is left out."
    ]


def largest_in_words(flags: Flags, condition: str) -> list[str]:
    """Which units are massive and how far beyond the threshold; the set is that of the main condition for all."""
    ratios = zip(flags.largest_units.tolist(), flags.largest_ratios.tolist(), strict=True)
    largest = [(unit, ratio) for unit, ratio in ratios]
    massive = [(u, x) for u, x in largest if x > MASSIVE]
    below = next(((u, x) for u, x in largest if x <= MASSIVE), None)
    n = len(flags.massive_units)
    next_one = "" if below is None else f" The largest below is unit {below[0]}, {below[1]:.0f} times."
    if not n:
        return [f"No unit is massive: none has a mean of {MASSIVE:g} times the median in {condition}.{next_one}"]
    shown = ", ".join(f"{u} ({x:.0f} times)" for u, x in massive) + (", ..." if n > len(massive) else "")
    return [
        f"{n} massive unit{'s' * (n > 1)}, the same for all conditions: |mean| beyond {MASSIVE:g} times the median in "
        f"{condition}: {shown}.{next_one} The threshold is a cliff: findings.md shows each finding without 0 to "
        f"{int(flags.left_out_counts[-1])} of the largest units."
    ]


def samples_in_words(found: AnalysisResults) -> list[str]:
    """How many samples the information is of, and that it may not be compared where that differs."""
    counts = {c: r.mutual_information.mean.n for c, r in found.conditions.items() if r.mutual_information is not None}
    if len(set(counts.values())) < 2:
        return []
    named = ", ".join(f"{n} ({c})" for c, n in counts.items())
    return [f"Mutual information depends on the number of samples: with {named} its rows may not be compared."]


def flags_in_words(found: AnalysisResults) -> list[str]:
    """Units that need a second look, counted and named, for each condition that has some."""
    lines = []
    information = [r.mutual_information for r in found.conditions.values() if r.mutual_information is not None]
    if any(r.true is not None for r in information):
        lines.append(
            "mi.estimator=paper_literal is the paper's sum as printed, without the cell's area. It is not a "
            "mutual information: it changes with the unit of the activations, and falls when they grow. The rows on "
            "information above show it; the true one (kde) is in the figures and in results.npz as "
            "mutual_information/true."
        )
    lines += largest_in_words(found.main.flags, found.main_name) if found.main.flags.known else []
    lines += samples_in_words(found)
    for condition, r in found.conditions.items():
        parts = _units_in_words(r)
        if parts:
            lines.append(f"Units to look at twice, {condition}: {'; '.join(parts)}.")
    return lines


def _units_in_words(r: ConditionResults) -> list[str]:
    flags, parts = r.flags, []
    for units, words in (
        (flags.unusable_units.tolist(), "left out for NaN or infinities"),
        (flags.constant_units.tolist(), "constant at every sublayer"),
        (flags.frozen_units.tolist(), "frozen by rounding in most steps"),
    ):
        if units:
            shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
            parts.append(f"{len(units)} {words} ({shown})")
    for counts, words in (
        (flags.constant, "constant"),
        (flags.few_levels, "with few levels (|mean| / std > 30 in bf16)"),
    ):
        if n := int(counts.sum()):
            parts.append(f"{n} unit-sublayers {words}")
    return parts
