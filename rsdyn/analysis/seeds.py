"""Several streams of one condition: the spread of what is measured over untrained language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from rsdyn.analysis.results import ConditionResults, Measured


def with_seeds(results: Mapping[str, ConditionResults], condition_of: Mapping[str, str]) -> dict[str, ConditionResults]:
    """The results of each condition; of several streams of one, those of the first with the others' values in them.

    ``condition_of`` names the condition of each entry of ``results``. Each :class:`~rsdyn.analysis.results.Measured` of
    the first, which is called as its condition is, gets the values of the other streams as its ``seeds``.
    """
    found: dict[str, ConditionResults] = {}
    others: dict[str, list[ConditionResults]] = {}
    for name, r in results.items():
        if condition_of[name] in found:
            others.setdefault(condition_of[name], []).append(r)
        else:
            found[condition_of[name]] = r
    return found | {condition: _merged(found[condition], more) for condition, more in others.items()}


def _merged(first: Any, others: Sequence[Any]) -> Any:
    if not is_dataclass(first) or isinstance(first, type):
        return first
    parts = {
        f.name: _merged(getattr(first, f.name), [of for other in others if (of := getattr(other, f.name)) is not None])
        for f in fields(first)
    }
    if isinstance(first, Measured) and others:
        parts["seeds"] = torch.stack([other.value for other in others])
    return replace(first, **parts)
