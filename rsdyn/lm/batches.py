"""Which sequences go through the language model together: a function of their lengths and of a number of tokens alone.

In one of two layouts. ``packed``: one row of sequences end to end, none of whose tokens is padding. ``sorted``:
sequences of like length in a row each, padded on the right to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

PACKED, SORTED = "packed", "sorted"


def make_batches(
    lengths: Sequence[int], batch_tokens: int, layout: str = SORTED, apart: int | None = None
) -> list[list[int]]:
    """Group sequences of these lengths: lists of positions, of at most ``batch_tokens`` tokens with their padding.

    A sequence that is longer by itself gets a batch of its own. Sequences of up to ``apart`` tokens share none with
    longer ones. A batch alone is grouped as it was, in the same order.
    """
    if layout == SORTED:
        return length_sorted_batches(lengths, batch_tokens, apart)
    everything = range(len(lengths))
    if apart is None:
        return _packed(lengths, everything, batch_tokens)
    is_long = [length > apart for length in lengths]
    parts = ([i for i in everything if is_long[i] == which] for which in (False, True))
    return [batch for part in parts for batch in _packed(lengths, part, batch_tokens)]


def tokens_computed(lengths: Sequence[int], batches: Sequence[Sequence[int]], layout: str) -> int:
    """How many tokens go through the model, padding included."""
    if layout == PACKED:
        return sum(lengths[i] for batch in batches for i in batch)
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def batches_apart(batches: list[list[int]], lengths: Sequence[int], apart: int | None) -> list[list[list[int]]]:
    """Groups of batches that must not run at the same time: up to ``apart`` tokens, and beyond."""
    if apart is None:
        return [batches]
    is_long = [max(lengths[i] for i in batch) > apart for batch in batches]
    groups = [[b for b, long in zip(batches, is_long, strict=True) if long == which] for which in (False, True)]
    return [group for group in groups if group]


def length_sorted_batches(lengths: Sequence[int], batch_tokens: int, apart: int | None = None) -> list[list[int]]:
    """The sorted layout of :func:`make_batches`: shortest first, ties in the order given."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        crosses = apart is not None and batches and lengths[batches[-1][-1]] <= apart < lengths[i]
        if batches and not crosses and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _packed(lengths: Sequence[int], which: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows of as many tokens each as can be, so that threads that take them in turn end together.

    Longest first, each to the shortest row; in a row in the order given. More rows than needed are made where the
    longest cannot be shared out evenly, and where their number is odd: two threads would wait for the last.
    """
    alone = [[i] for i in which if lengths[i] >= batch_tokens]
    rest = sorted((i for i in which if lengths[i] < batch_tokens), key=lambda i: (-lengths[i], i))
    if not rest:
        return alone
    n_rows = -(-sum(lengths[i] for i in rest) // batch_tokens)
    while True:
        n_rows += n_rows > 1 and n_rows % 2
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [(0, row) for row in range(n_rows)]
        for i in rest:
            tokens, row = heappop(filled)
            rows[row].append(i)
            heappush(filled, (tokens + lengths[i], row))
        if max(filled)[0] <= batch_tokens:
            return alone + [sorted(row) for row in rows if row]
        n_rows += 1
