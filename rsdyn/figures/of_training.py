"""The figures of a training (paper Fig. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsdyn.autoencoder.summary import TrainingSummary, dimensions_filled
from rsdyn.figures.training import explained_variance, latent_distance, latent_trajectory, loss_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 100  # trajectories behind the mean one


def panels(found: TrainingSummary, *, sites_per_layer: int, several_tokens: bool) -> dict[str, Figure]:
    """Each figure by the name of its file; ``several_tokens`` where a sequence has more than one trajectory."""
    results = found.results
    samples = results["latent_samples"]
    if several_tokens:  # in the corpus' order, where a hundred may be the tokens of one sequence
        samples = samples[:: max(1, len(samples) // DRAWN)]
    distance, std = results["latent_distance"], results["latent_distance_std"]
    filled = dimensions_filled(results["latent_participation"], found.n_latents)
    title = f"mean latents: {filled}" if found.n_latents > 1 else None
    explained = {"autoencoder": found.explained, f"PCA, {found.n_latents} components": found.explained_pca}
    return {
        "fig3b_latent_trajectory": latent_trajectory(
            results["mean_latents"], samples[:DRAWN], sites_per_layer=sites_per_layer, title=title
        ),
        "fig3c_latent_distance": latent_distance(
            distance,
            (distance - std, distance + std),
            sites_per_layer=sites_per_layer,
            spread_label="± 1 SD over sequences",
        ),
        "fig3d_explained_variance": explained_variance(explained, sites_per_layer=sites_per_layer),
        "loss": loss_curves([*found.losses["train"]], [*found.losses["val"]], found.best_epoch),
    }
