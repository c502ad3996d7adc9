"""What the scripts share: the stream and the Trainer that a config asks for.

The scripts and this file are the only ones that read the config; all below takes plain arguments.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

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
from rsdyn.stream.lm import find_lm
from rsdyn.stream.text import tokenise
from rsdyn.stream.trajectories import TrajectoryStream


def open_stream(run: Run) -> TrajectoryStream:
    """The trajectories of the text that the config asks for: nothing is recorded yet; says what was found."""
    transformers.utils.logging.set_verbosity_error()
    lm_config, cache = run.config.lm, run.config.cache
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
        condition=data.condition,
        seed=run.config.seed,
        max_tokens=lm.max_tokens,
        truncate=data.truncate,
        vocab_size=lm.vocab_size,
    )
    text = data.name or (Path(data.path).name if data.path else "embedded")
    shuffled = ", tokens shuffled" if data.condition == "shuffled" else ""
    run.say(
        f"Text: {text}{shuffled}: {len(sequences)} sequences of {data.l_min + 1} to {data.l_max - 1} characters out of "
        f"{sequences.n_rows} rows read, {sequences.n_tokens / len(sequences):.0f} tokens each on average"
    )
    for note in (sequences.bos_note, f"{sequences.n_truncated} sequences were cut" if sequences.n_truncated else None):
        if note:
            run.say(f"      {note}")
    stream = TrajectoryStream(
        lm,
        sequences,
        made_from={
            "lm_revision": lm.commit or lm.revision,
            "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, BOS {sequences.bos_id}",
            "text": text,
            "text_config": data.config,
            "text_split": data.split,
            "text_revision": data.revision,
            "text_column": data.text_column,
            "filter": [data.l_min, data.l_max],
            "limit": data.limit,
            "condition": data.condition,
            "shuffle_seed": run.config.seed if data.condition == "shuffled" else None,
            "positions": data.positions,
        },
        cache_dir=(cache.dir or default_cache_dir()) if cache.enabled else None,
        dtype=cache.dtype,
        shard_sequences=cache.shard_sequences,
        batch_tokens=lm_config.batch_tokens,
        lm_dtype=lm_config.dtype,
        matmul_precision=lm_config.matmul_precision,
    )
    stream.open()
    missing = stream.n_missing()
    size = stream.n_sequences * stream.n_sublayers * stream.n_units * stream.dtype.itemsize / 2**20
    if stream.cache is None:
        run.say("Cache: none (cache.enabled=false); the LM runs again in every epoch")
    elif missing == 0:
        run.say(f"Cache: complete, {size:.0f} MiB in {stream.cache.folder}; the LM is not loaded")
    else:
        run.say(
            f"Cache: {missing} of {stream.n_sequences} sequences to record, {size:.0f} MiB in all, "
            f"in {stream.cache.folder}"
        )
    run.record_provenance(
        lm={"name": lm.name, "revision": lm.revision, "commit": lm.commit, "identity": lm.identity()},
        text=text,
        tokens_digest=sequences.digest,
        cache_key=stream.cache.key if stream.cache else None,
        cache_folder=str(stream.cache.folder) if stream.cache else None,
    )
    run.start_tracking(group=lm.label, tags=[lm.label, text, data.condition])
    return stream


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
