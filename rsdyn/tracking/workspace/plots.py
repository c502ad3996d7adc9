"""Panels of W&B for what runs log: curves over depth, charts, images, tables (keys: ``rsdyn/tracking/keys.py``).

Each function gives panels in the order in which they are read, three of them filling a row.
"""

from __future__ import annotations

import math

import wandb_workspaces.reports.v2 as wr

from rsdyn.tracking.keys import CHART, CHARTS, CURVE, DEPTH, IMAGE, PANELS, SECTIONS, TABLE, TABLES, Panel, section

# The series that stand beside each other when models are compared.
SERIES = {"analyze": ("original", "token_shuffled", "shuffled_keep_last", "untrained"), "train": ("autoencoder", "pca")}
ALONE = {"latent_distance": ("autoencoder",)}  # measures that have fewer
OF_PERTURB = "layer[0-9]+_(teleport|noise|swap)$"  # which layers these are depends on the model

# The pictures of each figure: what they show, and the names of their files; a run has one of several names.
IMAGES = (
    ("1", "Findings without the largest units", ("findings_without_largest",)),
    ("1B", "Mean activations", ("fig1b_mean_activations",)),
    ("1B", "Share of active units", ("fig1b_density",)),
    ("1C", "Correlation of each unit", ("fig1c_correlation",)),
    ("1C", "Correlation, mean over units", ("fig1c_correlation_mean",)),
    ("1D", "Correlation of all pairs of sublayers", ("fig1d_correlation_density",)),
    ("1E", "Cosine of successive states", ("fig1e_cosine",)),
    ("1F", "Speed", ("fig1f_speed",)),
    ("1F", "Speed over the norm", ("fig1f_relative_speed",)),
    ("1G", "Mutual information of each unit", ("fig1g_information",)),
    ("1H", "Mutual information, mean over units", ("fig1h_information_mean",)),
    ("2A", "Portraits of units", ("fig2a_portraits",)),
    ("2B", "Turns over units, beside the nulls", ("fig2b_rotations",)),
    ("2C", "Turns of all units, steps shuffled in windows", ("fig2c_rotations_by_unit_increment_shuffle_windowed",)),
    ("2C", "Turns of all units, the paper's null", ("fig2c_rotations_by_unit_layer_shuffle",)),
    ("3", "Training and validation loss", ("loss",)),
    ("3B", "Latent trajectories", ("fig3b_latent_trajectory",)),
    ("3C", "Distance between successive latents", ("fig3c_latent_distance",)),
    ("3D", "Explained variance by sublayer", ("fig3d_explained_variance",)),
    ("4", "Loadings of the components", ("fig4_loadings",)),
    ("4A", "The stream in the plane of two components", ("fig4a_trajectory",)),
    ("4B", "Cumulative explained variance", ("fig4b_cumulative_variance",)),
    ("4C", "Variance that the principal components explain", ("fig4c_variance_by_sublayer",)),
    ("4C", "Components for 90 % of the variance", ("fig4c_components_needed",)),
    ("4D", "Where points go in the plane", ("fig4d_teleport", "fig4d_noise", "fig4d_swap")),
    ("4D", "Distance to the reference", ("recovery_relative",)),
    ("4D", "Cosine to the reference", ("recovery_cosine",)),
    ("4D", "MSE in the plane, beside points that do not move", ("recovery_mse",)),
    ("4D", "KL by the layer that is changed", ("skip_kl", "swap_layers_kl")),
    ("4D", "Perplexity by the layer that is changed", ("skip_perplexity", "swap_layers_perplexity")),
)

# The section of a table; what stands in none of the figures' sections is in that of the findings.
TABLE_SECTIONS = {"massive_units": "1", "units_by_rotation": "2", "perturbation_points": "4D", "layer_effects": "4D"}

LOSSES = ("train/loss", "val/loss")
ERROR = "val/mse"
STEP = "trainer/global_step"

# What configs/sweep-cae*.yaml vary, and whether its values are spread over orders of magnitude.
SWEPT = {
    "cae.layers": False, "cae.count": False, "cae.bottleneck": False, "cae.standardise": False, "cae.lr": True,
}  # fmt: skip


