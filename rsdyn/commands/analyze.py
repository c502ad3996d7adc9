"""Measure the residual stream as a dynamical system: the paper's measures, with null models (paper 2.2-2.6, 2.8).

python analyze.py                                             the embedded model and text, with their controls
python analyze.py analysis.measures=[correlation,cosine] analysis.samples=500
python analyze.py analysis.measures=[jacobian]                derivatives over depth, against nulls (arXiv 2605.14258)
python analyze.py --config paper lm.name=meta-llama/Llama-3.1-8B trainer.devices=4
python analyze.py --help
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from rsdyn import figures
from rsdyn.analysis import jacobian_table
from rsdyn.analysis import measures as analysis
from rsdyn.analysis.checks import check_settings, streams_wanted
from rsdyn.analysis.findings import findings
from rsdyn.analysis.flat import flat_results, typed_results
from rsdyn.analysis.jacobians import JacobianResult, claims
from rsdyn.analysis.left_out import as_json as left_out_json
from rsdyn.analysis.left_out import as_markdown as left_out_markdown
from rsdyn.analysis.left_out import without_largest
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.results import AnalysisResults
from rsdyn.analysis.seeds import with_seeds
from rsdyn.analysis.settings import JACOBIAN
from rsdyn.analysis.stored import flatten
from rsdyn.analysis.streams import compare_streams, measures_of
from rsdyn.analysis.summary import in_words, numbers_of
from rsdyn.analysis.table import as_json, as_markdown, as_text
from rsdyn.commands.jacobians import check_continues, measure_jacobians
from rsdyn.errors import UserError
from rsdyn.figures import static
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.of_analysis import panels, portrait_units
from rsdyn.files import write_results, write_text
from rsdyn.report import write_report
from rsdyn.run.opening import (
    Source,
    find_source,
    last_tokens,
    make_stream,
    make_trainer,
    open_stream,
    say_positions,
    start_records,
)
from rsdyn.run.progress import ProbeProgress, stage_bar
from rsdyn.run.script import Run, run_script
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule
from rsdyn.tracking import show


def analyze(run: Run) -> None:
    """Text, language models, streams; a probe through each; results, null models, findings; figures, numbers, W&B."""
    config: Any = run.config
    settings, seed = config.analysis, config.seed
    L.seed_everything(seed, verbose=False)
    source = find_source(run)
    measures = [m for m in settings.measures if m != JACOBIAN]
    if not measures:
        analyze_jacobians(run, source)
        return
    if JACOBIAN in settings.measures:
        check_continues(run, source)
    wanted = {w.name: w for w in streams_wanted(settings, source.lm.n_parameters())}  # the original first
    streams = {
        w.name: open_stream(
            run, source, w.condition, samples=settings.samples, untrained_seed=w.untrained_seed, name=w.name
        )
        for w in wanted.values()
    }
    first = next(iter(streams.values()))
    sites = len(source.lm.site_names)
    n_samples = min(settings.samples or first.n_sequences, first.n_sequences)
    check_settings(
        settings,
        n_sequences=n_samples,
        n_trajectories=first.n_trajectories(0, n_samples),
        n_sublayers=first.n_sublayers,
        n_units=first.n_units,
        sites_per_layer=sites,
    )
    say_positions(run, first, n_samples)
    start_records(run, source, streams)
    groups = sequence_groups(source.sequences, n_samples, resample=settings.resample)
    run.say(
        f"Measuring {', '.join(settings.measures)} on the first {n_samples} sequences; intervals leave out "
        f"{groups.words()}"
    )

    clock = Clock(run.started)
    probes: dict[str, ResidualStreamProbe] = {}
    results: dict[str, dict[str, Any]] = {}
    n_recorded: list[int] = []  # of each stream, in all processes
    run.kept = lambda: _kept(streams, settings.samples)
    for condition, stream in streams.items():
        probe = ResidualStreamProbe(
            n_sublayers=stream.n_sublayers,
            n_units=stream.n_units,
            measures=measures,
            keep=settings.keep,
            components=settings.components,
            groups=groups,
            bar=stage_bar,
            name=condition,
            largest=next(iter(probes.values())).largest if probes else None,  # one set for all conditions
            last_token=last_tokens(stream),
            sites_per_layer=sites,
        )
        progress = ProbeProgress(condition)
        datamodule = TrajectoryDataModule(
            stream, samples=settings.samples, passes=probe.n_passes, on_record=progress.recorded
        )
        met = L.pytorch.callbacks.LambdaCallback(setup=lambda *_, **__: clock.done("start"))  # all processes are there
        trainer = make_trainer(run, [progress, met])
        datamodule.set_process(0, trainer.world_size)  # too many processes are a mistake to name before they start
        trainer.test(probe, datamodule=datamodule, verbose=False)
        here = torch.tensor(stream.n_recorded, device=trainer.strategy.root_device)
        n_recorded.append(int(trainer.strategy.reduce(here, reduce_op="sum")))
        stream.release_lm()
        probes[condition] = probe
        clock.done("passes")
        results[condition] = analysis.counts(probe) | analysis.flags(probe, stream.dtype)
        nulls = wanted[condition].untrained_seed == 0
        for measure, measured in measures_of(probe, settings, sites_per_layer=sites, seed=seed, nulls=nulls):
            results[condition] |= measured
            clock.done(measure)
    if "rotation" in settings.measures:
        compare_streams(probes, results, settings, sites_per_layer=sites, seed=seed)
        clock.done("rotation")

    jacobians = None
    if JACOBIAN in settings.measures:
        jacobians = measure_jacobians(run, source)
        clock.done(JACOBIAN)

    results = {c: _on_cpu(r) for c, r in results.items()}
    results = with_seeds(results, {w.name: w.condition for w in wanted.values()})
    found = AnalysisResults(
        {c: typed_results(r) for c, r in results.items()}, tuple(measures), sites, first.n_sublayers, first.n_units
    )
    drawn = _draw(run, trainer, found, jacobians)
    clock.done("figures")
    if trainer.is_global_zero:
        summary = {
            "lm": source.lm.label,
            "text": source.text,
            "conditions": list(found.conditions),
            "untrained_seeds": sum(w.condition == "untrained" for w in wanted.values()),
            "measures": list(settings.measures),
            "n_sequences": n_samples,
            "n_trajectories": first.n_trajectories(0, n_samples),
            "positions": first.positions.rule,
            "n_sublayers": first.n_sublayers,
            "n_units": first.n_units,
            "sites_per_layer": sites,
            "sequences_recorded": sum(n_recorded),
            "processes": trainer.world_size,
        }
        _report(run, summary, found, list(streams.values()), n_recorded, drawn, clock, jacobians)
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _kept(streams: dict[str, Any], samples: int | None) -> str:
    parts = [
        f"{stream.n_sequences - stream.n_missing()} of {stream.n_sequences} sequences of {condition} are in the cache"
        for condition, stream in streams.items()
        if stream.cache is not None
    ]
    return "; ".join(parts) + ", and will not be recorded again" if parts else "nothing is kept without a cache"


class Clock:
    """Seconds of each part of a run, which come one after another."""

    def __init__(self, started: float):
        self.parts: dict[str, float] = {}
        self._last = started

    def done(self, part: str) -> None:
        """Count the time since the last call for this part."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


