"""The measure ``phases``: whether the curves of a stream change together at some depths, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsdyn.analysis.results import ConditionResults, Measured, PhaseResults, curves
from rsdyn.analysis.statistics import per_layer
from rsdyn.dynamics.phases import LEAST_PLACES, best_change_points, phases
from rsdyn.dynamics.resampling import simulate
from rsdyn.errors import UserError

CURVES = {
    "correlation/mean": 1,
    "cosine/mean": 1,
    "velocity/relative": 1,
    "curvature/angle": 2,
    "dimension/participation": 0,
    "similarity/adjacent": 1,
    "readout/kl": 0,
}
"""The curves that are looked at together, and how many values fewer than sublayers each has."""
N_DRAWN = 200  # simulated data, for the intervals of the places


def n_places(curve: str, n_sublayers: int, sites_per_layer: int) -> int:
    """At how many layers a curve of :data:`CURVES` has a value."""
    return (n_sublayers - CURVES[curve]) // sites_per_layer


def phases_of(found: ConditionResults, *, sites_per_layer: int, seed: int, n: int = 399) -> PhaseResults | None:
    """Change points over layers of what was measured of a stream; None with too few layers.

    A curve that is undefined somewhere, as one of correlations at a constant sublayer, is left out.

    Raises ``UserError`` where none of the curves was measured.
    """
    known = {name: measured for name, measured in curves(found) if name in CURVES}
    if not known:
        raise UserError(
            "measures: phases look at the curves of other measures, and none of those was asked for. Add one "
            f"of {', '.join(dict.fromkeys(name.split('/')[0] for name in CURVES))}."
        )
    by_layer = {name: per_layer(measured.value, sites_per_layer) for name, measured in known.items()}
    n_layers = min(len(curve) for curve in by_layer.values())
    used = [name for name in CURVES if name in by_layer and by_layer[name][:n_layers].isfinite().all()]
    used = [name for name in used if by_layer[name][:n_layers].std() > 0]
    if n_layers < LEAST_PLACES or not used:
        return None
    together = torch.stack([by_layer[name][:n_layers].to(torch.float64).cpu() for name in used], dim=1)
    result = phases(together, n=n, seed=seed)
    most = len(result.places)
    low, high = _intervals([known[name] for name in used], n_layers, sites_per_layer, most, seed)
    return PhaseResults(
        curves=tuple(used),
        n=result.n,
        places=_padded(result.places, most),
        low=low,
        high=high,
        gain=result.gain,
        p=result.p,
        null_gain=result.null_gain,
    )


def _intervals(known: Sequence[Measured], n_layers: int, sites: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ends of the middle 95 % of the places over data that scatter as the jackknife says; -1 without groups."""
    none = torch.full((most, most), -1, dtype=torch.int64)
    if any(m.groups is None for m in known) or len({len(m.groups) for m in known if m.groups is not None}) != 1:
        return none, none
    value = torch.cat([per_layer(m.value, sites)[:n_layers].cpu() for m in known])
    without = torch.cat([per_layer(m.groups, sites)[:, :n_layers].cpu() for m in known if m.groups is not None], dim=1)

    def places(draws: Tensor) -> Tensor:
        found = []
        for draw in draws:
            curve = draw.view(len(known), n_layers).T
            spread = curve.std(0)
            curve = (curve - curve.mean(0)) / torch.where(spread > 0, spread, 1.0)
            found.append(_padded(best_change_points(curve, most)[0], most))
        return torch.stack(found).to(torch.float64)

    drawn = simulate(places, value.to(torch.float64), without.to(torch.float64), n=N_DRAWN, seed=seed)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0, interpolation="nearest")
    return ends[0].to(torch.int64), ends[1].to(torch.int64)


def _padded(places: Sequence[Sequence[int]], most: int) -> Tensor:
    return torch.tensor([[*row, *[-1] * (most - len(row))] for row in places], dtype=torch.int64)
