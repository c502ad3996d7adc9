"""Turns of the surrogates of single units, drawn again: they depend on the seed, the null and the unit alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.settings import RotationConfig
from rsdyn.dynamics.rotation_test import surrogate_turns

BINS = 40
AGAIN = ("increment_shuffle_scaled", "layer_shuffle")  # nulls that are drawn again: of the steps, and the paper's


@dataclass(frozen=True)
class TurnHistograms:
    """How the clockwise turns of each unit's surrogates are spread, in bins of its own.

    Attributes:
        units: their numbers.
        counts: ``(units, bins)``.
        low, high: ``(units,)`` ends of the bins.
    """

    units: tuple[int, ...]
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray


def turn_histograms(
    trajectory: Tensor, null: str, units: Sequence[int], settings: RotationConfig, *, sites_per_layer: int, seed: int
) -> TurnHistograms:
    """The surrogates of the test of a run on the mean ``trajectory`` ``(S, D)``, counted for some of its units."""
    found = -surrogate_turns(
        trajectory,
        null,
        units,
        settings.surrogates,
        seed,
        shared=settings.shared,
        window=settings.window,
        sites_per_layer=sites_per_layer,
    ).to(torch.float64)
    edges = [np.histogram_bin_edges(values, BINS) for values in found.T.numpy()]
    counts = [np.histogram(values, bins)[0] for values, bins in zip(found.T.numpy(), edges, strict=True)]
    ends = np.array(edges).reshape(-1, BINS + 1)[:, [0, -1]].T
    return TurnHistograms(tuple(units), np.array(counts, dtype=float).reshape(-1, BINS), *ends)
