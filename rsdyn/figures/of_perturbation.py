"""Which figures a perturbation makes."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rsdyn import figures
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.plane import Plane
from rsdyn.perturbation.result import STILL, WRITES, Found
from rsdyn.perturbation.settings import PerturbConfig


def panels(found: Found, plane: Plane, settings: PerturbConfig) -> dict[str, Figure]:
    """Fig. 4D; recovery curves beside the controls; the paper's MSE by layer beside points that no layer moves."""
    drawn = {}
    assert found.reference is not None
    if found.reference.shape[-1] >= 2:
        points = {layer: found.of_points[layer, found.kind]["latents"] for layer in found.sublayers}
        drawn[f"fig4d_{found.kind}"] = figures.teleports(
            found.reference, points, n_steps=settings.steps, ratio=plane.ratio, name=plane.name
        )
    axes: list[tuple[str, str, Any]] = [
        ("relative", "distance to the reference / its norm", {"log": True}),
        ("cosine", "cosine to the reference", {"fisher": True}),
    ]
    for name, ylabel, looks in axes:
        curves: dict[int, dict[str, Tensor]] = {}
        intervals: dict[int, dict[str, Any]] = {}
        for layer in found.sublayers:
            for condition in found.conditions(layer):
                curves.setdefault(layer, {})[condition] = found.measured(layer, condition, f"{name}_curve").value
            intervals[layer] = {found.kind: _band(found, layer, found.kind, name)}
        several = len(found.by_prompt(*next(iter(found.values)), "kl")) > 1
        label = "95 % interval over prompts" if several else "middle half of the points"
        drawn[f"recovery_{name}"] = figures.recovery_curves(
            curves, intervals, ylabel=ylabel, interval_label=label, **looks
        )
    if any(row["plane_mse"] == row["plane_mse"] for row in found.rows):
        drawn["recovery_mse"] = _mse(found)
    return drawn


def _band(found: Found, layer: int, condition: str, name: str) -> Tensor:
    ends = found.measured(layer, condition, f"{name}_curve")
    if len(found.by_prompt(layer, condition, "kl")) > 1:
        return torch.stack([ends.low, ends.high])  # NaN, and not drawn, with too few
    points = found.of_points[layer, condition][name].to(torch.float64)
    return torch.nanquantile(points, torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)


def _mse(found: Found) -> Figure:
    """The paper's profile: the MSE in the plane by layer of injection, beside points that no layer moves."""
    kept = {(row.layer, row.condition): row.values["plane_mse"] for row in found.rows}
    curves, intervals = {}, {}
    for condition in (found.kind, STILL, WRITES):
        of = [kept[layer, condition] for layer in found.sublayers]
        curves[condition] = [float(one.value) for one in of]
        intervals[condition] = [[float(one.low) for one in of], [float(one.high) for one in of]]
    return figures.by_layer(
        [*found.sublayers],
        curves,
        intervals,
        xlabel="layer of injection",
        ylabel="MSE in the plane",
        interval_label="95 % interval over prompts",
    )


def effect_panels(found: LayerEffects) -> dict[str, Figure]:
    """KL and perplexity by the layer that was left out, or exchanged with the next."""
    effects = found.effects
    what = "layer left out" if found.kind == "skip" else "layer exchanged with the next"
    name = "texts" if len(found.sample) > 1 else "the prompt"
    own = found.of_text(0) if found.drawn and 0 not in found.drawn else None
    drawn = {}
    measures: list[tuple[str, str, Any]] = [
        ("kl", "KL of the next token (nats)", {"log": True}),
        ("perplexity", "change of perplexity (%)", {"symlog": 10.0}),
    ]
    for i, (key, ylabel, looks) in enumerate(measures):
        of = [getattr(effect, key) for effect in effects]
        curves: dict[str, Any] = {name: [float(one.value) for one in of]}
        if own is not None:
            curves["the prompt"] = own[i].tolist()
        intervals = {name: [[float(one.low) for one in of], [float(one.high) for one in of]]}
        drawn[f"{found.kind}_{key}"] = figures.by_layer(
            found.layers,
            curves,
            intervals,
            xlabel=what,
            ylabel=ylabel,
            interval_label=f"95 % interval over {len(found.sample)} texts",
            **looks,
        )
    return drawn
