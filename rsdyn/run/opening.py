"""What the scripts share: the stream and the Trainer that a config asks for.

The scripts and this file are the only ones that read the config; all below takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import xxhash
from tqdm.auto import tqdm

from rsdyn.config.naming import keyed
from rsdyn.config.schema import to_dict
from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.errors import UserError
from rsdyn.lm.certificate import Certificate, say_unused
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.ranks import is_rank_zero
from rsdyn.redaction import redact
from rsdyn.run.checkpoints import identity
from rsdyn.run.early import check_machine, check_model
from rsdyn.run.given_stream import names_a_model, read_stream, skip_what_needs_a_model
from rsdyn.run.run import Run
from rsdyn.run.trainer import on_gpu, processes_here
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.kept import KeptStream
from rsdyn.stream.text.corpus import Corpus, open_corpus
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.sequence_labels import SequenceLabels, labels_of
from rsdyn.stream.text.tokens import Sequences, tokenise
from rsdyn.stream.trajectories import TrajectoryStream


class Source(NamedTuple):
    """The language model and the text of a run, neither of which has met the other yet."""

    lm: LMSource
    sequences: Sequences
    text: str
    made_from: dict[str, Any]
    stream: KeptStream | None = None
    rows: Corpus | None = None

    def digests(self, n: int, column: str, *, strip: bool) -> torch.Tensor | None:
        """A digest of each of the first ``n`` texts, ``(n,)`` int64, whatever its tokens; None where none is known."""
        if self.rows is None:
            return None
        texts = self.rows.rows.select(self.sequences.rows[:n])[column]
        found = [xxhash.xxh3_64_intdigest((text.rstrip() if strip else text).encode()) for text in texts]
        return torch.from_numpy(np.array(found, np.uint64).view(np.int64))

    def facts(self) -> dict[str, Any]:
        """What a summary says of them, whatever was done with them."""
        return {
            "lm": self.lm.label,
            "text": self.text,
            "n_sublayers": self.lm.n_sublayers,
            "sites_per_layer": len(self.lm.site_names),
            "n_units": self.lm.n_units,
        }


def find_source(run: Run) -> Source:
    """The language model (its config, not its weights) and the tokenised text that the config asks for.

    What the machine, or a model of this shape, cannot give is said before the text is opened. With ``data.stream``
    it is a stream that was recorded elsewhere, and what its file says of model and text.
    """
    check_machine(run)
    path = run.config.data.stream
    if path is not None:
        if run.script != "analyze":
            raise UserError(f"data.stream={path}: {run.script}.py records its stream itself. Use it with analyze.py.")
        skip_what_needs_a_model(run)
        stream = read_stream(run, open_lm(run) if names_a_model(run) else None)
        given: Any = stream.lm
        return Source(given, stream.sequences, Path(path).expanduser().absolute().name, {}, stream)
    lm = open_lm(run)
    check_model(run, lm)
    return find_text(run, lm)


def open_lm(run: Run) -> LMSource:
    """What the config of the language model says; its weights are not read."""
    transformers.utils.logging.set_verbosity_error()
    lm_config = run.config.lm
    lm = find_lm(
        lm_config.name,
        revision=lm_config.revision,
        trust_remote_code=lm_config.trust_remote_code,
        device_map=lm_config.device_map,
        tokenizer=lm_config.tokenizer,
        label=lm_config.label,
    )
    stored = "" if lm.gguf is None else f", a GGUF file stored as {lm.gguf.stored}"
    run.say(f"LM:   {lm.label} ({lm.config.model_type}), {lm.n_layers} layers of {lm.n_units} units{stored}")
    for note in lm.notes:
        run.say(f"      {note}")
    return lm


def _open_rows(run: Run) -> Corpus:
    data = run.config.data
    is_embedded = data.path is None and data.name is None
    return open_corpus(
        path=data.path,
        name=data.name,
        config=data.config,
        split=data.split,
        revision=data.revision,
        text_column=data.text_column,
        document_column=data.document_column or (DOCUMENT_COLUMN if is_embedded else None),
        group_column=data.group_column,
    )


def rows_in_range(run: Run) -> list[int]:
    """The characters of each row of the text that passes the filter, where there is no tokenizer to know more."""
    data = run.config.data
    texts = (text.rstrip() if data.strip else text for text in _open_rows(run).rows[data.text_column])
    return [len(text) for text in texts if data.l_min < len(text) < data.l_max]


def find_text(run: Run, lm: LMSource) -> Source:
    """The text that the config asks for, in this model's tokens."""
    data = run.config.data
    corpus = _open_rows(run)
    document_column = data.document_column or (DOCUMENT_COLUMN if data.path is None and data.name is None else None)
    tokenizer = lm.tokenizer()
    sequences = tokenise(
        corpus.rows,
        tokenizer,
        text_column=data.text_column,
        l_min=data.l_min,
        l_max=data.l_max,
        strip=data.strip,
        limit=data.limit,
        order=data.order,
        seed=run.config.seed if data.order_seed is None else data.order_seed,
        documents=document_of(corpus.rows, text_column=data.text_column, document_column=document_column),
        labels=None if data.group_column is None else labels_of(corpus.rows, data.group_column),
        max_tokens=lm.max_tokens,
        truncate=data.truncate,
        vocab_size=lm.vocab_size,
        bos=run.config.lm.bos,
        chat_template=data.chat_template,
    )
    text = data.name or (Path(data.path).expanduser().absolute().name if data.path else "embedded")
    run.say(
        f"Text: {text}: {len(sequences)} sequences of {data.l_min + 1} to {data.l_max - 1} characters out of "
        f"{sequences.n_rows} rows read, {sequences.n_tokens / len(sequences):.0f} tokens each on average"
    )
    cut = f"{sequences.n_truncated} sequences were cut" if sequences.n_truncated else None
    unread = f"not read: {corpus.unread}" if corpus.unread else None
    for note in (unread, sequences.bos_note, cut):
        if note:
            run.say(f"      {keyed(('data', 'lm'), note)}")
    if sequences.labels is not None:
        sequences.labels.check(f"group_column={data.group_column}")
        say_labels(run, sequences.labels)
    made_from = {
        "lm_revision": lm.commit or lm.revision,
        **({} if lm.quantisation is None else {"lm_quantisation": lm.quantisation}),
        **({} if lm.own_tokenizer is None else {"tokenizer_of": lm.own_tokenizer}),
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, BOS {sequences.bos_id}",
        "text": text,
        "text_config": data.config,
        "text_split": data.split,
        "text_revision": data.revision,
        "text_column": data.text_column,
        **({} if data.chat_template == "none" else {"chat_template": data.chat_template}),
        "filter": [data.l_min, data.l_max],
        **({"strip": True} if data.strip else {}),
        "limit": data.limit,
        "positions": data.positions,
    }
    return Source(lm, sequences, text, made_from, rows=corpus)


