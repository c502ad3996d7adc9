"""``--plan``: what a run will need, and what of it does not fit, before a weight is read or a file written.

Sizes first (``run/sizes.py``), then what the machine has, then from both the lines and the misfits: each is computed
from values alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants

from rsdyn.config.naming import in_keys
from rsdyn.errors import UserError
from rsdyn.lm.hub import hub_reachable, weights_size
from rsdyn.lm.shapes import SHAPES
from rsdyn.lm.source import LMSource, lm_of_shape
from rsdyn.lm.weights import DTYPES, available_memory, check_files
from rsdyn.run.early import check_machine, check_model, check_prompts
from rsdyn.run.opening import Source, find_source, find_text, open_lm, rows_in_range
from rsdyn.run.run import Run
from rsdyn.run.sizes import LIBRARIES, WEIGHTS, Sizes, changes_layers, samples_of, sizes_of
from rsdyn.run.trainer import on_gpu, processes_here
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.text.positions import Positions

CHARACTERS_PER_TOKEN = 4  # English prose in vocabularies of 32 to 256 thousand tokens, when the text cannot be had
NEEDS_NETWORK = "The run needs the network"


@dataclass(frozen=True)
class Machine:
    """What a run finds.

    Attributes:
        cache_folder: that of the cache, or the nearest above it that exists; ``writable`` says whether it can be
            written, ``disk_free`` how many bytes are free.
        memory_free: bytes; ``gpus_free`` the same of each GPU that the run may use.
        unreachable: what has to be fetched and cannot be now, each as a sentence.
        download: bytes of weights to fetch; 0 where they are here, or not known.
        hub_folder: where they go, with ``hub_free`` bytes.
    """

    cache_folder: Path
    writable: bool
    disk_free: int
    memory_free: int
    gpus_free: tuple[int, ...]
    unreachable: tuple[str, ...]
    download: int
    hub_folder: Path
    hub_free: int


@dataclass(frozen=True)
class Plan:
    """The lines to print, and a sentence with its cure for each thing that surely does not fit."""

    sizes: Sizes
    machine: Machine
    lines: tuple[str, ...]
    misfits: tuple[str, ...]


def show_plan(run: Run) -> None:
    """Print the plan of a run. Raises ``UserError`` naming what surely does not fit, and what would."""
    if run.config.data.stream is not None:
        find_source(run)  # it is read and checked, and that is all there is to plan
        run.say("No language model is needed. Everything that can be known before the run fits.")
        return
    check_machine(run)
    lm, missing = _open_lm(run)
    check_model(run, lm)
    source: Source | None = None
    if missing is None:
        try:
            source = find_text(run, lm)
            check_prompts(run, source)
        except UserError as error:
            if run.config.data.name is None or hub_reachable():  # a mistake, which the run would meet too
                raise
            missing = in_keys(error)
    plan = make_plan(run, lm, source, missing)
    for line in plan.lines:
        run.say(line)
    if plan.misfits:
        raise UserError("this run does not fit. " + " ".join(f"({i}) {m}" for i, m in enumerate(plan.misfits, 1)))
    known = "without the network" if plan.machine.unreachable else "before the run"
    run.say(f"Everything that can be known {known} fits.")


def make_plan(run: Run, lm: LMSource, source: Source | None, missing: str | None = None) -> Plan:
    """What the run of ``run.script`` will need.

    Args:
        run: with its settings; nothing of it is changed.
        lm: the shape of the model.
        source: the text in its tokens; None where it cannot be had.
        missing: why not, in a sentence.
    """
    lengths = _lengths(run, lm, source)
    sizes = sizes_of(run, lm, source, lengths)
    machine = look_around(run, lm, sizes, missing)
    told = [
        *([] if source is not None else _guessed(run, lengths)),
        *_of_weights(run, lm, sizes),
        *_of_cache(run, lm, sizes, machine, lengths),
        *_of_download(machine),
        *_of_autoencoder(sizes),
        *_of_memory(run, sizes, machine),
        *_of_operations(run, lm, sizes),
        *(("Network", sentence) for sentence in machine.unreachable),
    ]
    lines = tuple(f"{label + ':' if label else '':<14}{text}" for label, text in told)
    return Plan(sizes, machine, lines, tuple(_misfits(run, lm, sizes, machine)))


# --- what there is ----------------------------------------------------------------------------------------------------


def _open_lm(run: Run) -> tuple[LMSource, str | None]:
    """The model; of a preset's, its shape alone where neither the Hub nor its local cache has it, and why."""
    settings = run.config.lm
    try:
        return open_lm(run), None
    except UserError:
        shape = SHAPES.get(settings.name)
        if shape is None or hub_reachable():
            raise
        lm = lm_of_shape(settings.name, device_map=settings.device_map)
        run.say(f"LM:   {lm.label} ({lm.config.model_type}), {lm.n_layers} layers of {lm.n_units} units")
        run.say(f"      its shape is that of revision {shape.revision[:12]}, since the Hub is out of reach")
        return lm, "its tokenizer is not in the local Hub cache"