def _draw(run: Run, trainer: Any, found: AnalysisResults, jacobians: JacobianResult | None) -> list[str]:
    """Draw the figures, shared out over the processes of the first node, which surely have one disk; their names."""
    settings = run.config.analysis
    drawn = panels(
        {c: flat_results(r) for c, r in found.conditions.items()}, found.measures,
        sites_per_layer=found.sites_per_layer, units=settings.rotation.units, seed=run.config.seed,
    )  # fmt: skip
    if jacobians is not None:
        drawn |= {p.key: static.draw(p) for p in jacobian_panels(jacobians, settings.jacobian.sublayers)}
    for name in list(drawn)[trainer.local_rank :: trainer.num_devices] if trainer.node_rank == 0 else []:
        figures.save(drawn[name], run.folder / "figures", name)
    trainer.strategy.barrier()
    return list(drawn)


def _on_cpu(results: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if hasattr(v, "cpu") else v for k, v in results.items()}


def _report(
    run: Run,
    summary: dict[str, Any],
    found: AnalysisResults,
    streams: list[Any],
    n_recorded: list[int],
    drawn: list[str],
    clock: Clock,
    jacobians: JacobianResult | None = None,
) -> None:
    """Write results, findings and summary; send them and the figures to W&B; print the findings."""
    conditions, measures, sites = summary["conditions"], summary["measures"], summary["sites_per_layer"]
    results = {c: flat_results(r) for c, r in found.conditions.items()}
    main = results[conditions[0]]
    table = findings(results, measures, sites)
    largest = without_largest(results, measures, sites)
    several = summary["positions"] != "last"
    notes = in_words(
        results, measures, n_sublayers=summary["n_sublayers"], sites_per_layer=sites, several_tokens=several
    )
    arrays = flatten(found)
    if jacobians is not None:
        arrays |= jacobians.arrays()
        summary[JACOBIAN] = jacobian_table.as_json(jacobians, claims(jacobians))
    summary |= {
        **numbers_of(found),
        "findings": as_json(table),
        "without_largest": None if largest is None else left_out_json(largest),
        "in_words": notes,
        "seconds": {"total": time.time() - run.started, "parts": clock.parts},
    }
    write_results(run.folder, arrays, summary)
    write_report(run.folder)
    counted = f", {summary['n_trajectories']} trajectories" if several else ""
    title = f"# {summary['lm']} on {summary['text']}, {summary['n_sequences']} sequences{counted}\n\n"
    below = "".join(f"\n{line}\n" for line in notes)
    left_out = "" if largest is None else "\n" + left_out_markdown(largest, conditions[0])
    derived = _jacobians_in_markdown(jacobians)
    write_text(run.folder / "findings.md", title + as_markdown(table, conditions) + below + left_out + derived)
    rotation, units = run.config.analysis.rotation, []
    if "rotation" in measures:
        units = portrait_units(main["rotation"], rotation.units, run.config.seed)
    shared = show.Shared(run.logger, run.folder, streams, n_recorded, drawn, run.config.tracking.artifacts)
    show.analysis(shared, summary=summary, table=table, results=results, units=units)
    run.say()
    for line in as_text(table, conditions):
        run.say(line)
    for line in notes:
        run.say()
        run.say(line)
    _say_jacobians(run, jacobians)
    run.say()
    recorded = summary["sequences_recorded"]
    run.say(f"LM:          {recorded} sequences recorded" if recorded else "LM:          not loaded, all was cached")
    run.say(f"Time:        {summary['seconds']['total']:.0f} s in all")
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, findings.md, summary.json, results.npz, figures/")


