"""What a CausalLM does behind its last layer: final norm, LM head, and what some families do to the logits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _States(tuple[Tensor]):
    """The output of a base model that has states alone: no cache, no routing, no attention."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _FinalNorm(nn.Module):
    """Stands where a CausalLM has its base model: gives the states that it was given, behind the final norm."""

    def __init__(self, final_norm: nn.Module | None):
        super().__init__()
        self.final_norm = final_norm

    @property
    def decoder(self) -> nn.Module:
        """OPT's CausalLM calls a part of its base model."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _States:
        return _States((inputs_embeds if self.final_norm is None else self.final_norm(inputs_embeds),))


def base_of(causal: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The base model in a CausalLM, and the name that it has there.

    That is what its ``base_model_prefix`` says, or where this is the prefix of a larger model's weights (Llama 4), the
    one model among its parts. Raises ``ValueError`` where there is none.
    """
    from transformers import PreTrainedModel

    parts = {name: part for name, part in causal.named_children() if isinstance(part, PreTrainedModel)}
    name = causal.base_model_prefix
    if name not in parts and len(parts) == 1:
        name = next(iter(parts))
    if name not in parts:
        raise ValueError(f"causal: {type(causal).__name__} has no one base model among its parts ({', '.join(parts)}).")
    return name, parts[name]


def behind_the_layers(causal: PreTrainedModel, final_norm: nn.Module | None) -> PreTrainedModel:
    """A CausalLM without its layers: its ``inputs_embeds`` are the states behind the last one.

    So that what a family does to its logits is run, not rewritten. No weight is copied.
    """
    tail = copy.copy(causal)
    tail._modules = {**causal._modules, base_of(causal)[0]: _FinalNorm(final_norm)}
    return tail
