"""The panels of perturbed streams (Fig. 4D): where points go, whether they come back, and what layers are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rsdyn.figures.panel import (
    Axis,
    Caption,
    Control,
    Flow,
    Line,
    Mark,
    Panel,
    Rows,
    Rule,
    Said,
    array,
    brief,
    counted,
    in_words,
    percent,
)
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.result import STILL, WRITES, Found

UNPERTURBED = "unperturbed"
DONE = {"teleport": "teleported", "noise": "noised", "swap": "swapped"}
OFF_PLANE = {
    "drop": " off_plane=drop, the paper's reading: whatever of the state lies outside the plane is lost, so points "
    "start far from any real state.",
    "keep": " off_plane=keep: the state moves within the plane alone and keeps the rest.",
}
EVERYWHERE = " One vector at every position leaves attention nothing to choose from: the prompt does not matter here."


def perturbation_panels(
    found: Found,
    *,
    steps: int,
    name: str = "component",
    ratio: Sequence[float] | None = None,
    site: str = "resid_pre",
    position: str = "last",
    off_plane: str = "drop",
) -> list[Panel]:
    """Fig. 4D; recovery beside the controls; the paper's MSE beside points that no layer moves; what points say.

    Args:
        found: what came of the points.
        steps: sublayers after the injection that Fig. 4D shows.
        name: what a dimension of the plane is called.
        ratio: share of the variance along each, where it is known.
        site, position, off_plane: how points were put in, for the caption.
    """
    panels = []
    assert found.reference is not None
    if found.reference.shape[-1] >= 2:
        how = (OFF_PLANE.get(off_plane, "") if found.kind == "teleport" else "") + EVERYWHERE * (position == "all")
        where = f"{site} at the chosen layer ({position} position)"
        panels.append(_plane(found, steps, name, ratio, where, how))
    panels.append(_recovery(found, "relative", "Distance to the reference, over its norm", Axis(
        "distance to the reference / its norm", "log")))  # fmt: skip
    panels.append(_recovery(found, "cosine", "Cosine to the reference", Axis("cosine to the reference", "fisher")))
    has_controls = all({STILL, WRITES} <= {*found.conditions(layer)} for layer in found.sublayers)
    if has_controls and any(row["plane_mse"] == row["plane_mse"] for row in found.rows):
        panels.append(_mse(found))
    if found.said:
        panels.append(_said(found))
    return panels


def _layers(found: Found) -> Control:
    layers = [str(layer) for layer in found.sublayers]
    options = tuple((layer, f"layer {layer}") for layer in layers)
    return Control("layer", "layer of injection", options, layers[len(layers) // 2], "steps", tuple(layers))


def _plane(found: Found, steps: int, name: str, ratio: Sequence[float] | None, where: str, how: str) -> Panel:
    reference = array(found.reference)[:, :2]
    n = len(reference)
    conditions = list(dict.fromkeys(c for layer in found.sublayers for c in found.conditions(layer)))
    longest = n - 1 - min(found.sublayers.values())
    ks = [str(k) for k in range(min(1, longest), longest + 1)]
    drawn: list[Mark] = [
        Line(name=UNPERTURBED, x=reference[:, 0], y=reference[:, 1], text=tuple(f"sublayer {s}" for s in range(n)))
    ]
    for layer in found.sublayers:
        for condition in conditions:
            when = {"layer": str(layer), "condition": condition}
            points = found.of_points.get((layer, condition))
            if points is None:
                lacks = f"The first prompt has no {condition} at layer {layer}."
                drawn.append(Said(name="said", when=when, words=lacks))
                continue
            latents, relative = array(points["latents"])[..., :2].transpose(1, 0, 2), array(points["relative"]).T
            last = len(latents) - 1
            rows = Rows("steps", tuple(ks[: max(1, last)]), last=True)  # the last ends where it stands
            at = n - 1 - last
            drawn.append(
                Flow(
                    name=condition,
                    when=when,
                    rows=rows,
                    start=latents[0],
                    end=latents[min(1, last) :],
                    value=relative[min(1, last) :],
                    bar="distance to the reference / its norm",
                    text=tuple(f"point {i}, put in at {brief(r)} norms" for i, r in enumerate(relative[0])),
                )
            )
            if condition == conditions[0]:
                ring = {"layer": str(layer)}
                drawn.append(Line(name="at the injection", when=ring, x=reference[[at], 0], y=reference[[at], 1],
                                  line=False, marker="ring"))  # fmt: skip
                then = reference[at + min(1, last) :]
                drawn.append(Line(name="then", when=ring, rows=rows, x=then[:, [0]], y=then[:, [1]], line=False,
                                  marker="circle", size=2))  # fmt: skip
            told = []
            if last < steps:
                told.append(f"{counted(last, 'sublayer')} {'follows' if last == 1 else 'follow'}")
            if lost := int((~np.isfinite(latents).all((0, 2))).sum()):
                told.append(f"{lost} of {latents.shape[1]} points not finite")
            if told:
                drawn.append(Said(name="said", when=when, words=", ".join(told)))
    labels = [f"{name} {i + 1}" for i in range(2)]
    if ratio is not None and len(ratio) > 1:
        labels = [f"{label} ({percent(share)})" for label, share in zip(labels, ratio, strict=False)]
    first = "of the first prompt " if found.n_prompts > 1 else ""
    points_in_words = counted(found.n_points, "point")
    return Panel(
        key=f"fig4d_{found.kind}", figure="4D", title=f"Where {DONE.get(found.kind, found.kind)} points go",
        marks=tuple(drawn), x=Axis(labels[0]), y=Axis(labels[1]),
        controls=(
            _layers(found),
            Control("condition", "what was put in", tuple((c, c) for c in conditions), conditions[0]),
            Control("steps", "sublayers later", tuple((k, k) for k in ks), str(min(steps, longest)), "steps"),
        ),
        caption=Caption(
            f"{points_in_words} {first}put in place of {where}, and where each goes in the next {steps} sublayers "
            "(on the page: choose how many), coloured by the distance to the reference then, over the reference's "
            f"norm. Line: the unperturbed run; ring: where it is at the injection; disc: where it is then.{how}",
            "whether points are carried along with the reference or stay where they were put, and how that depends on "
            "the layer; compare with each control.",
            "attraction, from lines that point at the reference: in a plane a stream may come near because its "
            "displacement turned out of the plane, and all lines share the step that is added to every stream alike. "
            "The curves beside it are in full space.",
        ),
        alt=f"Lines in the plane of two components from {points_in_words} as they were put in place of the stream at a "
        "layer to where they are some sublayers later; the reference's path in grey.",
        tall=1.1, wide=True,
    )  # fmt: skip


def _recovery(found: Found, measure: str, title: str, y: Axis) -> Panel:
    drawn: list[Mark] = []
    several = len(found.by_prompt(*next(iter(found.values)), "kl")) > 1
    spread = "95 % interval over prompts" if several else "middle half of the points"
    told, lacking = [], []
    for layer in found.sublayers:
        when = {"layer": str(layer)}
        for condition in found.conditions(layer):
            over = found.measured(layer, condition, f"{measure}_curve")
            value, low, high = array(over.value), array(over.low), array(over.high)
            ours = condition == found.kind
            if not several and (points := found.of_points.get((layer, condition))):
                half = torch.tensor([0.25, 0.75], dtype=torch.float64)
                low, high = array(torch.nanquantile(points[measure].to(torch.float64), half, dim=0))
            words = [f"{counted(k, 'sublayer')} later<br>{brief(v, 4)}" for k, v in enumerate(value)]
            since = np.arange(len(value))
            if ours:
                told.append(f"layer {layer}: from {brief(value[0])} to {brief(value[-1])}")
                put = np.full(2, value[0])
                drawn.append(Line(name="as put", when=when, x=np.array([0, max(1, len(value) - 1)]), y=put, width=0.6))
            drawn.append(
                Line(name=condition, when=when, x=since, y=value, low=low if ours else None,
                     high=high if ours else None, text=tuple(words), width=1.1 if ours else 0.8)
            )  # fmt: skip
            n = len(found.counted(layer, condition))
            if n < len(found.sample):
                lacking.append(f" {condition.capitalize()} at layer {layer}: {n} of {len(found.sample)} prompts.")
    over_prompts = f", median over {counted(len(found.sample), 'prompt')}" if len(found.sample) > 1 else ""
    not_for = (
        "contraction, from a cosine that recovers: norms grow with depth, so whatever is added to both streams alike "
        "turns them towards each other without undoing anything."
        if measure == "cosine"
        else "contraction, from a ratio that falls: the norm it is divided by grows with depth. The column nearer "
        "counts points that end nearer in distance as well as in ratio."
    )
    return Panel(
        key=f"recovery_{measure}", figure="4D", title=title, marks=tuple(drawn),
        x=Axis("sublayers since the injection", whole=True), y=y, bands=spread, controls=(_layers(found),),
        caption=Caption(
            f"Mean over {counted(found.n_points, 'point')}{over_prompts}, from the injection to the last sublayer, in "
            f"full space. Controls: the same points where they stay put, and where they take random "
            "steps as long as the reference's; random directions at the same distances, a real state of another "
            f"sequence, and the same points with attention frozen at the reference.{''.join(lacking)}",
            "recovery, only as far as the points come back more than points that stay put: the reference travels "
            "towards what lies ahead of it.",
            not_for,
        ),
        alt=f"Lines over sublayers since the injection, for {found.kind}: " + "; ".join(told) + ".",
    )  # fmt: skip


def _mse(found: Found) -> Panel:
    """The paper's profile: the MSE in the plane by layer of injection, beside points that no layer moves."""
    kept = {(row.layer, row.condition): row.values["plane_mse"] for row in found.rows}
    layers = np.array([*found.sublayers], dtype=float)
    drawn = []
    for condition in (found.kind, STILL, WRITES):
        value, low, high = (np.array([float(getattr(kept[layer, condition], end)) for layer in found.sublayers])
                            for end in ("value", "low", "high"))  # fmt: skip
        drawn.append(Line(name=condition, x=layers, y=value, low=low, high=high, marker="circle",
                          text=tuple(f"layer {layer:g}: {brief(v, 4)}" for layer, v in zip(layers, value, strict=True)),
                          width=1.1 if condition == found.kind else 0.8))  # fmt: skip
    ratios = []
    for beyond in found.beyond_still:
        ratio, lowest, highest = map(float, beyond.mse_ratio)
        if ratio == ratio:
            ends = f" [{brief(lowest)}, {brief(highest)}]" if lowest == lowest else ""
            ratios.append(f"{brief(ratio)}{ends} at layer {beyond.layer}")
    return Panel(
        key="recovery_mse", figure="4D", title="Mean squared distance in the plane", marks=tuple(drawn),
        x=Axis("layer of injection", whole=True), y=Axis("MSE in the plane", from_zero=True),
        bands="95 % interval over prompts",
        caption=Caption(
            "The paper's measure of recovery: squared distance to the reference in the plane, averaged over the "
            "points, both components and all sublayers after the injection. Over that of points that stay put: "
            f"{', '.join(ratios)}.",
            "whether the profile over layers is the model's: only where it lies below that of points that do not move.",
            "that the layers in the middle recover best, from a minimum there: the profile of points that do not move "
            "has it too.",
        ),
        alt=f"Lines over the layer of injection, for {found.kind}, points that stay put and points with random steps.",
    )  # fmt: skip


