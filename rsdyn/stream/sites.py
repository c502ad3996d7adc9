"""Where the residual stream can be read in a model, and what adds to it. The only file that knows architectures.

Adding a family is adding a line to ``SITES``, once the identities of ``tests/test_lm.py`` hold for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn

from rsdyn.errors import UserError


class Family(NamedTuple):
    """The names of a family's modules: in the base model, or, where marked, in a layer.

    Attributes:
        layers: the list of layers.
        attention_norm: in a layer; the first norm.
        attention: in a layer.
        mlp_norm: in a layer; its *input* is resid_mid. A layer's own input is resid_pre.
        mlp: in a layer.
        final_norm: the norm between the last layer and the LM head.
    """

    layers: str
    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str
    final_norm: str


_LLAMA = Family("layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "norm")

# model_type -> its modules. These families share Llama's shape: norm, attention, add, norm, MLP, add.
SITES: dict[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}

RESID_PRE, RESID_MID = "resid_pre", "resid_mid"


@dataclass(frozen=True)
class Sites:
    """The modules whose inputs are the stream, in the order of the sublayers, and what each sublayer adds to it.

    Attributes:
        names: the sites of one layer, in order: ``("resid_pre", "resid_mid")``.
        modules: ``S = 2 L`` modules; the input of ``modules[s]`` is the stream at sublayer ``s``.
        norms: ``S`` modules: the norm that the stream goes through at sublayer ``s``.
        blocks: ``S`` modules, attention and MLP in turn; the stream moves by ``blocks[s](norms[s](stream))``.
        final_norm: what the stream goes through behind the last layer.
        layers: ``L`` modules, the decoder layers.
        attention, mlp: ``L`` modules each, of the layers.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    norms: tuple[nn.Module, ...] = ()
    blocks: tuple[nn.Module, ...] = ()
    final_norm: nn.Module | None = None
    layers: tuple[nn.Module, ...] = ()
    attention: tuple[nn.Module, ...] = ()
    mlp: tuple[nn.Module, ...] = ()


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
    family = SITES[model_type]
    modules: list[nn.Module] = []
    norms: list[nn.Module] = []
    blocks: list[nn.Module] = []
    for layer in cast(nn.ModuleList, base.get_submodule(family.layers)):
        attention_norm, mlp_norm = layer.get_submodule(family.attention_norm), layer.get_submodule(family.mlp_norm)
        modules += [layer, mlp_norm]
        norms += [attention_norm, mlp_norm]
        blocks += [layer.get_submodule(family.attention), layer.get_submodule(family.mlp)]
    return Sites(
        names,
        tuple(modules),
        tuple(norms),
        tuple(blocks),
        base.get_submodule(family.final_norm),
        layers=tuple(modules[::2]),
        attention=tuple(blocks[::2]),
        mlp=tuple(blocks[1::2]),
    )


def sublayer_index(names: Sequence[str], n_layers: int, layer: int, site: str = RESID_PRE) -> int:
    """The sublayer ``s`` of a layer's site, in a model of ``n_layers`` layers whose sites are ``names``.

    Raises ``UserError`` for a layer that is not there, and for a site that is unknown or that this model has not: with
    parallel attention (one sum for both blocks) there is no resid_mid.
    """
    if site not in (RESID_PRE, RESID_MID):
        raise UserError(f"site={site!r}: no such site of the stream; allowed: {RESID_PRE}, {RESID_MID}.")
    if site not in names:
        raise UserError(
            f"site={site!r}: this model adds attention and MLP to the stream at once (parallel attention), so there is "
            f"no state between them. Use site={names[0]}."
        )
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise UserError(
            f"layer={layer}: the model has {n_layers} layers; give a whole number from 0 to {n_layers - 1}."
        )
    return layer * len(names) + names.index(site)
