"""From rows of text to token sequences: filter by length, tokenise, shuffle for the control, split.

The paper's section 2.1. Whole rows, unchanged, with ``l_min < characters < l_max``; token 0 is BOS. Everything here is
a function of the rows, the settings and (seed, sequence index): never of batch, process or worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsdyn.errors import UserError
from rsdyn.stream.text.corpus import load_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sequences", "keep", "load_rows", "split", "token_order", "tokenise", "tokenise_one", "tokenise_texts"]

_CHUNK = 1000  # rows read and tokenised at once: bounds the memory


def keep(text: str, l_min: int, l_max: int) -> bool:
    """Whether a row passes the paper's filter: ``l_min < len(text) < l_max``, in characters, both strict."""
    return l_min < len(text) < l_max


@dataclass(frozen=True, eq=False)
class Sequences:
    """N token sequences, flat: sequence i is ``ids[offsets[i]:offsets[i + 1]]``, and its token 0 is BOS."""

    ids: np.ndarray
    """int32 (n_tokens,)."""
    offsets: np.ndarray
    """int64 (N + 1,), from 0 to n_tokens."""
    n_rows: int
    """Rows read before the filter, up to the row that filled the limit."""
    n_truncated: int
    """Sequences that were cut to the model's context."""
    bos_id: int
    bos_note: str | None
    """What the run should say when the tokenizer itself puts no BOS, else None."""
    row_of: np.ndarray | None = None
    """int64 (N,), the row of the text that each sequence is; None where sequence i is row i."""
    documents: np.ndarray | None = None
    """int64 (N,), the document that each belongs to; None where nobody knows."""

    @property
    def rows(self) -> np.ndarray:
        """The row of the text that each sequence is, int64 (N,)."""
        return np.arange(len(self)) if self.row_of is None else self.row_of

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one sequence, int64 (T,), a copy."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        return self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each sequence with BOS, int64 (N,)."""
        return np.diff(self.offsets)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def shuffled(self, seed: int, *, keep_last: bool = False) -> Sequences:
        """The paper's control: tokens 1..n of sequence i permuted by (seed, i) alone, BOS kept.

        With ``keep_last`` the last token stays too: it is the one whose stream is recorded, and most sequences end in
        the same one, so that the paper's control changes the recorded token as well as what stands before it.
        """
        ids = self.ids.copy()
        for i, (start, stop) in enumerate(zip(self.offsets[:-1], self.offsets[1:] - keep_last, strict=True)):
            ids[start + 1 : stop] = ids[start + 1 : stop][_permutation(seed, i, stop - start - 1)]
        ids.setflags(write=False)
        return replace(self, ids=ids)

    @property
    def last_tokens(self) -> np.ndarray:
        """The id of each sequence's last token, int64 (N,)."""
        return self.ids[self.offsets[1:] - 1].astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Hex digest of what the LM will be given: the same on every machine, for the cache's key."""
        import xxhash

        state = xxhash.xxh3_128(f"{len(self)} sequences".encode())
        state.update(np.ascontiguousarray(self.offsets, "<i8").data)
        state.update(np.ascontiguousarray(self.ids, "<i4").data)
        return state.hexdigest()


