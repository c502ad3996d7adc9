"""The paper's panels: arrays or tensors in, a matplotlib Figure out; one function a panel, one column wide."""

from rsdyn.figures.components import components_needed, cumulative_variance, loadings, pca_trajectory
from rsdyn.figures.left_out import findings_left_out
from rsdyn.figures.massive import massive_activations
from rsdyn.figures.rotations import portraits, rotation_distribution, rotations_by_unit
from rsdyn.figures.stream import correlation_density, density, mean_activations
from rsdyn.figures.style import CROSS, WITHIN, save
from rsdyn.figures.training import explained_variance, latent_distance, latent_trajectory, loss_curves
from rsdyn.figures.transitions import transition_curve, unit_correlations, unit_information

__all__ = [
    "CROSS",
    "WITHIN",
    "components_needed",
    "correlation_density",
    "cumulative_variance",
    "density",
    "explained_variance",
    "findings_left_out",
    "latent_distance",
    "latent_trajectory",
    "loadings",
    "loss_curves",
    "massive_activations",
    "mean_activations",
    "pca_trajectory",
    "portraits",
    "rotation_distribution",
    "rotations_by_unit",
    "save",
    "transition_curve",
    "unit_correlations",
    "unit_information",
]
