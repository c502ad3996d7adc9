"""The keys under which W&B gets what a run found: one table, from which curves, charts and layouts are made.

A curve over depth is logged twice, as ``sublayer/<measure>/<series>`` against the step ``sublayer`` and as
``depth/<measure>/<series>`` against ``depth`` (0 to 1), so that models of different depth overlay. One panel is one
measure: all keys with its prefix. A series is a condition (``original``, ``untrained``), in train.py ``autoencoder`` or
``pca``, in perturb.py a layer and what was put in there (``layer08_teleport``); what belongs to a curve is a series
too: ``<series>_low`` and ``<series>_high`` (95 % interval, unless the panel says otherwise), ``<series>_null`` (null or
floor), ``<series>_without_massive``. The same curves, complete, are the chart ``charts/<measure>``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CURVE = "sublayer/{measure}/{series}"
DEPTH = "depth/{measure}/{series}"
CHART = "charts/{measure}"
TABLE = "tables/{name}"
IMAGE = "figures/{name}"


class Panel(NamedTuple):
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


PANELS = (
    Panel("1B", "Share of active units", "active_share", "share of units", "analyze"),
    Panel("1B", "Participation of units in the mean", "participation", "share of units", "analyze"),
    Panel("1C", "Correlation from sublayer to sublayer", "correlation", "mean correlation over units", "analyze"),
    Panel("1E", "Cosine of successive states", "cosine", "cosine", "analyze"),
    Panel("1F", "Speed", "speed", "speed (activation units)", "analyze"),
    Panel("1F", "Speed over the norm", "relative_speed", "step / norm of the state", "analyze"),
    Panel("1H", "Mutual information from sublayer to sublayer", "mutual_information",
          "mean mutual information over units (nats)", "analyze"),
    Panel("1H", "The paper's sum, as printed (not an information)", "paper_literal", "sum of p log p / (p p)",
          "analyze", log=True),
    Panel("3C", "Distance between successive latents", "latent_distance", "distance of latents", "train",
          interval="± 1 SD over sequences"),
    Panel("3D", "Explained variance by sublayer", "explained_variance", "explained variance", "train"),
    Panel("4C", "Variance that the principal components explain", "components_variance", "explained variance",
          "analyze"),
    Panel("4C", "Components for 90 % of the variance", "components_90", "components", "analyze"),
    Panel("4C", "Dimensions filled", "dimensions", "participation ratio of the variances", "analyze"),
    Panel("4D", "Distance to the reference", "recovery_distance", "distance / norm of the reference", "perturb",
          log=True, interval="95 % interval over prompts"),
    Panel("4D", "Cosine to the reference", "recovery_cosine", "cosine", "perturb",
          interval="95 % interval over prompts"),
)  # fmt: skip

SECTIONS = {
    "1": "Figure 1: the stream over depth",
    "2": "Figure 2: turns of units",
    "3": "Figure 3: the compressing autoencoder",
    "4": "Figure 4A-C: principal components",
    "4D": "Figure 4D: perturbation and recovery",
}

# Interactive figures that are no curves over depth, by the paper's figure: title and the script that logs them.
CHARTS = {
    "mean_activations": ("1B", "Mean activations", "analyze"),
    "correlation_density": ("1D", "Correlation of all pairs of sublayers", "analyze"),
    "portraits": ("2A", "Portraits of units", "analyze"),
    "rotations": ("2B", "Turns over units, beside the nulls", "analyze"),
    "rotations_by_unit": ("2C", "Turns of all units, beside their nulls", "analyze"),
    "latents": ("3B", "Latent trajectories", "train"),
    "loss": ("3", "Training and validation loss", "train"),
    "trajectory": ("4A", "The stream in the plane of two components", "analyze"),
    "cumulative_variance": ("4B", "Cumulative explained variance", "analyze"),
    "plane": ("4D", "Where points go in the plane", "perturb"),
    "layer_kl": ("4D", "KL by the layer that is changed", "perturb"),
    "layer_perplexity": ("4D", "Perplexity by the layer that is changed", "perturb"),
}

# What a table is, and whose runs have it; train.py has that of massive units where analysis.on_train is on.
TABLES = {
    "findings": ("The paper's claims beside what was measured", ("analyze",)),
    "massive_units": ("Massive units", ("analyze", "train")),
    "units_by_rotation": ("Units by rotation effect size", ("analyze",)),
    "perturbation_points": ("Perturbation points", ("perturb",)),
    "layer_effects": ("Layers left out or exchanged", ("perturb",)),
}

SUFFIXES = ("_low", "_high", "_null", "_without_massive")


def panel(measure: str) -> Panel:
    """The panel of a measure; ``KeyError`` for one that is not in the table."""
    for found in PANELS:
        if found.measure == measure:
            return found
    raise KeyError(f"measure is {measure!r}, but must be one of {', '.join(p.measure for p in PANELS)}.")


def section(figure: str) -> str:
    """The section of a figure: ``4D`` has one of its own, the others go by their number."""
    return SECTIONS[figure if figure in SECTIONS else re.sub(r"\D.*", "", figure)]