def tokenise(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    l_min: int = 100,
    l_max: int = 500,
    limit: int | None = None,
    strip: bool = False,
    condition: Literal["original", "shuffled", "shuffled_keep_last"] = "original",
    order: Literal["random", "corpus"] = "random",
    seed: int = 0,
    documents: np.ndarray | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
    vocab_size: int | None = None,
) -> Sequences:
    """Filter and tokenise whole rows, until `limit` sequences are there; exactly one BOS opens each.

    With ``order="random"`` rows come in an order that is a function of (seed, row) alone, so that the first N sequences
    are a sample of the whole text, the same rows whatever `limit` is; ``"corpus"`` keeps the order of the text, whose
    neighbours are alike. `documents` ``(n_rows,)`` says which document each row belongs to, -1 where it does not say
    (:func:`rsdyn.stream.text.documents.document_of`).

    Text that spells a special token ("<s>") is taken as text. With `strip` white space at a row's end goes before its
    characters are counted: WikiText's rows end in " \\n", so that all of them would end in one token.
    ``condition="shuffled"`` permutes tokens 1..n of sequence i by (seed, i) alone and keeps BOS (the paper's control);
    ``"shuffled_keep_last"`` keeps the last token in its place too. `max_tokens` counts BOS; what is longer is an error,
    or with `truncate` is cut before it is shuffled. `vocab_size` is the model's.

    Raises UserError: bad settings, no BOS to be had, no row in range, too long, an id outside the vocabulary.
    """
    if l_min < 0 or l_max - l_min < 2:
        raise UserError(f"l_min={l_min} and l_max={l_max} leave no length between them (both strict).")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1; leave it out to take every sequence.")
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"a context of {max_tokens} tokens has no room for BOS and a token of text.")
    if condition not in ("original", "shuffled", "shuffled_keep_last"):
        raise UserError(f"condition={condition} must be original, shuffled or shuffled_keep_last.")
    if order not in ("random", "corpus"):
        raise UserError(f"order={order} must be random or corpus.")
    bos_id, bos_note = _bos(tokenizer)
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    kept: list[int] = []
    turns = np.argsort(_hash(_ORDER, seed, np.arange(len(rows)))) if order == "random" else None
    n_rows = n_truncated = n_long = longest = 0
    shortest_row, longest_row = math.inf, 0
    for first in range(0, len(rows), _CHUNK):
        wanted = math.inf if limit is None else limit - len(lengths) - n_long
        if wanted <= 0:
            break
        texts, numbers = [], []
        if turns is None:
            chosen, found = range(first, min(first + _CHUNK, len(rows))), rows[first : first + _CHUNK][text_column]
        else:
            chosen = turns[first : first + _CHUNK].tolist()
            found = rows[chosen][text_column]
        for number, text in zip(chosen, found, strict=True):
            n_rows += 1
            text = (text or "").removeprefix("\ufeff")  # a null row is an empty one; a byte-order mark is no text
            text = text.rstrip() if strip else text
            n_characters = len(text)
            shortest_row, longest_row = min(shortest_row, n_characters), max(longest_row, n_characters)
            if text and keep(text, l_min, l_max):
                texts.append(text)
                numbers.append(number)
                if len(texts) >= wanted:
                    break
        chunk = []
        for number, tokens in zip(numbers, _encode(tokenizer, texts), strict=True):
            _check(tokens, number, tokenizer, bos_id, vocab_size)
            if max_tokens is not None and len(tokens) + 1 > max_tokens:
                longest = max(longest, len(tokens) + 1)
                if not truncate:
                    n_long += 1
                    continue
                n_truncated += 1
                tokens = tokens[: max_tokens - 1]
            chunk += [np.array([bos_id], np.int32), tokens]
            lengths.append(len(tokens) + 1)
            kept.append(number)
        if chunk:
            ids.append(np.concatenate(chunk))
    if n_long:
        raise UserError(
            f"{n_long} of {n_long + len(lengths)} sequences are longer than the model's context of {max_tokens} tokens "
            f"(the longest has {longest}, with BOS). Set truncate=true to cut them, or lower l_max={l_max}."
        )
    if not lengths:
        seen = f"rows have {shortest_row} to {longest_row} characters" if n_rows else "there are no rows"
        raise UserError(
            f"no sequence is left: {n_rows} rows were read and none has more than l_min={l_min} and fewer than "
            f"l_max={l_max} characters ({seen}). Change one of the two, or give another text."
        )
    flat, offsets = np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat.setflags(write=False)
    offsets.setflags(write=False)
    row_of = np.array(kept, np.int64)
    of_documents = None if documents is None else documents[row_of]
    if of_documents is not None and of_documents.min() < 0:
        row = int(row_of[of_documents < 0][0])
        raise UserError(
            f"row {row} of the text names no document. Give every row of text one in its document_column, or none."
        )
    sequences = Sequences(flat, offsets, n_rows, n_truncated, bos_id, bos_note, row_of, of_documents)
    if condition == "original":
        return sequences
    return sequences.shuffled(seed, keep_last=condition == "shuffled_keep_last")


