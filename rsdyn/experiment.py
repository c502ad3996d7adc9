"""What the scripts share: the stream and the Trainer that a config asks for.

The scripts and this file are the only ones that read the config; all below takes plain arguments.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import transformers
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from rsdyn.errors import UserError
from rsdyn.script import Run
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.corpus import load_rows
from rsdyn.stream.source import LMSource, find_lm
from rsdyn.stream.text import Sequences, tokenise
from rsdyn.stream.trajectories import TrajectoryStream


class Source(NamedTuple):
    """The language model and the text of a run, neither of which has met the other yet."""

    lm: LMSource
    sequences: Sequences
    text: str
    made_from: dict[str, Any]


def find_source(run: Run) -> Source:
    """The language model (its config, not its weights) and the tokenised text that the config asks for."""
    transformers.utils.logging.set_verbosity_error()
    lm_config = run.config.lm
    data: Any = run.config.data  # its choices are plain strings, checked when the config was read
    lm = find_lm(lm_config.name, revision=lm_config.revision, trust_remote_code=lm_config.trust_remote_code)
    run.say(f"LM:   {lm.label} ({lm.config.model_type}), {lm.n_layers} layers of {lm.n_units} units")
    rows = load_rows(
        path=data.path,
        name=data.name,
        config=data.config,
        split=data.split,
        revision=data.revision,
        text_column=data.text_column,
    )
    tokenizer = lm.tokenizer()
    sequences = tokenise(
        rows,
        tokenizer,
        text_column=data.text_column,
        l_min=data.l_min,
        l_max=data.l_max,
        limit=data.limit,
        max_tokens=lm.max_tokens,
        truncate=data.truncate,
        vocab_size=lm.vocab_size,
    )
    text = data.name or (Path(data.path).name if data.path else "embedded")
    run.say(
        f"Text: {text}: {len(sequences)} sequences of {data.l_min + 1} to {data.l_max - 1} characters out of "
        f"{sequences.n_rows} rows read, {sequences.n_tokens / len(sequences):.0f} tokens each on average"
    )
    for note in (sequences.bos_note, f"{sequences.n_truncated} sequences were cut" if sequences.n_truncated else None):
        if note:
            run.say(f"      {note}")
    made_from = {
        "lm_revision": lm.commit or lm.revision,
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, BOS {sequences.bos_id}",
        "text": text,
        "text_config": data.config,
        "text_split": data.split,
        "text_revision": data.revision,
        "text_column": data.text_column,
        "filter": [data.l_min, data.l_max],
        "limit": data.limit,
        "positions": data.positions,
    }
    return Source(lm, sequences, text, made_from)


def open_stream(
    run: Run, source: Source, condition: str = "original", *, samples: int | None = None
) -> TrajectoryStream:
    """The trajectories of one condition, of which nothing is recorded yet; says what the cache holds of them.

    ``condition`` is ``original``, ``shuffled`` or ``token_shuffled`` (one control, the paper's and the null model's
    name of it), or ``untrained``: the original text in random weights. ``samples`` is how many sequences, from the
    first one on, the run will want; default all.
    """
    config, cache, seed = run.config, run.config.cache, run.config.seed
    is_shuffled = condition in ("shuffled", "token_shuffled")
    stream = TrajectoryStream(
        source.lm.without_training(seed) if condition == "untrained" else source.lm,
        source.sequences.shuffled(seed) if is_shuffled else source.sequences,
        made_from={
            **source.made_from,
            "condition": "shuffled" if is_shuffled else "original",
            "shuffle_seed": seed if is_shuffled else None,
        },
        cache_dir=(cache.dir or default_cache_dir()) if cache.enabled else None,
        dtype=cache.dtype,
        shard_sequences=cache.shard_sequences,
        batch_tokens=config.lm.batch_tokens,
        lm_dtype=config.lm.dtype,
        matmul_precision=config.lm.matmul_precision,
    )
    stream.open(samples)
    missing, in_shards = stream.n_missing(samples), stream.bounds(stream.shards_of(samples) - 1)[1]
    bytes_each = stream.n_sublayers * stream.n_units * stream.dtype.itemsize
    name = "" if condition == "original" else f" ({condition})"
    if stream.cache is None:
        run.say(f"Cache{name}: none (cache.enabled=false); the LM runs whenever the stream is read")
    elif missing == 0:
        run.say(
            f"Cache{name}: complete, {in_shards * bytes_each / 2**20:.0f} MiB in {stream.cache.folder}; "
            "the LM is not loaded"
        )
    else:
        run.say(
            f"Cache{name}: {missing} of {in_shards} sequences to record, {in_shards * bytes_each / 2**20:.0f} MiB in "
            f"all, in {stream.cache.folder}"
        )
    return stream


def start_records(run: Run, source: Source, streams: Mapping[str, TrajectoryStream]) -> None:
    """Write down what the run measures, and start W&B, once the first stream is open."""
    lm, first = source.lm, next(iter(streams.values()))
    caches = {name: stream.cache for name, stream in streams.items() if stream.cache is not None}
    run.record_provenance(
        lm={"name": lm.name, "revision": lm.revision, "commit": lm.commit, "identity": lm.identity()},
        text=source.text,
        tokens_digest=first.sequences.digest,
        caches={name: {"cache_key": c.key, "cache_folder": str(c.folder)} for name, c in caches.items()},
    )
    run.start_tracking(group=lm.label, tags=[lm.label, source.text, *streams])


def make_trainer(run: Run, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer: the ``trainer`` section, our defaults, and ``trainer.options`` over them.

    Raises ``UserError`` for an option Lightning does not have, or a device this machine does not have.
    """
    settings = run.config.trainer
    accelerator = settings.accelerator
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "cpu"  # Lightning would take Apple's MPS, which has no float64, and the statistics need it
    arguments: dict[str, Any] = {
        "max_epochs": settings.max_epochs,
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "accelerator": accelerator,
        "precision": settings.precision,
        "logger": run.logger or False,
        "callbacks": callbacks,
        "default_root_dir": run.folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,  # validation before training would record what training is about to
        "log_every_n_steps": 20,
        "use_distributed_sampler": False,
    }
    if settings.devices != 1 or settings.num_nodes > 1:
        # the buffers are equal everywhere; syncing them in each forward would hang processes with fewer batches
        new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
        arguments["strategy"] = DDPStrategy(**no_sync)
    known = inspect.signature(L.Trainer).parameters
    for name, value in settings.options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"Did you mean trainer.options.{near[0]}?" if near else f"It has: {', '.join(known)}."
            raise UserError(f"trainer.options.{name}={value}: lightning's Trainer has no such argument. {cure}")
    try:
        return L.Trainer(**(arguments | settings.options))
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        given = f"devices={settings.devices}, accelerator={settings.accelerator}, precision={settings.precision}"
        options = f", options={settings.options}" if settings.options else ""
        reason = " ".join(str(error).split())
        raise UserError(f"trainer ({given}{options}): lightning refuses this: {reason}") from error
