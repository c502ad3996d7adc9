"""What each script hands to W&B at its end: curves, charts, tables, pictures, its row in the runs table, artifacts.

Everything is on disk by then. ``shared`` are the arguments that all scripts have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsdyn.tracking.artifacts import log_caches, log_checkpoint, log_results, use_checkpoint
from rsdyn.tracking.keys import PANELS
from rsdyn.tracking.log import Curves, log_charts, log_curves, log_figures, log_summary, log_tables

if TYPE_CHECKING:
    from rsdyn.analysis.finding import Finding
    from rsdyn.perturbation.layers import LayerEffects
    from rsdyn.perturbation.result import Found
    from rsdyn.tracking.logger import RunLogger

# of a summary.json, what tells runs apart in the runs table
HEAD = ("lm", "text", "condition", "n_sublayers", "n_units", "n_sequences", "kind", "space", "n_prompts")


class Shared(NamedTuple):
    """What all scripts show: the logger, the run's folder, its streams, its pictures, and whether to make artifacts.

    ``recorded`` is how many sequences of each stream the run recorded, in all its processes.
    """

    logger: RunLogger | None
    folder: Path
    streams: Sequence[Any]
    recorded: Sequence[int]
    pictures: Sequence[str]
    artifacts: bool


def training(
    shared: Shared, *, summary: Mapping[str, Any], results: Mapping[str, Any], measured: Mapping[str, Any]
) -> None:
    """A run of train.py: ``results`` of the test, and what was ``measured`` on the side (analysis.on_train)."""
    if shared.logger is None:
        return
    from rsdyn.tracking import analysis as dashboard_analysis
    from rsdyn.tracking import training as dashboard_training
    from rsdyn.tracking.interactive import training_charts

    curves = dashboard_training.curves(results)
    tables = {}
    if measured:
        condition = str(summary["condition"])
        curves |= dashboard_analysis.curves({condition: measured})
        if "mean" in measured:
            tables["massive_units"] = dashboard_analysis.massive_table(
                {condition: (measured["mean"], measured["massive_units"])}
            )
    _curves(shared, summary, curves)
    log_charts(shared.logger, training_charts(shared.folder))
    log_tables(shared.logger, tables)
    log_figures(shared.logger, shared.folder / "figures", shared.pictures)
    log_summary(shared.logger, _head(summary) | dashboard_training.summary_numbers(summary))
    if shared.artifacts:
        log_caches(shared.logger, shared.streams, shared.recorded)
        log_checkpoint(
            shared.logger, shared.folder / summary["checkpoint"], widths=summary["widths"], lm=summary["lm"],
            standardise=summary["standardise"], epoch=summary["best_epoch"], val_loss=summary["best_val_loss"],
        )  # fmt: skip
        log_results(shared.logger, shared.folder, script="train")


def analysis(
    shared: Shared,
    *,
    summary: Mapping[str, Any],
    table: Sequence[Finding],
    results: Mapping[str, Mapping[str, Any]],
    units: Sequence[int],
) -> None:
    """A run of analyze.py: ``results`` by condition, the findings, and the ``units`` whose portraits are drawn."""
    if shared.logger is None:
        return
    from rsdyn.tracking import analysis as dashboard_analysis
    from rsdyn.tracking.interactive import analysis_charts

    _curves(shared, summary, dashboard_analysis.curves(results))
    log_charts(shared.logger, analysis_charts(shared.folder, units))
    tables = dashboard_analysis.tables(table, results) if table else {}
    numbers = {"findings": dashboard_analysis.summary_numbers(table)} if table else {}
    if "jacobian" in summary:
        tables |= {"jacobian_claims": dashboard_analysis.claims_table(summary["jacobian"])}
        numbers |= {"jacobian": {c["key"]: c["values"]["full"]["value"] for c in summary["jacobian"]["claims"]}}
    log_tables(shared.logger, tables)
    log_figures(shared.logger, shared.folder / "figures", shared.pictures)
    counts = {f"n_massive_units/{c}": len(r["massive_units"]) for c, r in results.items()}
    log_summary(shared.logger, _head(summary) | counts | numbers)
    if shared.artifacts:
        log_caches(shared.logger, shared.streams, shared.recorded)
        log_results(shared.logger, shared.folder, script="analyze")


def perturbation(shared: Shared, *, summary: Mapping[str, Any], found: Found, checkpoint: str | None) -> None:
    """A run of perturb.py: what it found, and the ``checkpoint`` of the autoencoder in whose plane it was done."""
    if shared.logger is None:
        return
    from rsdyn.tracking import perturbation as dashboard_perturbation
    from rsdyn.tracking.interactive import perturbation_charts

    _curves(shared, summary, dashboard_perturbation.curves(found))
    log_charts(shared.logger, perturbation_charts(shared.folder))
    log_tables(shared.logger, {"perturbation_points": dashboard_perturbation.points_table(found)})
    log_figures(shared.logger, shared.folder / "figures", shared.pictures)
    numbers = {
        "recovery": dashboard_perturbation.summary_numbers(found),
        "beyond_still": dashboard_perturbation.beyond_still_numbers(found),
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
    from rsdyn.tracking.interactive import effects_charts

    log_charts(shared.logger, effects_charts(shared.folder))
    log_tables(shared.logger, {"layer_effects": dashboard_perturbation.effects_table(found)})
    log_figures(shared.logger, shared.folder / "figures", shared.pictures)
    log_summary(shared.logger, _head(summary) | {found.kind: dashboard_perturbation.effects_numbers(found)})
    if shared.artifacts:
        log_results(shared.logger, shared.folder, script="perturb")


def _curves(shared: Shared, summary: Mapping[str, Any], curves: Curves) -> None:
    """The curves, and the chart of each measure, which is complete without a saved layout."""
    from rsdyn.report.plots import sublayer_names
    from rsdyn.tracking.charts import curve_charts

    log_curves(shared.logger, curves, summary["n_sublayers"])
    names = sublayer_names(summary["n_sublayers"], summary["sites_per_layer"])
    log_charts(shared.logger, curve_charts(curves, PANELS, names))


def _head(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in HEAD if key in summary} | {"seconds": summary["seconds"]["total"]}
