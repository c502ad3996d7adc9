"""Call a model's decoder layers again for its last token, behind the other tokens of a run that was recorded.

No architecture is known here. What a layer was called with is recorded, and it is called with the same again: what
belongs to a token becomes the last token's, the cache gives the keys and values of the tokens before it, and the mask
lets every point see those and itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rsdyn.errors import UserError
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.tracing import stream_of

# Points that attend together, see LayerCall.mask: more of them cost products with each other's keys, which the mask
# throws away, fewer cost copies of the shared ones. Flat from 16 to 50 at 15 and 64 tokens and 128 units.
BLOCK = 32
# Masked keys of zeros fill a row of scores up to a multiple of this: attention on a CPU takes the exp of what is left
# over a vector one by one, and a row of 77 took twice as long as one of 80.
_VECTOR = 16
_MASK = "attention_mask"
# What a layer may be given besides the mask to add to the scores, a column a key. Alibi's rows are those of a batch
# and its heads in one dimension; a position bias is the same for the whole batch.
_PER_ROW, _SHARED = "alibi", "position_bias"

Masks = dict[tuple[int, torch.device, int], Tensor]


@dataclass(frozen=True)
class LayerCall:
    """What one decoder layer was called with, of the last token, and what of the others it looked at.

    Attributes:
        n_tokens: ``T``, of the prompt.
        keys, values: of the tokens before the last, ``(1, heads, 15 + T - 1, units of a head)``, zeros first: see
            :meth:`mask`.
        arguments: of the call, but for the states, the mask, the cache, positions and biases; the last token's where a
            token's.
        positions: whole numbers of the last token, ``(1,)`` or ``(1, 1)``, by argument.
        cache_name: the argument that took the cache.
        seen: ``(1, heads or 1, 1, T)`` the mask's row of the last token, as the layer takes it; None for no mask.
        biases: what else is added to the scores, by argument.
        attention: ``(D,)`` what attention gave for the last token; without the stream, if it gave the sum.
        gives_sum: whether the attention module adds the stream itself, and gives the sum.
        n_outputs: how many things the attention module gives in a tuple; None when it gives a tensor.
    """

    n_tokens: int
    keys: Tensor
    values: Tensor
    arguments: dict[str, Any]
    positions: dict[str, Tensor]
    cache_name: str
    seen: Tensor | None
    biases: dict[str, Tensor]
    attention: Tensor
    gives_sum: bool
    n_outputs: int | None

    @property
    def takes_blocks(self) -> bool:
        """Whether points can stand side by side as tokens: what is added to the scores has to be the mask alone."""
        hidden_is_true = self.seen is not None and self.seen.dtype == torch.bool and not self.seen[..., -1].all()
        return not self.biases and not hidden_is_true

    def __call__(self, layer: nn.Module, x: Tensor, *, alone: bool, masks: Masks) -> Tensor:
        """What the layer makes of points ``x`` ``(rows, points of a row, D)``.

        Every point stands at the last token's position, and sees the tokens before it and itself; with ``alone``
        itself only. Points that share a row stand in it as if they were successive tokens. ``masks`` keeps masks for
        the layers that have the same.
        """
        rows, size = x.shape[:2]
        arguments = dict(self.arguments)
        for name, position in self.positions.items():
            arguments[name] = position.expand(size) if position.ndim == 1 else position.expand(rows, size)
        for name, bias in self.biases.items():
            bias = bias[..., -1:] if alone else bias
            arguments[name] = bias.repeat(rows, *[1] * (bias.ndim - 1)) if name == _PER_ROW else bias
        if alone:
            arguments[_MASK] = None if self.seen is None else self.seen[..., -1:]
            arguments[self.cache_name] = None
        elif size == 1:
            arguments[_MASK] = self.seen
            arguments[self.cache_name] = self.prefix(0)
        else:
            arguments[_MASK] = mask = self.mask(size, x.dtype, masks)
            arguments[self.cache_name] = self.prefix(mask.shape[-1] - (self.n_tokens - 1) - size)
        return first(layer(x, **arguments))

    def keeping(self, tokens: Sequence[int]) -> LayerCall:
        """The same call behind some of the tokens before the last one, in order, each where it stood.

        It looks at no others.
        """
        rest = torch.as_tensor(tokens, dtype=torch.int64, device=self.keys.device)
        seen = torch.cat([rest, rest.new_tensor([self.n_tokens - 1])])
        keys, values = (
            torch.cat([x[:, :, : _VECTOR - 1], x[:, :, _VECTOR - 1 :][:, :, rest]], 2) for x in (self.keys, self.values)
        )
        return replace(
            self,
            n_tokens=len(seen),
            keys=keys,
            values=values,
            seen=None if self.seen is None else self.seen[..., seen.to(self.seen.device)],
            biases={name: bias[..., seen.to(bias.device)] for name, bias in self.biases.items()},
        )

    def mask(self, size: int, dtype: torch.dtype, masks: Masks) -> Tensor:
        """The mask of a row of ``size`` points: ``(1, heads or 1, size, filling + T - 1 + size)``, added to scores."""
        key = (id(self.seen), self.keys.device, size)
        if key not in masks:
            hidden = torch.finfo(dtype).min
            others = torch.eye(size, dtype=torch.bool, device=self.keys.device).logical_not()
            seen = others.new_ones(1, 1, 1, self.n_tokens) if self.seen is None else self.seen
            if seen.dtype == torch.bool:
                seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, hidden)
            tokens, own = (part.expand(-1, -1, size, -1) for part in (seen[..., :-1], seen[..., -1:]))
            own = own.expand(-1, -1, -1, size).masked_fill(others, hidden)
            filling = tokens.new_full((*tokens.shape[:3], -(self.n_tokens - 1 + size) % _VECTOR), hidden)
            masks[key] = torch.cat([filling, tokens, own], -1)
        return masks[key]

    def prefix(self, filling: int) -> _Prefix:
        """The keys and values of the tokens before the last, with ``filling`` of zeros in front."""
        return _Prefix(self.keys[:, :, _VECTOR - 1 - filling :], self.values[:, :, _VECTOR - 1 - filling :])


class _Prefix:
    """Stands where a layer looks for its cache: puts the shared keys and values in front of the points' own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(keys), -1, -1, -1
        return torch.cat([self.keys.expand(rows), keys], 2), torch.cat([self.values.expand(rows), values], 2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.keys.shape[2]


def check_memories(config: Any, name: str) -> None:
    """Raise ``UserError`` for a model whose layers carry a state from token to token beside keys and values.

    Asked of the config, so before weights are read or anything is recorded: state-space layers (Mamba), linear
    attention and short convolutions do.
    """
    from transformers import DynamicCache, cache_utils

    kinds: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())  # older ones tell in the run of a prompt
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError, ValueError):  # a cache of its own: the run of a prompt will tell
        return
    carrying = [i for i, layer in enumerate(layers) if isinstance(layer, kinds)]
    if carrying:
        which = f"all {len(layers)} layers carry" if len(carrying) == len(layers) else f"layer {carrying[0]} carries"
        raise _refused(
            name,
            f"{which} a state from token to token beside keys and values (a state-space layer, linear attention or a "
            "convolution), which the points of a grid cannot share",
        )


