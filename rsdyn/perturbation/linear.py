"""Beside a perturbation: what the Jacobian predicts of it, and how far outside the linear range it lies (METHOD 12)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.dynamics.recovery import rates
from rsdyn.lm.continuing.continuation import continue_all
from rsdyn.lm.continuing.reference import Reference
from rsdyn.lm.jacobians import double_layers, format_of, in_format, linear_prediction, reference_run
from rsdyn.lm.model import LanguageModel

POINTS = 16  # that are scaled down until they behave as predicted
HALVINGS = 12
FACTOR = 2.0  # what a displacement may be off by, either way, and still count as linear


class LinearRange(NamedTuple):
    """Of one prompt's points at one sublayer.

    Attributes:
        outside: how many times smaller the median displacement would have to be, to end within a factor of two of what
            the Jacobian predicts; 1 where it does as it is, inf where even 1 / 4096 of it does not.
        ratio: median length of the displacement at the end over the predicted one.
        error: median distance of the displacement at the end from the predicted one, over the length of that: 1 and
            more where the prediction says nothing. Lengths may agree where this is large, since the stream carries a
            displacement along, whatever the layers add.
        contraction: what the Jacobian predicts for :attr:`rsdyn.dynamics.recovery.Rates.contraction`, mean over points.
    """

    outside: float
    ratio: float
    error: float
    contraction: float


def linear_ranges(lm: LanguageModel, tokens: Sequence[int], points: dict[int, Tensor]) -> dict[int, LinearRange]:
    """The range of each sublayer's points ``(P, D)``, which take the last token's place; in float32 at least."""
    lm = in_format(lm, format_of(lm))
    reference = reference_run(lm, tokens)
    with double_layers(lm):
        return {s: _range(lm, reference, tokens, s, states.to(lm.device, lm.dtype)) for s, states in points.items()}


def _range(lm: LanguageModel, reference: Reference, tokens: Sequence[int], s: int, states: Tensor) -> LinearRange:
    state = reference.stream[s]
    away = states - state
    predicted = linear_prediction(lm, tokens, s, away, reference=reference)
    lengths = predicted.norm(dim=-1)  # (P, S - s + 1)
    contraction = rates(lengths[:, :-1], reference.stream[s:].norm(dim=-1)).contraction
    some = torch.linspace(0, len(states) - 1, min(POINTS, len(states))).round().long().unique().to(states.device)
    scales = 0.5 ** torch.arange(HALVINGS + 1, dtype=lm.dtype, device=states.device)
    scaled = (state + scales[:, None, None] * away[some]).flatten(0, 1)
    (result,) = continue_all(lm, reference, [(s, scaled)])
    ends = (result.final - reference.final).view(len(scales), len(some), -1)
    ratio = ends.norm(dim=-1) / (scales[:, None] * lengths[some, -1])
    error = (ends[0] - predicted[some, -1]).norm(dim=-1) / lengths[some, -1]
    linear = (ratio > 1 / FACTOR) & (ratio < FACTOR)
    # the largest linear one: far smaller ones are owned by rounding
    first = torch.where(linear.any(0), linear.to(torch.int64).argmax(0), HALVINGS + 1)
    outside = 2.0 ** first.double()
    outside[first > HALVINGS] = torch.inf
    return LinearRange(
        float(outside.median()), float(ratio[0].median()), float(error.median()), float(contraction.nanmean())
    )


HEADS = ("outside", "ends, of predicted", "off by", "contraction", "J predicts")
NOTE = (
    "The first prompt's points against what the Jacobian predicts of them, medians: how many times smaller their "
    "displacement would have to be, to end within a factor of two of the predicted length (inside: it does); how far "
    "they end over how far it predicts; how far they end from where it predicts, over the same; and their mean "
    "contraction beside what it predicts."
)


def linear_cells(found: LinearRange, measured: float) -> list[str]:
    """A layer's row under ``HEADS``; ``measured`` is the contraction of the same prompt's points."""
    if found.outside == 1:
        outside = "inside"
    elif found.outside == float("inf"):
        outside = f"> {2**HALVINGS} x"
    else:
        outside = f"{found.outside:.0f} x"
    return [outside, *(f"{x:.3g}" for x in (found.ratio, found.error, measured, found.contraction))]
