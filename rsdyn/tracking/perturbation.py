"""What a run of perturb.py shows: its curves, points, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.result import STILL, Found
from rsdyn.tracking.keys import depth_slots
from rsdyn.tracking.log import Series, Table

MEASURES = {"relative_curve": "recovery_distance", "cosine_curve": "recovery_cosine"}
ENDS = ("relative_put", "relative", "cosine_put", "cosine", "nearer", "contraction", "kl")
HEADS = ("distance put", "distance at the end", "cosine put", "cosine at the end", "nearer", "contraction", "KL")
NUMBERS = ("nearer", "contraction", "kl")  # of the points; of the controls the table has them
BEYOND = ("nearer", "mse_ratio")  # of what the points do beyond points that stay put


def slots(found: Found, n_layers: int) -> dict[int, str]:
    """The slot of depth of each layer of injection."""
    return depth_slots([*found.sublayers], n_layers)


def curves(found: Found, n_layers: int) -> Series:
    """Distance and cosine to the reference from each injection on: of the points, and of points that stay put."""
    out: Series = {measure: {} for measure in MEASURES.values()}
    for layer, slot in slots(found, n_layers).items():
        for condition in (found.kind, STILL):
            if (layer, condition) not in found.values:
                continue
            at = slot.removeprefix("depth_").replace(".", "")  # W&B takes a dot in the name of a curve for a path
            name = f"{at}_{condition.replace(' ', '_')}"
            before: list[float | None] = [None] * found.sublayers[layer]
            for key, measure in MEASURES.items():
                over = found.measured(layer, condition, key)
                parts: dict[str, Tensor] = {name: over.value}
                if condition == found.kind and over.low.isfinite().any():
                    parts |= {f"{name}_low": over.low, f"{name}_high": over.high}
                for part, curve in parts.items():
                    known = [float(v) if v.isfinite() else None for v in curve.to(torch.float64)]
                    out[measure][part] = [*before, *known]
    return out


def summary_numbers(found: Found, n_layers: int) -> dict[str, Any]:
    """``{slot of depth: {kind: {number: value}}}`` of the points, for ``recovery/<slot>/<kind>/<number>``."""
    kept = {(row.layer, row.condition): row for row in found.rows}
    return {
        slot: {found.kind: {name: value for name in NUMBERS if (value := kept[layer, found.kind][name]) == value}}
        for layer, slot in slots(found, n_layers).items()
    }


def beyond_still_numbers(found: Found, n_layers: int) -> dict[str, Any]:
    """``{slot of depth: {number: value}}`` of what points do beyond points that stay put, with the interval's ends."""
    at = slots(found, n_layers)
    out: dict[str, Any] = {}
    for beyond in found.beyond_still:
        values: dict[str, float] = {}
        for name in BEYOND:
            parts = zip(("", "_low", "_high"), map(float, getattr(beyond, name)), strict=True)
            values |= {f"{name}{suffix}": value for suffix, value in parts if value == value}
        if values:
            out[at[beyond.layer]] = values
    return out


def effects_table(found: LayerEffects) -> Table:
    """One row per layer that was left out, or exchanged with the next."""
    columns = ["layer", "KL, nats", "low", "high", "perplexity, %", "low %", "high %"]
    rows = [[e.layer, *map(float, e.kl), *map(float, e.perplexity)] for e in found.effects]
    return Table(columns, rows)


def effects_numbers(found: LayerEffects) -> dict[str, Any]:
    """What tells models apart: the plain perplexity, the most and the least missed layer, and the median KL."""
    effects = sorted(found.effects, key=lambda e: float(e.kl.value))
    ends = {
        name: {"layer": e.layer, "kl": float(e.kl.value), "perplexity_percent": float(e.perplexity.value)}
        for name, e in (("most", effects[-1]), ("least", effects[0]))
    }
    return {
        "perplexity": float(found.perplexity.value),
        "median_kl": float(effects[len(effects) // 2].kl.value),
        **ends,
    }


def points_table(found: Found) -> Table:
    """One row per point: where it was put and where it ended; coordinates are those of the first prompt's points.

    ``nearer`` is 1 where it ends nearer in distance and in ratio; ``contraction`` the larger slope of their logarithms
    a sublayer. Rows come point by point, so that a table cut at its end keeps every layer and control.
    """
    rows = []
    for order, ((layer, condition), ends) in enumerate(found.ends.items()):
        for at, prompt in enumerate(found.prompts[layer, condition]):
            latents = found.of_points[layer, condition]["latents"] if prompt == 0 else None
            for i in range(len(ends["relative"][at])):
                put = [None, None] if latents is None else [*latents[i, 0, :2].tolist(), None][:2]
                values = [float(ends[name][at][i]) for name in ENDS]
                rows.append((prompt, i, order, [layer, condition, prompt, i, *put, *values]))
    rows.sort(key=lambda row: row[:3])
    columns = ["layer", "control", "prompt", "point", "coordinate 1", "coordinate 2", *HEADS]
    return Table(columns, [row[-1] for row in rows])