@torch.no_grad()  # not inference mode: what a layer was called with may be differentiated through
def record_calls(lm: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor, tuple[LayerCall, ...]]:
    """Run a prompt ``(T,)``: the last token's stream ``(S, D)``, its state ``(D,)`` behind the last layer, the calls.

    Raises ``UserError`` for a model whose layers keep something else than keys and values, or take another mask.
    """
    from transformers import DynamicCache

    check_memories(lm.base.config, lm.name)
    sites, n_tokens = lm.sites, len(ids)
    cache: Any = DynamicCache()  # without a config, or the layers with a sliding window forget what lies behind it
    streams: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    outputs: list[Tensor] = []  # of attention; the last token's
    latest: list[Tensor] = []  # the whole of the last one, or the next could get its memory
    tuples: list[int | None] = []
    sums: set[int] = set()
    final: list[Tensor] = []

    def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(module).forward)  # the class's own, whatever is wrapped around this one's
        given = signature.bind(module, *args, **kwargs).arguments
        rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        calls.append({**{k: v for k, v in given.items() if k not in rest}, **(given.get(rest[0], {}) if rest else {})})

    def output_of(module: nn.Module, args: Any, output: Any) -> None:
        latest[:] = [first(output)]
        tuples.append(len(output) if isinstance(output, tuple) else None)
        outputs.append(first(output).reshape(-1, lm.n_units)[-1].clone())

    def final_of(module: nn.Module, args: Any, output: Any) -> None:
        final.append(first(output)[0, -1].to(lm.device, copy=True))

    def at_site(s: int, stream: Tensor) -> None:
        layer, site = divmod(s, len(sites.names))
        if site and latest[0].data_ptr() == stream.data_ptr() and torch.equal(outputs[-1], stream[-1]):
            sums.add(layer)
        streams.append(stream[-1].to(lm.device, copy=True))

    with ExitStack() as hooks:
        reading_sites(lm, hooks, at_site)
        for layer, attention in zip(sites.layers, sites.attention, strict=True):
            hooks.callback(layer.register_forward_pre_hook(call_of, with_kwargs=True).remove)
            hooks.callback(attention.register_forward_hook(output_of).remove)
        hooks.callback(sites.layers[-1].register_forward_hook(final_of).remove)
        with refusing(lm, "it does not run with a cache of keys and values alone"):
            lm.base(input_ids=ids[None], past_key_values=cache, use_cache=True)
    found = {"layers called": len(calls), "blocks of attention": len(outputs), "layers in the cache": len(cache.layers)}
    if set(found.values()) != {lm.n_layers}:
        counts = ", ".join(f"{n} {what}" for what, n in found.items())
        raise _refused(lm.name, f"of its {lm.n_layers} layers, {counts}")
    rows: dict[int, Tensor] = {}  # layers share their mask, and so do ours
    layers = []
    for i, (arguments, output, stored) in enumerate(zip(calls, outputs, cache.layers, strict=True)):
        kept = getattr(stored, "keys", None)
        if not isinstance(kept, Tensor) or kept.ndim != 4 or kept.shape[0] != 1 or kept.shape[2] != n_tokens:
            raise _refused(lm.name, f"layer {i} does not keep the keys and values of all tokens")
        mask = arguments.pop(_MASK, None)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (n_tokens, n_tokens):
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise _refused(lm.name, f"layer {i} takes {shape} for a mask, where (1, heads, T, T) is needed")
            mask = rows.setdefault(id(mask), mask[:1, :, -1:])
        for name in list(inspect.signature(type(sites.layers[i]).forward).parameters)[:2]:  # the layer and the states
            arguments.pop(name)
        cache_names = [name for name, value in arguments.items() if value is cache]
        if len(cache_names) != 1:
            raise _refused(
                lm.name, f"layer {i} is not given the cache as one of its arguments ({', '.join(arguments)})"
            )
        biases = {name: arguments.pop(name) for name in (_PER_ROW, _SHARED) if arguments.get(name) is not None}
        arguments = {name: _last(value, n_tokens) for name, value in arguments.items() if value is not cache}
        positions = {name: arguments.pop(name) for name in list(arguments) if _is_position(arguments[name])}
        layers.append(
            LayerCall(
                n_tokens=n_tokens,
                keys=nn.functional.pad(stored.keys[:, :, :-1], (0, 0, _VECTOR - 1, 0)),
                values=nn.functional.pad(stored.values[:, :, :-1], (0, 0, _VECTOR - 1, 0)),
                arguments=arguments,
                positions=positions,
                cache_name=cache_names[0],
                seen=mask,
                biases=biases,
                attention=output - streams[i * len(sites.names)].to(output.device) if i in sums else output,
                gives_sum=i in sums,
                n_outputs=tuples[i],
            )
        )
    return torch.stack(streams), final[0], tuple(layers)


