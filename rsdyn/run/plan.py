"""``--plan``: what a run will need, and what of it does not fit, before a weight is read or a file written.

Reads the config, as ``experiment.py`` does, and takes every number from what the run itself uses: the stream, the
cache, the autoencoder, the probe. What is an estimate says "about".
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants

from rsdyn.analysis.checks import Wanted, streams_wanted
from rsdyn.analysis.jacobians import MATRIX_NULLS, SERIES
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.settings import JACOBIAN
from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.errors import UserError
from rsdyn.lm.batches import PACKED, SORTED, make_batches
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.lm.hub import hub_reachable, weights_size
from rsdyn.lm.source import LMSource
from rsdyn.lm.weights import DTYPES, available_memory, check_files
from rsdyn.perturbation.layers import changed_layers
from rsdyn.perturbation.plane import open_autoencoder
from rsdyn.perturbation.prompts import layers_of, prompts_of
from rsdyn.perturbation.settings import LAYER_KINDS
from rsdyn.run import estimates
from rsdyn.run.opening import Source, find_text, make_stream, on_gpu, open_lm, processes_here
from rsdyn.run.run import Run
from rsdyn.stream.cache import DTYPES as CACHE_DTYPES
from rsdyn.stream.cache import default_cache_dir, file_bytes
from rsdyn.stream.text.positions import Positions
from rsdyn.stream.text.tokens import split

CHARACTERS_PER_TOKEN = 4  # English prose in vocabularies of 32 to 256 thousand tokens, when the text cannot be had


@dataclass
class Plan:
    """The lines to print, and a sentence with its cure for each thing that surely does not fit.

    ``parts`` holds bytes of memory per process by name, ``numbers`` what the tests compare with the run.
    """

    lines: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    cache_root: Path | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def say(self, label: str, text: str) -> None:
        self.lines.append(f"{label + ':' if label else '':<22}{text}")


def show_plan(run: Run) -> None:
    """Print the plan of a run. Raises ``UserError`` naming what surely does not fit, and what would."""
    lm = open_lm(run)
    source: Source | None = None
    missing = ""
    try:
        source = find_text(run, lm)
    except UserError as error:
        if run.config.data.name is None or hub_reachable():  # a mistake, which the run would meet too
            raise
        missing = str(error)
    if run.script == "perturb":
        _check_perturbation(run, lm, source)
    plan = make_plan(run, lm, source)
    if missing:
        plan.say("Text", f"not read: {missing}")
        plan.misfits.append(missing)
    for line in plan.lines:
        run.say(line)
    if plan.misfits:
        raise UserError("this run does not fit. " + " ".join(f"({i}) {m}" for i, m in enumerate(plan.misfits, 1)))
    run.say("Everything that can be known before the run fits.")


def _check_perturbation(run: Run, lm: LMSource, source: Source | None) -> None:
    """The mistakes that perturb.py would meet once the stream is there, and that can be seen now."""
    settings: Any = run.config.perturb
    layers = None if settings.layers is None else layers_of(settings.layers, lm.n_layers)
    if settings.kind in LAYER_KINDS:
        changed_layers(settings.kind, layers, lm.n_layers)
    else:
        for layer in layers or layers_of(None, lm.n_layers):
            lm.sublayer(layer, settings.site)
        open_autoencoder(settings, lm.n_units)
        check_memories(lm.config, lm.name)
    if source is not None:
        prompts_of(settings, source.sequences, source.lm, seed=run.config.seed)


def make_plan(run: Run, lm: LMSource, source: Source | None) -> Plan:
    """What the run of ``run.script`` will need; without ``source`` (no text to be had) for ``data.limit`` sequences."""
    plan = Plan()
    lengths = _lengths(plan, run, source)
    positions = Positions(run.config.data.positions, np.array(lengths), seed=run.config.seed)
    _weights(plan, run, lm)
    to_record = _cache(plan, run, lm, source, positions)
    needs_lm = run.script == "perturb" or any(map(len, to_record.values())) or _differentiates(run)
    if needs_lm:
        _reach(plan, lm)
    _memory(plan, run, lm, positions, needs_lm=needs_lm)
    _operations(plan, run, lm, positions, to_record)
    return plan


# --- text and stream --------------------------------------------------------------------------------------------------


def _differentiates(run: Run) -> bool:
    return run.script == "analyze" and JACOBIAN in run.config.analysis.measures


def _samples(run: Run) -> int | None:
    """How many sequences of a stream the script wants; None for all."""
    return {"train": None, "analyze": run.config.analysis.samples, "perturb": run.config.perturb.samples}[run.script]


def _changes_layers(run: Run) -> bool:
    """Whether the run changes layers of the model, and records no stream."""
    return run.script == "perturb" and run.config.perturb.kind in LAYER_KINDS


def _streams(run: Run, lm: LMSource) -> list[Wanted]:
    if run.script == "analyze":
        if run.config.analysis.measures == [JACOBIAN]:
            return []  # which needs no stream
        return streams_wanted(run.config.analysis, lm.n_parameters())
    condition = run.config.data.condition if run.script == "train" else "original"
    return [Wanted(condition, condition)]


def _lengths(plan: Plan, run: Run, source: Source | None) -> list[int]:
    """Tokens of each sequence of the corpus, BOS included."""
    if source is not None:
        return source.sequences.lengths.tolist()
    data = run.config.data
    n = data.limit or 10_000
    tokens = 1 + (data.l_min + data.l_max) // 2 // CHARACTERS_PER_TOKEN
    known = f"data.limit={n}" if data.limit else f"{n} (no data.limit: as many as the text has)"
    plan.say("Sequences", f"{known}, about {tokens} tokens each: the text is out of reach")
    return [tokens] * n


def _cache(plan: Plan, run: Run, lm: LMSource, source: Source | None, positions: Positions) -> dict[str, np.ndarray]:
    """The cache's size and what of it is there; which sequences of each condition are still to record."""
    settings, counts = run.config.cache, positions.counts
    n = len(counts)
    each = lm.n_sublayers * lm.n_units * CACHE_DTYPES[settings.dtype].itemsize
    of_one = file_bytes(1, 0, (lm.n_sublayers, lm.n_units), CACHE_DTYPES[settings.dtype])
    on_disk = of_one + file_bytes(0, 1, (0, 0), CACHE_DTYPES[settings.dtype]) / counts.mean()
    plan.numbers["bytes_per_trajectory"], plan.numbers["trajectories"] = each, int(counts.sum())
    if _changes_layers(run):
        plan.say("Cache", f"none is needed: perturb.kind={run.config.perturb.kind} records no stream")
        return {}
    sublayers = f"{lm.n_sublayers} sublayers of {lm.n_units} units"
    if positions.is_last:
        plan.say("Trajectories", f"{sublayers}, {_size(each)} a sequence in {settings.dtype}")
    else:
        plan.say("Trajectories", f"{counts.sum():,} of {n:,} sequences, {positions.words()}")
        plan.say("", f"{sublayers}, {_size(each)} a trajectory in {settings.dtype}")
    wanted = min(_samples(run) or n, n)
    shards = -(-wanted // settings.shard_sequences)
    in_shards = min(n, shards * settings.shard_sequences)  # recording goes by whole shards
    if not settings.enabled:
        plan.say("Cache", "none (cache.enabled=false): the LM runs whenever the stream is read")
        return {stream.name: np.arange(in_shards) for stream in _streams(run, lm)}
    root = Path(settings.dir or default_cache_dir()).expanduser()
    to_record: dict[str, np.ndarray] = {}
    needed = 0
    for condition, kind, untrained_seed in _streams(run, lm):
        if source is None:
            to_record[condition] = np.arange(in_shards)
            needed += int(counts[:in_shards].sum() * on_disk)
            size = _size(counts[:in_shards].sum() * each)
            plan.say("Cache", f"{condition}: {size} in {root}, if nothing of it is there")
            continue
        stream = make_stream(run, source, kind, untrained_seed=untrained_seed)
        assert stream.cache is not None
        to_record[condition] = absent = stream.missing_sequences(_samples(run))
        bytes_absent = stream.cache.n_bytes(absent)
        bytes_all = sum(map(stream.cache.shard_bytes, range(shards)))
        needed += bytes_absent
        plan.say(
            "Cache",
            f"{condition}: {_size(bytes_all)}, of which {_size(bytes_all - bytes_absent)} is there; "
            f"{len(absent)} of {in_shards} sequences to record, in {stream.cache.folder}",
        )
    plan.numbers["cache_bytes_missing"] = needed
    free = shutil.disk_usage(_existing(root)).free
    plan.say("Disk", f"{_size(free)} free for the cache")
    if not os.access(_existing(root), os.W_OK) or not _existing(root).is_dir():
        plan.misfits.append(f"cache.dir={root}: {_existing(root)} is no folder that can be written. Give another.")
    elif needed > free:
        fit = int(free * 0.98 / (on_disk * counts.mean()) / max(1, len(to_record)))
        if run.script != "train":  # recording goes by whole shards
            fit = fit // settings.shard_sequences * settings.shard_sequences
        fewer = {"train": "data.limit", "analyze": "analysis.samples", "perturb": "perturb.samples"}[run.script]
        plan.misfits.append(
            f"The cache needs {_size(needed)} more and {root} has {_size(free)} free: set cache.dir to a larger disk, "
            + (f"{fewer}={fit} or less, " if fit else "")
            + "or cache.enabled=false, which runs the LM again whenever the stream is read."
        )
    plan.cache_root = _existing(root)
    return to_record


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


# --- the language model -----------------------------------------------------------------------------------------------


def _weights(plan: Plan, run: Run, lm: LMSource) -> None:
    head = run.script == "perturb"
    n = lm.n_parameters(head=head)
    n_bytes = n * DTYPES[run.config.lm.dtype].itemsize
    plan.numbers["lm_parameters"], plan.numbers["lm_bytes"] = n, n_bytes
    what = "with the LM head" if head else "without the LM head, which is not read"
    plan.say("LM weights", f"{n:,} parameters ({what}), {_size(n_bytes)} in {run.config.lm.dtype}")
    folder = lm.folder
    if lm.gguf is not None:
        plan.say("", f"in {lm.gguf.path}, stored as {lm.gguf.stored} and dequantised")
    elif folder is not None:
        plan.say("", f"in {folder}, stored in {lm.stored_dtype() or 'several formats, or not complete yet'}")


def _reach(plan: Plan, lm: LMSource) -> None:
    """Whether the weights can be had, and whether there is room for their download."""
    if lm.commit is None:
        return
    there = 0
    if lm.folder is not None:
        try:
            check_files(lm.name, lm.folder)
            return
        except UserError:  # a download that was interrupted
            there = sum(file.stat().st_size for file in lm.folder.glob("model*.safetensors"))
    if not hub_reachable():
        what = "only partly" if there else "not"
        plan.misfits.append(
            f"The weights of lm.name={lm.name} are {what} in the local Hub cache and the network is out of reach: "
            "connect once to fetch them, or give lm.name=<folder of the model>."
        )
        return
    size, cache = max(0, weights_size(lm.location, lm.commit) - there), Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache)).free
    plan.say("Download", f"{_size(size)} of weights to {cache}, where {_size(free)} is free")
    both, same_disk = size, ""
    if plan.cache_root is not None and os.stat(plan.cache_root).st_dev == os.stat(_existing(cache)).st_dev:
        both += int(plan.numbers.get("cache_bytes_missing", 0))
        same_disk = f" (with the cache of trajectories, on the same disk, {_size(both)})"
    if both > free:
        plan.misfits.append(
            f"The weights of lm.name={lm.name} are {_size(size)} to download{same_disk} and {cache} has {_size(free)} "
            "free: set HF_HOME to a folder on a larger disk."
        )


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan, run: Run, lm: LMSource, positions: Positions, *, needs_lm: bool) -> None:
    counts, n = positions.counts, len(positions.counts)
    each = int(plan.numbers["bytes_per_trajectory"])
    config: Any = run.config  # its choices are plain strings, checked when the config was read
    gpu, processes = on_gpu(run.config), processes_here(run)
    lm_bytes = int(plan.numbers["lm_bytes"]) * needs_lm
    # weights in the format they are stored in are mapped from their files on a CPU, and shared by its processes
    is_mapped = not gpu and lm.stored_dtype() == config.lm.dtype
    first = positions.lengths[: config.cache.shard_sequences].tolist()
    batches = len(make_batches(first, config.lm.batch_tokens, _layout(config)))
    at_once = 1 if gpu else min(torch.get_num_threads(), batches)
    per_shard = np.add.reduceat(counts, range(0, n, config.cache.shard_sequences))
    shard = int(per_shard.max()) * each
    parts = plan.parts
    parts["LM weights"] = lm_bytes
    if not needs_lm:
        plan.say("", "not loaded: all that is wanted of them is in the cache")
    parts["LM forward, about"] = needs_lm * estimates.forward_bytes(
        lm, dtype_bytes=DTYPES[config.lm.dtype].itemsize, batch_tokens=config.lm.batch_tokens, at_once=at_once
    )
    if gpu and not positions.is_last:  # the tokens of a batch, before they go to the shard
        item = DTYPES[config.lm.dtype].itemsize
        parts["a batch being recorded"] = needs_lm * config.lm.batch_tokens * lm.n_sublayers * lm.n_units * item
    parts["a shard being recorded, about"] = needs_lm * 2 * shard * (not _changes_layers(run))
    if run.script == "train":
        _autoencoder(plan, run, lm, n, shard)
    elif run.script == "analyze":
        analysis = config.analysis
        with torch.device("meta"):
            probe = ResidualStreamProbe(
                n_sublayers=lm.n_sublayers,
                n_units=lm.n_units,
                measures=analysis.measures,
                keep=analysis.keep,
                components=analysis.components,
            )
        measured = int(counts[: analysis.samples].sum())
        kept = min(analysis.keep or measured, measured) if probe.kept is not None else 0
        parts["statistics"] = estimates.state_bytes(probe)
        parts["kept trajectories, about"] = 2 * kept * each
        if "pca" in analysis.measures:
            parts["PCA, about"] = estimates.covariance_bytes(lm.n_units, 2)
    elif not _changes_layers(run):
        kept = int(counts[: config.perturb.samples].sum())
        parts["trajectories behind the plane, about"] = 2 * kept * each
        parts["PCA, about"] = estimates.covariance_bytes(lm.n_units, 1)
    parts["Python and its libraries, about"] = estimates.LIBRARIES
    for i, (name, size) in enumerate((name, size) for name, size in parts.items() if size):
        plan.say("" if i else "Memory", f"{_size(size):>10}  {name}")
    total = sum(parts.values())
    on_node = total if processes == 1 else processes * (total - lm_bytes * is_mapped) + lm_bytes * is_mapped
    free_memory = available_memory()
    if gpu:
        _gpu_memory(plan, run, total - parts["Python and its libraries, about"], processes)
        return
    at_one = f"about {_size(total)} a process"
    shared = ", the weights shared" if is_mapped and processes > 1 else ""
    plan.say("", f"{at_one}, {_size(on_node)} for {processes} on this machine{shared}; {_size(free_memory)} is free")
    sure = lm_bytes * (1 if is_mapped else processes)
    if config.lm.device_map is None and sure > free_memory:
        plan.misfits.append(
            f"The LM's weights take {_size(sure)} and {_size(free_memory)} of memory is free: {_cure(run, plan, sure)}."
        )
    elif on_node > free_memory:
        plan.say("Warning", "with what is about, this may not fit: lower lm.batch_tokens or cache.shard_sequences")


