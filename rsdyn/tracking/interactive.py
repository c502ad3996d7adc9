"""The interactive figures of each script for W&B, beside its curves: those of the report page, and menus of ours.

They are read from the run folder, which is complete by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsdyn.analysis.settings import NULLS
from rsdyn.labels import NAMES
from rsdyn.report import plots
from rsdyn.report.figure1 import figure1
from rsdyn.report.figure2 import chosen_units, distribution
from rsdyn.report.figure3 import figure3
from rsdyn.report.figure4 import figure4
from rsdyn.report.figure4d import layer_effects
from rsdyn.report.plots import Control, Plot, packed
from rsdyn.report.reading import read_run
from rsdyn.report.streams import streams_of
from rsdyn.tracking.charts import COLOURS, figure_of
from rsdyn.tracking.keys import CHARTS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# plots of the page -> charts; the page's names end with the number of the run
OF_THE_PAGE = {
    "fig1b-mean": "mean_activations", "fig1d": "correlation_density", "fig2b": "rotations", "fig3b-0": "latents",
    "loss-0": "loss", "effects-kl-0": "layer_kl", "effects-perplexity-0": "layer_perplexity",
    "fig4a": "trajectory", "fig4b": "cumulative_variance",
}  # fmt: skip
NO_CAPTION = ("", "", "")


def analysis_charts(folder: Path, units: Sequence[int]) -> dict[str, Figure]:
    """The charts of a finished run of analyze.py; ``units`` are those whose portraits are drawn."""
    streams = streams_of([read_run(folder)])
    turned = [s for s in streams if s.measured("rotation")]
    found = [*figure1(streams), *figure4(streams)]
    if turned:
        found += [distribution(turned), _portraits(turned[0].arrays, units), _by_unit(turned[0].arrays)]
    return _chosen(found)


def training_charts(folder: Path) -> dict[str, Figure]:
    """The charts of a finished run of train.py."""
    run = read_run(folder)
    return _chosen(figure3(run, [], run.sites_per_layer, "0"))


def perturbation_charts(folder: Path) -> dict[str, Figure]:
    """The charts of a finished run of perturb.py."""
    run = read_run(folder)
    return _chosen([_plane(run.arrays, run.summary, run.config)]) if run.arrays["reference"].shape[1] >= 2 else {}


def effects_charts(folder: Path) -> dict[str, Figure]:
    """The charts of a finished run of perturb.py that changed layers of the model."""
    return _chosen(layer_effects(read_run(folder), "0"))


def _chosen(found: Sequence[Plot]) -> dict[str, Figure]:
    named = {OF_THE_PAGE.get(plot.name, plot.name): plot for plot in found}
    return {name: figure_of(named[name]) for name in CHARTS if name in named}


def _portraits(arrays: Mapping[str, np.ndarray], units: Sequence[int]) -> Plot:
    """Fig. 2A: the path of a unit in the plane of its activation and that one's gradient, by a menu of units."""
    import torch

    from rsdyn.dynamics.rotation import portrait

    path = portrait(torch.from_numpy(arrays["rotation_mean_trajectory"][:, list(units)]))
    turns = arrays["rotation"]
    traces = []
    for i, u in enumerate(units):
        x, y = path.x[:, i].numpy(), path.y[:, i].numpy()
        at = list(range(len(x)))
        look = {"color": at, "colorscale": "Viridis", "size": 7, "colorbar": {"title": {"text": "sublayer"}}}
        traces.append({
            "type": "scatter", "mode": "lines+markers", "x": packed(x), "y": packed(y), "name": f"unit {u}",
            "line": {"color": "@muted", "width": 1}, "marker": look, "text": [f"sublayer {s}" for s in at],
            "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra>%{fullData.name}</extra>", "showlegend": False,
            "when": {"unit": str(u)},
        })  # fmt: skip
    options = [(str(u), f"{u}, {-turns[u]:.2f} clockwise turns") for u in units]
    layout = {"xaxis": plots.axis("activation, from its start"), "yaxis": plots.axis("gradient, from its start")}
    return Plot("portraits", _title("portraits"), "", NO_CAPTION, traces, layout,
                [Control("unit", "unit", options, options[0][0])])  # fmt: skip