def say_labels(run: Run, labels: SequenceLabels) -> None:
    """Say which groups the sequences belong to, and how many belong to none."""
    without = f"; {labels.n_missing} without a label, in no group" if labels.n_missing else ""
    run.say(f"      groups: {labels.words()}{without}")


def open_stream(
    run: Run,
    source: Source,
    condition: str = "original",
    *,
    samples: int | None = None,
    untrained_seed: int = 0,
    name: str | None = None,
    is_read: bool = True,
) -> TrajectoryStream:
    """The trajectories of one condition, of which nothing is recorded yet; says what the cache holds of them.

    ``condition`` is ``original``, ``shuffled`` or ``token_shuffled`` (one control, the paper's and the null model's
    name of it), ``shuffled_keep_last``, or ``untrained``: the original text in random weights, those of the run's seed
    and ``untrained_seed``. ``samples`` is how many sequences, from the first one on, the run will want; default all.
    ``name`` is the stream's in the run's records; default its condition. One that is not ``is_read`` is there for its
    text and its model alone: it has no cache, and nothing is said of it.
    """
    if source.stream is not None:
        return source.stream
    if not is_read:
        return make_stream(run, source, condition, untrained_seed=untrained_seed, name=name, cached=False)
    stream = make_stream(run, source, condition, untrained_seed=untrained_seed, name=name)
    if stream.n_missing(samples) and not on_gpu(run.config):  # each GPU is asked when the weights go there
        stream.lm.check_memory(dtype=run.config.lm.dtype, processes=processes_here(run))
    stream.open(samples)
    missing, in_shards = stream.n_missing(samples), stream.bounds(stream.shards_of(samples) - 1)[1]
    n_bytes = stream.n_trajectories(0, in_shards) * stream.n_sublayers * stream.n_units * stream.dtype.itemsize
    shown = "" if condition == "original" else f" ({name or condition})"
    if stream.cache is None:
        run.say(f"Cache{shown}: none (cache.enabled=false); the LM runs whenever the stream is read")
    elif missing == 0:
        run.say(f"Cache{shown}: complete, {n_bytes / 2**20:.0f} MiB in {stream.cache.folder}; the LM is not loaded")
    else:
        run.say(
            f"Cache{shown}: {missing} of {in_shards} sequences to record, {n_bytes / 2**20:.0f} MiB in "
            f"all, in {stream.cache.folder}"
        )
    return stream


