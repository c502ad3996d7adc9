"""Where the residual stream can be read in a model. The only file that knows architectures.

Adding a family is adding a line to ``SITES``, once the identities of ``tests/test_lm.py`` hold for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from rsdyn.errors import UserError

# model_type -> (the list of layers in the base model, the module of a layer whose *input* is resid_mid).
# A layer's own input is resid_pre. These families share Llama's shape: norm, attention, add, norm, MLP, add.
SITES: dict[str, tuple[str, str]] = {
    "llama": ("layers", "post_attention_layernorm"),
    "mistral": ("layers", "post_attention_layernorm"),
    "qwen2": ("layers", "post_attention_layernorm"),
    "qwen3": ("layers", "post_attention_layernorm"),
}

RESID_PRE, RESID_MID = "resid_pre", "resid_mid"


@dataclass(frozen=True)
class Sites:
    """The modules whose inputs are the stream, in the order of the sublayers.

    Attributes:
        names: the sites of one layer, in order: ``("resid_pre", "resid_mid")``.
        modules: ``S = 2 L`` modules; the input of ``modules[s]`` is the stream at sublayer ``s``.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def site_names(model_type: str) -> tuple[str, ...]:
    """The sites that every layer of a family has, known from its config alone; ``UserError`` for an unknown family."""
    if model_type not in SITES:
        raise UserError(
            f"lm.name: a model of type {model_type!r} is not supported yet; allowed types: {', '.join(sorted(SITES))}."
        )
    return (RESID_PRE, RESID_MID)


def find_sites(base: nn.Module, model_type: str) -> Sites:
    """The sites of a base model (the one without the LM head)."""
    names = site_names(model_type)
    layers_name, mid_name = SITES[model_type]
    modules: list[nn.Module] = []
    for layer in cast(nn.ModuleList, base.get_submodule(layers_name)):
        modules += [layer, layer.get_submodule(mid_name)]
    return Sites(names, tuple(modules))
