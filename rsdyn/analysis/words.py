"""What a reader must know of an analysis beside its findings, in sentences with this run's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsdyn.analysis.finding import number
from rsdyn.analysis.probe import MASSIVE
from rsdyn.analysis.rotation_rows import share_beyond
from rsdyn.metrics.running import TOKEN_CLASSES
from rsdyn.stream.text.positions import SINK_RATIO

Results = Mapping[str, Any]


def rotation_in_words(results: Results, n_sublayers: int) -> list[str]:
    """What a reader must know before taking turns for dynamics, with this run's numbers."""
    observed, walk = float(results["rotation_abs_mean"]), float(results["rotation_random_walk"])
    lines = [
        f"Units turn {observed:.2f} times on average over {n_sublayers} sublayers; a random walk of equal length turns "
        f"{walk:.2f} times. A path in the plane of a value and its slope can only turn clockwise: |R| counts how "
        "jagged it is."
    ]
    lead = "null_innovation_shuffle_turns"
    if lead in results:
        spread, away = float(results[f"{lead}_std"]), float(results[f"{lead}_z"])
        p = float(results["null_innovation_shuffle_population_p"])
        verdict = "explain the turns" if p >= 0.05 else "do not explain the turns"
        lines.append(
            f"Surrogates that keep most (a linear process with this stream's own step sizes, the correlation of its "
            f"near steps and of its units) turn {float(results[lead]):.2f} ± {spread:.2f} times: the stream lies "
            f"{abs(away):.1f} SD {'above' if away > 0 else 'below'} (p {number(p)}), so these facts {verdict}. Claims "
            "rest on this null; the others are the ladder down to the paper's, and each keeps less."
        )
    explained = {
        "innovation_shuffle": "that null",
        "layer_shuffle": "the paper's null (layer order shuffled)",
    }
    for null, words in explained.items():
        if f"null_{null}_mean" in results:
            here, passed = share_beyond(results, null), share_beyond(results, null, corrected=True)
            of_walks = 100 * float(results[f"walks_beyond_{null}"])
            lines.append(
                f"{here:.0f} % of the units go beyond {words} at p < .05, {passed:.0f} % at a false discovery rate of "
                f"5 %. Of random walks of equal length, which have no dynamics, {of_walks:.0f} % do at p < .05."
            )
    if "regularity_mean" in results and "regularity_increment_shuffle_scaled_population" in results:
        theirs = float(results["regularity_increment_shuffle_scaled_population"].mean())
        lines.append(
            "Turns cannot show every orbit: one of period 5 or 6 makes as many as a walk. Regularity shows one from an "
            "amplitude of about one step's SD on. The largest share of a unit's steps at one frequency is "
            f"{float(results['regularity_mean']):.3f}, and {theirs:.3f} once they are shuffled in windows and scaled."
        )
    return lines


def plane_in_words(results: Results) -> list[str]:
    """How much of the stream the plane of PCA shows, how sure it is, and what a random walk's plane would hold."""
    held, walk = 100 * float(results["pca_ratio"][:2].sum()), 100 * float(results["control_ratio"].sum())
    line = (
        f"The plane of the first two components holds {held:.0f} % of the variance (that of a smoothed random walk "
        f"with the same steps: {walk:.0f} %)."
    )
    if "half_angles" in results:
        first, second = (float(a) for a in results["half_angles"])
        line += f" The planes of two halves of the sequences lie {first:.1f} and {second:.1f} degrees apart."
    loadings = results["pca_massive_loadings"]
    if loadings.shape[1]:
        line += f" Massive units are {100 * float(loadings[0].sum()):.0f} % of the first component."
    return [line]


def massive_in_words(results: Results, sites_per_layer: int) -> list[str]:
    """The unit that stands out most in each class of tokens: how large it is, and where it is written and unwritten."""
    lines = []
    for k, name in enumerate(TOKEN_CLASSES):
        if not results["massive_counts"][k]:
            continue
        curve = results["massive_largest"][k]
        s = int(curve.argmax())
        unit, value = int(results["massive_unit"][k, s]), float(curve[s])
        line = (
            f"Largest activation, {name} ({int(results['massive_counts'][k])}): {_size(value)}, unit {unit} at "
            f"{_place(s, sites_per_layer)}, {value / float(results['massive_typical'][k, s]):,.0f} times a typical one"
        )
        units = results["massive_top"].tolist()
        if unit in units:
            u = units.index(unit)
            before, after, onset = (float(results[f"massive_{w}"][k, u]) for w in ("before", "after", "onset"))
            line += f"; written by {_writer(int(onset), sites_per_layer)}, from {_size(before)} to {_size(after)}"
            fallen = int(results["massive_unwritten"][k, u])
            line += f", below half of its peak from {_place(fallen, sites_per_layer)} on" if fallen >= 0 else ""
        lines.append(f"{line}.")
    if "norm_by_position" not in results:
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