def make_stream(
    run: Run, source: Source, condition: str, *, untrained_seed: int = 0, name: str | None = None, cached: bool = True
) -> TrajectoryStream:
    """The trajectories of one condition (see :func:`open_stream`), before anything is looked up or written.

    Where it is not ``cached`` it has no cache, whatever the settings.
    """
    config, cache, seed = run.config, run.config.cache, run.config.seed
    shuffle = {"token_shuffled": "shuffled"}.get(condition, condition)
    is_shuffled = shuffle in ("shuffled", "shuffled_keep_last")
    text = source.sequences
    return TrajectoryStream(
        source.lm.without_training(seed + untrained_seed) if condition == "untrained" else source.lm,
        text.shuffled(seed, keep_last=shuffle == "shuffled_keep_last") if is_shuffled else text,
        positions=config.data.positions,
        position_seed=seed,
        made_from={
            **source.made_from,
            "condition": shuffle if is_shuffled else "original",
            "shuffle_seed": seed if is_shuffled else None,
        },
        cache_dir=(cache.dir or default_cache_dir()) if cache.enabled and cached else None,
        dtype=cache.dtype,
        shard_sequences=cache.shard_sequences,
        batch_tokens=config.lm.batch_tokens,
        lm_dtype=config.lm.dtype,
        matmul_precision=config.lm.matmul_precision,
        layout=config.lm.layout,
        on_certificate=partial(say_certificate, run, name or condition),
    )


def last_tokens(stream: TrajectoryStream) -> torch.Tensor | None:
    """Which last token each sequence has, ``(N,)`` numbers from 0; None where other tokens' states are recorded."""
    if not stream.positions.is_last or not stream.tokens_are_known:
        return None
    return torch.from_numpy(np.unique(stream.sequences.last_tokens, return_inverse=True)[1])


def say_positions(run: Run, stream: TrajectoryStream, samples: int | None = None) -> None:
    """Say how many trajectories the first ``samples`` sequences have, where it is not one each."""
    if not stream.positions.is_last:
        n = stream.n_sequences if samples is None else min(samples, stream.n_sequences)
        run.say(f"Positions: {stream.positions.words()}, {stream.n_trajectories(0, n)} trajectories of {n} sequences")


def start_records(run: Run, source: Source, streams: Mapping[str, TrajectoryStream]) -> None:
    """Write down what the run measures, and start W&B, once the first stream is open; there may be none."""
    lm = source.lm
    sequences = next((stream.sequences for stream in streams.values()), source.sequences)
    caches = {name: stream.cache for name, stream in streams.items() if stream.cache is not None}
    run.record_provenance(
        lm={
            "name": lm.name,
            "revision": lm.revision,
            "commit": lm.commit,
            "identity": lm.identity(),
            "quantisation": lm.quantisation,
        },
        text=source.text,
        tokenizer=source.made_from.get("tokenizer"),
        bos=sequences.opened_by,
        tokens_digest=sequences.digest if source.stream is None or source.stream.tokens_are_known else None,
        caches={name: {"cache_key": c.key, "cache_folder": str(c.folder)} for name, c in caches.items()},
    )
    for name, stream in streams.items():
        if stream.certificate is not None:
            record_certificate(run, name, stream.certificate)
            if stream.certificate.get("unused"):  # said when it was recorded, and to whoever uses that
                run.say(say_unused(stream.certificate["unused"]))
    run.start_tracking(group=lm.label, tags=list(dict.fromkeys([lm.label, source.text, *streams])))


def record_certificate(run: Run, condition: str, certificate: dict[str, Any]) -> None:
    """Add the certificate of a condition's model to ``provenance.json``."""
    run.record_provenance(certificates={**run.provenance.get("certificates", {}), condition: certificate})


def say_certificate(run: Run, condition: str, certificate: Certificate) -> None:
    """Say in a line how well a model's stream was certified, and write all of it into ``provenance.json``."""
    if is_rank_zero():
        with tqdm.external_write_mode():  # above the bar that shows the recording
            for line in certificate.lines():
                run.say(line)
        record_certificate(run, condition, certificate.to_dict())


def what_decides(run: Run, source: Source, stream: TrajectoryStream) -> dict[str, Any]:
    """What a checkpoint of this run must agree on with a run that resumes from it (``checkpoints.identity``)."""
    settings = redact(to_dict(run.config))
    return identity(settings, tokens=stream.sequences.digest, weights=source.lm.identity())
