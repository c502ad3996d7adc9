"""The measure ``readout``: what the stream says at each sublayer beside what it says at the end (METHOD section 13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.over_sequences import mean_of
from rsdyn.analysis.results import Example, Measured, ReadoutResults
from rsdyn.dynamics.massive import POSITIONS, position_range
from rsdyn.dynamics.readout import Readout
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.readout import Lens, stream_readout, top_tokens
from rsdyn.stream.text.tokens import token_order
from rsdyn.threads import side_by_side

TOP = 5  # tokens at each sublayer of an example
AT_ONCE = 64  # sequences whose trajectories are held together; the head's weights are read once for each sublayer


def read_sequences(
    lm: LanguageModel,
    sequences: Sequence[np.ndarray],
    lens: Lens,
    *,
    positions: Sequence[np.ndarray] | None = None,
    batch_tokens: int = 1024,
    done: Callable[[int], object] = lambda n: None,
) -> Readout:
    """Record some tokens of some sequences up to the end of the depth, and read each sublayer; on the CPU.

    In the model's own precision: what is cached has been rounded, and lacks the end. ``positions`` are the tokens of
    each sequence, one after another in what is returned; default the last.
    """
    parts = []
    n = AT_ONCE if positions is None else max(1, AT_ONCE // max(map(len, positions), default=1))
    for start in range(0, len(sequences), n):
        some = sequences[start : start + n]
        at = None if positions is None else positions[start : start + n]
        states = lm.record(some, positions=at, final=True, batch_tokens=batch_tokens)
        parts.append(stream_readout(lm, states[:, :-1], states[:, -1], lens))
        done(len(some))
    return Readout(*(torch.cat(values) for values in zip(*parts, strict=True)))


def with_one_of_each_range(sequence: np.ndarray, index: int, seed: int) -> np.ndarray:
    """The last token of sequence number ``index``, and behind it one of each range of positions that it reaches.

    Of each range it is the token whose turn comes first (:class:`rsdyn.stream.text.positions.Positions`).
    """
    turns = token_order(seed, index, len(sequence))
    ranges = position_range(torch.from_numpy(turns)).numpy()
    return np.array([len(sequence) - 1, *(turns[ranges == k][0] for k in np.unique(ranges))])


def by_position(found: Readout, position: Tensor) -> dict[str, Tensor]:
    """Means of the curves of :class:`ReadoutResults` over the tokens of each range of positions, ``(P, S)`` each.

    ``position`` ``(n,)`` is that of each token of ``found``. Where the lens does not read, and in a range without
    tokens, they are NaN.
    """
    ranges = position_range(position)

    def means(values: Tensor) -> Tensor:
        return torch.stack([values[ranges == k].nanmean(0) for k in range(len(POSITIONS))])

    return {name: means(values) for name, values in _curves(found).items()}


def _curves(found: Readout) -> dict[str, Tensor]:
    """``(n, S)`` float64 each, NaN where the lens does not read."""
    rank = found.rank.to(torch.float64)
    values = {"kl": found.kl, "entropy": found.entropy, "rank": rank.log1p(), "probability": found.probability,
              "agreement": found.agrees}  # fmt: skip
    return {name: value.to(torch.float64).masked_fill(rank < 0, torch.nan) for name, value in values.items()}


def examples_of(
    lm: LanguageModel, texts: Sequence[np.ndarray], lens: Lens, decode: Callable[[Sequence[int]], str], most: int = 160
) -> list[Example]:
    """The likeliest tokens at each sublayer behind three quarters of each sequence, as text.

    Not behind all of it: what follows the end of a paragraph says little.
    """
    if not len(texts):
        return []
    cuts = [max(1, 3 * len(tokens) // 4) for tokens in texts]
    states = lm.record([tokens[:cut] for tokens, cut in zip(texts, cuts, strict=True)], final=True)
    found = side_by_side(lambda x: top_tokens(lm, x[:-1], x[-1], lens, TOP), list(states), lm.device)
    out = []
    for tokens, cut, top in zip(texts, cuts, found, strict=True):
        names = tuple("" if token < 0 else decode([token]) for token in top.tokens.flatten().tolist())
        follows = decode([int(tokens[cut])]) if cut < len(tokens) else ""
        out.append(Example(decode(tokens[:cut].tolist())[-most:], follows, names, top.probability.to(torch.float64)))
    return out


def readout_results(
    found: Readout,
    group: Tensor,
    lens: Lens,
    examples: dict[str, Example] | None = None,
    by_position: dict[str, Tensor] | None = None,
    decode: Callable[[Sequence[int]], str] = str,
) -> ReadoutResults:
    """Means over sequences, with intervals that leave out groups ``(N,)`` of them."""
    n = len(found.kl)
    curves: dict[str, Measured] = {name: mean_of(values, group, n=n) for name, values in _curves(found).items()}
    places = torch.arange(found.kl.shape[1] + 1)
    commonest = int(found.top.mode().values)
    return ReadoutResults(
        lens=lens.name,
        **curves,
        commit=mean_of(found.commit.to(torch.float64), group, n=n),
        committed=(found.commit[:, None] <= places).to(torch.float64).mean(0),
        examples=examples or {},
        by_position=by_position or {},
        commonest=mean_of((found.top == commonest).to(torch.float64), group, n=n),
        commonest_token=decode([commonest]),
    )