def _said(found: Found) -> Panel:
    """What the points say on their way, beside what the reference does."""
    drawn: list[Mark] = []
    told = []
    for layer, said in found.said.items():
        when = {"layer": str(layer)}
        agreement = array(said.agreement)
        own = array(said.reference == said.reference[-1])
        since = np.arange(len(agreement))
        places = [f"{counted(k, 'sublayer')} later" for k in since[:-1]] + ["at the end"]
        for name, share, width in ((UNPERTURBED, own, 0.8), (found.kind, agreement, 1.1)):
            words = tuple(f"{place}<br>{percent(value)}" for place, value in zip(places, share, strict=True))
            drawn.append(Line(name=name, when=when, x=since, y=share, text=words, width=width))
        told.append(f"layer {layer}: from {percent(agreement[0])} to {percent(agreement[-1])}")
    n_points = len(next(iter(found.said.values())).tokens)
    return Panel(
        key="recovery_readout", figure="4D", title="What the points say on their way", marks=tuple(drawn),
        x=Axis("sublayers since the injection", whole=True),
        y=Axis("share on the reference's token", limits=(0, 1), percent=True), controls=(_layers(found),),
        caption=Caption(
            f"Share of {counted(n_points, 'point')} of the first prompt whose likeliest token, read from the state by "
            "the model's own final norm and head (logit lens), is the one that the unperturbed run ends on; beside it "
            "where the unperturbed run itself has that token. The last place is the model's own output.",
            "whether what was put in says something else before it comes back, and from where on it does not.",
            "that the stream lacks what is not read: early sublayers are read in the last one's basis, and so is a "
            "point that lies far from any state.",
        ),
        alt=f"Lines over sublayers since the injection, for {found.kind}: {'; '.join(told)}.",
    )  # fmt: skip