def _gpu_memory(plan: Plan, run: Run, total: int, processes: int) -> None:
    free = [available_memory(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    plan.say("", f"about {_size(total)} a GPU; free on {len(free)} GPUs: {', '.join(map(_size, free))}")
    if processes > len(free):
        plan.misfits.append(f"trainer.devices={run.config.trainer.devices} and this machine has {len(free)} GPUs.")
    smallest, weights = min(free), plan.parts["LM weights"]
    if run.config.lm.device_map is None and weights > smallest:
        plan.misfits.append(
            f"The LM's weights take {_size(weights)} and a GPU has {_size(smallest)} free: {_cure(run, plan, weights)}."
        )
    elif total > smallest:
        plan.say("Warning", "with what is about, this may not fit: lower lm.batch_tokens or cache.shard_sequences")


def _cure(run: Run, plan: Plan, needed: int) -> str:
    free = available_memory("cuda:0") if on_gpu(run.config) else available_memory()
    cures = []
    if DTYPES[run.config.lm.dtype].itemsize > 2 and needed / 2 < free:
        cures.append("set lm.dtype=bfloat16")
    if plan.parts["LM weights"] < free and processes_here(run) > 1:
        cures.append(f"set trainer.devices={max(1, free // plan.parts['LM weights'])}")
    cures.append("set lm.device_map=auto with trainer.devices=1 (all GPUs, then memory, then disk)")
    return ", or ".join([*cures, "take a smaller model"])


def _autoencoder(plan: Plan, run: Run, lm: LMSource, n: int, shard: int) -> None:
    config: Any = run.config
    cae = config.cae
    with torch.device("meta"):
        module = CompressingAutoencoder(
            lm.n_units,
            cae.bottleneck,
            cae.layers,
            count=cae.count,
            standardise=cae.standardise,
            n_sublayers=lm.n_sublayers,
        )
    n_parameters = sum(p.numel() for p in module.parameters())
    plan.numbers["cae_parameters"] = n_parameters
    plan.say("Autoencoder", f"{n_parameters:,} parameters, widths {' '.join(map(str, module.widths))} and back")
    plan.parts["autoencoder, its gradients and Adam"] = estimates.optimiser_bytes(
        n_parameters, config.trainer.precision
    )
    own_shards = math.ceil(-(-n // config.cache.shard_sequences) / processes_here(run))
    plan.parts["vectors being shuffled, at most"] = estimates.shuffle_bytes(
        corpus_bytes=own_shards * shard,
        window_bytes=min(config.data.shuffle_shards, own_shards) * shard,
        vector_bytes=lm.n_units * CACHE_DTYPES[config.cache.dtype].itemsize,
        kept=config.cache.enabled,
    )
    plan.parts["PCA beside it, about"] = estimates.covariance_bytes(lm.n_units, 2)


# --- operations -------------------------------------------------------------------------------------------------------


def _operations(plan: Plan, run: Run, lm: LMSource, positions: Positions, to_record: dict[str, np.ndarray]) -> None:
    config: Any = run.config
    lengths = positions.lengths
    size = config.cache.shard_sequences
    cost = estimates.forward_cost(lm)
    tokens, recording = 0, 0.0
    together = (np.split(lengths[absent], np.flatnonzero(np.diff(absent // size)) + 1) for absent in to_record.values())
    for part in (part.tolist() for parts in together for part in parts if len(part)):
        tokens += sum(part)
        recording += cost.of(part, config.lm.batch_tokens, _layout(config))
    plan.numbers["recording_flops"] = recording
    each = f"{_flops(cost.linear)} a token and attention, for {tokens:,} tokens"
    again = "" if config.cache.enabled else ", each time the stream is read"
    nothing = "nothing" if _changes_layers(run) else "nothing, all is in the cache"
    plan.say("Recording", f"{_flops(recording)}{again}: {each}" if tokens else nothing)
    if _differentiates(run):
        _jacobians(plan, run, lm)
    if run.script == "train":
        sizes = split(len(lengths), val_size=config.data.val_size, test_size=config.data.test_size, seed=config.seed)
        n_train, n_val = (int(positions.counts[sizes[part]].sum()) * lm.n_sublayers for part in ("train", "val"))
        with torch.device("meta"):
            widths = CompressingAutoencoder(
                lm.n_units, config.cae.bottleneck, config.cae.layers, count=config.cae.count
            ).widths
        epoch = estimates.training_flops(widths, n_train) + estimates.evaluation_flops(widths, n_val)
        plan.numbers["epoch_flops"] = epoch
        epochs = config.trainer.max_epochs
        plan.say("Training", f"{_flops(epoch)} an epoch of {n_train:,} vectors, {_flops(epochs * epoch)} for {epochs}")


def _jacobians(plan: Plan, run: Run, lm: LMSource) -> None:
    """What the derivatives of every text cost in each series, and their eigenvalues, which cost as much or more."""
    texts, n_units = run.config.analysis.jacobian.texts, lm.n_units
    n_series = sum(name not in MATRIX_NULLS for name in SERIES)
    rows = estimates.jacobian_flops(lm)
    spectra = estimates.spectrum_flops(n_units, lm.n_sublayers)
    plan.numbers |= {"jacobian_flops": rows, "spectrum_flops": spectra}
    plan.say(
        "Jacobians", f"{_flops(texts * n_series * (rows + spectra))} for {texts} texts in {n_series} series, each:"
    )
    plan.say("", f"{_flops(rows)} for all {n_units} rows, forward and backward (k leading exponents: about k/D of it")
    plan.say("", f"a pass), and about {_flops(spectra)} for eigenvalues, singular values and exponents")
    size = 8 * n_units**2 * lm.n_sublayers
    plan.say("", f"memory beside the LM: about {_size(2 * size)} for the matrices of one text, whatever their number")


def _layout(config: Any) -> str:
    """The layout that most models are recorded in; whether this one is only its weights can tell."""
    return SORTED if config.lm.layout == SORTED or config.lm.device_map is not None else PACKED


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}" if n_bytes < 1000 else f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def _flops(n: float) -> str:
    power = min(5, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}FLOP"
