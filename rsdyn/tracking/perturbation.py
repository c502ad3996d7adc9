"""What a run of perturb.py shows: its curves, points, and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsdyn.labels import COLUMNS
from rsdyn.perturbation.measure import Found
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
            parts: dict[str, Tensor] = {name: found.mean(layer, condition, key)}
            if (ends := found.interval(layer, condition, key)) is not None:
                parts |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
            for part, curve in parts.items():
                known = [float(v) if v.isfinite() else None for v in curve.to(torch.float64)]
                out[measure][part] = [*(None for _ in range(before)), *known]
    return out


def summary_numbers(found: Found) -> dict[str, Any]:
    """``{layer and condition: {column: value}}`` of the closing table."""
    rows = {
        series_name(found, row["layer"], row["condition"]): {k: row[k] for k in COLUMNS if row[k] == row[k]}
        for row in found.rows()
    }
    return {name: values for name, values in rows.items() if values}


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
