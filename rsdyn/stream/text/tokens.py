"""From rows of text to token sequences: filter by length, tokenise, shuffle for the control, split.

The paper's section 2.1. Whole rows, unchanged, with ``l_min < characters < l_max``; token 0 is BOS. Everything here is
a function of the rows, the settings and (seed, sequence index): never of batch, process or worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsdyn.errors import UserError
from rsdyn.lm.prefix import ChatFrame, chat_frame, find_bos, refuse_two_bos
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.sequence_labels import SequenceLabels

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
    bos_id: int | None
    """None where nothing opens a sequence (``bos=none``), or a chat template does without BOS."""
    bos_note: str | None
    """What the run should say when the tokenizer itself would put another opening, else None."""
    row_of: np.ndarray | None = None
    """int64 (N,), the row of the text that each sequence is; None where sequence i is row i."""
    documents: np.ndarray | None = None
    """int64 (N,), the document that each belongs to; None where nobody knows."""
    fixed: tuple[int, int] = (1, 0)
    """How many tokens at the beginning and at the end of each are not the text's: BOS, or a chat template's."""
    opened_by: str | None = None
    """What was put before each, in words; None where nobody knows."""
    chat_template: str = "none"
    """``user`` where each is a user turn of the tokenizer's chat template."""
    labels: SequenceLabels | None = None
    """Which group each belongs to; None where they have no labels. They are no part of :attr:`digest`."""

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
        """The paper's control: the text's tokens of sequence i permuted by (seed, i) alone, BOS (or a frame) kept.

        With ``keep_last`` the last token stays too: it is the one whose stream is recorded, and most sequences end in
        the same one, so that the paper's control changes the recorded token as well as what stands before it.
        """
        ids, (before, behind) = self.ids.copy(), self.fixed
        starts, stops = self.offsets[:-1] + before, self.offsets[1:] - max(behind, keep_last)
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ids[start:stop] = ids[start:stop][_permutation(seed, i, stop - start)]
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
    labels: SequenceLabels | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
    vocab_size: int | None = None,
    bos: str = "auto",
    chat_template: str = "none",
) -> Sequences:
    r"""Filter and tokenise whole rows, until `limit` sequences are there; exactly one BOS opens each.

    `bos` puts another token there, or ``none`` (:func:`rsdyn.lm.prefix.find_bos`). ``chat_template="user"`` makes each
    row a user turn of the tokenizer's chat template, up to where the model would answer.

    With ``order="random"`` rows come in an order that is a function of (seed, row) alone, so that the first N sequences
    are a sample of the whole text, the same rows whatever `limit` is; ``"corpus"`` keeps the order of the text, whose
    neighbours are alike. `documents` ``(n_rows,)`` says which document each row belongs to, -1 where it does not say
    (:func:`rsdyn.stream.text.documents.document_of`), and `labels` which group
    (:func:`rsdyn.stream.text.sequence_labels.labels_of`).

    Text that spells a special token ("<s>") is taken as text. With `strip` white space at a row's end goes before its
    characters are counted: WikiText's rows end in " \n", so that all of them would end in one token.
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
    encode = _Encoder(tokenizer, bos, chat_template, vocab_size)
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
        for number, tokens in zip(numbers, encode(texts, [f"row {n} of the text" for n in numbers]), strict=True):
            if max_tokens is not None and len(tokens) > max_tokens:
                longest = max(longest, len(tokens))
                if not truncate or encode.frame is not None:
                    n_long += 1
                    continue
                n_truncated += 1
                tokens = tokens[:max_tokens]
            chunk.append(tokens)
            lengths.append(len(tokens))
            kept.append(number)
        if chunk:
            ids.append(np.concatenate(chunk))
    if n_long:
        cure = f"Set truncate=true to cut them, or lower l_max={l_max}."
        if encode.frame is not None:
            cure = f"Lower l_max={l_max}: to cut them would cut the chat template's end."
        raise UserError(
            f"{n_long} of {n_long + len(lengths)} sequences are longer than the model's context of {max_tokens} tokens "
            f"(the longest has {longest}, with BOS). {cure}"
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
    opening = (encode.bos_id, encode.note)
    sequences = Sequences(
        *(flat, offsets, n_rows, n_truncated, *opening, row_of, of_documents),
        fixed=encode.fixed(flat, offsets),
        opened_by=encode.opened_by,
        chat_template=chat_template,
        labels=None if labels is None else labels.taken(row_of),
    )
    if condition == "original":
        return sequences
    return sequences.shuffled(seed, keep_last=condition == "shuffled_keep_last")


def tokenise_one(
    tokenizer: PreTrainedTokenizerBase, text: str, bos_id: int | None, *, chat_template: str = "none"
) -> np.ndarray:
    """The tokens of one text behind one BOS, int64, as in a corpus: a special token spelled in it is taken as text.

    ``bos_id`` of None puts nothing before it; ``chat_template="user"`` makes it a user turn, as in :func:`tokenise`.

    Raises UserError where the tokenizer cannot but read BOS out of the text.
    """
    bos = "none" if bos_id is None else str(tokenizer.convert_ids_to_tokens(bos_id))
    if chat_template == "user" and bos_id in (None, tokenizer.bos_token_id):
        bos = "auto"  # the template's own opening
    if not text:
        return np.array([] if bos_id is None else [bos_id], np.int64)
    return _Encoder(tokenizer, bos, chat_template, None)([text], [repr(text[:40])])[0].astype(np.int64)


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
    given = list(texts)
    encode = _Encoder(tokenizer, "auto", "none", vocab_size)
    ids, n_truncated = [], 0
    for number, tokens in enumerate(encode(given, [f"row {n} of the text" for n in range(len(given))])):
        if max_tokens is not None and len(tokens) > max_tokens:
            if not truncate:
                raise UserError(
                    f"texts[{number}] has {len(tokens)} tokens with BOS, more than the model's context of "
                    f"{max_tokens}. Shorten it, or give truncate=True to cut what is too long."
                )
            n_truncated += 1
            tokens = tokens[:max_tokens]
        ids.append(tokens)
    return sequences_of(ids, bos_id=encode.bos_id, bos_note=encode.note, n_truncated=n_truncated)


def sequences_of(
    ids: list[np.ndarray], *, bos_id: int | None, bos_note: str | None = None, n_truncated: int = 0
) -> Sequences:
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
            f"test_size={test_size} need at least {needed}. Raise `limit`, lower the sizes or give more text."
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


class _Encoder:
    """Texts into whole sequences: BOS and the text's tokens, or a user turn of a chat template.

    Attributes:
        bos_id: the token that opens each; None where nothing does.
        note: what the run should say of it.
        opened_by: what is put before each, in words.
        frame: the chat template's; None without one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, bos: str, chat_template: str, vocab_size: int | None
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.frame: ChatFrame | None = None
        if chat_template == "none":
            self.bos_id, self.opened_by, self.note = find_bos(tokenizer, bos)
            if bos == "auto" and tokenizer.chat_template is not None:
                plain = "its tokenizer has a chat template (an instruct model), and this is plain text; "
                plain += "chat_template=user makes each text a user turn"
                self.note = plain if self.note is None else f"{self.note}. Besides, {plain}"
            return
        if chat_template != "user":
            raise UserError(f"chat_template={chat_template} must be none or user.")
        self.frame = chat_frame(tokenizer)
        if self.frame is None:
            raise UserError(
                "chat_template=user: this model's tokenizer has no chat template (a base model). Use "
                "chat_template=none, or name another tokenizer (`tokenizer`)."
            )
        refuse_two_bos(tokenizer, self.frame)
        if bos == "none" and self.frame.opens_with:
            raise UserError(
                f"bos=none and chat_template=user: this template begins with {tokenizer.bos_token} itself. "
                "Leave bos out."
            )
        opens = tokenizer.bos_token_id if self.frame.opens_with else None
        self.bos_id = opens if bos in ("auto", "none") else find_bos(tokenizer, bos).bos_id
        self.opened_by = "the chat template's user turn" + ("" if self.bos_id == opens else f" behind {bos}")
        self.note = "each text is a user turn of the chat template, up to where the model would answer"
        words = tokenizer.all_special_tokens + [str(t) for t in tokenizer.get_added_vocab()]
        self._special = sorted({word for word in words if word.strip()}, key=len, reverse=True)

    def __call__(self, texts: list[str], names: list[str]) -> list[np.ndarray]:
        """The sequences of some texts, int32; ``names`` are what messages call them."""
        if self.frame is None:
            found = _encode(self.tokenizer, texts)
            for tokens, name in zip(found, names, strict=True):
                self._check(tokens, name)
            opening = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
            return [np.concatenate([opening, tokens]) for tokens in found]
        for text, name in zip(texts, names, strict=True):
            if spelled := next((word for word in self._special if word in text), None):
                raise UserError(
                    f"{name} spells {spelled}, which means something else in a chat. Take the row out of the text, or "
                    "use chat_template=none."
                )
        turns = [self.frame.around(text) for text in texts]
        found = [
            np.array(ids, np.int32)
            for ids in (self.tokenizer(turns, add_special_tokens=False)["input_ids"] if turns else [])
        ]
        if self.bos_id is not None:
            opening = np.array([self.bos_id], np.int32)
            found = [ids if ids[0] == self.bos_id else np.concatenate([opening, ids]) for ids in found]
        for tokens, name in zip(found, names, strict=True):
            self._check_vocabulary(tokens, name)
        return found

    def fixed(self, flat: np.ndarray, offsets: np.ndarray) -> tuple[int, int]:
        """How many tokens at both ends of every sequence are not the text's."""
        if self.frame is None:
            return int(self.bos_id is not None), 0
        before, behind = (
            np.array(self.tokenizer(part, add_special_tokens=False)["input_ids"], np.int32)
            for part in (self.frame.before, self.frame.after)
        )
        if self.bos_id is not None and not (len(before) and before[0] == self.bos_id):
            before = np.concatenate([np.array([self.bos_id], np.int32), before])
        # a token may reach over the seam between frame and text, so what is common to all is counted
        sequences = [flat[start:stop] for start, stop in pairwise(offsets)]
        return (
            min(_common(before, ids) for ids in sequences),
            min(_common(behind[::-1], ids[::-1]) for ids in sequences),
        )

    def _check(self, tokens: np.ndarray, name: str) -> None:
        if len(tokens) == 0:
            raise UserError(f"{name} gives no token with this tokenizer. Take the row out of it.")
        if self.bos_id is not None and self.bos_id in tokens:
            # split_special_tokens is not enough where the special token is a piece of the vocabulary too: unigram
            # models and BPE with ignore_merges still find it.
            raise UserError(
                f"{name} spells {self.tokenizer.convert_ids_to_tokens(self.bos_id)}, which this tokenizer "
                "cannot take as plain text: the sequence would have two BOS. Take the row out of the text."
            )
        self._check_vocabulary(tokens, name)

    def _check_vocabulary(self, tokens: np.ndarray, name: str) -> None:
        top = max(int(tokens.max()), -1 if self.bos_id is None else self.bos_id)
        if self.vocab_size is not None and top >= self.vocab_size:
            raise UserError(
                f"tokenizer: it gives token {top} ({self.tokenizer.convert_ids_to_tokens(top)!r}, {name}) but "
                f"the model's vocabulary ends at {self.vocab_size - 1}. The tokenizer in that folder belongs to "
                "another model."
            )


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with together."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


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
