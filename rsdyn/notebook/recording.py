"""``record``: a model and texts in, trajectories out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import UserError
from rsdyn.lm.blocks import record_blocks
from rsdyn.lm.given import GivenModel
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.text.sequence_labels import labels_from, labels_of
from rsdyn.stream.text.tokens import Sequences, sequences_of, tokenise_texts
from rsdyn.stream.trajectories import TrajectoryStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = (
    "a transformers model, its name on the Hub, its folder, a .gguf file, embedded, smollm2, or any torch module with "
    "sites=[...]"
)
TEXTS = "a list of strings, a list of lists of token ids, or a datasets.Dataset"


@dataclass(frozen=True)
class Origin:
    """What trajectories were recorded from: enough to record them again, shuffled, or from random weights."""

    lm: LMSource | GivenModel
    sequences: Sequences
    settings: Mapping[str, Any]

    def stream(self, condition: str = "original", *, seed: int = 0) -> TrajectoryStream:
        """The same tokens, ``token_shuffled``, or through an ``untrained`` model of the same shape."""
        lm: Any = self.lm.without_training(seed) if condition == "untrained" else self.lm
        sequences = self.sequences.shuffled(seed) if condition == "token_shuffled" else self.sequences
        return TrajectoryStream(lm, sequences, made_from={"condition": condition}, **self.settings)


def record(
    model: nn.Module | LMSource | str | PathLike[str],
    texts: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    positions: str | int = "last",
    groups: Sequence[str | None] | None = None,
    sites: Sequence[str] | None = None,
    cache: str | PathLike[str] | None = None,
    dtype: str = "float32",
    stored: str = "float32",
    device: str | torch.device | None = None,
    batch_tokens: int = 1024,
    truncate: bool = False,
    text_column: str = "text",
    group_column: str | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> Trajectories:
    """Record the residual stream of a model over texts (paper 2.1, Fig. 1A).

    Every text is recorded as it is, none is filtered. Before anything is recorded the sites are certified on two of the
    sequences: what attention and MLP add to the stream is what it grows by, in every layer. A model object comes back
    as it was.

    Args:
        model: a transformers model (with or without its LM head, wrapped by PEFT or not), its name or folder, a
            ``.gguf`` file, ``embedded``, ``smollm2``, what :func:`rsdyn.find_lm` gives, or any torch module with
            ``sites``.
        texts: strings, lists of token ids (taken as they are: no BOS is put before them), or a ``datasets.Dataset``.
            With ``sites``, the module's inputs: a tensor or a dictionary of keyword arguments.
        tokenizer: of a model object; a named model brings its own.
        positions: which tokens of each sequence: ``last``, ``all``, or how many drawn at random.
        groups: a label of each text, such as ``correct`` and ``wrong``; None is no label. They change nothing of what
            is recorded; :func:`rsdyn.measure` then gives every curve and finding by group too.
        sites: the names of a module's blocks in order; their inputs are the stream, which must be a running sum.
        cache: a folder in which what was recorded is kept, and found again by the same call.
        dtype: what a named model computes in; an object computes in its own.
        stored: ``float32`` or ``bfloat16``, the format of the result.
        device: where a named model runs; default a GPU if there is one. An object stays where it is.
        batch_tokens: at most this many tokens go through the model together.
        truncate: cut texts longer than the model's context instead of refusing them.
        text_column: the column of a Dataset that holds the text.
        group_column: the column of a Dataset that holds the labels.
        seed: of the drawn positions.
        progress: called with the number of sequences after each batch.

    Returns:
        :class:`~rsdyn.stream.recorded.Trajectories`, whose ``tensor`` is ``(N, S, D)``.

    Raises:
        UserError: a model that has no running sum to record, texts that are empty or longer than its context, a
            tokenizer that belongs to another model, sites that are not there or whose sum identity fails.
        TypeError: a model, texts or tokenizer of a kind that is not taken.
    """
    if sites is not None:
        return _record_blocks(model, texts, sites, positions, groups)
    lm = open_model(model)
    given, labels = _texts_of(texts, groups, text_column, group_column)
    sequences = _tokens_of(given, lm, tokenizer, truncate)
    if isinstance(positions, bool) or not (positions in ("last", "all") or isinstance(positions, int)):
        raise UserError(f"positions={positions!r}: give 'last', 'all', or how many tokens of each sequence.")
    rule: Any = {"sample": positions} if isinstance(positions, int) else positions
    if isinstance(positions, int) and positions < 1:
        raise UserError(f"positions={positions}: at least one token of each sequence is recorded.")
    if stored not in ("float32", "bfloat16"):
        raise UserError(f"stored={stored!r}: give float32 or bfloat16.")
    if isinstance(lm, GivenModel):
        dtype = lm.dtype
    settings = {
        "positions": rule,
        "position_seed": seed,
        "cache_dir": None if cache is None else Path(cache).expanduser(),
        "dtype": stored,
        "batch_tokens": batch_tokens,
        "lm_dtype": dtype,
    }
    origin = Origin(lm, sequences, settings)
    return read(origin.stream(), origin, labels, given if isinstance(given[0], str) else None, device, progress)


def read(
    stream: TrajectoryStream,
    origin: Origin | None,
    groups: tuple[str | None, ...] | None,
    texts: Sequence[str] | None,
    device: str | torch.device | None,
    progress: Callable[[int], object],
) -> Trajectories:
    """All of a stream, recorded where it is not in the cache; its language model is let go of."""
    lm: Any = stream.lm
    stream.device = lm.device if isinstance(lm, GivenModel) else device or _default_device()
    try:
        tensor, sequence = stream.read(on_record=progress)
    finally:
        stream.release_lm()
    position = np.concatenate([stream.positions.of(i) for i in range(stream.n_sequences)])
    n_layers = stream.n_sublayers // len(lm.site_names)
    return Trajectories(
        tensor,
        sites=tuple(lm.site_names) * n_layers,
        layers=tuple(layer for layer in range(n_layers) for _ in lm.site_names),
        sequence=sequence,
        position=torch.from_numpy(position.astype(np.int64)),
        texts=None if texts is None else tuple(texts),
        groups=groups,
        label=lm.label,
        certificate=stream.certificate,
        tokens=tuple(torch.from_numpy(stream.sequences[i]) for i in range(stream.n_sequences)),
        origin=origin,
    )


def open_model(model: Any, name: str | None = None) -> LMSource | GivenModel:
    """The language model that a person gave, by its name or as an object; ``TypeError`` for anything else."""
    if isinstance(model, (LMSource, GivenModel)):
        return model
    if isinstance(model, (str, PathLike)):
        return find_lm(str(model))
    if isinstance(model, nn.Module):
        if hasattr(model, "peft_config") or hasattr(model, "get_output_embeddings"):
            return GivenModel(model, name)
        raise TypeError(
            f"model: {type(model).__name__} is no transformers model; name its blocks, in order, with sites=[...]."
        )
    raise TypeError(f"model: {type(model).__name__} is not taken; give {MODELS}.")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _texts_of(
    texts: Any, groups: Sequence[str | None] | None, text_column: str, group_column: str | None
) -> tuple[list[Any], tuple[str | None, ...] | None]:
    """The texts, or the token ids, as a list, and a label of each."""
    if hasattr(texts, "column_names") and hasattr(texts, "features"):
        for argument, column in (("text_column", text_column), ("group_column", group_column)):
            if column is not None and column not in texts.column_names:
                raise UserError(f"{argument}={column}: this Dataset has the columns {', '.join(texts.column_names)}.")
        if group_column is not None and groups is None:
            labels = labels_of(texts, group_column)
            groups = [None if code < 0 else labels.names[code] for code in labels.code.tolist()]
        texts = list(texts[text_column])
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: one {type(texts).__name__} is not taken; give {TEXTS}.")
    given = list(texts)
    if not given:
        raise UserError("texts: there are none. Give at least one.")
    if any(isinstance(text, str) != isinstance(given[0], str) for text in given):
        raise TypeError(f"texts: strings and others are mixed; give {TEXTS}.")
    for number, text in enumerate(given):
        if isinstance(text, str):
            if not text.strip():
                raise UserError(f"texts[{number}] is empty. Leave it out.")
        elif not isinstance(text, (list, tuple, np.ndarray, Tensor)):
            raise TypeError(f"texts[{number}] is a {type(text).__name__}; give {TEXTS}.")
    return given, _labels(groups, len(given))


def _labels(groups: Sequence[str | None] | None, n: int) -> tuple[str | None, ...] | None:
    """A label of each of ``n`` texts, None where it is missing or blank."""
    if groups is None:
        return None
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise TypeError(f"groups: one {type(groups).__name__} is not taken; give a list, a label of each text.")
    given = list(groups)
    if len(given) != n:
        raise UserError(f"groups: {len(given)} labels for {n} texts. Give one of each.")
    labels = labels_from(given)
    labels.check("groups")
    return tuple(None if code < 0 else labels.names[code] for code in labels.code.tolist())


def _tokens_of(texts: list[Any], lm: LMSource | GivenModel, tokenizer: Any, truncate: bool) -> Sequences:
    """The token sequences of texts, checked against the model's vocabulary and context."""
    if isinstance(texts[0], str):
        tokenizer = lm.tokenizer() if tokenizer is None else tokenizer
        if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
            raise TypeError(f"tokenizer: {type(tokenizer).__name__} is not taken; give a tokenizer of transformers.")
        if len(tokenizer) > lm.vocab_size:
            raise UserError(
                f"tokenizer: it has {len(tokenizer)} tokens and the model {lm.vocab_size}, so they do not belong "
                "together. Give the model's own."
            )
        return tokenise_texts(texts, tokenizer, max_tokens=lm.max_tokens, truncate=truncate, vocab_size=lm.vocab_size)
    ids = [np.asarray(torch.as_tensor(tokens).cpu()) for tokens in texts]
    for number, tokens in enumerate(ids):
        if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"texts[{number}]: token ids are a list of whole numbers, at least one; it is {tokens!r}.")
        if tokens.min() < 0 or tokens.max() >= lm.vocab_size:
            raise UserError(
                f"texts[{number}] holds token {int(tokens.max())}, and the model's vocabulary ends at "
                f"{lm.vocab_size - 1}. They are of another tokenizer."
            )
        if lm.max_tokens is not None and len(tokens) > lm.max_tokens:
            if not truncate:
                raise UserError(
                    f"texts[{number}] has {len(tokens)} tokens, more than the model's context of {lm.max_tokens}. "
                    "Shorten it, or give truncate=True to cut what is too long."
                )
            ids[number] = tokens[: lm.max_tokens]
    return sequences_of(ids, bos_id=int(ids[0][0]))


def _record_blocks(
    model: Any, inputs: Any, sites: Sequence[str], positions: str | int, groups: Sequence[str | None] | None
) -> Trajectories:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: with sites, give the torch module itself, not {type(model).__name__}.")
    if not isinstance(inputs, (Tensor, Mapping)):
        raise TypeError(
            f"texts: with sites they are the module's inputs, a tensor or a dictionary of keyword arguments, not "
            f"{type(inputs).__name__}."
        )
    if positions not in ("last", "all"):
        raise UserError(f"positions={positions!r}: with sites, give 'last' or 'all'.")
    states, certificate = record_blocks(model, inputs, sites)
    n, s, p, d = states.shape
    if positions == "last":
        states = states[:, :, -1:]
    places = torch.arange(p)[-states.shape[2] :]
    return Trajectories(
        states.permute(0, 2, 1, 3).reshape(-1, s, d).cpu().clone(),
        sites=("resid_pre",) * s,
        layers=tuple(range(s)),
        sequence=torch.arange(n).repeat_interleave(len(places)),
        position=places.repeat(n),
        groups=_labels(groups, n),
        label=type(model).__name__,
        certificate=certificate.to_dict(),
    )
