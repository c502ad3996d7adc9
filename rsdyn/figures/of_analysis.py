"""Which figures and curves the results of an analysis make (paper Figs. 1B-H, 2A-C, 4A-C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsdyn import figures
from rsdyn.analysis.left_out import LargestUnits, without_largest
from rsdyn.dynamics.massive import range_names
from rsdyn.dynamics.rotation import portrait
from rsdyn.labels import NAMES
from rsdyn.metrics.running import TOKEN_CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
LEADING_NULLS = ("innovation_shuffle", "layer_shuffle")  # the one for claims, and the paper's
N_DRAWN = 1000  # trajectories behind the mean
LITERAL = "sum of p log p / (p p), as printed\n(not an information)"


def panels(
    results: Mapping[str, Results],
    measures: Sequence[str],
    *,
    sites_per_layer: int,
    units: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Figure]:
    """The figures by file name; ``results`` maps a condition to its results, the first one being the main one."""
    main = next(iter(results.values()))
    sites: Any = {"sites_per_layer": sites_per_layer}
    others = {NAMES[c]: r for c, r in list(results.items())[1:]}
    makers: dict[str, Callable[[], dict[str, Figure]]] = {
        "activations": lambda: _activations(main, sites),
        "correlation": lambda: _correlation(main, others, sites),
        "cosine": lambda: {
            "fig1e_cosine": _curve(main, others, "cosine", "cosine of successive states", sites, fisher=True)
        },
        "velocity": lambda: {
            "fig1f_speed": _curve(main, others, "speed", "speed (activation units)", sites),
            "fig1f_relative_speed": _relative_speed(main, others, sites),
        },
        "mutual_information": lambda: _information(main, others, sites),
        "rotation": lambda: _rotation(main, results, sites, units, seed),
        "pca": lambda: _components(main, results, sites),
        "massive": lambda: {"massive_activations": _massive(main, sites)},
    }
    drawn: dict[str, Figure] = {}
    for measure in measures:
        drawn |= makers[measure]() if measure in makers else {}
    return drawn | _left_out(without_largest(results, measures, sites_per_layer))


def _left_out(found: LargestUnits | None) -> dict[str, Figure]:
    """The findings that have a row of their own, against how many of the largest units are left out."""
    if found is None or len(found.counts) < 2:
        return {}
    values = {
        row.statistic: {NAMES[c]: values for c, values in row.values.items()} for row in found.rows if not row.under
    }
    return {"findings_without_largest": figures.findings_left_out(found.counts, values)} if values else {}


def _massive(main: Results, sites: Any) -> Figure:
    found = {name: k for k, name in enumerate(TOKEN_CLASSES) if main["massive_counts"][k]}
    norms = main.get("norm_by_position")
    ranges = {} if norms is None else {name: norms[k] for k, name in enumerate(range_names())}
    return figures.massive_activations(
        {name: main["massive_largest"][k] for name, k in found.items()},
        {name: main["massive_typical"][k] for name, k in found.items()},
        {name: norm for name, norm in ranges.items() if not norm.isnan().any()},
        **sites,
    )


def _curve(main: Results, others: Mapping[str, Results], name: str, ylabel: str, sites: Any, **looks: Any) -> Figure:
    """One curve over depth with its interval; beside it the other conditions, and itself without massive units."""
    beside: dict[str, Tensor] = {}
    if f"{name}_without_massive" in main:
        beside["without massive units"] = main[f"{name}_without_massive"]
    beside |= {label: r[name] for label, r in others.items()}
    return figures.transition_curve(
        main[name],
        main.get(f"{name}_interval"),
        others=beside,
        ylabel=ylabel,
        interval_label="95 % interval",
        **looks,
        **sites,
    )


def _relative_speed(main: Results, others: Mapping[str, Results], sites: Any) -> Figure:
    """Speed over the norm: the first steps may be tens of times the state they start from, the last hundredths."""
    every = torch.cat([r["relative_speed"] for r in (main, *others.values())])
    every = every[every.isfinite() & (every > 0)]
    wide = len(every) > 0 and bool(every.max() > 50 * every.min())
    return _curve(main, others, "relative_speed", "step / norm of the state", sites, log=wide)


def _activations(main: Results, sites: Any) -> dict[str, Figure]:
    n_units = main["mean"].shape[1]
    n_usable = n_units - len(main["unusable_units"])
    participation: Any = main["participation"] / n_usable
    if n_massive := len(main["massive_units"]):
        participation = {
            "all units": participation,
            "without massive units": main["participation_without_massive"] / (n_usable - n_massive),
        }
    fraction: Any = main["density"]
    thresholds = [main["density_threshold"]]
    if n_massive:
        fraction = {"all units": fraction, "without massive units": main["density_without_massive"]}
        thresholds.append(main["density_threshold_without_massive"])
    return {
        "fig1b_mean_activations": figures.mean_activations(main["mean"], **sites),
        "fig1b_density": figures.density(fraction, participation, threshold=thresholds, **sites),
    }


def _correlation(main: Results, others: Mapping[str, Results], sites: Any) -> dict[str, Figure]:
    return {
        "fig1c_correlation": figures.unit_correlations(main["r"], **sites),
        "fig1c_correlation_mean": _curve(main, others, "r_mean", "mean correlation over units", sites, fisher=True),
        "fig1d_correlation_density": figures.correlation_density(
            main["r_all_counts"], main["r_all_edges"], below=main["r_all_below"]
        ),
    }


def _information(main: Results, others: Mapping[str, Results], sites: Any) -> dict[str, Figure]:
    literal = main["mi_estimator"] == "paper_literal"
    drawn = {}
    if literal:  # the true mutual information beside the paper's sum, in every picture
        drawn["fig1g_information_kde"] = figures.unit_information(main["mi_true"], **sites)
        drawn["fig1h_information_kde_mean"] = figures.transition_curve(
            main["mi_true_mean"], ylabel="mean mutual information\nover units (nats)", **sites
        )
    words: Any = {"ylabel": LITERAL, "log": True} if literal else {}
    drawn["fig1g_information"] = figures.unit_information(main["mi"], floor=main["mi_floor"], **words, **sites)
    beside = {"permuted pairs (floor)": main["mi_floor"]}
    if "mi_mean_without_massive" in main:
        beside["without massive units"] = main["mi_mean_without_massive"]
    beside |= {label: r["mi_mean"] for label, r in others.items()}
    drawn["fig1h_information_mean"] = figures.transition_curve(
        main["mi_mean"],
        main.get("mi_mean_interval"),
        others=beside,
        ylabel=LITERAL if literal else f"mean mutual information\nover units (nats, {main['mi_estimator']})",
        interval_label="95 % interval",
        log=literal,
        **sites,
    )
    return drawn


def _rotation(
    main: Results, results: Mapping[str, Results], sites: Any, units: Sequence[int] | None, seed: int
) -> dict[str, Figure]:
    r = main["rotation"]
    drawn = {}
    chosen = portrait_units(r, units, seed)
    a = main["rotation_mean_trajectory"][:, chosen]
    path = portrait(a)
    drawn["fig2a_portraits"] = figures.portraits(path.x, path.y, [f"unit {u}" for u in chosen], r[chosen], **sites)
    spread: dict[str, Tensor] = {NAMES["per_sequence"]: main["rotation_per_sequence"]}
    nulls = [k.removeprefix("null_").removesuffix("_example") for k in main if k.endswith("_example")]
    spread |= {NAMES[null]: main[f"null_{null}_example"] for null in nulls}
    spread |= {NAMES[c]: other["rotation"] for c, other in list(results.items())[1:]}
    drawn["fig2b_rotations"] = figures.rotation_distribution(r, spread)
    for null in nulls:
        if null in LEADING_NULLS:
            drawn[f"fig2c_rotations_by_unit_{null}"] = figures.rotations_by_unit(
                r, main[f"null_{null}_mean"], main[f"null_{null}_std"], p=main[f"null_{null}_p"], null_name=NAMES[null]
            )
    return drawn


def portrait_units(r: Tensor, units: Sequence[int] | None, seed: int) -> list[int]:
    """The units asked for, else the three that turn most clockwise and three others at random."""
    if units is not None:
        return list(units)[:12]
    ranked = torch.argsort(torch.nan_to_num(r, nan=torch.inf)).tolist()
    generator = torch.Generator().manual_seed(seed)
    rest = ranked[3:]
    picked = [rest[i] for i in torch.randperm(len(rest), generator=generator)[:3].tolist()]
    return [*ranked[:3], *picked]


def _components(main: Results, results: Mapping[str, Results], sites: Any) -> dict[str, Figure]:
    named = {NAMES[c]: r for c, r in results.items()}
    n_components = len(main["pca_ratio"])
    return {
        "fig4a_trajectory": figures.pca_trajectory(
            main["latent_mean"],
            main["latent_samples"][:N_DRAWN],
            ratio=main["pca_ratio"],
            control_mean=main["control_mean"],
            control_samples=main["control_samples"],
            control_ratio=main["control_ratio"],
            **sites,
        ),
        "fig4b_cumulative_variance": figures.cumulative_variance(
            {k: r["pca_ratio"] for k, r in named.items()} | _without_massive(main, "pca_ratio")
        ),
        "fig4c_variance_by_sublayer": figures.explained_variance(
            {f"{k}, {n_components} components": r["ev"] for k, r in named.items()} | _without_massive(main, "ev"),
            **sites,
        ),
        "fig4c_components_needed": figures.components_needed(
            {k: r["components_90"] for k, r in named.items()}, **sites
        ),
        "fig4_loadings": figures.loadings(main["pca_components"], main["massive_units"].tolist()),
    }


def _without_massive(main: Results, name: str) -> dict[str, Tensor]:
    """The same curve without massive units, where there are some."""
    key = f"{name}_without_massive"
    return {"without massive units": main[key]} if key in main else {}
