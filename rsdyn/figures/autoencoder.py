"""The panels of a trained autoencoder: its shape, the latent path, its steps, what it explains, the losses (Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rsdyn.analysis.results import Measured
from rsdyn.autoencoder.result import Trained
from rsdyn.autoencoder.summary import dimensions_filled
from rsdyn.figures.colours import LOOKS, Look
from rsdyn.figures.components import plane_marks
from rsdyn.figures.over_depth import depth_axis, sublayer_names, transition_kinds, transition_names
from rsdyn.figures.panel import Axis, Caption, Control, Line, Mark, Panel, Rule, array, brief, counted, in_words

SPACES = {
    "none": "raw activations",
    "unit": "standardised by unit",
    "unit_sublayer": "standardised by unit and sublayer",
}
LOWEST = -0.5  # explained variance below this is off the panel


def training_panels(found: Trained, beside: Mapping[str, Measured] | None = None) -> list[Panel]:
    """The panels of one training run.

    Args:
        found: what came of it.
        beside: explained variance by the principal components of an analysis of the same stream, by what it is called.
    """
    return [_shape(found), *_latents(found), _distance(found), _explained(found, beside or {}), _losses(found)]


def _shape(found: Trained) -> Panel:
    widths = np.array([*found.widths, *found.widths[-2::-1]], dtype=float)
    at = np.arange(len(widths))
    names = tuple(
        f"{'encoder' if i < len(found.widths) - 1 else 'decoder'}, {int(w):,} wide" for i, w in enumerate(widths)
    )
    told = " ".join(str(w) for w in found.widths)
    return Panel(
        key="fig3a_shape", figure="3A", title="The autoencoder's shape",
        marks=(Line(name="width", x=at, y=widths, marker="square", text=names),),
        x=Axis("layer of the autoencoder", whole=True), y=Axis("width", "log"),
        caption=Caption(
            f"The widths of the autoencoder, {told} and back.",
            "how fast it narrows, and to what.",
            "its quality: inner widths next to the number of latents tend to a line.",
        ),
        alt=f"Widths of the layers: {told} and back.",
    )  # fmt: skip


def _latents(found: Trained) -> list[Panel]:
    """The path in the plane of the first latents, or against depth where there is one latent alone."""
    mean, samples = array(found.latents), array(found.samples)
    samples = samples[:: max(1, len(samples) // 100)][:100]
    labels = [f"sequence {i}" for i in found.sequences[:: max(1, len(found.samples) // 100)][:100]]
    n, k = mean.shape
    sites = found.sites or 1
    fills = "" if found.fill is None else (
        f" The latents of all of them fill {brief(found.fill)} of {k} dimensions (participation ratio: 1 on a line)."
    )  # fmt: skip
    if k == 1:
        at = np.arange(n)[:, None]
        mean = np.concatenate([at, mean], axis=1)
        samples = np.concatenate([np.broadcast_to(at, (len(samples), n, 1)), samples], axis=2)
        axes = [depth_axis(n, found.sites), Axis("latent 1")]
    else:
        axes = [Axis("latent 1"), Axis("latent 2")]
    pairs = [(0, 1), *([(0, 2)] if k > 2 else [])]
    options = tuple((f"1-{j + 1}", f"latents 1 and {j + 1}") for _, j in pairs) if k > 2 else ()
    marks: list[Mark] = []
    for i, pair in enumerate(pairs):
        here = {"latents": options[i][0]} if options else {}
        marks += plane_marks("mean", mean[:, pair], samples[..., pair], sites, labels, when=here)
    control = (
        Control("latents", "plane", options, options[0][0], shown=tuple(v for v, _ in options)) if options else None
    )
    ys = {value: (axes[0], Axis(f"latent {value[2:]}")) for value, _ in options}
    return [
        Panel(
            key="fig3b_latent_trajectory",
            figure="3B",
            title="Latent trajectories",
            marks=tuple(marks),
            x=axes[0],
            y=axes[1],
            axes=ys,
            own_axes=bool(ys),
            controls=() if control is None else (control,),
            tall=1.3,
            columns=1,
            note="" if found.fill is None or k == 1 else f"mean latents: {dimensions_filled(found.fill, k)}",
            caption=Caption(
                f"What the encoder makes of {found.n_test:,} test sequences: the mean at every sublayer, coloured by "
                "depth (circles resid_pre, squares resid_mid), and single sequences behind it; on the page, put the "
                f"pointer on one to follow it.{fills}",
                "that sequences pass through the same places, if they do, in a plane that was learnt to describe them.",
                "distances and angles: latents have no unit, and a network may bend and stretch the plane as it likes. "
                "A curve here is not evidence of dynamics; the random walk under Fig. 4A makes one too.",
            ),
            alt=f"Path of the mean over {n} sublayers through the latents, from ({brief(mean[0, 0])}, "
            f"{brief(mean[0, 1])}) to ({brief(mean[-1, 0])}, {brief(mean[-1, 1])}), and "
            f"{counted(len(samples), 'single sequence')}.",
        )
    ]


def _distance(found: Trained) -> Panel:
    mean, std = array(found.distance), array(found.distance_std)
    names = transition_names(found.n_sublayers, found.sites)
    x = np.arange(len(mean)) + 0.5
    low, high = np.maximum(mean - std, 0), mean + std
    marks = tuple(
        Line(name=kind.name, x=x[kind.part], y=mean[kind.part], low=low[kind.part], high=high[kind.part],
             marker=kind.marker, text=tuple(f"{where}<br>{brief(v, 4)}" for where, v in
                                            zip(names[kind.part], mean[kind.part], strict=True)))
        for kind in transition_kinds(found.sites)
        if len(x[kind.part])
    )  # fmt: skip
    return Panel(
        key="fig3c_latent_distance", figure="3C", title="Distance between successive latents", marks=marks,
        x=depth_axis(found.n_sublayers, found.sites), y=Axis("distance in latent space", from_zero=True),
        bands="± 1 SD over sequences",
        caption=Caption(
            "The distance from one sublayer's latents to the next's, mean over the test sequences.",
            "where in depth the latent path takes its long steps.",
            "a speed of the stream: the encoder may shorten steps that reconstruct well anyhow. Fig. 1F has the "
            "stream's.",
        ),
        alt="Lines over depth. " + in_words("latent distance", mean, names) + ".",
    )  # fmt: skip


def _explained(found: Trained, beside: Mapping[str, Measured]) -> Panel:
    space, k = SPACES.get(found.standardise, found.standardise), found.widths[-1]
    own, total = "about each sublayer's own mean", "about the global mean"
    labels = {
        "own": f"{space}, {own}", "global": f"{space}, {total}",
        "raw": f"{SPACES['none']}, {own}", "raw_global": f"{SPACES['none']}, {total}",
    }  # fmt: skip
    views = [v for v in found.explained if found.standardise != "none" or not v.startswith("raw")]
    names = sublayer_names(found.n_sublayers, found.sites)
    x = np.arange(found.n_sublayers)
    marks: list[Mark] = [Rule(name="zero", y=0.0, legend=False)]
    told, lowest = [], 0.0
    several = len(views) > 1
    for view in views:
        series = {"autoencoder": LOOKS["autoencoder"], f"PCA, {k} components": LOOKS["pca"]}
        for (name, look), values in zip(series.items(), found.explained[view], strict=True):
            ev = array(values)
            words = tuple(f"{where}<br>{brief(v)}" for where, v in zip(names, ev, strict=True))
            marks.append(Line(name=name, when={"variance": view} if several else {}, x=x, y=ev, text=words,
                              look=look, marker="circle", size=0.6))  # fmt: skip
            if view == "own":
                told.append(in_words(name, ev, names))
            finite = ev[np.isfinite(ev)]
            lowest = min(lowest, float(finite.min(initial=0.0)))
    for name, measured in beside.items():
        # an analysis' components are of raw activations, about each sublayer's own mean
        marks.append(Line(name=name, when={"variance": "raw" if "raw" in views else "own"} if several else {}, x=x,
                          y=array(measured.value), look=Look(LOOKS["pca"].colour, "dot"), width=0.8))  # fmt: skip
    low = max(LOWEST, lowest * 1.05) - 0.02
    cut = f" Values below {brief(LOWEST)} are off the panel." if lowest < LOWEST else ""
    also = (
        " In raw activations, dotted, the analysis' PCA of other sequences: what more components hold."
        if beside
        else ""
    )
    options = tuple((view, labels[view]) for view in views)
    return Panel(
        key="fig3d_explained_variance", figure="3D", title="Explained variance by sublayer of the autoencoder",
        marks=tuple(marks), x=depth_axis(found.n_sublayers, found.sites),
        y=Axis("explained variance", limits=(low, 1.03)),
        controls=(Control("variance", "variance", options, views[0]),) if several else (),
        caption=Caption(
            f"1 − SSE/SST of the test sequences at each sublayer ({labels['own']}, unless chosen otherwise), for the "
            f"autoencoder with {counted(k, 'latent')} and for PCA with as many components, fitted on the same training "
            f"sequences.{also}{cut}",
            "whether the autoencoder found more than a plane: where it is above PCA. Below 0 it is worse than that "
            "sublayer's mean.",
            "that later layers are lower-dimensional because the curve rises: a loss in squared error belongs to the "
            "sublayers and units with the largest variance, so they are described best by construction. Compare the "
            "raw and the standardised view.",
        ),
        alt="Lines over depth. " + "; ".join(told) + ".",
    )  # fmt: skip


def _losses(found: Trained) -> Panel:
    marks: list[Mark] = []
    every = []
    for name, pairs in (("training", found.train), ("validation", found.val)):
        if pairs:
            epochs, values = np.array(pairs).T
            marks.append(Line(name=name, x=epochs, y=values, marker="circle" if len(pairs) < 30 else "", size=0.7))
            every += [v for v in values if v > 0]
    if found.best_epoch is not None:
        marks.append(
            Rule(name=f"best epoch ({found.best_epoch:g})", x=float(found.best_epoch), look=Look("muted", "dot"))
        )
    val = [v for _, v in found.val if v == v]
    wide = len(every) > 0 and max(every) > 10 * min(every)
    return Panel(
        key="loss", figure="3", title="Training and validation loss", marks=tuple(marks), x=Axis("epoch", whole=True),
        y=Axis("loss (MSE)", "log" if wide else "linear"),
        caption=Caption(
            f"The mean squared error in the space of the loss ({SPACES.get(found.standardise, '')}) over epochs. "
            "Dotted: the best epoch, whose weights were tested.",
            "whether training went on long enough, and whether it overfits.",
            "a comparison between runs with different standardisation: their losses have different units.",
        ),
        alt=f"Lines over {len(found.val)} epochs; the validation loss goes from {brief(val[0] if val else None)} to "
        f"{brief(val[-1] if val else None)}.",
    )  # fmt: skip
