"""Figure 3 of the page: what a training run left, beside PCA on the same split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsdyn.figures.colours import look_of
from rsdyn.report import plots
from rsdyn.report.paths import trajectories
from rsdyn.report.plots import Control, Plot, band, line, number
from rsdyn.report.reading import RunFiles
from rsdyn.report.streams import Stream, places

SPACES = {
    "none": "raw activations",
    "unit": "standardised by unit",
    "unit_sublayer": "standardised by unit and sublayer",
}
LOWEST = -1.0  # explained variance below this is off the panel


def figure3(run: RunFiles, streams: Sequence[Stream], sites: int | None, key: str) -> list[Plot]:
    """The panels of one training run; ``streams`` are those of analyses of its model, whose PCA stands beside it."""
    panels = [] if run.summary["widths"][-1] < 2 else [_latents(run, sites, key)]
    return [*panels, _distance(run, sites, key), _explained(run, streams, sites, key), _losses(run, key)]


def _latents(run: RunFiles, sites: int | None, key: str) -> Plot:
    mean, samples = run.arrays["mean_latents"], run.arrays["latent_samples"]
    names = None
    if "latent_sample_sequences" in run.arrays:
        names = [f"sequence {int(i)}" for i in run.arrays["latent_sample_sequences"]]
    traces, n_drawn = trajectories(mean, samples, sites, names=names)
    test = run.summary["test"]
    k = mean.shape[1]
    only = "" if k == 2 else f" The first two of {k} latents."
    filled = test.get("latent_participation")  # not in runs of rsdyn 0.1
    fills = "" if filled is None else f" The latents of all of them fill {number(filled, 3)} of {k} dimensions"
    fills += "" if filled is None else " (participation ratio: 1 on a line)."
    return Plot(
        f"fig3b-{key}",
        "Fig. 3B  Latent trajectories",
        f"Path of the mean over {len(mean)} sublayers in the plane of two latents, from ({number(mean[0, 0])}, "
        f"{number(mean[0, 1])}) to ({number(mean[-1, 0])}, {number(mean[-1, 1])}), and {n_drawn} single sequences.",
        (
            f"What the autoencoder's encoder makes of {int(test['n_test_sequences']):,} test sequences: the mean at "
            f"every sublayer, coloured by depth (circles resid_pre, squares resid_mid), and {n_drawn} single "
            f"sequences; put the pointer on one to follow it.{only}{fills}",
            "that sequences pass through the same places, if they do, in a plane that was learnt to describe them.",
            "distances and angles: latents have no unit, and a network may bend and stretch the plane as it likes. A "
            "curve here is not evidence of dynamics; the random walk under Fig. 4A makes one too.",
        ),
        traces,
        {"xaxis": plots.axis("latent 1"), "yaxis": plots.axis("latent 2"), "height": 420},
        widget="paths",
    )


def _distance(run: RunFiles, sites: int | None, key: str) -> Plot:
    mean, std = run.arrays["latent_distance"], run.arrays["latent_distance_std"]
    names = plots.transition_names(run.n_sublayers, sites)
    x = np.arange(len(mean)) + 0.5
    parts: list[tuple[slice, str, str]] = [(slice(None), "latent distance", "@ink")]
    if sites == 2:
        parts = [(slice(0, None, 2), "within layer", "@within"), (slice(1, None, 2), "cross layer", "@cross")]
    traces: list[dict[str, Any]] = []
    for part, label, colour in parts:
        traces.append(band(x[part], np.maximum(mean - std, 0)[part], (mean + std)[part], colour, label))
        traces.append(
            line(x[part], mean[part], label, colour, text=names[part], legendgroup=label, mode="lines+markers")
        )
    return Plot(
        f"fig3c-{key}",
        "Fig. 3C  Distance between successive latents",
        "Lines over depth. " + plots.curve_in_words("latent distance", mean, names) + ".",
        (
            "The distance from one sublayer's latents to the next's, mean over the test sequences; the band is ± 1 SD "
            "over sequences.",
            "where in depth the latent path takes its long steps.",
            "a speed of the stream: the encoder may shorten steps that reconstruct well anyhow. Fig. 1F has the "
            "stream's.",
        ),
        traces,
        {"xaxis": plots.depth_axis(run.n_sublayers, sites), "yaxis": plots.axis("distance", rangemode="tozero")},
    )


def _explained(run: RunFiles, streams: Sequence[Stream], sites: int | None, key: str) -> Plot:
    standardised = run.summary.get("standardise", "none")
    n_latent = run.summary["widths"][-1]
    space, own, total = (
        SPACES.get(standardised, standardised),
        "about each sublayer's own mean",
        "about the global mean",
    )
    views = [("own", f"{space}, {own}", "ev_{}"), ("global", f"{space}, {total}", "ev_global_{}")]
    if standardised != "none":
        space = SPACES["none"]
        views += [("raw", f"{space}, {own}", "ev_{}_raw"), ("raw-global", f"{space}, {total}", "ev_global_{}_raw")]
    views = [view for view in views if view[2].format("cae") in run.arrays]
    names = plots.sublayer_names(run.n_sublayers, sites)
    control = Control(f"ev-{key}", "variance", [(value, label) for value, label, _ in views], views[0][0])
    traces, words, lows = [], [], []
    for value, _, form in views:
        for which, label, colour, dash in (
            ("cae", "autoencoder", "@c1", "solid"), ("pca", f"PCA, {n_latent} components", "@ink", "dash"),
        ):  # fmt: skip
            ev = run.arrays[form.format(which)]
            lows.append(np.nanmin(ev) if np.isfinite(ev).any() else 0.0)
            traces.append(
                plots.merge_when(
                    line(np.arange(len(ev)), ev, label, colour, dash=dash, text=names, form=".3f"),
                    {control.name: value},
                )
            )
            if value == "own":
                words.append(plots.curve_in_words(label, ev, names))
    beside = [s for s in streams if s.measured("pca") and s.condition == run.summary["condition"]]
    for stream in beside[:1]:
        ev = stream.arrays["ev"]
        n = len(stream.arrays["pca_ratio"])
        trace = line(places(stream, len(ev), False), ev, f"PCA, {n} components (analysis)", "@c3", dash="dot",
                     width=1.4, text=names, form=".3f")  # fmt: skip
        # the analysis' PCA is of raw activations, about each sublayer's own mean
        traces.append(plots.merge_when(trace, {control.name: "raw" if standardised != "none" else "own"}))
    low = max(LOWEST, min(0.0, min(lows) * 1.05))
    cut = f" Values below {number(LOWEST)} are off the panel." if min(lows) < LOWEST else ""
    also = (
        " In raw activations the dotted line is the analysis' PCA, of other sequences: it shows what more components "
        "hold."
        if beside
        else ""
    )
    return Plot(
        f"fig3d-{key}",
        "Fig. 3D  Explained variance by sublayer",
        "Lines over depth. " + "; ".join(words) + ".",
        (
            f"1 − SSE/SST of the test sequences at each sublayer, for the autoencoder with {n_latent} latents and for "
            f"PCA with as many components, fitted on the same training sequences.{also}{cut}",
            "whether the autoencoder found more than a plane: where it is above PCA. Below 0 it is worse than that "
            "sublayer's mean.",
            "that later layers are lower-dimensional because the curve rises: a loss in squared error belongs to the "
            "sublayers and units with the largest variance, so they are described best by construction. Compare the "
            "raw and the standardised view.",
        ),
        traces,
        {
            "xaxis": plots.depth_axis(run.n_sublayers, sites),
            "yaxis": plots.axis("explained variance", range=[low, 1.02]),
        },
        [control] if len(views) > 1 else [],
    )


def _losses(run: RunFiles, key: str) -> Plot:
    history, best = run.summary["history"], run.summary.get("best_epoch")
    traces = []
    for name, label in (("train", "training"), ("val", "validation")):
        pairs = np.array([[e, np.nan if v is None else v] for e, v in history[name]], dtype=float).reshape(-1, 2)
        traces.append(
            line(
                pairs[:, 0],
                pairs[:, 1],
                label,
                look_of(label).token,
                dash=look_of(label).dash,
                form=".4g",
                mode="lines+markers" if len(pairs) < 15 else "lines",
            )
        )
    losses = [np.nan if v is None else v for part in history.values() for _, v in part]
    layout: dict[str, Any] = {
        "xaxis": plots.axis("epoch", rangemode="tozero", zeroline=False), "yaxis": plots.log_axis("loss", losses),
    }  # fmt: skip
    if best is not None:
        layout["shapes"] = [
            {"type": "line", "x0": best, "x1": best, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": "@ink", "width": 1, "dash": "dot"}}
        ]  # fmt: skip
    val = [v for _, v in history["val"] if v is not None]
    return Plot(
        f"loss-{key}",
        "Loss  Training and validation",
        f"Lines over {len(history['val'])} epochs; the validation loss goes from "
        f"{number(val[0] if val else None)} to {number(val[-1] if val else None)}, best at epoch {best}.",
        (
            "The mean squared error in the space of the loss "
            f"({SPACES.get(run.summary.get('standardise', 'none'), '')}) "
            f"over epochs. Dotted: the best epoch, {best}, whose weights were tested.",
            "whether training went on long enough, and whether it overfits.",
            "a comparison between runs with different standardisation: their losses have different units.",
        ),
        traces,
        layout,
    )
