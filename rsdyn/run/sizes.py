"""How large a run is, from its settings, its model's shape and its text: values alone, computed once.

Every number is taken from what the run itself uses: the stream, the cache, the autoencoder, the probe. What is an
estimate has a name that says "about".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rsdyn.analysis.checks import Wanted, streams_wanted
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.jacobians import SERIES
from rsdyn.analysis.settings import JACOBIAN, READOUT, needs_streams
from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.config.schema import Config
from rsdyn.dynamics.jacobian import NULLS as MATRIX_NULLS
from rsdyn.lm.batches import PACKED, SORTED, make_batches
from rsdyn.lm.source import LMSource
from rsdyn.lm.weights import DTYPES
from rsdyn.perturbation.settings import LAYER_KINDS
from rsdyn.run import estimates
from rsdyn.run.early import autoencoder_arguments
from rsdyn.run.opening import Source, make_stream
from rsdyn.run.run import Run
from rsdyn.run.trainer import on_gpu, processes_here
from rsdyn.stream.cache import DTYPES as CACHE_DTYPES
from rsdyn.stream.cache import file_bytes
from rsdyn.stream.text.positions import Positions
from rsdyn.stream.text.tokens import split

WEIGHTS, LIBRARIES = "LM weights", "Python and its libraries, about"


class StreamSize(NamedTuple):
    """One stream of a run.

    Attributes:
        name: its condition.
        missing: numbers of the sequences that are still to be recorded.
        n_bytes: of all that is wanted of it, in the cache.
        missing_bytes: of those of them that are still to be recorded.
        folder: where it lies; None without a cache, and where the text is not known.
    """

    name: str
    missing: np.ndarray
    n_bytes: int
    missing_bytes: int
    folder: Path | None


class AutoencoderSize(NamedTuple):
    """The autoencoder of train.py: its widths and parameters, and the vectors and operations of an epoch."""

    widths: list[int]
    n_parameters: int
    n_vectors: int
    epoch_flops: float


class JacobianSize(NamedTuple):
    """The derivatives of analyze.py: texts, series, and for one text and series the operations and bytes."""

    n_texts: int
    n_series: int
    rows_flops: float
    spectra_flops: float
    n_bytes: int


@dataclass(frozen=True)
class Sizes:
    """How large a run is.

    Attributes:
        n_sequences, n_trajectories: of the text, and of what is recorded of it.
        in_shards: how many sequences lie in the shards that are wanted, since recording goes by whole ones.
        trajectory_bytes: of a trajectory's numbers; ``on_disk`` of all that a file holds of one, on average.
        streams: what is recorded or read.
        lm_parameters, lm_bytes: of the language model as it is loaded.
        has_head: whether that is with the LM head.
        needs_lm: whether it is loaded at all.
        is_mapped: whether the processes share its weights, mapped from their files.
        memory: bytes in each process by what takes them.
        tokens, recording_flops, token_flops: to record: tokens, operations, and operations of a token but attention's.
        autoencoder, jacobians: where the run has them.
    """

    n_sequences: int
    n_trajectories: int
    in_shards: int
    trajectory_bytes: int
    on_disk: float
    streams: tuple[StreamSize, ...]
    lm_parameters: int
    lm_bytes: int
    has_head: bool
    needs_lm: bool
    is_mapped: bool
    tokens: int
    recording_flops: float
    token_flops: float
    autoencoder: AutoencoderSize | None = None
    jacobians: JacobianSize | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def missing_bytes(self) -> int:
        """What the cache still needs."""
        return sum(stream.missing_bytes for stream in self.streams)

    @property
    def memory_bytes(self) -> int:
        """About what a process takes."""
        return sum(self.memory.values())


def sizes_of(run: Run, lm: LMSource, source: Source | None, lengths: np.ndarray) -> Sizes:
    """How large the run of ``run.script`` is, for sequences of so many tokens; without ``source`` no cache is asked."""
    config, gpu = run.config, on_gpu(run.config)
    positions = Positions(config.data.positions, lengths, seed=config.seed)
    counts, n = positions.counts, len(lengths)
    dtype = CACHE_DTYPES[config.cache.dtype]
    of_one = file_bytes(1, 0, (lm.n_sublayers, lm.n_units), dtype)
    on_disk = of_one + file_bytes(0, 1, (0, 0), dtype) / counts.mean()
    shards = -(-min(samples_of(run) or n, n) // config.cache.shard_sequences)
    in_shards = min(n, shards * config.cache.shard_sequences)
    streams = tuple(_stream(run, lm, source, w, counts[:in_shards], on_disk) for w in streams_of(run, lm))
    measures = config.analysis.measures if run.script == "analyze" else []
    differentiates, autoencoder = JACOBIAN in measures, None
    has_head = run.script == "perturb" or READOUT in measures
    if run.script == "train":
        autoencoder = _autoencoder(config, lm, counts, n)
    parameters = lm.n_parameters(head=has_head)
    cost = estimates.forward_cost(lm)
    parts = [part for stream in streams for part in _recorded_together(lengths, stream, config.cache.shard_sequences)]
    lm_bytes = parameters * DTYPES[config.lm.dtype].itemsize
    needs_lm = has_head or differentiates or any(len(stream.missing) for stream in streams)
    each = lm.n_sublayers * lm.n_units * dtype.itemsize
    return Sizes(
        n_sequences=n,
        n_trajectories=int(counts.sum()),
        in_shards=in_shards,
        trajectory_bytes=each,
        on_disk=on_disk,
        streams=streams,
        lm_parameters=parameters,
        lm_bytes=lm_bytes,
        has_head=has_head,
        needs_lm=needs_lm,
        # weights in the format they are stored in are mapped from their files on a CPU, and shared by its processes
        is_mapped=not gpu and lm.stored_dtype() == config.lm.dtype,
        tokens=sum(map(sum, parts)),
        recording_flops=sum(cost.of(part, config.lm.batch_tokens, _layout(config)) for part in parts),
        token_flops=cost.linear,
        autoencoder=autoencoder,
        jacobians=_jacobians(config, lm) if differentiates else None,
        memory=_memory(run, lm, positions, each, lm_bytes if needs_lm else 0, needs_lm, autoencoder),
    )


def samples_of(run: Run) -> int | None:
    """How many sequences of a stream the script wants; None for all."""
    return {"train": None, "analyze": run.config.analysis.samples, "perturb": run.config.perturb.samples}[run.script]


def changes_layers(run: Run) -> bool:
    """Whether the run changes layers of the model, and records no stream."""
    return run.script == "perturb" and run.config.perturb.kind in LAYER_KINDS


def streams_of(run: Run, lm: LMSource) -> list[Wanted]:
    """The streams that the run records or reads."""
    if run.script == "analyze":
        if not needs_streams(run.config.analysis.measures):
            return []
        return streams_wanted(run.config.analysis, lm.n_parameters())
    condition = run.config.data.condition if run.script == "train" else "original"
    return [] if changes_layers(run) else [Wanted(condition, condition)]


def _stream(
    run: Run, lm: LMSource, source: Source | None, wanted: Wanted, counts: np.ndarray, on_disk: float
) -> StreamSize:
    if not run.config.cache.enabled:
        return StreamSize(wanted.name, np.arange(len(counts)), 0, 0, None)
    if source is None:
        n_bytes = int(counts.sum() * on_disk)
        return StreamSize(wanted.name, np.arange(len(counts)), n_bytes, n_bytes, None)
    stream = make_stream(run, source, wanted.condition, untrained_seed=wanted.untrained_seed)
    assert stream.cache is not None
    absent = stream.missing_sequences(samples_of(run))
    n_bytes = sum(map(stream.cache.shard_bytes, range(stream.shards_of(samples_of(run)))))
    return StreamSize(wanted.name, absent, n_bytes, stream.cache.n_bytes(absent), stream.cache.folder)


def _recorded_together(lengths: np.ndarray, stream: StreamSize, shard_sequences: int) -> list[list[int]]:
    """The lengths of the sequences of a stream that are still to be recorded, by shard."""
    ends = np.flatnonzero(np.diff(stream.missing // shard_sequences)) + 1
    return [part.tolist() for part in np.split(lengths[stream.missing], ends) if len(part)]


def _autoencoder(config: Config, lm: LMSource, counts: np.ndarray, n: int) -> AutoencoderSize:
    with torch.device("meta"):
        module = CompressingAutoencoder(**autoencoder_arguments(config.cae, lm.n_units, lm.n_sublayers))
    parts = split(n, val_size=config.data.val_size, test_size=config.data.test_size, seed=config.seed)
    n_train, n_val = (int(counts[parts[part]].sum()) * lm.n_sublayers for part in ("train", "val"))
    epoch = estimates.training_flops(module.widths, n_train) + estimates.evaluation_flops(module.widths, n_val)
    return AutoencoderSize(module.widths, sum(p.numel() for p in module.parameters()), n_train, epoch)


def _jacobians(config: Config, lm: LMSource) -> JacobianSize:
    return JacobianSize(
        n_texts=config.analysis.jacobian.texts,
        n_series=sum(name not in MATRIX_NULLS for name in SERIES),
        rows_flops=estimates.jacobian_flops(lm),
        spectra_flops=estimates.spectrum_flops(lm.n_units, lm.n_sublayers),
        n_bytes=2 * 8 * lm.n_units**2 * lm.n_sublayers,
    )


def _memory(
    run: Run,
    lm: LMSource,
    positions: Positions,
    each: int,
    lm_bytes: int,
    needs_lm: bool,
    autoencoder: AutoencoderSize | None,
) -> dict[str, int]:
    """Bytes in each process by what takes them; ``each`` are those of a trajectory."""
    config, gpu, counts = run.config, on_gpu(run.config), positions.counts
    size, itemsize = config.cache.shard_sequences, DTYPES[config.lm.dtype].itemsize
    shard = int(np.add.reduceat(counts, range(0, len(counts), size)).max()) * each
    parts = {WEIGHTS: lm_bytes}
    if needs_lm:
        batches = len(make_batches(positions.lengths[:size].tolist(), config.lm.batch_tokens, _layout(config)))
        parts["LM forward, about"] = estimates.forward_bytes(
            lm,
            dtype_bytes=itemsize,
            batch_tokens=config.lm.batch_tokens,
            at_once=1 if gpu else min(torch.get_num_threads(), batches),
        )
        if gpu and not positions.is_last:  # the tokens of a batch, before they go to the shard
            parts["a batch being recorded"] = config.lm.batch_tokens * lm.n_sublayers * lm.n_units * itemsize
        if streams_of(run, lm):
            parts["a shard being recorded, about"] = 2 * shard
    if autoencoder is not None:
        own = math.ceil(-(-len(counts) // size) / processes_here(run)) * shard
        parts["autoencoder, its gradients and Adam"] = estimates.optimiser_bytes(
            autoencoder.n_parameters, config.trainer.precision
        )
        parts["vectors being shuffled, at most"] = estimates.shuffle_bytes(
            corpus_bytes=own,
            window_bytes=min(config.data.shuffle_shards * shard, own),
            vector_bytes=each // lm.n_sublayers,
            kept=config.cache.enabled,
        )
        parts["PCA beside it, about"] = estimates.covariance_bytes(lm.n_units, 2)
    elif run.script == "analyze" and streams_of(run, lm):
        parts |= _of_analysis(config, lm, counts, each)
    elif run.script == "perturb" and not changes_layers(run):
        parts["trajectories behind the plane, about"] = 2 * int(counts[: config.perturb.samples].sum()) * each
        parts["PCA, about"] = estimates.covariance_bytes(lm.n_units, 1)
    return {**parts, LIBRARIES: estimates.LIBRARIES}


def _of_analysis(config: Config, lm: LMSource, counts: np.ndarray, each: int) -> dict[str, int]:
    analysis = config.analysis
    with torch.device("meta"):
        probe = Collected(
            n_sublayers=lm.n_sublayers,
            n_units=lm.n_units,
            measures=[m for m in analysis.measures if m != JACOBIAN],
            keep=analysis.keep,
            components=analysis.components,
        )
    measured = int(counts[: analysis.samples].sum())
    kept = min(analysis.keep or measured, measured) if probe.kept is not None else 0
    parts = {"statistics": estimates.state_bytes(probe), "kept trajectories, about": 2 * kept * each}
    if "pca" in analysis.measures:
        parts["PCA, about"] = estimates.covariance_bytes(lm.n_units, 2)
    return parts


def _layout(config: Config) -> str:
    """The layout that most models are recorded in; whether this one is only its weights can tell."""
    return SORTED if config.lm.layout == SORTED or config.lm.device_map is not None else PACKED