def positions_in_words(results: Mapping[str, Results]) -> list[str]:
    """How many trajectories are BOS and sinks, which weigh more in every mean than the rest, for each condition."""
    counted = "; ".join(
        f"{r['n_bos']} BOS and {r['n_sinks']} sinks of {r['n_trajectories']} ({condition})"
        for condition, r in results.items()
    )
    return [
        f"Among the trajectories are {counted}. A sink's state in the middle of the depth is more than {SINK_RATIO:g} "
        "times as long as the median one, as BOS often is: such tokens weigh most in means, variances and the plane of "
        "PCA. Nothing is left out."
    ]


def largest_in_words(results: Mapping[str, Results]) -> list[str]:
    """Which units are massive and how far beyond the threshold; the set is that of the main condition for all."""
    condition, main = next(iter(results.items()))
    if "largest_ratios" not in main:
        return []
    units, ratios = main["largest_units"].tolist(), [float(x) for x in main["largest_ratios"]]
    massive = [(u, x) for u, x in zip(units, ratios, strict=True) if x > MASSIVE]
    below = next(((u, x) for u, x in zip(units, ratios, strict=True) if x <= MASSIVE), None)
    n = len(main["massive_units"])
    next_one = "" if below is None else f" The largest below is unit {below[0]}, {below[1]:.0f} times."
    if not n:
        return [f"No unit is massive: none has a mean of {MASSIVE:g} times the median in {condition}.{next_one}"]
    shown = ", ".join(f"{u} ({x:.0f} times)" for u, x in massive) + (", ..." if n > len(massive) else "")
    return [
        f"{n} massive unit{'s' * (n > 1)}, the same for all conditions: |mean| beyond {MASSIVE:g} times the median in "
        f"{condition}: {shown}.{next_one} The threshold is a cliff: findings.md shows each finding without 0 to "
        f"{int(main['left_out_counts'][-1])} of the largest units."
    ]


def samples_in_words(results: Mapping[str, Results]) -> list[str]:
    """How many samples the information is of, and that it may not be compared where that differs."""
    counts = {c: int(r["mi_samples"]) for c, r in results.items() if "mi_samples" in r}
    if len(set(counts.values())) < 2:
        return []
    named = ", ".join(f"{n} ({c})" for c, n in counts.items())
    return [f"Mutual information depends on the number of samples: with {named} its rows may not be compared."]


def flags_in_words(results: Mapping[str, Results]) -> list[str]:
    """Units that need a second look, counted and named, for each condition that has some."""
    lines = []
    if any(r.get("mi_estimator") == "paper_literal" for r in results.values()):
        lines.append(
            "mi.estimator=paper_literal is the paper's sum as printed, without the cell's area. It is not a "
            "mutual information: it changes with the unit of the activations, and falls when they grow. The rows on "
            "information above show it; the true one (kde) is in the figures and in results.npz as mi_true."
        )
    lines += largest_in_words(results)
    lines += samples_in_words(results)
    for condition, r in results.items():
        parts = []
        for name, words in (
            ("unusable_units", "left out for NaN or infinities"),
            ("constant_units", "constant at every sublayer"),
            ("frozen_units", "frozen by rounding in most steps"),
        ):
            units = r[name].tolist()
            if units:
                shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
                parts.append(f"{len(units)} {words} ({shown})")
        for name, words in (
            ("constant", "constant"),
            ("few_levels", "with few levels (|mean| / std > 30 in bf16)"),
        ):
            if n := int(r[name].sum()):
                parts.append(f"{n} unit-sublayers {words}")
        if parts:
            lines.append(f"Units to look at twice, {condition}: {'; '.join(parts)}.")
    return lines