def _by_unit(arrays: Mapping[str, np.ndarray]) -> Plot:
    """Fig. 2C: turns of the units, sorted, beside each one's null, by a menu of null models."""
    turns = -arrays["rotation"]
    kept = chosen_units(-turns)
    kept = kept[np.argsort(turns[kept], kind="stable")]
    nulls = [null for null in NULLS if f"null_{null}_std" in arrays]  # those first that keep most
    x = list(range(len(kept)))
    text = [f"unit {u}" for u in kept]
    traces: list[dict[str, Any]] = []
    for null in nulls:
        mean, std = -arrays[f"null_{null}_mean"][kept], arrays[f"null_{null}_std"][kept]
        p, q = arrays[f"null_{null}_p"][kept], arrays[f"null_{null}_q_normal"][kept]
        traces.append({
            "type": "scatter", "mode": "markers", "x": x, "y": packed(mean), "name": f"{NAMES.get(null, null)}, 95 %",
            "marker": {"color": "@muted", "size": 3}, "when": {"null": null}, "hoverinfo": "skip",
            "error_y": {"type": "data", "array": packed(1.96 * std), "color": "@muted", "thickness": 1, "width": 0},
        })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "markers", "x": x, "y": packed(turns[kept]), "name": "units",
            "marker": {"color": "@c1", "size": 5}, "when": {"null": null},
            "text": [f"{t}<br>p {a:.3g}, q {b:.3g}" for t, a, b in zip(text, p, q, strict=True)],
            "hovertemplate": "%{text}<br>%{y:.3f} clockwise turns<extra></extra>",
        })  # fmt: skip
    thinned = "" if len(kept) == len(turns) else f" ({len(kept):,} of {len(turns):,} units)"
    layout = {"xaxis": plots.axis(f"units, sorted{thinned}"), "yaxis": plots.axis("clockwise turns")}
    options = [(null, NAMES.get(null, null)) for null in nulls]
    return Plot("rotations_by_unit", _title("rotations_by_unit"), "", NO_CAPTION, traces, layout,
                [Control("null", "null model", options, options[0][0])] if options else [])  # fmt: skip


def _plane(arrays: Mapping[str, np.ndarray], summary: Mapping[str, Any], config: Mapping[str, Any]) -> Plot:
    """Fig. 4D: from where each point of the first prompt was put to where it is some sublayers later."""
    kind, steps = summary["kind"], int(config["perturb"]["steps"])
    reference = arrays["reference"]
    traces: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines+markers", "x": packed(reference[:, 0]), "y": packed(reference[:, 1]),
        "name": "reference", "line": {"color": "@muted", "width": 1}, "marker": {"size": 4},
        "text": [f"sublayer {s}" for s in range(len(reference))], "hovertemplate": "%{text}<extra>reference</extra>",
    }]  # fmt: skip
    for layer in summary["layers"]:
        latents = arrays[f"layer{layer}/{kind}/points_latents"][..., :2].astype(float)
        later = latents[:, min(steps, latents.shape[1] - 1)]
        gap = np.full_like(later, np.nan)
        way = np.stack([latents[:, 0], later, gap], axis=1).reshape(-1, 2)
        when = {"layer": str(layer)}
        traces.append({
            "type": "scatter", "mode": "lines", "x": packed(way[:, 0]), "y": packed(way[:, 1]), "name": "way",
            "line": {"color": COLOURS["@c1"], "width": 1}, "hoverinfo": "skip", "when": when,
        })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "markers", "x": packed(later[:, 0]), "y": packed(later[:, 1]),
            "name": f"{steps} sublayers later, or at the end", "marker": {"color": COLOURS["@c1"], "size": 5},
            "text": [f"point {i}" for i in range(len(later))], "hovertemplate": "%{text}<extra></extra>", "when": when,
        })  # fmt: skip
    name = "latent" if summary.get("space") == "cae" else "component"
    options = [(str(n), str(n)) for n in summary["layers"]]
    layout = {"xaxis": plots.axis(f"{name} 1"), "yaxis": plots.axis(f"{name} 2")}
    return Plot("plane", _title("plane"), "", NO_CAPTION, traces, layout,
                [Control("layer", "layer of injection", options, options[len(options) // 2][0])])  # fmt: skip


def _title(name: str) -> str:
    figure, title, _ = CHARTS[name]
    return f"Fig. {figure}  {title}"
