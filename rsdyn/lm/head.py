"""What a CausalLM does behind its last layer: final norm, LM head, and what some families do to the logits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rsdyn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def class_with_head(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The class of transformers that opens a config's model with its LM head: one more for those that see or hear.

    Raises ``UserError`` for a model that has none.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    kind: Any = type(config)
    own_code = getattr(config, "auto_map", None) or {}
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or (trust_remote_code and AutoModelForCausalLM.__name__ in own_code):
        return AutoModelForCausalLM
    if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    raise UserError(
        f"name: transformers opens a model of type {config.model_type!r} without a language-modelling head, and "
        "next-token probabilities need one. Record and analyse it, or perturb another model."
    )


class _States(tuple[Tensor]):
    """The output of a base model that has states alone: no cache, no routing, no attention."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _FinalNorm(nn.Module):
    """Stands where a CausalLM has its base model: gives the states that it was given, behind the final norm."""

    def __init__(self, final_norm: nn.Module | None, base: nn.Module) -> None:
        super().__init__()
        self.final_norm = final_norm
        vars(self)["base"] = base  # beside its modules: nothing of it is run or moved

    def __getattr__(self, name: str) -> Any:
        """What a CausalLM looks up in its base model: Falcon-H1 keeps a number there that scales the logits."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["base"], name)

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
    name, base = base_of(causal)
    tail._modules = {**causal._modules, name: _FinalNorm(final_norm, base)}
    return tail
