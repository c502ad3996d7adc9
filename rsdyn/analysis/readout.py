"""The measure ``readout``: what the stream says at each sublayer beside what it says at the end (METHOD section 13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.over_sequences import mean_of
from rsdyn.analysis.results import Example, Measured, ReadoutResults
from rsdyn.dynamics.readout import Readout
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.readout import Lens, stream_readout, top_tokens

TOP = 5  # tokens at each sublayer of an example
AT_ONCE = 64  # sequences whose trajectories are held together; the head's weights are read once for each sublayer


def read_sequences(
    lm: LanguageModel,
    sequences: Sequence[np.ndarray],
    lens: Lens,
    *,
    batch_tokens: int = 1024,
    done: Callable[[int], object] = lambda n: None,
) -> Readout:
    """Record the last tokens of some sequences up to the end of the depth, and read each sublayer; on the CPU.

    In the model's own precision: what is cached has been rounded, and lacks the end.
    """
    parts = []
    for start in range(0, len(sequences), AT_ONCE):
        some = sequences[start : start + AT_ONCE]
        states = lm.record(some, final=True, batch_tokens=batch_tokens)
        parts.append(stream_readout(lm, states[:, :-1], states[:, -1], lens))
        done(len(some))
    return Readout(*(torch.cat(values) for values in zip(*parts, strict=True)))


def example(
    lm: LanguageModel, tokens: np.ndarray, lens: Lens, decode: Callable[[Sequence[int]], str], most: int = 160
) -> Example:
    """The likeliest tokens at each sublayer behind three quarters of a sequence, as text.

    Not behind all of it: what follows the end of a paragraph says little.
    """
    cut = max(1, 3 * len(tokens) // 4)
    states = lm.record([tokens[:cut]], final=True)[0]
    found = top_tokens(lm, states[:-1], states[-1], lens, TOP)
    names = tuple("" if token < 0 else decode([token]) for token in found.tokens.flatten().tolist())
    follows = decode([int(tokens[cut])]) if cut < len(tokens) else ""
    return Example(decode(tokens[:cut].tolist())[-most:], follows, names, found.probability.to(torch.float64))


def readout_results(
    found: Readout, group: Tensor, lens: Lens, examples: dict[str, Example] | None = None
) -> ReadoutResults:
    """Means over sequences, with intervals that leave out groups ``(N,)`` of them."""
    unread = found.rank < 0
    n = len(found.kl)

    def measured(values: Tensor) -> Measured:
        return mean_of(values.to(torch.float64).masked_fill(unread, torch.nan), group, n=n)

    places = torch.arange(found.kl.shape[1] + 1)
    return ReadoutResults(
        lens=lens.name,
        kl=measured(found.kl),
        entropy=measured(found.entropy),
        rank=measured(found.rank.to(torch.float64).log1p()),
        probability=measured(found.probability),
        agreement=measured(found.agrees),
        commit=mean_of(found.commit.to(torch.float64), group, n=n),
        committed=(found.commit[:, None] <= places).to(torch.float64).mean(0),
        examples=examples or {},
    )
