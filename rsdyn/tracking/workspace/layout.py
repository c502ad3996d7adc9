"""The workspace: a section for each figure of the paper, and those of findings, training and sweeps."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.expr as expr
import wandb_workspaces.workspaces as ws

from rsdyn.tracking.keys import SCRIPT, SECTIONS
from rsdyn.tracking.workspace import plots

NAME = "Transformer dynamics"
COLUMNS = 3
MAX_RUNS = 20  # W&B's own ten would leave out models for the runs of one sweep

# Runs that broke off have next to nothing to show; one that is going has its losses.
STATES = ("finished", "running")


def workspace(
    project: str, entity: str = "", *, by_model: bool = False, metric: str, script: str | None = None
) -> ws.Workspace:
    """The workspace of ``project``; nothing is sent, and ``entity`` may stay empty until it is saved.

    Args:
        by_model: draw the mean of all runs of a model and script, instead of one line per run.
        metric: the summary's number that sweeps are compared by.
        script: with the sections and runs of this one alone; None for all.
    """
    shown = [expr.Metric("State").isin(list(STATES))]
    if script is not None:
        shown.append(expr.Metric("JobType") == script)
    grouping: list[Any] = [expr.Metric("Group"), expr.Metric("JobType")] if by_model else []
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[section(name, panels) for name, panels in sections(metric, script).items()],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(*shown),
            groupby=grouping,
            pinned_columns=["run:displayName", "run:group", "run:jobType", "run:tags"],
        ),
    )


def sections(metric: str, script: str | None = None) -> dict[str, list]:
    """The sections in their order: what was found, the paper's figures, training, sweeps; of one script or of all."""
    figures = {name: plots.of_figure(number) for number, name in SECTIONS.items() if script in (None, SCRIPT[number])}
    found = {"Findings": plots.of_findings()} if script in (None, "analyze") else {}
    training = {"Training": plots.of_training(), "Sweeps": plots.of_sweeps(metric)} if script in (None, "train") else {}
    return found | figures | training


def section(name: str, panels: list) -> ws.Section:
    """A section that shows all of its panels at once, three in a row."""
    return ws.Section(
        name=name,
        panels=panels,
        is_open=True,
        layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=plots.rows(panels, COLUMNS)),
    )
