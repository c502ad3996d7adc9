"""Results of an analysis made by hand: what is given by its path of fields, and nothing for the rest."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured

EMPTY = {int: 0, float: float("nan"), str: "", Tensor: torch.zeros(0)}


def scattered(curve: Tensor, **more: Any) -> Measured:
    """A curve that scatters a little over groups."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(10, *curve.shape, generator=generator, dtype=torch.float64)
    return Measured(curve, groups=curve + noise, **more)


def condition(values: dict[str, Any] | None = None, *, trajectories: int = 240, groups: int = 10) -> ConditionResults:
    """A stream's results from ``velocity/speed``, ``flags/massive_units`` and the like; a tensor is a value alone."""
    given = {"counts/trajectories": trajectories, "counts/groups": groups, "flags/constant": torch.zeros(1)}
    return _made(ConditionResults, given | (values or {}))


def analysis(
    conditions: dict[str, ConditionResults],
    measures: list[str],
    *,
    sites: int = 2,
    n_sublayers: int = 13,
    n_units: int = 8,
) -> AnalysisResults:
    return AnalysisResults(conditions, tuple(measures), sites, n_sublayers, n_units)


def _made(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind, localns={"Tensor": Tensor})
    parts = {}
    for f in fields(kind):
        of = next((t for t in get_args(hints[f.name]) if is_dataclass(t)), hints[f.name])
        own = {name[len(f.name) + 1 :]: x for name, x in values.items() if name.startswith(f"{f.name}/")}
        if f.name in values:
            value = values[f.name]
            parts[f.name] = Measured(value) if of is Measured and isinstance(value, Tensor) else value
        elif is_dataclass(of) and (own or (kind is ConditionResults and f.name in ("counts", "flags"))):
            parts[f.name] = _made(of, own)
        elif type(None) in get_args(hints[f.name]) or is_dataclass(of):
            parts[f.name] = None  # a required one too: these results have nothing but what is given
        else:
            parts[f.name] = {} if f.name == "nulls" else EMPTY[of]
    return kind(**parts)
