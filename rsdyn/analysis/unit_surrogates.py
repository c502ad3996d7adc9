"""Turns of the surrogates of single units, drawn again: they depend on the seed, the null and the unit alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.settings import RotationConfig
from rsdyn.dynamics.rotation import turns
from rsdyn.dynamics.rotation_test import surrogates

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
    n_units = trajectory.shape[1]
    blocks = [(0, n_units)] if len(units) == n_units else [(u, 1) for u in units]
    counts, ends = np.zeros((len(units), BINS)), np.zeros((2, len(units)))
    at = 0
    for first, width in blocks:
        found = []
        for portrait in surrogates(
            trajectory[:, first : first + width],
            null,
            settings.surrogates,
            first_unit=first,
            seed=seed,
            window=settings.window,
            sites_per_layer=sites_per_layer,
            shared=settings.shared,
            of_all=trajectory,
        ):
            x, y = (v.to(torch.float64).movedim(1, 0).diff(dim=0) for v in portrait)
            length = torch.maximum(x.abs().amax(0), y.abs().amax(0)).clamp(min=1e-300)
            found.append(-turns((x / length).contiguous(), (y / length).contiguous()))
        values = torch.cat(found).numpy()
        for u in range(width):
            edges = np.histogram_bin_edges(values[:, u], BINS)
            counts[at], _ = np.histogram(values[:, u], edges)
            ends[:, at] = edges[0], edges[-1]
            at += 1
    return TurnHistograms(tuple(units), counts, *ends)
