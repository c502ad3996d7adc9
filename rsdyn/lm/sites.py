"""Where the residual stream can be read in a model, and what adds to it (METHOD section 2).

The sites are found by following one forward of the model without its weights (``tracing.py``), so no architecture is
named here. A family whose code that cannot follow gets a line in ``SITES``; what is written there is believed before
what is traced. Either way the certificate (``certificate.py``) checks the sites on the weights before they are used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from rsdyn.errors import UnfitModelError, UserError
from rsdyn.lm.tracing import LayerTrace, Term, Trace, UnbuildableError, UntraceableError, model_without_weights, trace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """The names of a family's modules: of the layers and the final norm in the base model, of the others in a layer.

    Attributes:
        layers: the list of layers; a layer's input is resid_pre.
        mid: the module whose input is resid_mid, usually the second norm; None for parallel attention.
        attention, mlp: the two blocks.
        final_norm: the norm between the last layer and the LM head.
        attention_adds, mlp_adds: the modules whose outputs are added to the stream, where those are not the blocks
            (Gemma 2 norms each block's output once more: ``post_attention_layernorm``).
        scale: a number that these outputs are multiplied by first, or the config's attribute that holds it.
    """

    layers: str
    mid: str | None
    attention: str
    mlp: str
    final_norm: str
    attention_adds: str | None = None
    mlp_adds: str | None = None
    scale: float | str = 1.0


# model_type -> its modules, for families that tracing cannot follow. A line here, such as
#     "my_model": Family("transformer.layers", "norm_2", "attn", "ffn", "transformer.norm"),
# is all that adding a family takes; the certificate says at the next run whether it is right.
SITES: dict[str, Family] = {}

RESID_PRE, RESID_MID = "resid_pre", "resid_mid"
_NOT_OF_THE_SHAPE = ("_name_or_path", "transformers_version", "dtype", "architectures")


@dataclass(frozen=True)
class Addend:
    """A module whose output, times a number, is added to the stream."""

    module: nn.Module
    scale: float


@dataclass(frozen=True)
class Sites:
    """The modules whose inputs are the stream, in the order of the sublayers, and what each sublayer adds to it.

    Attributes:
        names: the sites of one layer, in order: ``("resid_pre", "resid_mid")``; with parallel attention, where both
            blocks are added at once, and with one block a layer (Mamba), ``("resid_pre",)``.
        modules: ``S`` modules; the input of ``modules[s]`` is the stream at sublayer ``s``.
        layers: ``L`` modules, the decoder layers.
        attention, mlp: ``L`` modules each, of the layers; the same where a layer has one block alone.
        adds: ``S`` of them: what is added to the stream at ``s`` to make that at ``s + 1``.
        final_norm: what the stream goes through behind the last layer.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...] = ()
    attention: tuple[nn.Module, ...] = ()
    mlp: tuple[nn.Module, ...] = ()
    adds: tuple[tuple[Addend, ...], ...] = ()
    final_norm: nn.Module | None = None

    @property
    def has_one_block(self) -> bool:
        """Whether each layer adds one module's output to the stream (Mamba), where others add attention and MLP."""
        return all(len(addends) == 1 for addends in self.adds) and len(self.names) == 1


