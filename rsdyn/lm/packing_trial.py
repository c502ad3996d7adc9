"""Can a language model be recorded in packed rows? Tried on two short sequences each time its weights are opened."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.lm.batches import PACKED, SORTED
from rsdyn.lm.certificate import best_of, relative, tolerances, two_short
from rsdyn.lm.model import LanguageModel, Layout, longrope_length
from rsdyn.lm.packing import NotPackedError


def choose_layout(lm: LanguageModel, sequences: Sequence[np.ndarray], wanted: str = "auto") -> Layout:
    """The layout for recording ``sequences`` (token ids of each, BOS included): packed rows where they are right.

    ``wanted`` is ``auto``, ``packed`` (``UserError`` where the model cannot, saying why) or ``sorted``. To be put into
    ``lm.layout``. A state that is not finite is an error of the model, not of the layout, and raises as recording does.
    """
    if wanted == SORTED:
        return Layout(SORTED)
    reason = _why_not(lm, sequences)
    if reason is None:
        return Layout(PACKED)
    if wanted == PACKED:
        raise UserError(
            f"layout=packed: {lm.name} cannot be recorded in packed rows: {reason}. Use layout=auto or sorted."
        )
    return Layout(SORTED, reason)


def _why_not(lm: LanguageModel, sequences: Sequence[np.ndarray]) -> str | None:
    """Why a model cannot be packed, in a clause, or None: every state of a row against each sequence alone.

    What could go wrong in a row are positions that go on and attention to the neighbours. Either moves a state by far
    more than the roundings of one forward, which is what is allowed.
    """
    if lm.is_spread:
        return "its layers are spread over devices"
    pair = two_short(sequences)
    if (apart := longrope_length(lm.config)) is not None:
        pair = [s[:apart] for s in pair]
    allowed = tolerances(lm)[0] * max(1.0, lm.n_layers / 16) ** 0.5

    def attempt(n_tokens: int) -> tuple[float, str]:
        row = [pair[1], pair[0][:n_tokens], pair[1]]  # the longer one at two places
        alone = torch.cat([_states(lm, [s], SORTED) for s in row])  # what is wrong here is wrong in any layout
        try:
            packed = _states(lm, row, PACKED)
        except NotPackedError as error:
            return torch.inf, error.reason
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever code that expects a sequence a row makes of one with several
            said = " ".join(str(error).split())[:200]
            return torch.inf, f"its code fails in such a row ({type(error).__name__}: {said})"
        worst = float(relative(packed, alone).max())
        return worst, f"states are {worst:.1e} of their norm away from those of the sequences alone"

    error, reason = best_of(attempt, sorted({len(pair[0]), max(1, len(pair[0]) // 2)}, reverse=True), allowed)
    return None if error <= allowed else reason


def _states(lm: LanguageModel, sequences: list[np.ndarray], layout: str) -> Tensor:
    """Every token's trajectory, with the sequences in one batch of a layout."""
    before, lm.layout = lm.layout, Layout(layout)
    n_tokens = sum(len(s) for s in sequences)
    try:
        return lm.record(sequences, positions=[np.arange(len(s)) for s in sequences], batch_tokens=n_tokens)
    finally:
        lm.layout = before