@contextmanager
def refusing(lm: LanguageModel, why: str) -> Iterator[None]:
    """Turn what a model's own code raises in here into a refusal to continue it, or to run its layers again."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as cause:
        if isinstance(cause, UserError | torch.OutOfMemoryError):
            raise
        raise _refused(lm.name, f"{why} ({type(cause).__name__}: {cause})") from cause


def _refused(name: str, why: str) -> UserError:
    return UserError(f"name: {name} cannot be continued from a sublayer: {why}. Give another model.")


def reading_sites(
    lm: LanguageModel, hooks: ExitStack, take: Callable[[int, Tensor], object], *, sublayers: Sequence[int] = ()
) -> None:
    """While ``hooks`` are open, call ``take(s, stream)`` with the stream ``(tokens of all rows, D)`` at each sublayer.

    It is the tensor itself: what is written into it moves the stream. ``sublayers`` limits where; default all.
    """

    def at(s: int) -> Any:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(s, stream_of(args, kwargs).view(-1, lm.n_units))

        return pre_hook

    for s in sublayers or range(lm.n_sublayers):
        hooks.callback(lm.sites.modules[s].register_forward_pre_hook(at(s), with_kwargs=True).remove)


def first(output: Any) -> Tensor:
    """The states in a module's output, which may be a tuple with other things behind them."""
    return output[0] if isinstance(output, tuple) else output


def _last(value: Any, n_tokens: int) -> Any:
    """The last token's row of ``(1, T, ...)`` or ``(T,)``, or of each in a tuple."""
    if isinstance(value, tuple):
        return tuple(_last(v, n_tokens) for v in value)
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) == n_tokens:
        return value[-1:]
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == n_tokens:
        return value[:, -1:]
    return value


def _is_position(value: Any) -> bool:
    """Angles are broadcast to all points, but what is looked up in a table with these has to be there for each."""
    return isinstance(value, Tensor) and value.shape in ((1,), (1, 1)) and not value.is_floating_point()