def analyze_jacobians(run: Run, source: Source) -> None:
    """The measure ``jacobian`` by itself: no stream is recorded, and the text's sequences are enough."""
    config: Any = run.config
    if config.trainer.devices not in (1, "1") or config.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: analysis.measures=[jacobian] alone runs in one process. Set "
            "trainer.devices=1 and trainer.num_nodes=1, or measure something of the stream beside it."
        )
    check_continues(run, source)
    clock = Clock(run.started)
    stream = make_stream(run, source, "original")
    start_records(run, source, {"original": stream})
    run.kept = lambda: "texts that were finished are in the cache" if config.cache.enabled else "nothing is kept"
    result = measure_jacobians(run, source)
    clock.done(JACOBIAN)
    panels_of_it = jacobian_panels(result, config.analysis.jacobian.sublayers)
    for panel in panels_of_it:
        static.save(panel, run.folder / "figures")
    clock.done("figures")
    table = claims(result)
    summary = {
        "lm": source.lm.label,
        "text": source.text,
        "conditions": ["original"],
        "measures": [JACOBIAN],
        "n_sequences": config.analysis.jacobian.texts,
        "n_trajectories": config.analysis.jacobian.texts,
        "positions": "last",
        "n_sublayers": source.lm.n_sublayers,
        "n_units": source.lm.n_units,
        "sites_per_layer": len(source.lm.site_names),
        "sequences_recorded": 0,
        "processes": 1,
        "findings": [],
        "in_words": [],
        "counts": {},
        "curves": {},
        "seconds": {"total": time.time() - run.started, "parts": clock.parts},
        JACOBIAN: jacobian_table.as_json(result, table),
    }
    write_results(run.folder, result.arrays(), summary)
    write_report(run.folder)
    title = f"# {summary['lm']} on {summary['text']}\n"
    write_text(run.folder / "findings.md", title + _jacobians_in_markdown(result))
    pictures = [panel.key for panel in panels_of_it]
    shared = show.Shared(run.logger, run.folder, [], [], pictures, config.tracking.artifacts)
    show.analysis(shared, summary=summary, table=[], results={}, units=[])
    _say_jacobians(run, result)
    run.say()
    run.say(f"Time:        {time.time() - run.started:.0f} s in all")
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, findings.md, summary.json, results.npz, figures/")


def _jacobians_in_markdown(result: JacobianResult | None) -> str:
    if result is None:
        return ""
    below = "".join(f"\n{line}\n" for line in jacobian_table.words(result))
    return "\n" + jacobian_table.as_markdown(result, claims(result)) + below


def _say_jacobians(run: Run, result: JacobianResult | None) -> None:
    if result is None:
        return
    run.say()
    for line in jacobian_table.as_text(result, claims(result)):
        run.say(line)
    for line in jacobian_table.words(result):
        run.say()
        run.say(line)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("analyze", analyze, argv)
