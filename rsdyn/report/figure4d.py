"""Figure 4D of the page: where perturbed streams go, and whether they come back, beside the controls."""

from __future__ import annotations

from typing import Any

import numpy as np

from rsdyn.labels import COLUMNS
from rsdyn.report import plots
from rsdyn.report.plots import Control, Plot, band, counted, fisher, fisher_axis, line, number, packed
from rsdyn.report.reading import RunFiles

COLOURS = {
    "attention frozen": ("@c2", "dash"),
    "random directions": ("@c3", "dot"),
    "swapped-in state": ("@c4", "dashdot"),
}
KINDS = {"teleport": "teleported", "noise": "noised", "swap": "swapped"}


def conditions_at(run: RunFiles, layer: int) -> list[str]:
    """What was done at a layer, the points themselves first."""
    return [row["condition"] for row in run.summary["rows"] if row["layer"] == layer]


def _folder(layer: int, condition: str) -> str:
    return f"layer{layer}/{condition.replace(' ', '_')}/"


def _shown(run: RunFiles, layer: int) -> list[str]:
    """What was done to the first prompt at a layer; another prompt may have a state to swap in where it has none."""
    n = int(run.summary["n_prompts"])
    return [
        row["condition"]
        for row in run.summary["rows"]
        if row["layer"] == layer
        and (row.get("n_prompts", n) == n or "points_latents" in run.arrays.under(_folder(layer, row["condition"])))
    ]


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
        Control(f"steps-{key}", "sublayers later", [(str(k), str(k)) for k in range(1, longest + 1)],
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
    n_prompts = int(run.summary["n_prompts"])
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
            mean = curves[has].mean(0) if has.any() else curves[0]
            colour, dash = COLOURS.get(condition, ("@c1", "solid"))
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
                elif n_prompts > 1:
                    low, high = _bootstrap(curves)
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
    spread_of = "95 % interval over prompts (bootstrap)" if n_prompts > 1 else "middle half of the points"
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
            f"Mean over {counted(int(run.summary['n_points']), 'point')} and {counted(n_prompts, 'prompt')}, from the "
            f"injection at the chosen layer to the last sublayer, in full space; band: {spread_of}. Every layer has a "
            "scale of its own. Controls: random directions at the same distances, a real state of another sequence, "
            f"and the same points with attention frozen at the reference.{few}",
            "recovery, only as far as the points come back more than random directions do.",
            notes,
        ),
        traces,
        {
            "xaxis": plots.axis("sublayers since the injection", rangemode="tozero"),
            "versions": {at_layer.name: at_each},
        },
        [at_layer],
    )


def _bootstrap(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of the mean over prompts, as the run's own figures have it."""
    import torch

    from rsdyn.dynamics.recovery import bootstrap

    found = bootstrap(torch.from_numpy(curves))
    return found.low.numpy(), found.high.numpy()


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
        some = _of_some(row, int(run.summary["n_prompts"]))
        rows.append([f"layer {row['layer']}, {row['condition']}{some}", *cells])
    return ["layer, what was put in", *COLUMNS.values()], rows
