"""Figure 4D of the page: where perturbed streams go, and whether they come back, beside the controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rsdyn.dynamics.recovery import median_over_prompts
from rsdyn.figures.colours import look_of
from rsdyn.labels import COLUMNS
from rsdyn.perturbation.words import percent
from rsdyn.report import plots
from rsdyn.report.plots import Control, Plot, band, counted, fisher, fisher_axis, line, number, packed
from rsdyn.report.reading import RunFiles

STILL = "stays put"
KINDS = {"teleport": "teleported", "noise": "noised", "swap": "swapped"}


def conditions_at(run: RunFiles, layer: int) -> list[str]:
    """What was done at a layer, the points themselves first."""
    return [row["condition"] for row in run.summary["rows"] if row["layer"] == layer]


def _folder(layer: int, condition: str) -> str:
    return f"layer{layer}/{condition.replace(' ', '_')}/"


def _shown(run: RunFiles, layer: int) -> list[str]:
    """What was done to the first prompt at a layer; another prompt may have a state to swap in where it has none."""
    conditions = conditions_at(run, layer)
    return [c for c in conditions if "points_latents" in run.arrays.under(_folder(layer, c))]


def _sample(run: RunFiles) -> list[int]:
    """The prompts that curves are over: those drawn from the text, or all."""
    if "sample" in run.arrays:
        return [int(i) for i in run.arrays["sample"]]
    return [*range(int(run.summary["n_prompts"]))]


def _of_some(row: dict[str, Any], n_prompts: int) -> str:
    """``, 1 of 2 prompts`` for what not every prompt had a state for."""
    n = int(row.get("n_prompts", n_prompts))
    return f", {n} of {n_prompts} prompts" if n < n_prompts else ""


def figure4d(run: RunFiles, key: str) -> tuple[list[Plot], dict[str, Any]]:
    """The panels of one perturbation, and the shared data of its plane."""
    reference = run.arrays["reference"]
    layers = [int(layer) for layer in run.summary["layers"]]
    at_layer = Control(
        f"layer-{key}",
        "layer of injection",
        [(str(n), str(n)) for n in layers],
        str(layers[len(layers) // 2]),
        "slider",
    )
    panels, data = [], {}
    if reference.shape[1] >= 2:
        panels.append(_plane(run, key, at_layer))
        data[f"plane-{key}"] = _points(run, layers, reference)
    for name, title in (
        ("relative", "Distance to the reference, over its norm"),
        ("cosine", "Cosine to the reference"),
    ):
        panels.append(_recovery(run, key, layers, at_layer, name, title))
    if "beyond_still" in run.summary:
        panels.append(_mse(run, key, layers))
    return panels, data


def _points(run: RunFiles, layers: list[int], reference: np.ndarray) -> dict[str, Any]:
    """Where every point of the first prompt is at every sublayer from its injection on."""
    found: dict[str, Any] = {}
    for layer in layers:
        conditions = {}
        for condition in _shown(run, layer):
            arrays = run.arrays.under(_folder(layer, condition))
            latents = arrays["points_latents"][..., :2]
            conditions[condition] = {
                "points": len(latents),
                "steps": latents.shape[1],
                "latents": packed(latents),
                "relative": packed(arrays["points_relative"]),
            }
        found[str(layer)] = conditions
    name = "latent" if run.summary.get("space") == "cae" else "component"
    return {
        "reference": packed(reference[:, :2]),
        "sublayers": len(reference),
        "layers": found,
        "steps": int(run.config["perturb"]["steps"]),
        "axes": [f"{name} 1", f"{name} 2"],
    }


def _plane(run: RunFiles, key: str, at_layer: Control) -> Plot:
    summary = run.summary
    kind, n_prompts = summary["kind"], int(summary["n_prompts"])
    shown = {int(layer): _shown(run, int(layer)) for layer in summary["layers"]}
    conditions = list(dict.fromkeys(condition for at in shown.values() for condition in at))
    lacking = [
        f" The first prompt has no {condition} at layer {layer}."
        for layer, at in shown.items()
        for condition in conditions_at(run, layer)
        if condition not in at
    ]
    steps = int(run.config["perturb"]["steps"])
    longest = len(run.arrays["reference"]) - 1
    controls = [
        at_layer,
        Control(f"condition-{key}", "what was put in", [(c, c) for c in conditions], conditions[0]),
        Control(f"steps-{key}", "sublayers later", [(str(k), str(k)) for k in range(min(1, longest), longest + 1)],
                str(min(steps, longest)), "slider"),
    ]  # fmt: skip
    lost = {
        "drop": "off_plane=drop, the paper's reading: whatever of the state lies outside the plane is lost, so "
        "points start far from any real state",
        "keep": "off_plane=keep: the state moves within the plane alone and keeps the rest",
    }.get(summary.get("off_plane", ""), "")
    how = f" {lost}." if kind == "teleport" and lost else ""
    everywhere = (
        " One vector at every position leaves attention nothing to choose from: the prompt does not matter here."
        if summary.get("position") == "all"
        else ""
    )
    first = "of the first prompt " if n_prompts > 1 else ""
    return Plot(
        f"fig4d-{key}",
        f"Fig. 4D  Where {KINDS.get(kind, kind)} points go",
        f"Lines in the plane of two components from {counted(int(summary['n_points']), 'point')} as they were put in "
        "place of the stream at a layer to where they are some sublayers later; the reference's path in grey.",
        (
            f"{counted(int(summary['n_points']), 'point')} {first}put in place of {summary.get('site', 'resid_pre')} "
            f"at the chosen layer ({summary.get('position', 'last')} position), and where each is so many sublayers "
            f"later, where its line ends in a disc (the paper takes {steps}). Coloured by the distance to the "
            "reference then, over the reference's norm. Line: the unperturbed run; ring: where it is at the "
            f"injection; black disc: where it is then.{how}{everywhere}{''.join(lacking)}",
            "whether points are carried along with the reference or stay where they were put, and how that depends on "
            "the layer; compare with each control.",
            "attraction, from lines that point at the reference: in a plane a stream may come near because its "
            "displacement turned out of the plane, and all lines share the step that is added to every stream alike. "
            "The curves beside it are in full space.",
        ),
        controls=controls,
        widget="plane",
        source=f"plane-{key}",
        wide=True,
    )  # fmt: skip


def _recovery(run: RunFiles, key: str, layers: list[int], at_layer: Control, name: str, title: str) -> Plot:
    sample = _sample(run)
    n_prompts = len(sample)
    kind = run.summary["kind"]
    is_cosine = name == "cosine"
    to_axis = fisher if is_cosine else (lambda v: np.asarray(v, dtype=float))
    traces, words = [], []
    at_each: dict[str, Any] = {}
    for layer in layers:
        values = []
        for condition in conditions_at(run, layer):
            arrays = run.arrays.under(_folder(layer, condition))
            curves = np.atleast_2d(arrays[f"{name}_curve"])
            has = ~np.isnan(curves).all(1)  # a prompt without this condition is a row of NaN
            of = [i for i in sample if has[i]] or has.nonzero()[0].tolist() or [0]
            mean, low, high = (end.numpy() for end in median_over_prompts(torch.from_numpy(curves[of])))
            look = look_of(condition)
            colour, dash = look.token, look.dash
            x, when = np.arange(len(mean)), {at_layer.name: str(layer)}
            if condition == kind:
                spread = arrays[f"points_{name}"].astype(float)
                known = np.isfinite(spread).any(0)
                if n_prompts == 1 and known.any():
                    low, high = np.nanquantile(spread[:, known], [0.25, 0.75], axis=0)
                    values += [low, high]
                    traces.append(
                        plots.merge_when(band(x[known], to_axis(low), to_axis(high), colour, condition), when)
                    )
                elif np.isfinite(low).any():
                    values += [low, high]
                    traces.append(plots.merge_when(band(x, to_axis(low), to_axis(high), colour, condition), when))
                words.append(f"layer {layer}: from {number(mean[0])} to {number(mean[-1])}")
            text = [f"{k} sublayer{'' if k == 1 else 's'} later<br>{number(v, 4)}" for k, v in enumerate(mean)]
            trace = line(x, to_axis(mean), condition, colour, dash=dash, text=text, legendgroup=condition,
                         width=2.2 if condition == kind else 1.5)  # fmt: skip
            trace["hovertemplate"] = "%{text}<extra>%{fullData.name}</extra>"
            traces.append(plots.merge_when(trace, when))
            values.append(mean)
        every = np.concatenate(values)
        y = fisher_axis("cosine", [every]) if is_cosine else plots.log_axis("distance / norm", every)
        at_each[str(layer)] = {"yaxis": y}
    some = [(row, _of_some(row, n_prompts)) for row in run.summary["rows"]]
    few = "".join(f" {row['condition'].capitalize()} at layer {row['layer']}{of}." for row, of in some if of)
    over = f", median over {counted(n_prompts, 'prompt')}" if n_prompts > 1 else ""
    spread_of = "95 % interval over prompts" if n_prompts > 1 else "middle half of the points"
    notes = (
        "contraction, from a cosine that recovers: norms grow with depth, so whatever is added to both streams alike "
        "turns them towards each other without undoing anything."
        if is_cosine
        else "contraction, from a ratio that falls: the norm it is divided by grows with depth. The column nearer "
        "counts points that end nearer in distance as well as in ratio."
    )
    return Plot(
        f"recovery-{name}-{key}",
        f"Recovery  {title}",
        f"Lines over sublayers since the injection, for {kind}: " + "; ".join(words) + ".",
        (
            f"Mean over {counted(int(run.summary['n_points']), 'point')}{over}, from the injection at the chosen layer "
            f"to the last sublayer, in full space; band: {spread_of}. Every layer has a scale of its own. Controls: "
            "the same points where they stay put, and where they take random steps as long as the reference's; random "
            "directions at the same distances, a real state of another sequence, and the same points with attention "
            f"frozen at the reference.{few}",
            "recovery, only as far as the points come back more than points that stay put: the reference travels "
            "towards what lies ahead of it.",
            notes,
        ),
        traces,
        {
            "xaxis": plots.axis("sublayers since the injection", rangemode="tozero"),
            "versions": {at_layer.name: at_each},
        },
        [at_layer],
    )


def _mse(run: RunFiles, key: str, layers: list[int]) -> Plot:
    """The paper's profile over layers of injection, beside points that no layer moves."""
    kind, traces, values = run.summary["kind"], [], []
    rows = {(row["layer"], row["condition"]): row for row in run.summary["rows"]}
    for condition in (kind, STILL, "random writes"):
        of = [rows[layer, condition] for layer in layers]
        y = np.array([_number(row.get("plane_mse")) for row in of])
        ends = np.array([row.get("plane_mse_interval") or [np.nan, np.nan] for row in of], dtype=float).T
        look = look_of(condition)
        colour, dash = look.token, look.dash
        if np.isfinite(ends).any():
            low, high = ends
            traces.append(band(layers, low, high, colour, condition))
            values += [*ends]
        traces.append(line(layers, y, condition, colour, dash=dash, legendgroup=condition, mode="lines+markers"))
        values.append(y)
    ratios = [
        (row["layer"], _number(row.get("mse_ratio")), row.get("mse_ratio_interval"))
        for row in run.summary["beyond_still"]
    ]
    told = ", ".join(
        f"{number(ratio)}{f' [{number(ends[0])}, {number(ends[1])}]' if ends else ''} at layer {layer}"
        for layer, ratio, ends in ratios
        if ratio == ratio
    )
    return Plot(
        f"recovery-mse-{key}",
        "Fig. 4D  Mean squared distance in the plane",
        f"Lines over the layer of injection, for {kind}, points that stay put and points with random steps.",
        (
            "The paper's measure of recovery: squared distance to the reference in the plane, averaged over the "
            f"points, both components and all sublayers after the injection. Over that of points that stay "
            f"put: {told}.",
            "whether the profile over layers is the model's: only where it lies below that of points that do not move.",
            "that the layers in the middle recover best, from a minimum there: the profile of points that do not move "
            "has it too.",
        ),
        traces,
        {
            "xaxis": plots.axis("layer of injection"),
            "yaxis": plots.axis("MSE in the plane", rangemode="tozero"),
        },
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def layer_effects(run: RunFiles, key: str) -> list[Plot]:
    """What leaving layers out, or exchanging neighbours, does to the predictions: KL and perplexity by layer."""
    effects, kind = run.summary["effects"], run.summary["kind"]
    layers = [int(effect["layer"]) for effect in effects]
    what = "left out" if kind == "skip" else "exchanged with the next"
    n = int(run.summary.get("n_drawn") or run.summary["n_prompts"])
    tokens = int(run.summary.get("n_tokens", 0))
    found = []
    for name, title, scale in (("kl", "KL of the next token", 1.0), ("perplexity", "Change of perplexity", 0.01)):
        y = scale * np.array([_number(effect.get(name)) for effect in effects])
        ends = scale * np.array([effect.get(f"{name}_interval") or [np.nan] * 2 for effect in effects], dtype=float).T
        is_kl = name == "kl"
        to_axis = (lambda v: v) if is_kl else np.log1p  # the logarithm of the ratio of perplexities
        text = [
            f"layer {layer}<br>" + (f"{number(v, 4)} nats" if is_kl else f"{100 * v:+,.1f} %")
            for layer, v in zip(layers, y, strict=True)
        ]
        traces = []
        if np.isfinite(ends).any():
            traces.append(band(layers, to_axis(ends[0]), to_axis(ends[1]), "@c1", kind))
        trace = line(layers, to_axis(y), f"layer {what}", "@c1", text=text, legendgroup=kind, mode="lines+markers")
        trace["hovertemplate"] = "%{text}<extra></extra>"
        traces.append(trace)
        every = np.concatenate([y, ends.ravel()])
        yaxis = (
            plots.log_axis("KL, nats", every)
            if is_kl
            else plots.axis("log of the ratio of perplexities, nats per token")
        )
        worst = int(np.nanargmax(y))
        found.append(
            Plot(
                f"effects-{name}-{key}",
                f"Fig. 4D  {title}, by the layer {what}",
                f"A line over the layers {what}; largest at layer {layers[worst]}: {text[worst].split('<br>')[1]}.",
                (
                    f"Each layer of the model {what} in turn, on {counted(n, 'text')} of {counted(tokens, 'token')}; "
                    "band: 95 % interval over texts.",
                    "which layers the predictions hang on, and which can be missed.",
                    "what a layer computes: a layer can matter because later ones expect its writes, as those of "
                    "massive units, and not for what they say.",
                ),
                traces,
                {"xaxis": plots.axis(f"layer {what}"), "yaxis": yaxis},
            )
        )
    return found


def effects_table(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Heads, then a row a layer that was changed."""
    rows = []
    for effect in run.summary["effects"]:
        cells = []
        for name, form in (("kl", "{:.3g}".format), ("perplexity", percent)):
            ends, value = effect.get(f"{name}_interval"), _number(effect.get(name))
            cells.append("–" if value != value else form(value))
            cells.append(f"[{form(ends[0])}, {form(ends[1])}]" if ends else "–")
        rows.append([str(effect["layer"]), *cells])
    return ["layer", "KL, nats", "95 %", "perplexity", "95 %"], rows


def table(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """The closing table: heads, then a row a layer and condition."""
    rows = []
    for row in run.summary["rows"]:
        cells = []
        for name in COLUMNS:
            value = row.get(name)
            text = (
                f"{100 * value:.0f} %"
                if name == "nearer" and value is not None
                else number(value, 4 if name == "plane_mse" else 3)
            )
            interval = row.get(f"{name}_interval")
            if interval and None not in interval:
                ends = [f"{100 * e:.0f}" if name == "nearer" else number(e) for e in interval]
                text += f" [{ends[0]}, {ends[1]}]"
            cells.append(text)
        some = _of_some(row, len(_sample(run)))
        rows.append([f"layer {row['layer']}, {row['condition']}{some}", *cells])
    return ["layer, what was put in", *COLUMNS.values()], rows
