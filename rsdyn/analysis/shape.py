"""Readout and geometry over depth, in the order in which an analysis takes them: per stream, then across streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from rsdyn.analysis.curvature import LEAST_SUBLAYERS, curvature
from rsdyn.analysis.dimension import dimension
from rsdyn.analysis.phases import CURVES, phases_of
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured, each_tensor
from rsdyn.analysis.similarity import similarity
from rsdyn.dynamics.dimension import LEAST_STATES
from rsdyn.dynamics.similarity import LEAST
from rsdyn.errors import UserError

Shapes = dict[str, Any]  # what was measured of one stream, by measure
T = TypeVar("T")
NEEDS = {"dimension": ("skdim", "scikit-dimension"), "phases": ("ruptures", "ruptures")}


def check_shape(measures: Sequence[str], *, n_trajectories: int, n_sublayers: int) -> None:
    """Raise ``UserError`` for what this stream or this installation cannot give, naming the key and the cure."""
    for measure, (module, package) in NEEDS.items():
        if measure in measures and find_spec(module) is None:
            raise UserError(f"measures: {measure} needs the package {package}: pip install {package}, or leave it out.")
    if "curvature" in measures and n_sublayers < LEAST_SUBLAYERS:
        raise UserError(
            f"measures: curvature needs at least {LEAST_SUBLAYERS} sublayers, and this model has "
            f"{n_sublayers}. Leave it out."
        )
    for measure, least in (("similarity", LEAST), ("dimension", LEAST_STATES)):
        if measure in measures and n_trajectories < least:
            raise UserError(
                f"measures: {measure} needs at least {least} sequences and gets {n_trajectories}. Raise "
                "`samples`, `keep` or `limit`, or leave it out."
            )
    sources = list(dict.fromkeys(name.split("/")[0] for name in CURVES))
    if "phases" in measures and not set(measures) & set(sources):
        raise UserError(
            "measures: phases look at the curves of other measures, and none of those is asked for. Add one "
            f"of {', '.join(sources)}."
        )


def shapes_of(
    probe: ResidualStreamProbe,
    measures: Sequence[str],
    *,
    main: ResidualStreamProbe,
    sites_per_layer: int,
    seed: int,
) -> Iterator[tuple[str, Any]]:
    """The measures of a stream's shape that were asked for; ``main`` is the main stream's probe, maybe this one."""
    is_main = main is probe
    if "curvature" in measures:
        yield "curvature", curvature(probe, sites_per_layer=sites_per_layer, seed=seed)
    if "dimension" in measures:
        yield "dimension", dimension(probe, intervals=is_main)
    if "similarity" in measures:
        yield "similarity", similarity(probe, None if is_main else main, seed=seed, floor=is_main)


def with_positions(found: ConditionResults, probe: ResidualStreamProbe) -> ConditionResults:
    """The curves of a stream by range of positions beside them, where positions were recorded."""
    at = probe.by_position
    if at is None:
        return found
    changed: dict[str, Any] = {}
    if found.cosine is not None:
        changed["cosine"] = replace(found.cosine, by_position=at.cosine)
    if found.velocity is not None:
        by_speed = {"by_position": at.speed, "relative_by_position": at.relative_speed}
        changed["velocity"] = replace(found.velocity, **by_speed)
    if found.curvature is not None:
        changed["curvature"] = replace(found.curvature, by_position=at.curvature)
    return replace(found, **changed)


def _with_seeds(first: T, others: Sequence[T]) -> T:
    """A result whose measured values have those of further streams of its kind beside them."""
    if not others:
        return first
    if isinstance(first, Measured):
        return replace(first, seeds=torch.stack([other.value for other in others if isinstance(other, Measured)]))
    if not is_dataclass(first) or isinstance(first, type):
        return first
    parts: dict[str, Any] = {
        f.name: _with_seeds(getattr(first, f.name), [getattr(other, f.name) for other in others]) for f in fields(first)
    }
    return replace(first, **parts)


def with_shapes(
    found: AnalysisResults,
    shapes: Mapping[str, Shapes],
    probes: Mapping[str, ResidualStreamProbe],
    condition_of: Mapping[str, str],
    seed: int,
) -> AnalysisResults:
    """Results with what was measured of shape and readout; then phases of all curves together. On the CPU.

    ``condition_of`` names the condition of each stream; of several the first is the condition, with the others' values
    as its seeds.
    """
    conditions = {}
    for name, of in found.conditions.items():
        first, *others = [each_tensor(shapes[s], torch.Tensor.cpu) for s, c in condition_of.items() if c == name]
        seeded = {m: _with_seeds(shape, [other[m] for other in others]) for m, shape in first.items()}
        of = each_tensor(with_positions(replace(of, **seeded), probes[name]), torch.Tensor.cpu)
        if "phases" in found.measures:
            of = replace(of, phases=phases_of(of, sites_per_layer=found.sites_per_layer, seed=seed))
        conditions[name] = of
    return replace(found, conditions=conditions)
