"""All measures of one stream, and what compares streams, in the order in which an analysis takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rsdyn.analysis import measures
from rsdyn.analysis.checks import nulls_of
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.settings import AnalysisConfig

Results = dict[str, Any]


def measures_of(
    probe: ResidualStreamProbe, settings: AnalysisConfig, *, sites_per_layer: int, seed: int, nulls: bool = True
) -> Iterator[tuple[str, Results]]:
    """Each measure that was asked for, and what it gives; ``nulls`` as well where rotations are to be tested."""
    rotation = settings.rotation
    surrogates: Any = {"n": rotation.surrogates, "shared": rotation.shared, "window": rotation.window}
    surrogates |= {"sites_per_layer": sites_per_layer, "seed": seed}
    own = nulls_of(settings, own=True) if nulls else []
    ways: dict[str, Callable[[], Results]] = {
        "activations": lambda: measures.activations(probe, settings.density_threshold),
        "correlation": lambda: measures.correlation(probe),
        "cosine": lambda: measures.cosine(probe),
        "velocity": lambda: measures.velocity(probe),
        "mutual_information": lambda: measures.information(probe, settings.mi.estimator, seed),
        "rotation": lambda: measures.rotations(probe, own, **surrogates),
        "pca": lambda: measures.principal_components(probe, seed),
        "massive": lambda: measures.massive_activations(probe),
    }
    for measure, measured in ways.items():
        if measure in settings.measures:
            yield measure, measured()


def compare_streams(
    probes: Mapping[str, ResidualStreamProbe],
    results: Mapping[str, Results],
    settings: AnalysisConfig,
    *,
    sites_per_layer: int,
    seed: int,
) -> None:
    """Add to the results what needs several streams, or none: nulls that are other streams, and random walks."""
    rotation = settings.rotation
    walks = measures.random_walks(
        next(iter(probes.values())).n_sublayers,  # what a unit without dynamics does is the same for every stream
        nulls_of(settings, own=True),
        n=min(rotation.surrogates, 199),
        window=rotation.window,
        sites_per_layer=sites_per_layer,
        seed=seed,
    )
    for found in results.values():
        found |= walks
    for null in nulls_of(settings, own=False) if "original" in probes else []:
        original = results["original"]
        original |= measures.compare_rotations(
            probes["original"], probes[null], original, null, n=rotation.surrogates, seed=seed
        )
