"""Panels of W&B for what runs log: curves over depth, figures, tables (keys: ``rsdyn/tracking/keys.py``).

Each function gives panels in the order in which they are read.
"""

from __future__ import annotations

import math

import wandb_workspaces.reports.v2 as wr

from rsdyn.tracking.keys import CHART, CURVE, CURVES, IMAGE, PANELS, SECTIONS, TABLE, TABLES, Curves, section

# The series that stand beside each other when models are compared.
SERIES = {
    "analyze": ("original", "token_shuffled", "shuffled_keep_last", "untrained"),
    "train": ("autoencoder", "pca"),
    "perturb": (),
}
ALONE = {"latent_distance": ("autoencoder",)}  # measures that have fewer
OF_PERTURB = "[0-9]+_(teleport|noise|swap|stays_put)$"  # which slots of depth these are is a setting

# The section of a table; what stands in none of the figures' sections is in that of the findings.
TABLE_SECTIONS = {
    "by_group": "G",
    "massive_units": "1",
    "units_by_rotation": "2",
    "perturbation_points": "4D",
    "layer_effects": "4D",
}

LOSSES = ("train/loss", "val/loss")
ERROR = "val/mse"
STEP = "trainer/global_step"

# What configs/sweep-cae*.yaml vary, and whether its values are spread over orders of magnitude.
SWEPT = {
    "cae.layers": False, "cae.count": False, "cae.bottleneck": False, "cae.standardise": False, "cae.lr": True,
}  # fmt: skip


def curves(of: Curves) -> wr.LinePlot:
    """A measure against depth, where models overlay: the series that are compared, and their intervals by pattern."""
    return wr.LinePlot(
        title=f"{of.figure}  {of.title}",
        x="depth",
        y=[CURVE.format(measure=of.measure, series=series) for series in ALONE.get(of.measure) or SERIES[of.script]],
        metric_regex="^" + CURVE.format(measure=of.measure, series=OF_PERTURB) if of.script == "perturb" else None,
        range_x=(0.0, 1.0),
        title_x="depth (0 to 1)",
        title_y=of.ylabel,
        log_y=True if of.log else None,
        smoothing_type="none",  # a curve over depth is no noisy loss
    )


def panel(key: str, title: str) -> wr.MediaBrowser:
    """A panel of :mod:`rsdyn.figures`: its interactive chart, and its picture as it lies in the run folder."""
    return wr.MediaBrowser(title=title, media_keys=[CHART.format(key=key), IMAGE.format(key=key)])


def table(name: str) -> wr.WeavePanelSummaryTable:
    """A table, of all runs that are shown."""
    return wr.WeavePanelSummaryTable(table_name=TABLE.format(name=name))


def of_figure(number: str) -> list:
    """The panels of a section of ``rsdyn/tracking/keys.py``: curves over depth, then figures, then tables."""
    lines = [curves(of) for of in CURVES if section(of.figure) == SECTIONS[number]]
    whole = [wr.MediaBrowser(title="Figure 1 as one", media_keys=[IMAGE.format(key="fig1")])] if number == "1" else []
    shown = [panel(key, title) for key, title in PANELS[number].items()]
    return [*lines, *whole, *shown, *(table(name) for name in TABLES if TABLE_SECTIONS.get(name) == number)]


def of_findings() -> list:
    """What was found, and what differs between the runs."""
    found = [table(name) for name in TABLES if name not in TABLE_SECTIONS]
    return [*found, wr.RunComparer(diff_only="split")]


def of_training() -> list:
    """The panels of losses."""
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
