"""Figure 4A-C of the page: principal components of the stream, beside a random walk's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsdyn.report import plots
from rsdyn.report.paths import trajectories
from rsdyn.report.plots import Plot, line, number
from rsdyn.report.streams import Stream, curve, over_depth, pick, sequences_in_words, switch, with_and_without


def figure4(streams: Sequence[Stream]) -> list[Plot]:
    """The panels of the analyses that have principal components."""
    some = [s for s in streams if s.measured("pca")]
    if not some:
        return []
    return [
        _plane(some),
        _control(some),
        _cumulative(some),
        _explained(some),
        _needed(some),
        _dimensions(some),
        _loadings(some),
    ]


def _percent(ratio: Any) -> str:
    return f"{100 * float(ratio):.1f} %"


def _axes(stream: Stream, ratio: np.ndarray) -> dict[str, Any]:
    """Axes whose titles change with the stream."""
    x, y = (plots.axis(f"component {k + 1} ({_percent(ratio[k])})") for k in (0, 1))
    return {"xaxis": x, "yaxis": y}


def _plane(streams: list[Stream]) -> Plot:
    traces, versions = [], {}
    n_drawn = 0
    for stream in streams:
        some, n_drawn = trajectories(stream.arrays["latent_mean"], stream.arrays["latent_samples"], stream.sites)
        when = {"stream": stream.key} if len(streams) > 1 else {}
        traces += [plots.merge_when(t, when) for t in some]
        versions[stream.key] = _axes(stream, stream.arrays["pca_ratio"])
    first = streams[0]
    mean = first.arrays["latent_mean"]
    angles = first.arrays.get("half_angles")
    sure = (
        f" The planes of two halves of the sequences lie {angles[0]:.1f} and {angles[1]:.1f} degrees apart."
        if angles is not None
        else ""
    )
    return Plot(
        "fig4a",
        "Fig. 4A  The stream in the plane of its first two components",
        f"Path of the mean over {len(mean)} sublayers in the plane of two components, from ({number(mean[0, 0])}, "
        f"{number(mean[0, 1])}) to ({number(mean[-1, 0])}, {number(mean[-1, 1])}), and {n_drawn} single sequences.",
        (
            f"The mean over {sequences_in_words(streams)} at every sublayer, coloured by depth (circles resid_pre, "
            f"squares resid_mid), and {n_drawn} single sequences; put the pointer on one to follow it. Components are "
            f"of all states of all sequences together.{sure}",
            "the direction in which all sequences move together, and how far they spread about it.",
            "that the curve is the system's: the first two components of any smooth random walk trace one, as the "
            "panel beside it shows. The plane holds the share of the variance that its axes say; the rest is not seen.",
        ),
        traces,
        {**versions[first.key], "height": 420, "versions": {"stream": versions} if len(streams) > 1 else {}},
        pick("stream", "stream", streams),
        widget="paths",
    )


def _control(streams: list[Stream]) -> Plot:
    traces, versions = [], {}
    for stream in streams:
        some, _ = trajectories(
            stream.arrays["control_mean"], stream.arrays["control_samples"], stream.sites,
            names=[f"walk {i}" for i in range(len(stream.arrays["control_samples"]))],
        )  # fmt: skip
        when = {"stream": stream.key} if len(streams) > 1 else {}
        traces += [plots.merge_when(t, when) for t in some]
        versions[stream.key] = _axes(stream, stream.arrays["control_ratio"])
    first = streams[0]
    ratio = first.arrays["control_ratio"]
    return Plot(
        "fig4a-control",
        "Control to 4A  A random walk in the plane of its own components",
        f"Path of the mean of random walks in the plane of their own first two components, which hold "
        f"{_percent(ratio[:2].sum())} of their variance; it is a curve although the walks have no dynamics.",
        (
            f"{len(first.arrays['control_samples'])} smoothed random walks with the stream's own step lengths, common "
            "to all and their own, in the plane of their own components, drawn as Fig. 4A is.",
            "how much curve, and how much variance in a plane, comes from nothing but steps added up.",
            "a test: it is one draw of one kind of walk.",
        ),
        traces,
        {**versions[first.key], "height": 420, "versions": {"stream": versions} if len(streams) > 1 else {}},
        pick("stream", "stream", streams),
        widget="paths",
    )


def _cumulative(streams: list[Stream]) -> Plot:
    traces, words = [], []
    found = with_and_without(streams, "pca_ratio")
    for stream, name, when in found:
        total = np.cumsum(stream.arrays[name])
        text = [f"{i + 1} component{'s' if i else ''}" for i in range(len(total))]
        x = np.arange(1, len(total) + 1)
        trace = line(x, total, stream.label, stream.colour, text=text, form=".1%", dash=stream.dash)
        traces.append(plots.merge_when(trace, when))
        words.append(
            f"{stream.label}{' without massive units' if name != 'pca_ratio' else ''}: {_percent(total[0])} with one "
            f"component, {_percent(total[-1])} with {len(total)}"
        )
    return Plot(
        "fig4b",
        "Fig. 4B  Cumulative explained variance",
        "Rising lines. " + "; ".join(words) + ".",
        (
            f"The share of the variance of all states, over all sublayers of {sequences_in_words(streams)}, that the "
            "first components hold together.",
            "how many directions hold most of what varies, depth included.",
            "the dimension of the computation: large units and late layers own the variance, and movement that is "
            "common to all sequences is counted like differences between them.",
        ),
        traces,
        {
            "xaxis": plots.log_axis("components", [1, max(len(s.arrays["pca_ratio"]) for s in streams)]),
            "yaxis": plots.axis("variance", tickformat=".0%", range=[0, 1.02]),
        },
        switch(found),
    )


def _explained(streams: list[Stream]) -> Plot:
    traces, controls, drawn, words = curve(streams, "ev", form=".3f")
    negative = any((v[np.isfinite(v)] < 0).any() for v in drawn)
    cut = (
        " Values below 0, of sublayers that vary outside all of the components, are off the panel." if negative else ""
    )
    n = dict.fromkeys(str(len(s.arrays["pca_ratio"])) for s in streams)
    return Plot(
        "fig4c",
        "Fig. 4C  Explained variance by sublayer",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"How much of each sublayer's variance over {sequences_in_words(streams)} the first {', '.join(n)} "
            "components of all sublayers together hold. The band about each line is its 95 % interval over sequences "
            f"(jackknife).{cut}",
            "which sublayers vary within the directions that are shared.",
            "that later layers need fewer components because it rises: the components are fitted to where the "
            "variance is, which is late. The two panels below do not depend on that.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.axis("explained variance", range=[-0.02, 1.02])},
        controls,
    )


def _needed(streams: list[Stream]) -> Plot:
    traces, controls, _, words = curve(streams, "components_90", form=".0f")
    return Plot(
        "fig4c-needed",
        "To Fig. 4C  Components for 90 % of a sublayer's variance",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"How many of each sublayer's own components hold 90 % of its variance over {sequences_in_words(streams)}.",
            "the number of directions that matter at a depth, whatever its norm. The paper's claim is that it falls.",
            "a number of dimensions beyond the number of sequences, which limits it from above.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.axis("components", rangemode="tozero")},
        controls,
    )


def _dimensions(streams: list[Stream]) -> Plot:
    traces, controls, _, words = curve(streams, "dimensions", form=".3g")
    return Plot(
        "fig4c-dimensions",
        "To Fig. 4C  Dimensions filled at each sublayer",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            "The participation ratio of each sublayer's own variances, (Σλ)² / Σλ², over "
            f"{sequences_in_words(streams)}. The band about each line is its 95 % interval over sequences (jackknife).",
            "how many directions the sequences spread over evenly at a depth. Here the claim \u201clater layers need "
            "fewer components\u201d can be seen to hold or not.",
            "much about small directions: the ratio is ruled by the largest variances, and one massive unit holds it "
            "near 1.",
        ),
        traces,
        {"xaxis": over_depth(streams), "yaxis": plots.axis("dimensions", rangemode="tozero")},
        controls,
    )


def _loadings(streams: list[Stream]) -> Plot:
    traces, share = [], []
    widest = max(s.arrays["pca_components"].shape[1] for s in streams)
    for stream in streams:
        components = stream.arrays["pca_components"][:2]
        power = components**2
        largest = np.sort(power, axis=1)[:, ::-1].cumsum(1)
        for k, dash in enumerate(("solid", "dash")[: len(components)]):
            x = np.arange(1, largest.shape[1] + 1)
            text = [f"its {i} largest units" for i in x]
            name = f"{stream.label}, component {k + 1}"
            traces.append(line(x, largest[k], name, stream.colour, dash=dash, form=".1%", text=text))
        massive = stream.arrays["massive_units"]
        held = f", of which {len(massive)} massive units {_percent(power[0, massive].sum())}" if len(massive) else ""
        share.append(f"{stream.label}: the largest unit holds {_percent(largest[0, 0])} of component 1{held}")
    return Plot(
        "fig4-loadings",
        "To Fig. 4A  How many units a component is made of",
        "Rising lines. " + "; ".join(share) + ".",
        (
            "The squared loadings of the first two components, added up from the largest. " + "; ".join(share) + ".",
            "whether a component is a direction of many units or, at bottom, one or two.",
            "that a few large loadings are a finding: massive units have most of the variance and become components of "
            "themselves.",
        ),
        traces,
        {
            "xaxis": plots.log_axis("units, largest loading first", [1, widest]),
            "yaxis": plots.axis("share of the component", tickformat=".0%", range=[0, 1.02]),
        },
    )
