"""Which figures the Jacobians of an analysis make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsdyn import figures
from rsdyn.analysis.jacobians import DIRECTIONS, SERIES, SIZES, JacobianResult, depths_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name of the curve -> its axis
DEPTH = {
    "antisymmetric": "antisymmetric share of G",
    "henrici": "Henrici's departure of J",
    "henrici_update": "Henrici's departure of G",
    "gain": "largest singular value of J",
    "expanding": "share of singular values above 1",
    "complex_share": "share of complex eigenvalues",
}


def panels(result: JacobianResult, sublayers: Sequence[int] | None = None) -> dict[str, Figure]:
    """The figures by file name; eigenvalues of ``sublayers``, by default of the first, the middle and the last one."""
    labels = {s: SERIES[s].label for s in result.series}
    n = result.n_layers * result.sites
    chosen = [0, n // 2, n - 1] if sublayers is None else list(sublayers)

    def named(of: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        return {label: of(s) for s, label in labels.items()}

    drawn = {
        "jacobian_eigenvalues": figures.eigenvalue_planes(
            {label: result.eigenvalues[s] for s, label in labels.items()}, chosen
        )
    }
    for name, ylabel in DEPTH.items():
        others = {label: result.mean(s, name) for s, label in labels.items() if s != "full"}
        drawn[f"jacobian_{name}"] = figures.transition_curve(
            result.mean("full", name),
            result.interval("full", name),
            others=others,
            ylabel=ylabel,
            interval_label="95 % interval over texts",
            log=name == "gain",
            sites_per_layer=result.sites,
        )
    drawn["jacobian_exponents"] = figures.lyapunov_exponents(named(lambda s: result.mean(s, "exponents")))
    drawn["jacobian_exponents_relative"] = figures.lyapunov_exponents(
        named(lambda s: result.mean(s, "exponents") - result.mean(s, "growth")), relative=True
    )
    drawn["jacobian_participation"] = figures.product_participation(
        named(lambda s: result.mean(s, "product_participation"))
    )
    if "linear" in result.curves["full"]:
        ratios = np.exp(np.median(np.log(result.curves["full"]["linear"]), 0))  # (depths, directions, sizes)
        by_direction = {d: ratios[:, i] for i, d in enumerate(DIRECTIONS)}
        drawn["jacobian_linear_range"] = figures.linear_range(by_direction, SIZES, depths_of(n))
    return drawn
