"""What analyze.py needs beside the streams: a check before they are read, the probe, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rsdyn.analysis import group_table, jacobian_table
from rsdyn.analysis.answer import answer
from rsdyn.analysis.by_label import by_group, given_by_group
from rsdyn.analysis.checks import check_settings
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.findings import findings
from rsdyn.analysis.group_design import Labelled, check_groups
from rsdyn.analysis.jacobians import JacobianResult, claims
from rsdyn.analysis.left_out import as_json as left_out_json
from rsdyn.analysis.left_out import as_markdown as left_out_markdown
from rsdyn.analysis.left_out import without_largest
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import AnalysisResults, ConditionResults, on_cpu
from rsdyn.analysis.seeds import with_seeds
from rsdyn.analysis.settings import JACOBIAN, OF_STREAM, PHASES, READOUT, UNTRAINED, AnalysisConfig, needs_streams
from rsdyn.analysis.shape import with_phases
from rsdyn.analysis.shape_rows import shape_in_words, shape_rows
from rsdyn.analysis.stored import flatten
from rsdyn.analysis.summary import in_words, numbers_of
from rsdyn.analysis.table import as_json, as_markdown, as_text
from rsdyn.config.naming import keyed
from rsdyn.figures.analysis import analysis_panels
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.panel import Panel
from rsdyn.figures.streams import Analysis, streams_of
from rsdyn.metrics.processes import n_processes
from rsdyn.run.finish import MOST_SENTENCES, Ending, Recorded
from rsdyn.run.opening import Source, last_tokens
from rsdyn.run.output import table_columns
from rsdyn.run.progress import Steps
from rsdyn.run.run import Run
from rsdyn.stream.text.groups import SequenceGroups, clusters_of, sequence_groups
from rsdyn.stream.text.tokens import Sequences
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.tracking import show


def check_analysis(run: Run, stream: TrajectoryStream) -> int:
    """Check that a stream can give what was asked for, and say how many of its sequences are measured."""
    settings = run.config.analysis
    n_samples = n_measured(settings, stream)
    check_settings(
        settings,
        n_sequences=n_samples,
        n_trajectories=stream.n_trajectories(0, n_samples),
        n_sublayers=stream.n_sublayers,
        n_units=stream.n_units,
        sites_per_layer=len(stream.lm.site_names),
    )
    return n_samples


def n_measured(settings: AnalysisConfig, stream: TrajectoryStream) -> int:
    """How many sequences are measured; where no stream is recorded, those that are read out."""
    n = min(settings.samples or stream.n_sequences, stream.n_sequences)
    return n if needs_streams(settings.measures) else min(n, settings.readout.samples)


def groups_of(run: Run, source: Source, n_samples: int) -> SequenceGroups:
    """The groups of sequences that intervals leave out, and a line that says what is measured on what."""
    settings = run.config.analysis
    groups = sequence_groups(source.sequences, n_samples, resample=settings.resample)
    if source.sequences.labels is not None:
        check_groups(labelled_of(source.sequences, settings), min(n_samples, settings.keep or n_samples))
    on = f"{', '.join(settings.measures)} on the first {_sequences(n_samples)}"
    one = groups.n_groups < 2
    run.say(f"Measuring {on}; {'no intervals, from' if one else 'intervals leave out'} {groups.words()}")
    if not needs_streams(settings.measures):
        run.say("          No stream is recorded: these measures run the LM themselves")
    return groups


def _sequences(n: int) -> str:
    return f"{n} sequence{'s' * (n != 1)}"


def n_steps(settings: AnalysisConfig, n_streams: int, source: Source) -> int:
    """How many steps an analysis has: for each stream its reading and its measures, what compares them, the figures."""
    of_streams = sum(m in OF_STREAM for m in settings.measures)
    compared = sum(m in settings.measures for m in ("rotation", JACOBIAN, READOUT))
    return n_streams * (1 + of_streams) + compared + (source.sequences.labels is not None) + 1


def collected_of(
    run: Run,
    source: Source,
    stream: TrajectoryStream,
    condition: str,
    groups: SequenceGroups,
    steps: Steps,
    *,
    main: Collected | None,
) -> Collected:
    """What is collected of one stream; the largest units are those of the ``main`` one, which all conditions share."""
    settings, data = run.config.analysis, run.config.data
    with_others = {"similarity", "dsa"} & set(settings.measures)  # on the same texts
    compared = bool(with_others) and stream.positions.is_last
    return Collected(
        n_sublayers=stream.n_sublayers,
        n_units=stream.n_units,
        measures=[m for m in settings.measures if m != JACOBIAN],
        keep=settings.keep,
        components=settings.components,
        groups=groups,
        bar=steps.bar,
        name=condition,
        largest=None if main is None else main.largest,
        last_token=last_tokens(stream),
        sites_per_layer=len(stream.lm.site_names),
        tokens="last" if stream.positions.is_last else "all" if stream.positions.rule == "all" else "some",
        texts=source.digests(len(groups.group), data.text_column, strip=data.strip) if compared else None,
        keeps=main is None and stream.sequences.labels is not None,
    )


def gathered(
    run: Run,
    source: Source,
    stream: TrajectoryStream,
    results: Mapping[str, ConditionResults],
    collected: Mapping[str, Collected],
    condition_of: Mapping[str, str],
    steps: Steps,
) -> AnalysisResults:
    """The results of all streams, several of one condition as its spread, and the main one by group, off any GPU.

    Args:
        run: whose measures were asked for.
        source: with the labels of its sequences, if they have any.
        stream: of the first condition.
        results, collected: of each stream by its name.
        condition_of: the condition of each.
        steps: what is told that groups were compared.
    """
    settings, seed = run.config.analysis, run.config.seed
    merged = with_seeds({name: on_cpu(r) for name, r in results.items()}, condition_of)
    measures, sites = tuple(m for m in settings.measures if m != JACOBIAN), len(stream.lm.site_names)
    found = AnalysisResults(merged, measures, sites, stream.n_sublayers, stream.n_units)
    if PHASES in measures:
        found = with_phases(found, seed)
    if source.sequences.labels is None:
        return found
    if not given_by_group(found.main):
        run.say(f"Not by group: {', '.join(settings.measures)}")
        return found
    labelled = labelled_of(source.sequences, settings)
    groups = by_group(next(iter(collected.values())), found, labelled, How(settings, sites, seed), bar=steps.bar)
    steps.done("groups")
    return replace(found, by_group=on_cpu(groups))


def labelled_of(sequences: Sequences, settings: AnalysisConfig) -> Labelled:
    """The labels of a corpus, and what its sequences are part of."""
    labels = sequences.labels
    assert labels is not None
    cluster, kind = clusters_of(sequences, len(sequences), resample=settings.resample)
    return Labelled(labels.names, torch.from_numpy(labels.code), cluster, kind)


def panels_of(run: Run, found: AnalysisResults, n_sequences: int, jacobians: JacobianResult | None) -> list[Panel]:
    """Every panel of an analysis."""
    settings = run.config.analysis
    panels = analysis_panels(
        streams_of([Analysis(found, n_sequences=n_sequences)]),
        largest=without_largest(found) if found.main.flags.known else None,
        units=settings.rotation.units,
        seed=run.config.seed,
    )
    return [*panels, *([] if jacobians is None else jacobian_panels(jacobians, settings.jacobian.sublayers))]


def kept_of(streams: Mapping[str, TrajectoryStream]) -> str:
    """What an analysis that is cut short leaves behind."""
    parts = [
        f"{stream.n_sequences - stream.n_missing()} of {stream.n_sequences} sequences of {condition} are in the cache"
        for condition, stream in streams.items()
        if stream.cache is not None
    ]
    return "; ".join(parts) + ", and will not be recorded again" if parts else "nothing is kept without a cache"


def ending_of(
    run: Run,
    source: Source,
    streams: Mapping[str, TrajectoryStream],
    found: AnalysisResults | None,
    jacobians: JacobianResult | None,
    panels: Sequence[Panel],
    recorded: Sequence[int],
    steps: Steps,
) -> Ending:
    """Findings, sentences and numbers of an analysis.

    Args:
        streams: what was measured, the main one first; none where Jacobians alone were.
        found: the results; None where Jacobians alone were measured.
        jacobians: their result, where they were measured.
        panels: what is shown.
        recorded: how many sequences of each stream, in all processes.
        steps: with the seconds of each part.
    """
    settings = run.config.analysis
    conditions = [] if found is None else list(found.conditions)
    stream = next(iter(streams.values()), None)
    several = stream is not None and not stream.positions.is_last
    n_sequences = n_trajectories = settings.jacobian.texts
    if stream is not None:
        n_sequences = n_measured(settings, stream)
        n_trajectories = stream.n_trajectories(0, n_sequences)
    table = [] if found is None else [*findings(found), *shape_rows(found)]
    largest = None if found is None or not found.main.flags.known else without_largest(found)
    notes = [] if found is None else [*in_words(found, several_tokens=several), *shape_in_words(found)]
    notes = [*(() if stream is None else stream.notes), *notes]
    said, lines = answer(table, conditions), as_text(table, conditions, table_columns()) if table else []
    over = "" if found is None else found.conditions[conditions[0]].counts.intervals
    markdown = as_markdown(table, conditions, over) if table else ""
    arrays: dict[str, Any] = {} if found is None else flatten(found)
    summary: dict[str, Any] = {
        **source.facts(),
        "conditions": conditions or ["original"],
        "untrained_seeds": len(streams) - len(conditions) + 1 if UNTRAINED in conditions else 0,
        "measures": [*settings.measures],
        "n_sequences": n_sequences,
        "n_trajectories": n_trajectories,
        "positions": "last" if stream is None else stream.positions.rule,
        "sequences_recorded": sum(recorded),
        "processes": n_processes(),
        "findings": as_json(table),
        "without_largest": None if largest is None else left_out_json(largest),
        **({"counts": {}, "curves": {}} if found is None else numbers_of(found)),
    }
    if largest is not None:
        markdown += "\n" + left_out_markdown(largest, conditions[0])
    groups = None if found is None else found.by_group
    if groups is not None:
        summary["by_group"] = group_table.as_json(groups)
        lines += [""] * bool(lines) + group_table.as_text(groups, table_columns())
        markdown += "\n" + group_table.as_markdown(groups)
        said = [*said[: MOST_SENTENCES - 1], group_table.headline(groups)]
    if jacobians is not None:
        claimed = claims(jacobians)
        summary[JACOBIAN] = jacobian_table.as_json(jacobians, claimed)
        arrays |= jacobians.arrays()
        lines += [""] * bool(lines) + jacobian_table.as_text(jacobians, claimed)
        more = jacobian_table.words(jacobians)
        markdown += "\n" * bool(markdown) + jacobian_table.as_markdown(jacobians, claimed)
        markdown += "".join(f"\n{line}\n" for line in more)
        lines += [line for note in more for line in ("", note)]
        said = [*said[: MOST_SENTENCES - 1], jacobian_table.answer(claimed)]
    counted = f", {_sequences(n_sequences)}" + (f", {n_trajectories} trajectories" if several else "")
    title = f"{source.lm.label} on {source.text}{counted if streams else ''}"
    was_read = needs_streams(settings.measures)
    of_streams = Recorded([*streams.values()], recorded) if was_read else Recorded()
    return Ending(
        answer=said,
        tables=lines,
        notes=[keyed(("data", "analysis"), note) for note in notes],
        foot={"LM": of_streams.words() if was_read else "no stream recorded"} if streams else {},
        summary=summary,
        arrays=arrays,
        findings=(title, markdown),
        panels=panels,
        recorded=of_streams,
        seconds={"parts": steps.seconds},
        send=lambda to, summary: show.analysis(to, summary=summary, table=table, results=found),
    )
