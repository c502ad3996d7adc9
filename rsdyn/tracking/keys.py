"""The keys under which W&B gets what a run found: tables from which the layouts are made, too.

A curve over depth is logged as ``depth/<measure>/<series>`` against ``depth``, 0 at the first sublayer and 1 at the
last, so that models of different depth overlay. One panel of W&B is one measure: all keys with its prefix. A series
is a condition (``original``, ``untrained``), in train.py ``autoencoder`` or ``pca``, in perturb.py a slot of depth and
what was put in there (``050_teleport``, at half of the depth); what belongs to a curve is a series too:
``<series>_low`` and ``<series>_high`` (95 % interval, unless the panel says otherwise), ``<series>_null`` (null or
floor), ``<series>_without_massive``.

Every panel of :mod:`rsdyn.figures` is the interactive chart ``charts/<key>`` and the picture ``figures/<key>``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rsdyn.analysis.subset_curves import CURVES as BY_GROUP
from rsdyn.analysis.subset_curves import SINGLE

CURVE = "depth/{measure}/{series}"
CHART = "charts/{key}"
TABLE = "tables/{name}"
IMAGE = "figures/{key}"
PAGE = "page"


class Curves(NamedTuple):
    """One panel of curves over depth.

    Attributes:
        figure: the paper's figure, by number and letter; what the paper has not is under the figure it belongs to.
        title: what the panel shows.
        measure: the name in the keys.
        ylabel: the name of the y axis, with the unit.
        script: whose runs have it. ``train`` has the panels of ``analyze`` too, where ``analysis.on_train`` is on.
        log: whether the y axis is logarithmic.
        interval: what lies between ``_low`` and ``_high``.
    """

    figure: str
    title: str
    measure: str
    ylabel: str
    script: str
    log: bool = False
    interval: str = "95 % interval over sequences"


CURVES = (
    Curves("1B", "Share of active units", "active_share", "share of units", "analyze"),
    Curves("1B", "Participation of units in the mean", "participation", "share of units", "analyze"),
    Curves("1C", "Correlation from sublayer to sublayer", "correlation", "mean correlation over units", "analyze"),
    Curves("1E", "Cosine of successive states", "cosine", "cosine", "analyze"),
    Curves("1F", "Speed", "speed", "speed (activation units)", "analyze"),
    Curves("1F", "Speed over the norm", "relative_speed", "step / norm of the state", "analyze"),
    Curves("1F", "Norm of the state", "norm", "norm (activation units)", "analyze"),
    Curves("1H", "Mutual information from sublayer to sublayer", "mutual_information",
           "mean mutual information over units (nats)", "analyze"),
    Curves("1H", "The paper's sum, as printed (not an information)", "paper_literal", "sum of p log p / (p p)",
           "analyze", log=True),
    Curves("3C", "Distance between successive latents", "latent_distance", "distance of latents", "train",
           interval="± 1 SD over sequences"),
    Curves("3D", "Explained variance by sublayer", "explained_variance", "explained variance", "train"),
    Curves("4C", "Variance that the principal components explain", "components_variance", "explained variance",
           "analyze"),
    Curves("4C", "Components for 90 % of the variance", "components_90", "components", "analyze"),
    Curves("4C", "Dimensions filled", "dimensions", "participation ratio of the variances", "analyze"),
    Curves("4D", "Distance to the reference", "recovery_distance", "distance / norm of the reference", "perturb",
           log=True, interval="95 % interval over prompts"),
    Curves("4D", "Cosine to the reference", "recovery_cosine", "cosine", "perturb",
           interval="95 % interval over prompts"),
)  # fmt: skip

SECTIONS = {
    "1": "Figure 1: the stream over depth",
    "2": "Figure 2: turns of units",
    "3": "Figure 3: the compressing autoencoder",
    "4": "Figure 4A-C: principal components",
    "4D": "Figure 4D: perturbation and recovery",
    "S": "Readout and shape over depth",
    "G": "By group of sequences",
    "J": "Jacobians over depth",
}
SCRIPT = {
    "1": "analyze",
    "2": "analyze",
    "3": "train",
    "4": "analyze",
    "4D": "perturb",
    "S": "analyze",
    "G": "analyze",
    "J": "analyze",
}

# The panels of rsdyn.figures by the section that they stand in: figure and title of each.
PANELS = {
    "1": {
        "fig1b_mean_activations": "1B  Mean activations",
        "fig1b_active_share": "1B  Share of active units",
        "fig1b_participation": "1B  Participation of units in the mean",
        "fig1c_correlation": "1C  Correlation of each unit",
        "fig1c_correlation_mean": "1C  Correlation from sublayer to sublayer",
        "fig1d_correlation_density": "1D  Correlation of all pairs of sublayers",
        "fig1d_correlation_pairs": "1D  Correlation of all pairs, all units together",
        "fig1e_cosine": "1E  Cosine of successive states",
        "fig1f_speed": "1F  Speed",
        "fig1f_relative_speed": "1F  Speed over the norm of the state",
        "fig1g_information_kde": "1G  Mutual information of each unit, true",
        "fig1h_information_kde_mean": "1H  Mutual information, true, mean over units",
        "fig1g_information": "1G  Mutual information of each unit",
        "fig1h_information_mean": "1H  Mutual information from sublayer to sublayer",
        "massive_activations": "1B  Massive activations",
        "massive_ratio_first_token": "1B  How far the largest unit stands out, first token",
        "massive_ratio_sinks": "1B  How far the largest unit stands out, sinks",
        "massive_ratio_others": "1B  How far the largest unit stands out, others",
        "norm_by_position": "1B  Norm of the stream by position",
        "findings_without_largest": "1  Findings without the largest units",
    },
    "2": {
        "fig2a_portraits": "2A  Portraits of units",
        "fig2a_place_in_null": "2A  A unit's place in its null",
        "fig2b_rotations": "2B  Turns over units, beside the nulls",
        "fig2c_rotations_by_unit": "2C  Turns of all units, beside their nulls",
    },
    "3": {
        "fig3a_shape": "3A  The autoencoder's shape",
        "fig3b_latent_trajectory": "3B  Latent trajectories",
        "fig3c_latent_distance": "3C  Distance between successive latents",
        "fig3d_explained_variance": "3D  Explained variance by sublayer of the autoencoder",
        "loss": "3  Training and validation loss",
    },
    "4": {
        "fig4a_trajectory": "4A  The stream in the plane of its first two components",
        "fig4a_control": "4A  A random walk in the plane of its own components",
        "fig4b_cumulative_variance": "4B  Cumulative explained variance",
        "fig4c_variance_by_sublayer": "4C  Explained variance by sublayer",
        "fig4c_components_needed": "4C  Components for 90 % of a sublayer's variance",
        "fig4c_dimensions": "4C  Dimensions filled at each sublayer",
        "fig4_loadings": "4A  The 3 largest units of each component",
        "fig4_units_of_components": "4A  How many units a component is made of",
    },
    "4D": {
        "fig4d_teleport": "4D  Where teleported points go",
        "fig4d_noise": "4D  Where noised points go",
        "fig4d_swap": "4D  Where swapped points go",
        "recovery_relative": "4D  Distance to the reference, over its norm",
        "recovery_cosine": "4D  Cosine to the reference",
        "recovery_mse": "4D  Mean squared distance in the plane",
        "recovery_readout": "4D  What the points say on their way",
        "skip_kl": "4D  KL of the next token, by the layer left out",
        "skip_perplexity": "4D  Change of perplexity, by the layer left out",
        "swap_layers_kl": "4D  KL of the next token, by the layer exchanged with the next",
        "swap_layers_perplexity": "4D  Change of perplexity, by the layer exchanged with the next",
    },
    "S": {
        "readout_kl": "How far the readout is from the end",
        "readout_agreement": "Agreement with the final top token",
        "readout_entropy": "Entropy of the readout",
        "readout_probability": "Probability of the final top token",
        "readout_rank": "Rank of the final top token",
        "readout_committed": "Sequences that have committed",
        "curvature": "Angle between successive steps",
        "curvature_tokens": "Angle over tokens",
        "dimension_twonn": "Intrinsic dimension, TwoNN",
        "dimension_mle": "Intrinsic dimension, maximum likelihood",
        "dimension_participation": "Participation ratio",
        "dimension_components_90": "Components for 90 % of the variance",
        "dimension_effective_rank": "Effective rank",
        "dimension_matrix_entropy": "Matrix entropy",
        "similarity_map": "Similarity of sublayers",
        "similarity_adjacent": "Similarity of successive sublayers",
        "similarity_with_main": "Similarity with original text",
        "phases": "Phases over depth",
        "by_position": "Curves by the token's position",
    },
    "G": {
        f"groups_{key}{more}": f"{head}: {words}"
        for path, (_, key, words) in BY_GROUP.items()
        if path not in SINGLE
        for more, head in {"": "By group", "_difference": "Difference between groups"}.items()
    },
    "J": {
        "jacobian_eigenvalues": "Eigenvalues of one text's Jacobians",
        "jacobian_antisymmetric": "Antisymmetric share of the update",
        "jacobian_henrici": "Departure from normality of J",
        "jacobian_henrici_update": "Departure from normality of the update",
        "jacobian_gain": "Largest gain of each sublayer",
        "jacobian_expanding": "Share of directions that grow",
        "jacobian_complex_share": "Share of complex eigenvalues",
        "jacobian_exponents": "Lyapunov exponents of the whole depth",
        "jacobian_exponents_relative": "Lyapunov exponents of the whole depth less the growth of the norm",
        "jacobian_participation": "Directions that carry the product to the end",
        "jacobian_linear_range": "Where a displacement is linear",
    },
}

# What a table is, and whose runs have it; train.py has that of massive units where analysis.on_train is on.
TABLES = {
    "findings": ("The paper's claims beside what was measured", ("analyze",)),
    "by_group": ("The findings by group of sequences", ("analyze",)),
    "massive_units": ("Massive units", ("analyze", "train")),
    "units_by_rotation": ("Units by rotation effect size", ("analyze",)),
    "perturbation_points": ("Perturbation points", ("perturb",)),
    "layer_effects": ("Layers left out or exchanged", ("perturb",)),
}

SUFFIXES = ("_low", "_high", "_null", "_without_massive")
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEAR = 0.06  # of a quarter, so that layers 7 of 16 and 15 of 32 share the slot of one half


def curves_of(measure: str) -> Curves:
    """The panel of a measure; ``KeyError`` for one that is not in the table."""
    for found in CURVES:
        if found.measure == measure:
            return found
    raise KeyError(f"measure is {measure!r}, but must be one of {', '.join(c.measure for c in CURVES)}.")


def section(figure: str) -> str:
    """The section of a figure: ``4D`` has one of its own, the others go by their number."""
    return SECTIONS[figure if figure in SECTIONS else re.sub(r"\D.*", "", figure)]


def depth_slots(layers: Sequence[int], n_layers: int) -> dict[int, str]:
    """Where in depth each layer is, as keys have it: ``depth_0.50``, the same for models of different depth.

    The layer that is nearest to a quarter of the depth, and near it, has its name; any other has its own depth.
    """
    depth = {layer: layer / max(n_layers - 1, 1) for layer in layers}
    slots = {layer: f"depth_{at:.2f}" for layer, at in depth.items()}
    for quarter in QUARTERS:
        nearest = min(depth, key=lambda layer: abs(depth[layer] - quarter), default=None)
        if nearest is not None and abs(depth[nearest] - quarter) <= NEAR:
            slots[nearest] = f"depth_{quarter:.2f}"
    taken: set[str] = set()
    for layer in sorted(layers, key=lambda layer: min(abs(depth[layer] - q) for q in QUARTERS)):
        if slots[layer] in taken:  # two layers of a deep model may round alike
            slots[layer] = f"depth_{depth[layer]:.4f}"
        taken.add(slots[layer])
    return slots
