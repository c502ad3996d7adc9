"""A stream that somebody else recorded, as what analyze.py measures: what it needs a model for is skipped, and said."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch

from rsdyn.analysis.settings import JACOBIAN, READOUT, STREAM_NULLS
from rsdyn.errors import UserError
from rsdyn.lm.settings import LmConfig
from rsdyn.lm.source import LMSource
from rsdyn.run.run import Run
from rsdyn.stream.exchange import load
from rsdyn.stream.kept import KeptStream
from rsdyn.stream.text.sequence_labels import MOST_GROUPS


def names_a_model(run: Run) -> bool:
    """Whether ``lm.name`` is somebody's choice: the stream is compared with that model."""
    default = next(f for f in fields(LmConfig) if f.name == "name").default
    return run.config.lm.name != default


def read_stream(run: Run, lm: LMSource | None) -> KeptStream:
    """The stream of ``data.stream``, checked, and compared with ``lm`` where that is given; says what it is."""
    config = run.config
    path = Path(str(config.data.stream)).expanduser()
    try:
        x = load(path, model=lm)
    except UserError as error:
        raise UserError(f"data.stream={config.data.stream}: {str(error).removeprefix(f'{path}: ')}") from error
    if config.data.limit is not None:
        numbers = x.sequence.unique()[: config.data.limit]
        x = x[torch.isin(x.sequence, numbers)]
    stream = KeptStream(x, shard_sequences=config.cache.shard_sequences, label=config.lm.label)
    label, sites = stream.lm.label, ", ".join(stream.lm.site_names)
    run.say(f"Stream: {path}: {label}, {stream.lm.n_layers} layers ({sites}) of {stream.n_units} units")
    run.say(f"        {len(x)} trajectories of {stream.n_sequences} sequences, {str(x.tensor.dtype)[6:]}")
    run.say(f"        {'compared with ' + lm.label if lm is not None else 'not compared with a model (lm.name=...)'}")
    _say_groups(run, stream)
    for note in x.notes:
        run.say(f"        {note}")
    return stream


def _say_groups(run: Run, stream: KeptStream) -> None:
    """Say which groups the file's labels make; labels that make none, which nobody can leave out here, are skipped."""
    labels = stream.sequences.labels
    if labels is None:
        return
    if 2 <= len(labels.names) <= MOST_GROUPS:
        without = f"; {labels.n_missing} without a label, in no group" if labels.n_missing else ""
        run.say(f"        groups: {labels.words()}{without}")
        return
    stream.sequences = replace(stream.sequences, labels=None)
    run.say(f"        its groups are skipped: they have {len(labels.names)} different labels (2 to {MOST_GROUPS} do)")


def skip_what_needs_a_model(run: Run) -> None:
    """Leave out of the settings what a stream alone cannot give, and say so."""
    settings = run.config.analysis
    skipped = [c for c in settings.conditions if c != "original"]
    measures = [m for m in settings.measures if m not in (JACOBIAN, READOUT)]
    nulls = settings.rotation.nulls
    if not measures:
        raise UserError(
            f"analysis.measures=[{','.join(settings.measures)}]: derivatives and readout need the model, and "
            "data.stream "
            "gives its stream alone. Measure something else of it, or leave data.stream out."
        )
    if "original" not in settings.conditions:
        raise UserError(
            f"analysis.conditions={list(settings.conditions)}: controls are recorded from a model, and data.stream is "
            "the original alone. Add original, or leave data.stream out."
        )
    skipped += [m for m in settings.measures if m not in measures]
    settings.conditions, settings.measures, settings.untrained_seeds = ["original"], measures, None
    if nulls is not None:
        skipped += [f"null {n}" for n in nulls if n in STREAM_NULLS]
        settings.rotation.nulls = [n for n in nulls if n not in STREAM_NULLS]
    if skipped:
        run.say(f"Skipped, since it needs the model: {', '.join(skipped)}")