def _lengths(run: Run, lm: LMSource, source: Source | None) -> np.ndarray:
    """Tokens of each sequence of the text, BOS included; guessed from its characters where it cannot be tokenised."""
    if source is not None:
        return source.sequences.lengths
    data = run.config.data
    if data.name is None:
        characters = rows_in_range(run)
        return 1 + np.array(characters)[: data.limit] // CHARACTERS_PER_TOKEN
    return np.full(data.limit or 10_000, 1 + (data.l_min + data.l_max) // 2 // CHARACTERS_PER_TOKEN)


def look_around(run: Run, lm: LMSource, sizes: Sizes, missing: str | None) -> Machine:
    """What the machine has, of what this run needs."""
    cache = _existing(Path(run.config.cache.dir or default_cache_dir()).expanduser())
    hub = Path(constants.HF_HUB_CACHE)
    download, unreachable = _weights_to_fetch(lm) if sizes.needs_lm else (0, None)
    texts = [] if missing is None else [f"{NEEDS_NETWORK} for the text: {missing}"]
    gpus = range(torch.cuda.device_count()) if on_gpu(run.config) else ()
    return Machine(
        cache_folder=cache,
        writable=os.access(cache, os.W_OK) and cache.is_dir(),
        disk_free=shutil.disk_usage(cache).free,
        memory_free=available_memory(),
        gpus_free=tuple(available_memory(f"cuda:{i}") for i in gpus),
        unreachable=(*([] if unreachable is None else [unreachable]), *texts),
        download=download,
        hub_folder=hub,
        hub_free=shutil.disk_usage(_existing(hub)).free,
    )


def _weights_to_fetch(lm: LMSource) -> tuple[int, str | None]:
    """Bytes of weights that are still to be fetched, and a sentence where they cannot be now."""
    if lm.commit is None:
        return 0, None
    there = 0
    if lm.folder is not None:
        try:
            check_files(lm.name, lm.folder)
            return 0, None
        except UserError:  # a download that was interrupted
            there = sum(file.stat().st_size for file in lm.folder.glob("model*.safetensors"))
    if hub_reachable():
        return max(0, weights_size(lm.location, lm.commit) - there), None
    shape = SHAPES.get(lm.name)
    size = 0 if shape is None else max(0, shape.parameters * DTYPES[shape.dtype].itemsize - there)
    return size, (
        f"{NEEDS_NETWORK} for the weights of lm.name={lm.name}, which are {'only partly' if there else 'not'} in the "
        "local Hub cache: fetch them where there is one, or give lm.name=<folder of the model>."
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


# --- the lines --------------------------------------------------------------------------------------------------------

Lines = Iterator[tuple[str, str]]


def _guessed(run: Run, lengths: np.ndarray) -> Lines:
    data = run.config.data
    known = f"data.limit={len(lengths)}" if data.limit else f"{len(lengths)}"
    if data.name is not None and not data.limit:
        known += " (no data.limit: as many as the text has)"
    what = "the text is" if data.name is not None else "the tokenizer is"
    yield "Sequences", f"{known}, about {lengths.mean():.0f} tokens each: {what} out of reach"


def _of_weights(run: Run, lm: LMSource, sizes: Sizes) -> Lines:
    what = "with the LM head" if sizes.has_head else "without the LM head, which is not read"
    yield "LM weights", f"{sizes.lm_parameters:,} parameters ({what}), {_size(sizes.lm_bytes)} in {run.config.lm.dtype}"
    if lm.gguf is not None:
        yield "", f"in {lm.gguf.path}, stored as {lm.gguf.stored} and dequantised"
    elif lm.folder is not None:
        yield "", f"in {lm.folder}, stored in {lm.stored_dtype() or 'several formats, or not complete yet'}"
    if not sizes.needs_lm:
        yield "", "not loaded: all that is wanted of them is in the cache"


def _of_cache(run: Run, lm: LMSource, sizes: Sizes, machine: Machine, lengths: np.ndarray) -> Lines:
    settings = run.config.cache
    if changes_layers(run):
        yield "Cache", f"none is needed: perturb.kind={run.config.perturb.kind} records no stream"
        return
    if not sizes.streams:
        yield "Cache", f"none is needed: analysis.measures=[{','.join(run.config.analysis.measures)}] records no stream"
        return
    positions = Positions(run.config.data.positions, lengths, seed=run.config.seed)
    sublayers = f"{lm.n_sublayers} sublayers of {lm.n_units} units"
    if positions.is_last:
        yield "Trajectories", f"{sublayers}, {_size(sizes.trajectory_bytes)} a sequence in {settings.dtype}"
    else:
        yield "Trajectories", f"{sizes.n_trajectories:,} of {sizes.n_sequences:,} sequences, {positions.words()}"
        yield "", f"{sublayers}, {_size(sizes.trajectory_bytes)} a trajectory in {settings.dtype}"
    if not settings.enabled:
        yield "Cache", "none (cache.enabled=false): the LM runs whenever the stream is read"
        return
    root = Path(settings.dir or default_cache_dir()).expanduser()
    for stream in sizes.streams:
        if stream.folder is None:
            yield "Cache", f"{stream.name}: {_size(stream.n_bytes)} in {root}, if nothing of it is there"
            continue
        there = _size(stream.n_bytes - stream.missing_bytes)
        yield "Cache", f"{stream.name}: {_size(stream.n_bytes)}, of which {there} is there;"
        yield "", f"{len(stream.missing)} of {sizes.in_shards} sequences to record, in {stream.folder}"
    yield "Disk", f"{_size(machine.disk_free)} free for the cache"


def _of_download(machine: Machine) -> Lines:
    if machine.download:
        free = _size(machine.hub_free)
        yield "Download", f"{_size(machine.download)} of weights to {machine.hub_folder}, where {free} is free"


def _of_autoencoder(sizes: Sizes) -> Lines:
    if (cae := sizes.autoencoder) is not None:
        yield "Autoencoder", f"{cae.n_parameters:,} parameters, widths {' '.join(map(str, cae.widths))} and back"


def _of_memory(run: Run, sizes: Sizes, machine: Machine) -> Lines:
    processes = processes_here(run)
    for i, (name, size) in enumerate((name, size) for name, size in sizes.memory.items() if size):
        yield "" if i else "Memory", f"{_size(size):>10}  {name}"
    if machine.gpus_free:
        free = ", ".join(map(_size, machine.gpus_free))
        yield "", f"about {_size(_on_gpu(sizes))} a GPU; free on {len(machine.gpus_free)} GPUs: {free}"
        short = _weights_here(sizes) <= min(machine.gpus_free) < _on_gpu(sizes)
    else:
        on_node = _on_node(sizes, processes)
        shared = ", the weights shared" if sizes.is_mapped and processes > 1 else ""
        each = f"about {_size(sizes.memory_bytes)} a process"
        yield "", f"{each}, {_size(on_node)} for {processes} on this machine{shared};"
        yield "", f"{_size(machine.memory_free)} is free"
        short = _sure(sizes, processes) <= machine.memory_free < on_node
    if short:
        yield "Warning", "with what is about, this may not fit: lower lm.batch_tokens or cache.shard_sequences"


def _of_operations(run: Run, lm: LMSource, sizes: Sizes) -> Lines:
    again = "" if run.config.cache.enabled else ", each time the stream is read"
    if sizes.tokens:
        yield "Recording", f"{_flops(sizes.recording_flops)}{again}:"
        yield "", f"{_flops(sizes.token_flops)} a token and attention, for {sizes.tokens:,} tokens"
    else:
        yield "Recording", "nothing, all is in the cache" if sizes.streams else "nothing"
    if (found := sizes.jacobians) is not None:
        total = found.n_texts * found.n_series * (found.rows_flops + found.spectra_flops)
        yield "Jacobians", f"{_flops(total)} for {found.n_texts} texts in {found.n_series} series, each:"
        yield "", f"{_flops(found.rows_flops)} for all {lm.n_units} rows, forward and backward"
        yield "", "(k leading exponents: about k/D of it a pass),"
        yield "", f"about {_flops(found.spectra_flops)} for eigenvalues, singular values and exponents"
        yield "", f"memory beside the LM: about {_size(found.n_bytes)} for the matrices of one text"
    if (cae := sizes.autoencoder) is not None:
        epochs = run.config.trainer.max_epochs
        yield "Training", f"{_flops(cae.epoch_flops)} an epoch of {cae.n_vectors:,} vectors,"
        yield "", f"{_flops(epochs * cae.epoch_flops)} for {epochs}"


# --- what does not fit ------------------------------------------------------------------------------------------------


def _misfits(run: Run, lm: LMSource, sizes: Sizes, machine: Machine) -> Iterator[str]:
    """A sentence, with what would fit, for each thing that surely does not."""
    if run.config.cache.enabled and sizes.streams:
        yield from _of_disk(run, sizes, machine)
    both, same_disk = machine.download, ""
    if machine.download and os.stat(machine.cache_folder).st_dev == os.stat(_existing(machine.hub_folder)).st_dev:
        both += sizes.missing_bytes
        same_disk = f" (with the cache of trajectories, on the same disk, {_size(both)})"
    if both > machine.hub_free:
        yield (
            f"The weights of lm.name={lm.name} are {_size(machine.download)} to download{same_disk} and "
            f"{machine.hub_folder} has {_size(machine.hub_free)} free: set HF_HOME to a folder on a larger disk."
        )
    if run.config.lm.device_map is not None:
        return
    if machine.gpus_free:
        weights, smallest = _weights_here(sizes), min(machine.gpus_free)
        if weights > smallest:
            cure = _cure(run, sizes, weights, available_memory("cuda:0"))
            yield f"The LM's weights take {_size(weights)} and a GPU has {_size(smallest)} free: {cure}."
    elif (sure := _sure(sizes, processes_here(run))) > machine.memory_free:
        cure = _cure(run, sizes, sure, machine.memory_free)
        yield f"The LM's weights take {_size(sure)} and {_size(machine.memory_free)} of memory is free: {cure}."


def _of_disk(run: Run, sizes: Sizes, machine: Machine) -> Iterator[str]:
    settings, root = run.config.cache, Path(run.config.cache.dir or default_cache_dir()).expanduser()
    if not machine.writable:
        yield f"cache.dir={root}: {machine.cache_folder} is no folder that can be written. Give another."
    elif sizes.missing_bytes > machine.disk_free:
        per_sequence = sizes.on_disk * sizes.n_trajectories / sizes.n_sequences
        fit = int(machine.disk_free * 0.98 / per_sequence / len(sizes.streams))
        if samples_of(run) is not None:  # recording goes by whole shards
            fit = fit // settings.shard_sequences * settings.shard_sequences
        fewer = {"train": "data.limit", "analyze": "analysis.samples", "perturb": "perturb.samples"}[run.script]
        yield (
            f"The cache needs {_size(sizes.missing_bytes)} more and {root} has {_size(machine.disk_free)} free: set "
            "cache.dir to a larger disk, "
            + (f"{fewer}={fit} or less, " if fit else "")
            + "or cache.enabled=false, which runs the LM again whenever the stream is read."
        )


def _weights_here(sizes: Sizes) -> int:
    return sizes.memory[WEIGHTS]


def _on_gpu(sizes: Sizes) -> int:
    """About what a GPU holds: all but what Python's libraries take in memory."""
    return sizes.memory_bytes - sizes.memory[LIBRARIES]


def _on_node(sizes: Sizes, processes: int) -> int:
    """About what the processes of a machine take together."""
    shared = _weights_here(sizes) if sizes.is_mapped else 0
    return processes * (sizes.memory_bytes - shared) + shared


def _sure(sizes: Sizes, processes: int) -> int:
    """What the weights alone take on a machine without GPUs."""
    return _weights_here(sizes) * (1 if sizes.is_mapped else processes)


def _cure(run: Run, sizes: Sizes, needed: int, free: int) -> str:
    weights, cures = _weights_here(sizes), []
    if DTYPES[run.config.lm.dtype].itemsize > 2 and needed / 2 < free:
        cures.append("set lm.dtype=bfloat16")
    if weights < free and processes_here(run) > 1:
        cures.append(f"set trainer.devices={max(1, free // weights)}")
    cures.append("set lm.device_map=auto with trainer.devices=1 (all GPUs, then memory, then disk)")
    return ", or ".join([*cures, "take a smaller model"])


# --- units ------------------------------------------------------------------------------------------------------------


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}" if n_bytes < 1000 else f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def _flops(n: float) -> str:
    power = min(5, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}FLOP"