def curves(panel: Panel) -> list[wr.LinePlot]:
    """A measure against the sublayer, with all that belongs to it, and against depth, where models overlay.

    The second has the bare series alone: intervals and nulls of several models on top of each other could not be read.
    """
    title = f"{panel.figure}  {panel.title}"
    log = True if panel.log else None
    main = ALONE.get(panel.measure) or SERIES.get(panel.script, ())
    by_sublayer = wr.LinePlot(
        title=title,
        x="sublayer",
        y=[CURVE.format(measure=panel.measure, series=series) for series in main],
        metric_regex="^" + CURVE.format(measure=panel.measure, series=""),
        title_x="sublayer",
        title_y=panel.ylabel,
        log_y=log,
        smoothing_type="none",  # a curve over depth is no noisy loss
    )
    by_depth = wr.LinePlot(
        title=f"{title}, over depth",
        x="depth",
        y=[DEPTH.format(measure=panel.measure, series=series) for series in main],
        metric_regex=None if main else "^" + DEPTH.format(measure=panel.measure, series=OF_PERTURB),
        range_x=(0.0, 1.0),
        title_x="depth (0 to 1)",
        title_y=panel.ylabel,
        log_y=log,
        smoothing_type="none",
    )
    return [by_sublayer, by_depth]


def chart(name: str, figure: str, title: str) -> wr.MediaBrowser:
    """An interactive chart (Plotly), which W&B shows among the media."""
    return wr.MediaBrowser(title=f"{figure}  {title}, interactive", media_keys=[CHART.format(measure=name)])


def image(figure: str, title: str, names: tuple[str, ...]) -> wr.MediaBrowser:
    """A picture of a figure, as it lies in the run folder."""
    return wr.MediaBrowser(title=f"{figure}  {title}, picture", media_keys=[IMAGE.format(name=name) for name in names])


def table(name: str) -> wr.WeavePanelSummaryTable:
    """A table, of all runs that are shown."""
    return wr.WeavePanelSummaryTable(table_name=TABLE.format(name=name))


def of_figure(number: str) -> list:
    """The panels of a section of ``rsdyn/tracking/keys.py``: a row a measure, then charts and pictures, then tables."""
    panels: list = []
    for panel in PANELS:
        if section(panel.figure) == SECTIONS[number]:
            panels += [*curves(panel), chart(panel.measure, panel.figure, panel.title)]
    for name, (figure, title, _) in CHARTS.items():
        if section(figure) == SECTIONS[number]:
            panels.append(chart(name, figure, title))
    panels += [image(*picture) for picture in IMAGES if section(picture[0]) == SECTIONS[number]]
    return panels + [table(name) for name in TABLES if TABLE_SECTIONS.get(name) == number]


def of_findings() -> list:
    """What was found, and what differs between the runs."""
    found = [table(name) for name in TABLES if name not in TABLE_SECTIONS]
    return [*found, wr.RunComparer(diff_only="split")]


def of_training() -> list:
    losses = wr.LinePlot(title="Loss", x=STEP, y=list(LOSSES), title_x="step", title_y="loss", log_y=True)
    batches = wr.LinePlot(
        title="Loss of each batch", x=STEP, y=["train/batch_loss"], title_x="step", title_y="loss", log_y=True
    )
    error = wr.LinePlot(
        title="Validation error in raw activations", x=STEP, y=[ERROR], title_x="step", title_y="MSE", log_y=True
    )
    return [losses, batches, error]


def of_sweeps(metric: str) -> list:
    """What a sweep of the autoencoder varied, beside what came of it, ``metric`` of the summary."""
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), log=log or None) for key, log in SWEPT.items()]
    result = wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(metric))
    return [
        wr.ParallelCoordinatesPlot(title="What was varied, and what came of it", columns=[*columns, result]),
        wr.ParameterImportancePlot(with_respect_to=metric),
        wr.ScatterPlot(
            title="Learning rate",
            x=wr.Config("cae.lr"),
            y=wr.SummaryMetric(metric),
            log_x=True,
        ),
    ]


def rows(panels: list, columns: int = 3) -> int:
    """How many rows so many panels fill."""
    return math.ceil(len(panels) / columns)
