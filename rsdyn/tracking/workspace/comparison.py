"""The report template: the figures' panels for chosen runs, with the numbers of each script beside them.

A report is W&B's page that people write on: it opens with what was chosen, and each section says what a reader may and
may not conclude. Each section has the runs of the script that measured it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr

from rsdyn.tracking.keys import SCRIPT, SECTIONS
from rsdyn.tracking.workspace import plots
from rsdyn.tracking.workspace.layout import STATES

TITLE = "Transformer dynamics compared"  # without a sign that its address would carry
WIDTH, PANEL = 24, (8, 6)  # of a grid of panels, and of one panel, in W&B's units

# What to read a section for.
NAMES = {"analyze": "Measured (analyze.py)", "train": "Trained (train.py)", "perturb": "Perturbed (perturb.py)"}
READING = {
    "1": "Shuffled tokens and the untrained model are controls: what they show too is not owed to the text, or not to "
    "the training. Bands are 95 % intervals over sequences. Mutual information is above the floor that pairs of "
    "different sequences give, or it is none; it depends on their number: compare runs of equal analysis.samples "
    "and analysis.keep.",
    "2": "Turns count how jagged a path is: a random walk makes as many as the paper reports, and the paper's null "
    "model rejects nearly every walk. Look at the steps shuffled in windows, which keep a walk a walk.",
    "3": "An autoencoder that PCA with as many components beats has not learnt the manifold. On raw activations a few "
    "massive units and the late layers own the loss, so explained variance can rise with depth from that alone.",
    "4": "The first two components of any smooth random walk trace a curve. Fewer components in later layers means "
    "something only where the controls do not do the same.",
    "S": "Steps that have nothing to do with each other are at a right angle. A running sum resembles itself, trained "
    "or not. Early sublayers are read in the last one's basis, so a large KL there may be the lens'. Any curve can be "
    "cut into phases: look at p.",
    "G": "Groups of data.group_column. A difference is judged by its own interval and p, not by two bands that "
    "overlap, and by p after Holm's adjustment where many findings are looked at. What depends on how many sequences "
    "there are is compared at equal N.",
    "J": "Nearly all eigenvalues of a random matrix are complex, and any network whose norm grows has directions that "
    "shrink against it: read each curve beside its nulls.",
    "4D": "Norms grow with depth, so the cosine and the relative distance improve without any contraction. Compare "
    "with the controls at the same layer, and first with points that stay put: the reference comes to them by itself. "
    "Then random writes, random directions, a real state swapped in, attention frozen.",
}

# Of the findings, those that tell two models apart at a glance; the table of all of them stands below.
FINDINGS = (
    "density_trend",
    "correlation_first",
    "correlation_trend",
    "cosine_trend",
    "speed_trend",
    "information_trend",
    "turns",
    "turns_of_random_walk",
    "turns_innovation_shuffle_p",
    "dimensions_trend",
)
RUN_COLUMNS = ("run:group", "run:tags", "run:createdAt")
SLOTS = ("0.00", "0.25", "0.50", "0.75", "1.00")  # of depth, which perturb.py takes by default


def comparison(project: str, entity: str = "", runs: Sequence[str] = ()) -> wr.Report:
    """The report on ``runs``, by their ids (the last part of a run's address), or on all finished runs without any.

    With an ``entity`` each set of runs names its project, which asks the server for it when the report is made into
    JSON; without one the runs are those of the report's own project, and nothing is asked.
    """
    blocks: list[Any] = [
        wr.TableOfContents(),
        wr.P(
            "Choose runs with the eye beside their names, or name them when this report is made: "
            "python -m rsdyn.tracking.workspace --runs ID ID. Models of different depth overlay over depth from 0 to 1."
        ),
        wr.H2("Runs"),
        grid([wr.RunComparer(diff_only="split")], list(NAMES), project, entity, runs, wide=True),
        wr.H2("Findings"),
        grid(plots.of_findings()[:-1], ["analyze"], project, entity, runs, wide=True),
    ]
    for number, name in SECTIONS.items():
        script = SCRIPT[number]
        blocks += [wr.H2(name), wr.P(READING[number])]
        blocks.append(grid(plots.of_figure(number), [script], project, entity, runs))
    return wr.Report(
        project=project,
        entity=entity,
        title=TITLE,
        description="The residual stream as a trajectory over depth: the paper's figures, beside controls.",
        blocks=blocks,
        width="fluid",
    )


def grid(
    panels: list, scripts: Sequence[str], project: str, entity: str, runs: Sequence[str], *, wide: bool = False
) -> wr.PanelGrid:
    """Panels of the runs of ``scripts``, three in a row, or each over the whole width."""
    w, h = (WIDTH, 2 * PANEL[1]) if wide else PANEL
    across = WIDTH // w
    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=w * (i % across), y=h * (i // across), w=w, h=h)
    return wr.PanelGrid(panels=panels, runsets=[runset(script, project, entity, runs) for script in scripts])


def runset(script: str, project: str, entity: str, runs: Sequence[str]) -> wr.Runset:
    """The chosen runs of one script, or its finished ones, with the columns that say what came of them."""
    chosen = expr.Metric("ID").isin(list(runs)) if runs else expr.Metric("State").isin(list(STATES))
    return wr.Runset(
        entity=entity,
        project=project if entity else "",
        name=NAMES[script],
        filters=expr.And(expr.Metric("JobType") == script, chosen),
        pinned_columns=["run:displayName"],
        visible_columns=columns(script),
        lock_columns=True,
    )


def columns(script: str) -> list[str]:
    """The columns of the runs table: what was run, then what came of it, by the keys of the run's summary."""
    settings, numbers = {
        "analyze": (
            ("data.value.positions", "analysis.value.samples"),
            [f"findings/{key}/original" for key in FINDINGS],
        ),
        "train": (
            ("data.value.condition", "cae.value.standardise", "cae.value.bottleneck", "cae.value.layers"),
            [f"test/{name}_{of}" for name in ("r2", "r2_without_massive") for of in ("cae", "pca")]
            + ["test/r2_cae_raw", "test/r2_pca_raw", "test/test_mse"],
        ),
        "perturb": (
            ("perturb.value.kind", "perturb.value.off_plane", "perturb.value.space"),
            [f"recovery/depth_{slot}/teleport/nearer" for slot in SLOTS]
            + [f"beyond_still/depth_{slot}/nearer" for slot in SLOTS],
        ),
    }[script]
    return [*RUN_COLUMNS, *(f"config:{key}" for key in settings), *(f"summary:{key}" for key in numbers)]
