"""Typed results from the flat names that measures still give, and back for who still reads them: on its way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rsdyn.analysis import results as typed
from rsdyn.analysis.results import ConditionResults, Measured, NullTest
from rsdyn.analysis.settings import NULLS

Flat = dict[str, Any]
_OF_MEASURED = ("interval", "groups", "draws", "std", "left_out", "seeds")
_OF_NULL = ("mean", "std", "delta", "z", "p", "q", "q_normal")


def _measured(r: Mapping[str, Any], name: str, n: str = "") -> Measured:
    rest = f"{name}_without_massive"
    parts = {part: r.get(f"{name}_{part}") for part in _OF_MEASURED}
    return Measured(
        torch.as_tensor(r[name]),
        **parts,
        n=r.get(n),
        without_massive=_measured(r, rest, n) if rest in r else None,
    )


def _null(r: Mapping[str, Any], null: str) -> NullTest:
    under = f"null_{null}_"

    def number(name: str) -> float | None:
        return float(r[f"{under}{name}"]) if f"{under}{name}" in r else None

    walks = r.get(f"walks_beyond_{null}")
    return NullTest(
        **{name: r[f"{under}{name}"] for name in _OF_NULL},
        over_units=float(r[f"{under}turns"]),
        over_units_std=number("turns_std"),
        over_units_z=number("turns_z"),
        over_units_p=number("population_p"),
        surrogates=r.get(f"{under}population"),
        example=r.get(f"{under}example"),
        walks_beyond=None if walks is None else float(walks),
    )


def _regular(r: Mapping[str, Any], null: str) -> NullTest:
    under, population = f"regularity_{null}_", r[f"regularity_{null}_population"]
    return NullTest(
        **{name: r[f"{under}{name}"] for name in ("mean", "std", "z", "p", "q_normal")},
        over_units=float(population.mean()),
        over_units_std=float(population.std()),
        over_units_z=float(r[f"{under}population_z"]),
        over_units_p=float(r[f"{under}population_p"]),
        surrogates=population,
    )


def typed_results(r: Mapping[str, Any]) -> ConditionResults:
    """The typed results of one stream from flat ones."""
    found: dict[str, Any] = {}
    if "density" in r:
        found["activations"] = typed.Activations(
            r["mean"],
            r["std"],
            _measured(r, "density"),
            float(r["density_threshold"]),
            _measured(r, "participation"),
            r.get("density_threshold_without_massive"),
        )
    if "r" in r:
        by_token = None
        if "r_first_between_tokens" in r:
            within = "r_second_layer_within_tokens"
            by_token = typed.ByLastToken(
                _measured(r, "r_first_between_tokens_mean", "n_last_tokens"),
                r["r_first_between_tokens"],
                _measured(r, f"{within}_mean", "n_last_tokens") if within in r else None,
                r.get(within),
            )
        found["correlation"] = typed.Correlation(
            r["r"],
            _measured(r, "r_mean"),
            r["r_undefined"],
            r["r_all_counts"],
            r["r_all_edges"],
            r["r_all_below"],
            float(r["r_all_negative"]),
            r["r_all_mean"],
            r["r_all_unit_mean"],
            by_token,
        )
    if "cosine" in r:
        found["cosine"] = typed.Cosine(_measured(r, "cosine"))
    if "speed" in r:
        relative = _measured(r, "relative_speed") if "relative_speed" in r else None
        found["velocity"] = typed.Velocity(_measured(r, "speed"), relative)
    if "mi" in r:
        between = "mi_between_tokens_mean"
        found["mutual_information"] = typed.MutualInformation(
            r["mi_estimator"],
            r["mi"],
            _measured(r, "mi_mean", "mi_samples"),
            r["mi_floor"],
            r["mi_undefined"],
            r["mi_infinite"],
            _measured(r, between, "mi_tokens") if between in r else None,
            _measured(r, "mi_true_mean", "mi_samples") if "mi_true_mean" in r else None,
            r.get("mi_true"),
        )
    if "rotation" in r:
        regularity = None
        if "regularity" in r:
            tests = {null: _regular(r, null) for null in NULLS if f"regularity_{null}_p" in r}
            regularity = typed.Regularity(r["regularity"], _measured(r, "regularity_mean"), tests)
        walk = r.get("rotation_random_walk")
        found["rotation"] = typed.Rotation(
            r["rotation"],
            _measured(r, "rotation_abs_mean"),
            r["rotation_mean_trajectory"],
            r["rotation_per_sequence"],
            r["rotation_zero_tangents"],
            None if walk is None else float(walk),
            {null: _null(r, null) for null in NULLS if f"null_{null}_mean" in r},
            regularity,
        )
    if "pca_ratio" in r:
        latents = over_depth = None
        if "ev" in r:
            latents = typed.Plane(r["latent_mean"], r["latent_samples"], r["pca_ratio"])
            over_depth = typed.OverDepth(
                _measured(r, "ev"), _measured(r, "dimensions", "n_kept"), _measured(r, "components_90", "n_kept")
            )
        found["pca"] = typed.PrincipalComponents(
            _measured(r, "pca_ratio"),
            r["pca_components"],
            r["pca_massive_loadings"],
            typed.Plane(r["control_mean"], r["control_samples"], r["control_ratio"]),
            r.get("pca_components_without_massive"),
            r.get("half_angles"),
            latents,
            over_depth,
        )
    if "massive_largest" in r:
        names = ("largest", "unit", "typical", "counts", "top", "onset", "before", "after", "unwritten")
        found["massive"] = typed.MassiveActivations(
            **{name: r[f"massive_{name}"] for name in names},
            curves=r["massive_of_top"],
            norm_by_position=r.get("norm_by_position"),
        )
    flags = {f: r[f] for f in typed.Flags.__dataclass_fields__}
    counts = typed.Counts(
        r["n_trajectories"], r["n_bos"], r["n_sinks"], r["n_groups"], r["intervals_over"], r["intervals_note"]
    )
    return ConditionResults(counts, typed.Flags(**flags), **found)


def flat_results(found: ConditionResults) -> Flat:
    """Flat names for the typed results of one stream."""
    c = found.counts
    r: Flat = {"n_trajectories": c.trajectories, "n_bos": c.bos, "n_sinks": c.sinks, "n_groups": c.groups}
    r |= {"intervals_over": c.intervals_over, "intervals_note": c.intervals_note}
    r |= {f: getattr(found.flags, f) for f in typed.Flags.__dataclass_fields__}

    def put(name: str, value: Any) -> None:
        if value is not None:
            r[name] = value

    def put_measured(name: str, value: Measured | None, n: str = "") -> None:
        if value is None:
            return
        r[name] = value.value
        for part in _OF_MEASURED:
            put(f"{name}_{part}", getattr(value, part))
        if n:
            put(n, value.n)
        put_measured(f"{name}_without_massive", value.without_massive)

    if (a := found.activations) is not None:
        r |= {"mean": a.mean, "std": a.std, "density_threshold": a.density_threshold}
        put("density_threshold_without_massive", a.density_threshold_without_massive)
        put_measured("density", a.density)
        put_measured("participation", a.participation)
    if (k := found.correlation) is not None:
        r |= {"r": k.units, "r_undefined": k.undefined, "r_all_counts": k.pair_counts, "r_all_edges": k.pair_edges}
        r |= {"r_all_below": k.pairs_below, "r_all_mean": k.pair_means, "r_all_unit_mean": k.unit_means}
        r["r_all_negative"] = torch.tensor(k.negative_pairs, dtype=torch.float64)
        put_measured("r_mean", k.mean)
        if (t := k.by_last_token) is not None:
            put_measured("r_first_between_tokens_mean", t.between, "n_last_tokens")
            put("r_first_between_tokens", t.between_units)
            put_measured("r_second_layer_within_tokens_mean", t.within, "n_last_tokens")
            put("r_second_layer_within_tokens", t.within_units)
    if found.cosine is not None:
        put_measured("cosine", found.cosine.mean)
    if found.velocity is not None:
        put_measured("speed", found.velocity.speed)
        put_measured("relative_speed", found.velocity.relative)
    if (m := found.mutual_information) is not None:
        r |= {"mi_estimator": m.estimator, "mi": m.units, "mi_floor": m.floor, "mi_undefined": m.undefined}
        r["mi_infinite"] = m.infinite
        put_measured("mi_mean", m.mean, "mi_samples")
        put_measured("mi_between_tokens_mean", m.between_tokens, "mi_tokens")
        put_measured("mi_true_mean", m.true)
        put("mi_true", m.true_units)
    if (o := found.rotation) is not None:
        r |= {"rotation": o.turns, "rotation_mean_trajectory": o.trajectory, "rotation_per_sequence": o.per_sequence}
        r["rotation_zero_tangents"] = o.zero_tangents
        put_measured("rotation_abs_mean", o.mean_abs)
        if o.random_walk is not None:
            r["rotation_random_walk"] = torch.tensor(o.random_walk, dtype=torch.float64)
        for null, test in o.nulls.items():
            for name in _OF_NULL:
                put(f"null_{null}_{name}", getattr(test, name))
            r[f"null_{null}_turns"] = torch.tensor(test.over_units, dtype=torch.float64)
            for old, value in (("turns_std", test.over_units_std), ("turns_z", test.over_units_z)):
                if value is not None:
                    r[f"null_{null}_{old}"] = torch.tensor(value, dtype=torch.float64)
            put(f"null_{null}_population_p", test.over_units_p)
            put(f"null_{null}_population", test.surrogates)
            put(f"null_{null}_example", test.example)
            if test.walks_beyond is not None:
                r[f"walks_beyond_{null}"] = torch.tensor(test.walks_beyond, dtype=torch.float64)
        if (g := o.regularity) is not None:
            r["regularity"] = g.units
            put_measured("regularity_mean", g.mean)
            for null, test in g.nulls.items():
                under = f"regularity_{null}_"
                r |= {f"{under}{name}": getattr(test, name) for name in ("mean", "std", "z", "p", "q_normal")}
                r[f"{under}population"] = test.surrogates
                r[f"{under}population_z"] = torch.tensor(test.over_units_z, dtype=torch.float64)
                r[f"{under}population_p"] = test.over_units_p
    if (p := found.pca) is not None:
        put_measured("pca_ratio", p.ratio)
        r |= {"pca_components": p.components, "pca_massive_loadings": p.massive_loadings}
        put("pca_components_without_massive", p.components_without_massive)
        put("half_angles", p.half_angles)
        r |= {f"control_{name}": getattr(p.control, name) for name in ("mean", "samples", "ratio")}
        if p.latents is not None:
            r |= {"latent_mean": p.latents.mean, "latent_samples": p.latents.samples}
        if p.over_depth is not None:
            put_measured("ev", p.over_depth.explained)
            put_measured("dimensions", p.over_depth.dimensions, "n_kept")
            put_measured("components_90", p.over_depth.components_90)
    if (x := found.massive) is not None:
        names = ("largest", "unit", "typical", "counts", "top", "onset", "before", "after", "unwritten")
        r |= {f"massive_{name}": getattr(x, name) for name in names}
        r["massive_of_top"] = x.curves
        put("norm_by_position", x.norm_by_position)
    return r
