"""What of an analysis is kept: arrays for ``results.npz``, numbers and sentences for ``summary.json`` and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsdyn.analysis.settings import MASSIVE
from rsdyn.analysis.words import flags_in_words, massive_in_words, plane_in_words, positions_in_words, rotation_in_words

Results = Mapping[str, Mapping[str, Any]]


def arrays_of(results: Results) -> dict[str, np.ndarray]:
    """Every array of every condition, by ``condition/name``."""
    return {f"{c}/{k}": np.asarray(v) for c, r in results.items() for k, v in r.items() if hasattr(v, "numpy")}


def scalars_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts and lists of units of one condition; what is longer is in ``results.npz``."""
    out = {}
    for name, value in results.items():
        if not hasattr(value, "numpy"):
            out[name] = value
        elif value.ndim == 0:
            out[name] = float(value)
        elif name.endswith("_units"):
            out[name] = value
    return out


def in_words(
    results: Results, measures: Sequence[str], *, n_sublayers: int, sites_per_layer: int, several_tokens: bool
) -> list[str]:
    """What a reader must know of the results, in sentences; ``several_tokens`` where a sequence has more than one."""
    main = next(iter(results.values()))
    words = rotation_in_words(main, n_sublayers) if "rotation" in measures else []
    words += plane_in_words(main) if "pca" in measures else []
    words += massive_in_words(main, sites_per_layer) if MASSIVE in measures else []
    return words + (positions_in_words(results) if several_tokens else []) + flags_in_words(results)
