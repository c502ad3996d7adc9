"""What each script hands to W&B at its end: curves, panels, tables, the page, its row in the runs table, artifacts.

Results come as the values that were measured; nothing is read back from the run folder but the files that W&B is to
have. ``shared`` are the arguments that all scripts have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsdyn.tracking.artifacts import log_caches, log_checkpoint, log_results, use_checkpoint
from rsdyn.tracking.log import log_curves, log_page, log_panels, log_summary, log_tables

if TYPE_CHECKING:
    from rsdyn.analysis.finding import Finding
    from rsdyn.analysis.results import AnalysisResults, ConditionResults
    from rsdyn.autoencoder.result import Trained
    from rsdyn.figures.panel import Panel
    from rsdyn.perturbation.layers import LayerEffects
    from rsdyn.perturbation.result import Found
    from rsdyn.tracking.logger import RunLogger

# of a summary.json, what tells runs apart in the runs table
HEAD = ("lm", "text", "condition", "n_sublayers", "n_units", "n_sequences", "kind", "space", "n_prompts")


class Shared(NamedTuple):
    """What all scripts show: the logger, the run's folder, its streams, its panels, and whether to make artifacts.

    ``recorded`` is how many sequences of each stream the run recorded, in all its processes.
    """

    logger: RunLogger | None
    folder: Path
    streams: Sequence[Any]
    recorded: Sequence[int]
    panels: Sequence[Panel]
    artifacts: bool


def training(
    shared: Shared,
    *,
    summary: Mapping[str, Any],
    found: Trained,
    measured: ConditionResults | None,
) -> None:
    """A run of train.py: what came of the test, and what was ``measured`` on the side (analysis.on_train)."""
    if shared.logger is None:
        return
    from rsdyn.tracking import analysis as dashboard_analysis
    from rsdyn.tracking import training as dashboard_training

    curves = dashboard_training.curves(found)
    tables = {}
    if measured is not None:
        of = {str(summary["condition"]): measured}
        curves |= dashboard_analysis.curves(of, int(summary["n_units"]))
        if measured.activations is not None:
            tables["massive_units"] = dashboard_analysis.massive_table(of)
    log_curves(shared.logger, curves, summary["n_sublayers"])
    _panels(shared)
    log_tables(shared.logger, tables)
    log_summary(shared.logger, _head(summary) | dashboard_training.summary_numbers(summary, found))
    if shared.artifacts:
        log_caches(shared.logger, shared.streams, shared.recorded)
        log_checkpoint(
            shared.logger, shared.folder / summary["checkpoint"], widths=summary["widths"], lm=summary["lm"],
            standardise=summary["standardise"], epoch=summary["best_epoch"], val_loss=summary["best_val_loss"],
        )  # fmt: skip
        log_results(shared.logger, shared.folder, script="train")


def analysis(
    shared: Shared, *, summary: Mapping[str, Any], table: Sequence[Finding], results: AnalysisResults | None
) -> None:
    """A run of analyze.py: what was measured of streams, unless it was Jacobians alone, and the findings."""
    if shared.logger is None:
        return
    from rsdyn.tracking import analysis as dashboard_analysis

    numbers: dict[str, Any] = {}
    tables = {}
    if results is not None:
        log_curves(shared.logger, dashboard_analysis.curves(results.conditions, results.n_units), results.n_sublayers)
        tables = dashboard_analysis.tables(table, results)
        numbers = {"findings": dashboard_analysis.summary_numbers(table)}
        if results.by_group is not None:
            numbers["by_group"] = dashboard_analysis.group_numbers(results.by_group)
        if results.main.flags.known:
            numbers["n_massive_units"] = {c: len(r.flags.massive_units) for c, r in results.conditions.items()}
    _panels(shared)
    if "jacobian" in summary:
        tables |= {"jacobian_claims": dashboard_analysis.claims_table(summary["jacobian"])}
        numbers |= {"jacobian": {c["key"]: c["values"]["full"]["value"] for c in summary["jacobian"]["claims"]}}
    log_tables(shared.logger, tables)
    log_summary(shared.logger, _head(summary) | numbers)
    if shared.artifacts:
        log_caches(shared.logger, shared.streams, shared.recorded)
        log_results(shared.logger, shared.folder, script="analyze")


def perturbation(shared: Shared, *, summary: Mapping[str, Any], found: Found, checkpoint: str | None) -> None:
    """A run of perturb.py: what it found, and the ``checkpoint`` of the autoencoder in whose plane it was done."""
    if shared.logger is None:
        return
    from rsdyn.tracking import perturbation as dashboard_perturbation

    n_layers = summary["n_sublayers"] // summary["sites_per_layer"]
    log_curves(shared.logger, dashboard_perturbation.curves(found, n_layers), summary["n_sublayers"])
    _panels(shared)
    log_tables(shared.logger, {"perturbation_points": dashboard_perturbation.points_table(found)})
    numbers = {
        "recovery": dashboard_perturbation.summary_numbers(found, n_layers),
        "beyond_still": dashboard_perturbation.beyond_still_numbers(found, n_layers),
    }
    log_summary(shared.logger, _head(summary) | numbers)
    if shared.artifacts:
        log_caches(shared.logger, shared.streams, shared.recorded)
        if checkpoint is not None:
            use_checkpoint(shared.logger, Path(checkpoint).expanduser().absolute())
        log_results(shared.logger, shared.folder, script="perturb")


def layer_effects(shared: Shared, *, summary: Mapping[str, Any], found: LayerEffects) -> None:
    """A run of perturb.py that left layers out or exchanged them."""
    if shared.logger is None:
        return
    from rsdyn.tracking import perturbation as dashboard_perturbation

    _panels(shared)
    log_tables(shared.logger, {"layer_effects": dashboard_perturbation.effects_table(found)})
    log_summary(shared.logger, _head(summary) | {found.kind: dashboard_perturbation.effects_numbers(found)})
    if shared.artifacts:
        log_results(shared.logger, shared.folder, script="perturb")


def _panels(shared: Shared) -> None:
    log_panels(shared.logger, shared.panels, shared.folder / "figures")
    log_page(shared.logger, shared.folder / "report.html")


def _head(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in HEAD if key in summary} | {"seconds": summary["seconds"]["total"]}
