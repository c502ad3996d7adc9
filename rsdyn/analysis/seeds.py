"""Several streams of one condition: the spread of what is measured over untrained language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rsdyn.analysis.findings import rows

Results = dict[str, Any]


def with_seeds(results: Mapping[str, Results], condition_of: Mapping[str, str]) -> dict[str, Results]:
    """The results of each condition; of several streams of one, those of the first with the others' curves in them.

    ``condition_of`` names the condition of each entry of ``results``. A curve ``name`` of the other streams becomes
    ``<name>_seeds`` ``(streams, ...)`` of the first, which is called as its condition is.
    """
    found: dict[str, Results] = {}
    others: dict[str, list[Results]] = {}
    for name, r in results.items():
        if condition_of[name] in found:
            others.setdefault(condition_of[name], []).append(r)
        else:
            found[condition_of[name]] = dict(r)
    curves = {row.curve for sites in (1, 2) for row in rows(sites)}
    curves |= {f"{name}_without_massive" for name in curves}
    for condition, more in others.items():
        for name in curves & found[condition].keys():
            found[condition][f"{name}_seeds"] = torch.stack([torch.as_tensor(r[name]) for r in more if name in r])
    return found
