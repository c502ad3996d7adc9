"""What ``summary.json`` and the page have of an analysis beside its findings: counts, curves, sentences."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from rsdyn.analysis.results import AnalysisResults, ConditionResults, curves
from rsdyn.analysis.words import flags_in_words, massive_in_words, plane_in_words, positions_in_words, rotation_in_words


def curves_of(found: ConditionResults) -> dict[str, Tensor]:
    """The curves over depth of one stream, by the names that they have in ``results.npz``."""
    known: dict[str, Tensor] = {}
    for path, curve in curves(found):
        if curve.value.ndim == 1:
            known[path] = curve.value
            if curve.without_massive is not None:
                known[f"{path}/without_massive"] = curve.without_massive.value
    return known


def numbers_of(found: AnalysisResults) -> dict[str, Any]:
    """Counts and curves of each stream, as ``summary.json`` has them."""
    return {
        "counts": {c: asdict(r.counts) for c, r in found.conditions.items()},
        "curves": {c: curves_of(r) for c, r in found.conditions.items()},
    }


def in_words(found: AnalysisResults, *, several_tokens: bool) -> list[str]:
    """What a reader must know of the results, in sentences; ``several_tokens`` where a sequence has more than one."""
    main = found.main
    words = [] if main.rotation is None else rotation_in_words(main.rotation, found.n_sublayers)
    words += [] if main.pca is None else plane_in_words(main.pca)
    words += [] if main.massive is None else massive_in_words(main.massive, found.sites_per_layer)
    return words + (positions_in_words(found) if several_tokens else []) + flags_in_words(found)