def effect_panels(found: LayerEffects) -> list[Panel]:
    """KL and perplexity by the layer that was left out, or exchanged with the next."""
    what = "left out" if found.kind == "skip" else "exchanged with the next"
    name = "texts" if len(found.sample) > 1 else "the prompt"
    own = found.of_text(0) if found.drawn and 0 not in found.drawn else None
    layers = np.array(found.layers, dtype=float)
    tokens = counted(int(found.n_tokens[found.sample].sum()), "token")
    panels = []
    for i, (key, title, y) in enumerate((
        ("kl", "KL of the next token", Axis("KL of the next token (nats)", "log")),
        ("perplexity", "Change of perplexity", Axis("change of perplexity (%)", "symlog", linear_to=10.0)),
    )):  # fmt: skip
        of = [getattr(effect, key) for effect in found.effects]
        value, low, high = (np.array([float(getattr(one, end)) for one in of]) for end in ("value", "low", "high"))
        unit = " nats" if key == "kl" else " %"
        words = tuple(f"layer {layer:g}<br>{brief(v, 4)}{unit}" for layer, v in zip(layers, value, strict=True))
        drawn: list[Mark] = [Line(name=name, x=layers, y=value, low=low, high=high, text=words, marker="circle")]
        if own is not None:
            drawn.append(Line(name="the prompt", x=layers, y=array(own[i]), marker="circle", width=0.8))
        if key == "perplexity":
            drawn.insert(0, Rule(name="zero", y=0.0, legend=False))
        panels.append(
            Panel(
                key=f"{found.kind}_{key}",
                figure="4D",
                title=f"{title}, by the layer {what}",
                marks=tuple(drawn),
                x=Axis(f"layer {what}", whole=True),
                y=y,
                bands=f"95 % interval over {counted(len(found.sample), 'text')}",
                caption=Caption(
                    f"Each layer of the model {what} in turn, on {counted(len(found.sample), 'text')} of {tokens}.",
                    "which layers the predictions hang on, and which can be missed.",
                    "what a layer computes: a layer can matter because later ones expect its writes, as those of "
                    "massive units, and not for what they say.",
                ),
                alt=in_words(title, value, [f"layer {layer:g}" for layer in layers]) + ".",
            )
        )
    return panels
