"""The measure ``readout`` of analyze.py: each stream's model with its head, its sequences, and a lens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rsdyn.analysis.readout import by_position, examples_of, read_sequences, readout_results, with_one_of_each_range
from rsdyn.analysis.results import ReadoutResults
from rsdyn.dynamics.readout import Readout
from rsdyn.metrics.processes import from_all, n_processes
from rsdyn.run.early import readout_lens
from rsdyn.run.opening import Source
from rsdyn.run.progress import Steps
from rsdyn.run.run import Run
from rsdyn.run.trainer import device_of, processes_here
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectories import TrajectoryStream


def check_readout(run: Run, source: Source) -> None:
    """Raise ``UserError`` for a model without a head, or one that does not fit with it, before anything is recorded.

    A model whose head nothing on this machine shows is loaded once, since that alone can tell.
    """
    lm, dtype, device = source.lm, run.config.lm.dtype, device_of(run.config)
    lm.check_memory(dtype=dtype, device=device, head=True, processes=processes_here(run))
    if not lm.check_head():
        lm.load(dtype=dtype, device=device, head=True)


def measure_readout(
    run: Run, source: Source, streams: Mapping[str, TrajectoryStream], groups: SequenceGroups, steps: Steps
) -> dict[str, ReadoutResults]:
    """Read the last tokens of each stream's first sequences; models one after another, sequences over processes.

    Where other tokens than the last are measured, one of each range of positions too, of the first stream.
    """
    config = run.config
    settings, lens = config.analysis.readout, readout_lens(run, source.lm)
    rank = torch.distributed.get_rank() if n_processes() > 1 else 0
    tokenizer = source.lm.tokenizer()
    found: dict[str, ReadoutResults] = {}
    n = min(settings.samples, len(groups.group))
    with steps.bar("readout", n * len(streams), "sequences") as done:
        lm, loaded = None, None
        for name, stream in streams.items():
            run.stop.check()
            if lm is None or stream.lm is not loaded:  # the controls are other texts in one model
                lm = None  # before the next one takes its memory
                lm, loaded = stream.lm.load(dtype=config.lm.dtype, device=device_of(config), head=True), stream.lm
            mine = list(range(n))[rank :: n_processes()]
            texts = [np.asarray(stream.sequences[i]) for i in range(n)]
            at = [np.array([len(text) - 1]) for text in texts]
            if not found and not stream.positions.is_last:
                at = [with_one_of_each_range(text, i, stream.positions.seed) for i, text in enumerate(texts)]
            options: Any = {"batch_tokens": config.lm.batch_tokens, "done": done, "positions": [at[i] for i in mine]}
            parts = from_all(read_sequences(lm, [texts[i] for i in mine], lens, **options) if mine else None, "cpu")
            shown = examples_of(lm, texts[: settings.examples], lens, tokenizer.decode)
            examples = {str(i): found for i, found in enumerate(shown)}
            whole = _in_order([part for part in parts if part is not None], [len(tokens) for tokens in at])
            last = np.cumsum([0, *(len(tokens) for tokens in at[:-1])])
            others = np.setdiff1d(np.arange(len(whole.kl)), last)
            position = torch.from_numpy(np.concatenate(at)[others])
            by_range = by_position(_rows(whole, others), position) if len(others) else None
            own = _rows(whole, last)
            found[name] = readout_results(
                own, groups.of(torch.arange(n)), lens, examples, by_range, decode=tokenizer.decode
            )
    return found


def _in_order(parts: list[Readout], counts: list[int]) -> Readout:
    """What each process read of every W-th sequence, ``counts`` tokens of each, in the sequences' order."""
    rows = torch.arange(sum(counts)).split(counts)
    order = torch.cat([row for rank in range(len(parts)) for row in rows[rank :: len(parts)]]).argsort()
    return Readout(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))


def _rows(found: Readout, rows: np.ndarray) -> Readout:
    return Readout(*(values[torch.from_numpy(rows)] for values in found))
