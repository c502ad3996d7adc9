"""What a run of perturb.py shows: its curves, points, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsdyn.labels import COLUMNS
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.result import Found
from rsdyn.tracking.log import Curves, Table

MEASURES = {"relative_curve": "recovery_distance", "cosine_curve": "recovery_cosine"}
ENDS = ("relative_put", "relative", "cosine_put", "cosine", "nearer", "contraction", "kl")
HEADS = ("distance put", "distance at the end", "cosine put", "cosine at the end", "nearer", "contraction", "KL")


def series_name(found: Found, layer: int, condition: str) -> str:
    """``layer08_attention_frozen``: as many digits as the deepest layer needs, at least two, so that they sort."""
    digits = max(2, len(str(max(found.sublayers))))
    return f"layer{layer:0{digits}d}_{condition.replace(' ', '_').replace('-', '_')}"


def curves(found: Found) -> Curves:
    """Distance and cosine to the reference from each injection on, of points and controls, with intervals."""
    out: Curves = {measure: {} for measure in MEASURES.values()}
    for (layer, condition), values in found.values.items():
        name, before = series_name(found, layer, condition), found.sublayers[layer]
        for key, measure in MEASURES.items():
            if key not in values:
                continue
            over = found.measured(layer, condition, key)
            parts: dict[str, Tensor] = {name: over.value}
            if over.low.isfinite().any():
                parts |= {f"{name}_low": over.low, f"{name}_high": over.high}
            for part, curve in parts.items():
                known = [float(v) if v.isfinite() else None for v in curve.to(torch.float64)]
                out[measure][part] = [*(None for _ in range(before)), *known]
    return out


def summary_numbers(found: Found) -> dict[str, Any]:
    """``{layer and condition: {column: value}}`` of the closing table."""
    rows = {
        series_name(found, row.layer, row.condition): {k: row[k] for k in COLUMNS if row[k] == row[k]}
        for row in found.rows
    }
    return {name: values for name, values in rows.items() if values}


def beyond_still_numbers(found: Found) -> dict[str, Any]:
    """``{layer: {name: value}}`` of what the points do beyond points that stay put, with the ends of its interval."""
    digits = max(2, len(str(max(found.sublayers))))
    out: dict[str, Any] = {}
    for beyond in found.beyond_still:
        values: dict[str, float] = {}
        for name in ("nearer", "contraction", "mse_ratio"):
            interval = getattr(beyond, name)
            parts = zip(("", "_low", "_high"), map(float, interval), strict=True)
            values |= {f"{name}{suffix}": value for suffix, value in parts if value == value}
        if values:
            out[f"layer{beyond.layer:0{digits}d}"] = values
    return out


def effects_table(found: LayerEffects) -> Table:
    """A row a layer that was left out, or exchanged with the next."""
    columns = ["layer", "KL, nats", "low", "high", "perplexity, %", "low %", "high %"]
    rows = [[e.layer, *map(float, e.kl), *map(float, e.perplexity)] for e in found.effects]
    return Table(columns, rows)


def effects_numbers(found: LayerEffects) -> dict[str, Any]:
    """What tells models apart: the plain perplexity, the most and the least missed layer, and the median KL."""
    effects = sorted(found.effects, key=lambda e: float(e.kl.value))
    most, least = effects[-1], effects[0]
    return {
        "perplexity": float(found.perplexity.value),
        "median_kl": float(effects[len(effects) // 2].kl.value),
        "most": {"layer": most.layer, "kl": float(most.kl.value), "perplexity_percent": float(most.perplexity.value)},
        "least": {
            "layer": least.layer,
            "kl": float(least.kl.value),
            "perplexity_percent": float(least.perplexity.value),
        },
    }


def points_table(found: Found) -> Table:
    """A row a point: where it was put and where it ended; coordinates are those of the first prompt's points.

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