def site_names(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The sites that every layer of a model has, known from its config alone.

    Raises ``UserError`` when the model has no running sum to record, or it cannot be found.
    """
    family = SITES.get(config.model_type)
    if family is not None:
        return _names(family.mid is not None)
    _refuse_encoders(config)
    try:
        base = model_without_weights(config, trust_remote_code=trust_remote_code)
        found = _traced(_Shape.of(type(base), config, base))
    except UntraceableError as error:
        raise _not_supported(config, error) from error
    return _names(found.layers[0].mid is not None)


def find_sites(base: PreTrainedModel) -> Sites:
    """The sites of a base model (the one without the LM head). Raises ``UserError`` as :func:`site_names` does."""
    config = base.config
    family = SITES.get(config.model_type)
    try:
        if family is None:
            _refuse_encoders(config)
            found = _traced(_Shape.of(type(base), config))
        else:
            found = _named(base, family)
    except UntraceableError as error:
        raise _not_supported(config, error) from error
    modules: list[nn.Module] = []
    for layer in found.layers:
        modules += [base.get_submodule(name) for name in (layer.layer, layer.mid) if name is not None]
    return Sites(
        names=_names(found.layers[0].mid is not None),
        modules=tuple(modules),
        layers=tuple(base.get_submodule(layer.layer) for layer in found.layers),
        attention=tuple(base.get_submodule(layer.attention) for layer in found.layers),
        mlp=tuple(base.get_submodule(layer.mlp) for layer in found.layers),
        adds=tuple(
            tuple(Addend(base.get_submodule(term.module), term.scale) for term in terms)
            for layer in found.layers
            for terms in layer.adds
        ),
        final_norm=None if found.final_norm is None else base.get_submodule(found.final_norm),
    )


def sublayer_index(names: Sequence[str], n_layers: int, layer: int, site: str = RESID_PRE) -> int:
    """The sublayer ``s`` of a layer's site, in a model of ``n_layers`` layers whose sites are ``names``.

    Raises ``UserError`` for a layer that is not there, and for a site that is unknown or that this model has not: with
    parallel attention (one sum for both blocks), or one block a layer, there is no resid_mid.
    """
    if site not in (RESID_PRE, RESID_MID):
        raise UserError(f"site={site!r}: no such site of the stream; allowed: {RESID_PRE}, {RESID_MID}.")
    if site not in names:
        raise UserError(
            f"site={site!r}: this model adds attention and MLP to the stream at once (parallel attention), or has one "
            f"block a layer, so there is no state between them. Use site={names[0]}."
        )
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise UserError(
            f"layer={layer}: the model has {n_layers} layers; give a whole number from 0 to {n_layers - 1}."
        )
    return layer * len(names) + names.index(site)


def _names(has_mid: bool) -> tuple[str, ...]:
    return (RESID_PRE, RESID_MID) if has_mid else (RESID_PRE,)


@dataclass(frozen=True)
class _Shape:
    """A model as tracing sees it: its class and the settings that its modules follow from."""

    kind: type
    settings: str
    config: Any = field(compare=False)
    base: nn.Module | None = field(compare=False)

    @classmethod
    def of(cls, kind: type, config: PreTrainedConfig, base: nn.Module | None = None) -> _Shape:
        settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_SHAPE}
        return cls(kind, json.dumps(settings, sort_keys=True, default=str), config, base)


@lru_cache(maxsize=64)
def _traced(shape: _Shape) -> Trace:
    base = shape.base
    if base is None:
        base = model_without_weights(shape.config, shape.kind)
    found = trace(base)
    if len({layer.mid is None for layer in found.layers}) > 1:
        raise UntraceableError("some of its layers add to the stream once and some twice")
    return found


def _named(base: nn.Module, family: Family) -> Trace:
    """What the table says of a model, in the form of a trace."""
    config = cast(Any, base).config
    scale = getattr(config, family.scale) if isinstance(family.scale, str) else family.scale
    attention_adds = Term(family.attention_adds or family.attention, scale)
    mlp_adds = Term(family.mlp_adds or family.mlp, scale)
    adds = ((attention_adds, mlp_adds),) if family.mid is None else ((attention_adds,), (mlp_adds,))

    def within(layer: str) -> LayerTrace:
        return LayerTrace(
            layer=layer,
            mid=None if family.mid is None else f"{layer}.{family.mid}",
            attention=f"{layer}.{family.attention}",
            mlp=f"{layer}.{family.mlp}",
            adds=tuple(tuple(Term(f"{layer}.{term.module}", term.scale) for term in terms) for terms in adds),
        )

    try:
        names = [f"{family.layers}.{name}" for name, _ in base.get_submodule(family.layers).named_children()]
        found = Trace(tuple(within(name) for name in names), family.final_norm)
        for layer in found.layers:
            terms = [term.module for terms in layer.adds for term in terms]
            for name in (layer.mid or layer.layer, layer.attention, layer.mlp, *terms, family.final_norm):
                base.get_submodule(name)
    except AttributeError as error:  # get_submodule's
        raise UntraceableError(f"SITES names a module that it has not ({error})") from error
    return found


def _refuse_encoders(config: PreTrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnfitModelError(
            f"name: a model of type {config.model_type!r} is not supported: it is an encoder-decoder, which has two "
            "streams, and the decoder's depends on the encoder's. Give a decoder-only language model."
        )


def _not_supported(config: PreTrainedConfig, error: UntraceableError) -> UserError:
    if isinstance(error, UnbuildableError):
        return UnfitModelError(
            f"name: a model of type {config.model_type!r} is not opened: {error}. Install what it asks for, or "
            "correct that value in its config.json."
        )
    return UnfitModelError(
        f"name: a model of type {config.model_type!r} is not supported: {error}. Give a decoder whose layers add to "
        "one running sum (pre-norm); if this one does, name its modules in SITES of rsdyn/lm/sites.py, a line a "
        "family."
    )