def tokenise_one(tokenizer: PreTrainedTokenizerBase, text: str, bos_id: int) -> np.ndarray:
    """The tokens of one text behind one BOS, int64, as in a corpus: a special token spelled in it is taken as text.

    Raises UserError where the tokenizer cannot but read BOS out of the text.
    """
    tokens = _encode(tokenizer, [text])[0]
    if bos_id in tokens:
        raise UserError(
            f"{text[:40]!r} spells {tokenizer.convert_ids_to_tokens(bos_id)}, which this tokenizer (lm.name) cannot "
            "take as plain text: there would be two BOS. Leave it out of the text."
        )
    return np.concatenate([[bos_id], tokens]).astype(np.int64)


def tokenise_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    truncate: bool = False,
    vocab_size: int | None = None,
) -> Sequences:
    """The tokens of texts as they are, none filtered; exactly one BOS opens each, as in a corpus.

    Raises ``UserError``: a text without a token or that spells BOS, one longer than ``max_tokens`` with BOS (unless
    ``truncate`` cuts it), a token outside the vocabulary.
    """
    bos_id, bos_note = _bos(tokenizer)
    ids, n_truncated = [], 0
    for number, tokens in enumerate(_encode(tokenizer, list(texts))):
        _check(tokens, number, tokenizer, bos_id, vocab_size)
        if max_tokens is not None and len(tokens) + 1 > max_tokens:
            if not truncate:
                raise UserError(
                    f"texts[{number}] has {len(tokens) + 1} tokens with BOS, more than the model's context of "
                    f"{max_tokens}. Shorten it, or give truncate=True to cut what is too long."
                )
            n_truncated += 1
            tokens = tokens[: max_tokens - 1]
        ids.append(np.concatenate([[bos_id], tokens]))
    return sequences_of(ids, bos_id=bos_id, bos_note=bos_note, n_truncated=n_truncated)


def sequences_of(ids: list[np.ndarray], *, bos_id: int, bos_note: str | None = None, n_truncated: int = 0) -> Sequences:
    """Token ids of each sequence as a corpus; BOS, if it is there, stands first in each."""
    flat = np.concatenate(ids).astype(np.int32)
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    flat.setflags(write=False)
    offsets.setflags(write=False)
    return Sequences(flat, offsets, len(ids), n_truncated, bos_id, bos_note)


def split(n: int, *, val_size: float, test_size: float, seed: int) -> dict[str, np.ndarray]:
    """Divide n sequences into train, val and test: sorted int64 indices that no two parts share.

    Sizes below 1 are fractions of n (rounded, at least one sequence), from 1 on they are counts. Who goes where is
    the rank of a hash of (seed, index): a function of (seed, index, n) alone.

    Raises UserError where a part would be empty.
    """
    for key, size in (("val_size", val_size), ("test_size", test_size)):
        if not (0 < size < 1 or (1 <= size < math.inf and size == int(size))):
            raise UserError(f"{key}={size} must be a fraction of the sequences between 0 and 1, or a count from 1 on.")
    n_val, n_test = _part(n, val_size), _part(n, test_size)
    if n_val + n_test >= n:
        fractions = [size for size in (val_size, test_size) if size < 1]
        if sum(fractions) >= 1:
            raise UserError(f"val_size={val_size} and test_size={test_size} leave nothing to train on.")
        counts = sum(int(size) for size in (val_size, test_size) if size >= 1)
        needed = math.ceil((counts + 1 + len(fractions)) / (1 - sum(fractions)))  # enough; the fewest is just below
        while needed > 3 and _part(needed - 1, val_size) + _part(needed - 1, test_size) < needed - 1:
            needed -= 1
        raise UserError(
            f"{n} sequence{'s' * (n != 1)} cannot fill train, val and test: val_size={val_size} and "
            f"test_size={test_size} need at least {needed}. Raise the limit, lower the sizes or give more text."
        )
    order = np.argsort(_hash(_SPLIT, seed, np.arange(n)))
    return {
        "train": np.sort(order[n_val + n_test :]),
        "val": np.sort(order[:n_val]),
        "test": np.sort(order[n_val : n_val + n_test]),
    }


