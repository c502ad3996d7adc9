"""What a perturbed stream says on its way to the end, read with the model's own final norm and head (logit lens)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rsdyn.lm.continuing.reference import Continued, Reference
from rsdyn.lm.model import LanguageModel

MOST_POINTS = 16  # of a prompt, evenly spaced among all: a vocabulary is read at each of their sublayers
BLOCK = 64  # states that are read together


@dataclass(frozen=True, eq=False)
class Said:
    """The likeliest token at every sublayer from an injection on, and at the end.

    Attributes:
        tokens: ``(P, S - s + 1)`` int64 of some points.
        reference: ``(S - s + 1,)`` int64 of the unperturbed stream.
    """

    tokens: Tensor
    reference: Tensor

    @property
    def agreement(self) -> Tensor:
        """``(S - s + 1,)`` share of points that say the reference's final token there."""
        return (self.tokens == self.reference[-1]).to(torch.float64).mean(0)

    @property
    def back(self) -> float:
        """Share of points that say the reference's final token at the end."""
        return float(self.agreement[-1])

    @property
    def astray(self) -> float:
        """Of these, the share that on their way said what the reference says neither there nor at its end.

        NaN where none came back, or nothing lies between the injection and the end.
        """
        home = self.tokens[self.tokens[:, -1] == self.reference[-1]]
        if len(home) == 0 or home.shape[1] < 3:
            return float("nan")
        way, own = home[:, 1:-1], self.reference[1:-1]
        other = (way != own) & (way != self.reference[-1])
        return float(other.any(1).to(torch.float64).mean())


@torch.inference_mode()
def said_along(lm: LanguageModel, reference: Reference, sublayer: int, points: Continued) -> Said:
    """Read some points that were put in at ``sublayer``, and the reference, at every sublayer from there on."""
    n = len(points.stream)
    rows = torch.linspace(0, n - 1, min(n, MOST_POINTS)).round().to(torch.int64)
    states = torch.cat([points.stream[rows], points.final[rows, None]], 1)
    own = torch.cat([reference.stream[sublayer:], reference.final[None]])
    return Said(_top(lm, states.flatten(0, 1)).view(states.shape[:2]), _top(lm, own))


def _top(lm: LanguageModel, states: Tensor) -> Tensor:
    return torch.cat([lm.logits(part).argmax(-1).cpu() for part in states.split(BLOCK)])


def said_in_words(said: Mapping[int, Said]) -> list[str]:
    """Whether points say something else before they come back, layer by layer."""
    parts = []
    for layer, one in said.items():
        told = f"layer {layer}: {100 * one.back:.0f} % end on the reference's token"
        if one.astray == one.astray:
            told += f", {100 * one.astray:.0f} % of them after saying something else on the way"
        parts.append(told)
    if not parts:
        return []
    n = len(next(iter(said.values())).tokens)
    return [
        f"Read through the logit lens, {n} points of the first prompt: {'; '.join(parts)}. Something else is what the "
        "reference says neither at that sublayer nor at its end."
    ]
