"""How the training and the test of an autoencoder went: for the closing table, the summary, the page and W&B alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

STILL = 1e-3  # spread of the latents over that of the data, below which they barely move
NO_BETTER = 0.01  # explained variance, in the space of the loss, up to which it is no better than the mean
# Participation ratio of the latents (1 for a line, K for a ball) below which they may lie on a line. With two latents
# it is a variance across the line of less than a tenth of that along it. A line is a line whatever the bottleneck, so
# the threshold does not grow with K: streams whose leading component has most of the variance rightly fill few.
LINE = 1.2
# What latents fill depends on how they are scaled, which the decoder can undo: of five trainings on the embedded text
# the best filled 1.12, and explained .73, on its longest axis alone .06. So they lie on a line where that axis alone
# has this share of what they explain.
ALONE = 0.95


def collapse_reasons(results: Mapping[str, Any]) -> list[str]:
    """Say in what ways an autoencoder collapsed; an empty list when it did not.

    Args:
        results: of the test: ``latent_spread``, ``r2_cae``, ``latent_participation``, ``mean_latents`` ``(S, K)``, and
            ``r2_line``, what is explained with the latents put on their longest axis.

    One latent is a line by construction, and cannot collapse to one.
    """
    n_latent = results["mean_latents"].shape[-1]
    spread, explained = float(results["latent_spread"]), float(results["r2_cae"])
    reasons = []
    if not spread >= STILL:
        reasons.append(f"its latents barely move (their spread is {spread:.1e} of the data's)")
    elif n_latent > 1 and not float(results["latent_participation"]) >= LINE and not is_thin(results):
        reasons.append(f"its latents lie on a line ({dimensions_filled(results['latent_participation'], n_latent)})")
    if not explained > NO_BETTER:
        reasons.append(f"it is no better than the mean (explained variance {explained:.3f})")
    return reasons


def is_thin(results: Mapping[str, Any]) -> bool:
    """Whether latents fill hardly more than a line and yet use the directions across it."""
    if len(results["mean_latents"][0]) < 2 or not float(results["latent_participation"]) < LINE:
        return False
    explained = float(results["r2_cae"])
    return explained - float(results.get("r2_line", explained)) > (1 - ALONE) * abs(explained)


def dimensions_filled(participation: Any, n_latent: int) -> str:
    """``they fill 1.930 of 2 dimensions``, by the participation ratio of the latents."""
    return f"they fill {float(participation):.3f} of {n_latent} dimensions"


@dataclass(frozen=True)
class TrainingSummary:
    """A training and its test.

    Attributes:
        results: of the test, as :class:`~rsdyn.autoencoder.training.LitAutoencoder` has them.
        widths: of the encoder; the decoder mirrors them.
        standardise: what the loss is of.
        n_parameters: of the network.
        epochs, best_epoch, best_val_loss: how many were trained, and the one that is kept.
        stopped_early: whether the patience ended it.
        losses: pairs of epoch and value by name: ``train``, ``val`` and ``lr``.
        seconds: of fitting.
        dropped: training vectors per epoch that no process trained on.
    """

    results: Mapping[str, Any]
    widths: Sequence[int]
    standardise: str
    n_parameters: int
    epochs: int
    best_epoch: int | None
    best_val_loss: float
    stopped_early: bool
    losses: Mapping[str, Sequence[tuple[int, float]]]
    seconds: float
    dropped: int

    @property
    def n_latents(self) -> int:
        """Units of the bottleneck."""
        return self.widths[-1]

    @property
    def test(self) -> dict[str, Any]:
        """The scalars of the test, and the names of what it flagged."""
        scalars = {k: float(v) for k, v in self.results.items() if getattr(v, "ndim", None) == 0}
        flags = ("n_test_sequences", "n_test_trajectories", "n_constant_units", "massive_units")
        return scalars | {k: self.results[k] for k in (*flags, "collapsed", "collapse")}

    @property
    def explained(self) -> Tensor:
        """Explained variance of each sublayer ``(S,)``, about its own mean, in the space of the loss."""
        return self.results["ev_cae"]

    @property
    def explained_pca(self) -> Tensor:
        """The same of PCA with as many components."""
        return self.results["ev_pca"]

    def to_dict(self) -> dict[str, Any]:
        """What ``summary.json`` has of it."""
        curves = {}
        for ours, name in (("cae", "explained_variance"), ("pca", "explained_variance_pca2")):
            curves[name] = self.results[f"ev_{ours}"]
            curves[f"{name}_global"] = self.results[f"ev_global_{ours}"]
            curves[f"{name}_raw"] = self.results[f"ev_{ours}_raw"]
        return {
            "widths": [*self.widths],
            "n_parameters": self.n_parameters,
            "standardise": self.standardise,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "stopped_early": self.stopped_early,
            "dropped_vectors_per_epoch": self.dropped,
            "test": self.test,
            **curves,
            **{name: self.results[name] for name in ("latent_distance", "latent_distance_std")},
            "history": dict(self.losses),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``results.npz`` has of it."""
        arrays = {name: value.numpy() for name, value in self.results.items() if isinstance(value, Tensor)}
        return {"widths": np.array(self.widths), **arrays}
