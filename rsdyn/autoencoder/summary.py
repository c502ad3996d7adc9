"""In words, how the test of an autoencoder went: for the closing table, the summary, the page and W&B alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STILL = 1e-3  # spread of the latents over that of the data, below which they barely move
NO_BETTER = 0.01  # explained variance, in the space of the loss, up to which it is no better than the mean
# Participation ratio of the latents (1 for a line, K for a ball) below which they lie on a line. With two latents it is
# a variance across the line of less than a tenth of that along it. A line is a line whatever the bottleneck, so the
# threshold does not grow with K: streams whose leading component has most of the variance fill few dimensions rightly.
LINE = 1.2


def collapse_reasons(results: Mapping[str, Any]) -> list[str]:
    """Say in what ways an autoencoder collapsed; an empty list when it did not.

    Args:
        results: of the test: ``latent_spread``, ``r2_cae``, ``latent_participation`` and ``mean_latents`` ``(S, K)``.

    One latent is a line by construction, and cannot collapse to one.
    """
    n_latent = results["mean_latents"].shape[-1]
    spread, explained = float(results["latent_spread"]), float(results["r2_cae"])
    filled = float(results["latent_participation"])
    reasons = []
    if not spread >= STILL:
        reasons.append(f"its latents barely move (their spread is {spread:.1e} of the data's)")
    elif n_latent > 1 and not filled >= LINE:
        reasons.append(f"its latents lie on a line ({dimensions_filled(filled, n_latent)})")
    if not explained > NO_BETTER:
        reasons.append(f"it is no better than the mean (explained variance {explained:.3f})")
    return reasons


def dimensions_filled(participation: Any, n_latent: int) -> str:
    """``they fill 1.930 of 2 dimensions``, by the participation ratio of the latents."""
    return f"they fill {float(participation):.3f} of {n_latent} dimensions"
