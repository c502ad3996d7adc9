"""Measure the residual stream as a dynamical system: the paper's measures, with null models (paper 2.2-2.6, 2.8).

python analyze.py                                             the embedded model and text, with their controls
python analyze.py analysis.measures=[correlation,cosine] analysis.samples=500
python analyze.py analysis.measures=[jacobian]                derivatives over depth, against nulls (arXiv 2605.14258)
python analyze.py --config paper lm.name=meta-llama/Llama-3.1-8B trainer.devices=4
python analyze.py --help
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import lightning as L

from rsdyn.analysis.checks import streams_wanted
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import How
from rsdyn.analysis.measures.rotation import compare_streams
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.results import ConditionResults
from rsdyn.analysis.settings import JACOBIAN, READOUT, needs_streams
from rsdyn.analysis.streams import measure_stream
from rsdyn.commands.jacobians import analyze_jacobians, check_continues, measure_jacobians
from rsdyn.commands.readout import check_readout, measure_readout
from rsdyn.run.analysis import (
    check_analysis,
    collected_of,
    ending_of,
    gathered,
    groups_of,
    kept_of,
    n_steps,
    panels_of,
)
from rsdyn.run.finish import draw, finish, in_all_processes, leave
from rsdyn.run.opening import find_source, open_stream, say_positions, start_records
from rsdyn.run.progress import ProbeProgress, Steps
from rsdyn.run.run import Run, keeping
from rsdyn.run.script import run_script
from rsdyn.run.trainer import make_trainer
from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule


def analyze(run: Run) -> None:
    """Text, language models, streams; a probe through each; results, null models, findings; figures, numbers, W&B."""
    settings, seed = run.config.analysis, run.config.seed
    L.seed_everything(seed, verbose=False)
    source = find_source(run)
    if settings.measures == [JACOBIAN]:
        analyze_jacobians(run, source)
        return
    if JACOBIAN in settings.measures:
        check_continues(run, source)
    if READOUT in settings.measures:
        check_readout(run, source)

    # the streams: of the text, of its controls, and of untrained models; recorded where a measure is of them
    wanted = {w.name: w for w in streams_wanted(settings, source.lm.n_parameters())}  # the original first
    n, is_read = settings.samples, needs_streams(settings.measures)
    streams = {
        name: open_stream(
            run, source, w.condition, samples=n, untrained_seed=w.untrained_seed, name=name, is_read=is_read
        )
        for name, w in wanted.items()
    }
    first, sites = next(iter(streams.values())), len(source.lm.site_names)
    n_samples = check_analysis(run, first)
    say_positions(run, first, n_samples)
    start_records(run, source, streams)
    groups = groups_of(run, source, n_samples)
    steps = Steps(n_steps(settings, len(streams), source), run.started)
    how = How(settings, sites, seed)
    collected: dict[str, Collected] = {}
    results: dict[str, ConditionResults] = {}
    recorded: list[int] = []
    with keeping(lambda: kept_of(streams)):
        for condition, stream in streams.items():
            # one pass over the stream, or two, in which a probe takes what its measures need
            main = next(iter(collected.values()), None)
            probe = ResidualStreamProbe(collected_of(run, source, stream, condition, groups, steps, main=main))
            progress, passes = ProbeProgress(steps, condition), probe.collected.n_passes
            datamodule = TrajectoryDataModule(stream, samples=n, passes=passes, on_record=progress.recorded)
            trainer = make_trainer(run, [progress])
            datamodule.set_process(0, trainer.world_size)  # too many processes are named before they start
            trainer.test(probe, datamodule=datamodule, verbose=False)
            recorded.append(in_all_processes(trainer, stream.n_recorded))
            stream.release_lm()
            collected[condition] = probe.collected
            steps.done("passes")

            # the measures with their intervals; turns beside surrogates, once per kind of stream
            here = how._replace(nulls=wanted[condition].untrained_seed == 0, main=main)
            results[condition] = measure_stream(probe.collected, here, stream.dtype, steps.done)
        if "rotation" in settings.measures:
            results = compare_streams(collected, results, how)
            steps.done("rotation")
        if READOUT in settings.measures:
            read = measure_readout(run, source, streams, groups, steps)
            results = {c: replace(r, readout=read[c]) for c, r in results.items()}
            steps.done(READOUT)
        jacobians = None
        if JACOBIAN in settings.measures:
            jacobians = measure_jacobians(run, source, steps)
            steps.done(JACOBIAN)

        # several untrained models are one condition with a spread; by group; figures, findings, numbers
        found = gathered(run, source, first, results, collected, {w.name: w.condition for w in wanted.values()}, steps)
        panels = panels_of(run, found, n_samples, jacobians)
        draw(run, panels, trainer)
        steps.done("figures")
        if trainer.is_global_zero:
            finish(run, ending_of(run, source, streams, found, jacobians, panels, recorded, steps))
    leave(trainer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_script("analyze", analyze, argv)
