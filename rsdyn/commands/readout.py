"""The measure ``readout`` of analyze.py: each stream's model with its head, its sequences, and a lens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rsdyn.analysis.readout import example, read_sequences, readout_results
from rsdyn.analysis.results import ReadoutResults
from rsdyn.dynamics.readout import Readout
from rsdyn.errors import UserError
from rsdyn.lm.head import class_with_head
from rsdyn.lm.readout import Lens, open_lens
from rsdyn.metrics.processes import from_all, n_processes
from rsdyn.run.opening import Source
from rsdyn.run.progress import Steps
from rsdyn.run.run import Run
from rsdyn.run.trainer import device_of
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectories import TrajectoryStream


def check_readout(run: Run, source: Source) -> Lens:
    """The lens that is asked for; ``UserError`` for one of another model, and for a model without a head."""
    lm = source.lm
    class_with_head(lm.config, trust_remote_code=lm.trust_remote_code)
    path = run.config.analysis.readout.lens
    sizes = {"n_sublayers": lm.n_sublayers, "n_units": lm.n_units, "sites_per_layer": len(lm.site_names)}
    try:
        return open_lens(path, **sizes)
    except UserError as error:
        raise UserError(f"analysis.readout.lens={path}: {str(error).removeprefix(f'{path}: ')}") from error


def measure_readout(
    run: Run, source: Source, streams: Mapping[str, TrajectoryStream], groups: SequenceGroups, steps: Steps
) -> dict[str, ReadoutResults]:
    """Read the last tokens of each stream's first sequences; models one after another, sequences over processes."""
    config = run.config
    settings, lens = config.analysis.readout, check_readout(run, source)
    rank = torch.distributed.get_rank() if n_processes() > 1 else 0
    tokenizer = source.lm.tokenizer()
    found = {}
    n = min(settings.samples, len(groups.group))
    with steps.bar("readout", n * len(streams), "sequences") as done:
        for name, stream in streams.items():
            run.stop.check()
            lm = stream.lm.load(dtype=config.lm.dtype, device=device_of(config), head=True)
            mine = list(range(n))[rank :: n_processes()]
            texts = [np.asarray(stream.sequences[i]) for i in range(n)]
            options: Any = {"batch_tokens": config.lm.batch_tokens, "done": done}
            parts = from_all(read_sequences(lm, [texts[i] for i in mine], lens, **options) if mine else None, "cpu")
            examples = {str(i): example(lm, texts[i], lens, tokenizer.decode) for i in range(min(settings.examples, n))}
            whole = _in_order([part for part in parts if part is not None], n)
            found[name] = readout_results(whole, groups.of(torch.arange(n)), lens, examples)
            del lm
    return found


def _in_order(parts: list[Readout], n: int) -> Readout:
    """What each process read of every W-th sequence, in the sequences' order."""
    order = torch.cat([torch.arange(n)[rank :: len(parts)] for rank in range(len(parts))]).argsort()
    return Readout(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))
