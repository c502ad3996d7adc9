"""Which figures a perturbation makes."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rsdyn import figures
from rsdyn.perturbation.measure import Found, Plane


def panels(found: Found, plane: Plane, settings: Any) -> dict[str, Figure]:
    """Fig. 4D, and recovery curves beside the controls."""
    drawn = {}
    assert found.reference is not None
    if found.reference.shape[-1] >= 2:
        points = {layer: found.of_points[layer, settings.kind]["latents"] for layer in found.sublayers}
        drawn[f"fig4d_{settings.kind}"] = figures.teleports(
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
                curves.setdefault(layer, {})[condition] = found.mean(layer, condition, f"{name}_curve")
            intervals[layer] = {settings.kind: _band(found, layer, settings.kind, name)}
        label = "95 % interval over prompts" if found.n_prompts > 1 else "middle half of the points"
        drawn[f"recovery_{name}"] = figures.recovery_curves(
            curves, intervals, ylabel=ylabel, interval_label=label, **looks
        )
    return drawn


def _band(found: Found, layer: int, condition: str, name: str) -> Tensor:
    ends = found.interval(layer, condition, f"{name}_curve")
    if ends is not None:
        return torch.stack(ends)
    points = found.of_points[layer, condition][name].to(torch.float64)
    return torch.nanquantile(points, torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