def _part(n: int, size: float) -> int:
    return int(size) if size >= 1 else max(1, round(size * n))


_SPLIT, _SHUFFLE, _DRAW, _ORDER = 1, 2, 3, 4  # so that the uses of one seed have nothing to do with each other


def _hash(*words: int | np.ndarray) -> np.ndarray:
    """splitmix64 of the words in turn, uint64; distinct for distinct values of the last one.

    Our own, because numpy does not promise that a Generator gives the same permutation in its next release, and
    then every cache key of a shuffled run would change.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        word = np.asarray(word if isinstance(word, np.ndarray) else word % 2**64, np.uint64)
        state = state + word + np.uint64(0x9E3779B97F4A7C15)  # wraps, as meant
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _permutation(seed: int, index: int, n: int) -> np.ndarray:
    """The order of the n tokens after BOS in shuffled sequence `index`."""
    return np.argsort(_hash(_SHUFFLE, seed, index, np.arange(n)))


def token_order(seed: int, index: int, n: int) -> np.ndarray:
    """The order in which the n tokens of sequence `index` are drawn where only some are wanted."""
    return np.argsort(_hash(_DRAW, seed, index, np.arange(n)))


def _bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str | None]:
    """The id that opens every sequence, and what to say if the tokenizer would not have put it there."""
    if tokenizer.bos_token_id is not None:
        if tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]:
            return tokenizer.bos_token_id, None
        note = f"this tokenizer adds no BOS of its own: {tokenizer.bos_token} was put before each sequence"
        return tokenizer.bos_token_id, note
    if tokenizer.eos_token_id is not None:
        note = f"this tokenizer has no BOS: its end-of-text token {tokenizer.eos_token} was put before each sequence"
        return tokenizer.eos_token_id, note
    raise UserError(
        "lm.name: its tokenizer has neither a BOS nor an EOS token to open a sequence with. Name one in the model's "
        "tokenizer_config.json (bos_token)."
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text alone, int32, no special tokens added and none read out of the text."""
    if not texts:
        return []
    backend: Any = getattr(tokenizer, "_tokenizer", None)  # the fast tokenizers' own
    before = getattr(backend, "encode_special_tokens", None)
    try:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    finally:
        if before is not None:
            backend.encode_special_tokens = before  # transformers leaves the last call's setting in the tokenizer
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def _check(
    tokens: np.ndarray, row: int, tokenizer: PreTrainedTokenizerBase, bos_id: int, vocab_size: int | None
) -> None:
    if len(tokens) == 0:
        raise UserError(f"row {row} of the text gives no token with this tokenizer (lm.name). Take the row out of it.")
    if bos_id in tokens:
        # split_special_tokens is not enough where the special token is a piece of the vocabulary too: unigram models
        # and BPE with ignore_merges still find it.
        raise UserError(
            f"row {row} of the text spells {tokenizer.convert_ids_to_tokens(bos_id)}, which this tokenizer (lm.name) "
            "cannot take as plain text: the sequence would have two BOS. Take the row out of the text."
        )
    top = max(int(tokens.max()), bos_id)
    if vocab_size is not None and top >= vocab_size:
        raise UserError(
            f"lm.name: its tokenizer gives token {top} ({tokenizer.convert_ids_to_tokens(top)!r}, row {row}) but the "
            f"model's vocabulary ends at {vocab_size - 1}. The tokenizer in that folder belongs to another model."
        )
