"""Trajectories in a plane: the mean over sequences coloured by depth, and single sequences under the pointer."""

from __future__ import annotations

from typing import Any

import numpy as np

from rsdyn.report import plots
from rsdyn.report.plots import packed

MOST_PATHS = 80  # single sequences: more are a grey mass, and heavy


def trajectories(
    mean: np.ndarray, samples: np.ndarray, sites: int | None, *, names: list[str] | None = None, form: str = ".3g"
) -> tuple[list[dict[str, Any]], int]:
    """Traces of the mean path ``(S, 2+)`` and of some of the ``samples`` ``(N, S, 2+)``, and how many of those.

    The sequences are one trace with gaps; the page draws the one under the pointer again, in colour.
    """
    n_sublayers = len(mean)
    kept = np.arange(len(samples))
    if len(kept) > MOST_PATHS:
        kept = np.linspace(0, len(samples) - 1, MOST_PATHS).round().astype(int)
    gap = np.full((len(kept), 1, 2), np.nan)
    flat = np.concatenate([samples[kept][..., :2].astype(float), gap], axis=1).reshape(-1, 2)
    where = [*plots.sublayer_names(n_sublayers, sites), ""]
    called = names or [f"sequence {i}" for i in range(len(samples))]
    each = {
        "type": "scatter",
        "mode": "lines",
        "x": packed(flat[:, 0]),
        "y": packed(flat[:, 1]),
        "line": {"color": "@muted/45", "width": 0.8},
        "name": "sequences",
        "customdata": [i for i in range(len(kept)) for _ in where],
        "hovertemplate": "%{text}<extra></extra>",
        "text": [f"{called[i]}, {place}" for i in kept for place in where],
        "paths": len(where),  # for the page: how many points make a path, the gap included
    }
    depth = np.arange(n_sublayers) / (sites or 1)
    look = {
        "color": packed(depth),
        "colorscale": "Viridis",
        "cmin": 0,
        "cmax": float(max(depth[-1], 1e-9)),
        "size": 7,
        "symbol": ["square" if sites == 2 and s % 2 else "circle" for s in range(n_sublayers)],
        "line": {"width": 0},
        "colorbar": {"title": {"text": "layer" if sites else "sublayer", "side": "right"}, "thickness": 10,
                     "outlinewidth": 0, "len": 0.9},
    }  # fmt: skip
    path = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": packed(mean[:, 0]),
        "y": packed(mean[:, 1]),
        "line": {"color": "@ink", "width": 1},
        "marker": look,
        "name": "mean",
        "text": [f"mean, {place}" for place in where[:-1]],
        "hovertemplate": f"%{{text}}<br>%{{x:{form}}}, %{{y:{form}}}<extra></extra>",
    }
    ends = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": packed(mean[[s], 0]),
            "y": packed(mean[[s], 1]),
            "name": name,
            "marker": {"size": 13, "symbol": "circle-open", "color": "@ink", "line": {"width": 2 if s else 1}},
            "hoverinfo": "skip",
        }
        for s, name in ((0, "start"), (-1, "end (bold)"))
    ]
    return [each, path, *ends], len(kept)
