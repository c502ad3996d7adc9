"""Continue a language model from a sublayer with given states: the primitive under every perturbation (METHOD 10).

Only the layers behind the injection run. With the last token's state replaced, the other tokens stay as they were in
the reference run, so their keys and values are computed once there and shared by every point. The blocks that run are
transformers' own attention, MLP and norms, called one after the other: ``x + block(norm(x))``. Positions, rotary or
learned, came in before (learned ones were added ahead of layer 0, the angles of rotary ones are recorded in the
reference run), so nothing here depends on their kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.dynamics.parallel import side_by_side
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.stream.lm import LanguageModel

Position = Literal["last", "all"]

# Points that attend together, see _Batch.attend: more of them cost products with each other's keys, which the mask
# throws away, fewer cost copies of the shared ones. Flat from 16 to 50 at 15 and 64 tokens and 128 units.
_BLOCK = 32
# Masked keys of zeros fill a row of scores up to a multiple of this: attention on a CPU takes the exp of what is left
# over a vector one by one, and a row of 77 took twice as long as one of 80.
_VECTOR = 16
_MASKABLE = ("eager", "sdpa")  # implementations of attention that take a mask of our own
_PER_TOKEN = ("position_embeddings", "position_ids", "cache_position")  # arguments of attention with a row a token


@dataclass(frozen=True)
class _Attention:
    """What one layer's attention needs to run again for the last token, from the reference run.

    Attributes:
        keys, values: of the tokens before the last, ``(1, heads, T - 1, units of a head)``.
        arguments: of the call, but for the states, the mask and the cache; of the last token where they are a token's.
        visible: ``(1, heads or 1, 1, T - 1)`` what the last token sees of the others: boolean, or added to the scores;
            None for everything.
        output: ``(D,)`` what attention added to the last token.
    """

    keys: Tensor
    values: Tensor
    arguments: dict[str, Any]
    visible: Tensor | None
    output: Tensor


@dataclass(frozen=True)
class Reference:
    """An unperturbed run of one prompt, and what continuing from it needs.

    Attributes:
        tokens: ``(T,)`` int64.
        stream: ``(S, D)``, the last token's trajectory.
        final: ``(D,)``, its state behind the last layer, ahead of the final norm.
        log_probs: ``(V,)`` float32, of the next token; None when the model was loaded without its LM head.
    """

    tokens: Tensor
    stream: Tensor
    final: Tensor
    log_probs: Tensor | None
    attention: tuple[_Attention, ...] = field(repr=False)


@dataclass(frozen=True)
class Continued:
    """The last token's stream from an injection on, for ``P`` points; on the model's device, in its dtype.

    Attributes:
        stream: ``(P, S - s, D)`` at the sublayers ``s, s + 1, ..., S - 1``; the injected state comes first.
        final: ``(P, D)`` behind the last layer, ahead of the final norm.
        log_probs: ``(P, V)`` float32, of the next token; None when they were not asked for.
    """

    stream: Tensor
    final: Tensor
    log_probs: Tensor | None


def run_reference(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> Reference:
    """Run a prompt, BOS included, and keep what continuing from any of its sublayers needs (METHOD section 10).

    At the end the run is continued from its own first state, which has to reproduce it. Raises ``UserError`` for an
    empty or over-long prompt, ids outside the vocabulary, and a model that cannot be continued; ``ValueError`` while
    an intervention is open.
    """
    ids = _check_tokens(lm, tokens)
    _check_model(lm)
    out = torch.empty(lm.n_sublayers, lm.n_units, dtype=lm.dtype, device=lm.device)
    final, attention = _run_prompt(lm, ids, out)
    with torch.inference_mode():
        log_probs = None if lm.head is None else lm.log_probs(final)
    reference = Reference(ids, out, final.clone(), None if log_probs is None else log_probs.clone(), attention)
    if not torch.isfinite(out).all() or not torch.isfinite(final).all():
        raise NonFiniteError(
            f"the stream of {lm.name} is not finite on this prompt of {len(ids)} tokens, in {lm.dtype}. Check the "
            "weights, or compute in a wider type (lm.dtype=float32)."
        )
    again = continue_from(lm, reference, 0, out[:1]).stream[0]
    error = float(((again - out).norm(dim=-1) / out.norm(dim=-1).clamp(min=1e-30)).max())
    if error > (1e-3 if lm.dtype == torch.float32 else 0.1):  # another formula is off by about 1, roundings by 1e-6
        raise RuntimeError(
            f"continuing {lm.name} from its own state is {error:.1e} off: its layers have another shape."
        )
    return reference


def continue_from(
    lm: LanguageModel,
    reference: Reference,
    sublayer: int,
    states: Tensor,
    *,
    position: Position = "last",
    freeze_attention: bool = False,
    log_probs: bool = False,
    batch_points: int = 1024,
) -> Continued:
    """Put each of ``states`` ``(P, D)`` in place of the stream at a sublayer and run the rest (METHOD section 10).

    Equal to one whole forward a point with a hook that replaces the stream, at a fraction of the cost. An injection at
    resid_mid moves the stream itself, not only what the MLP reads.

    Args:
        sublayer: ``s``, see :meth:`LanguageModel.sublayer` for that of a layer's site.
        states: any float dtype and device; finite.
        position: ``last`` replaces the last token's state alone; the other tokens stay at the reference. ``all`` puts
            the same state at every token: all values that attention averages are then equal, so nothing depends on
            the prompt, and what runs is one token that sees itself.
        freeze_attention: a control: what each layer's attention adds to the last token is taken from the reference
            run instead of being computed from the perturbed state, so that nothing is read again from the context and
            the MLPs alone answer. ``position`` then makes no difference.
        log_probs: also give next-token log-probabilities; the model must have been loaded with its LM head.
        batch_points: at most so many points go through the model together. Batches run side by side on a CPU's cores.

    Raises:
        ValueError: a sublayer that is not there, states of another shape, an unknown position, no LM head.
        NonFiniteError: states that are not finite, or a stream that is not after them.
    """
    options: dict[str, Any] = {"position": position, "freeze_attention": freeze_attention}
    return continue_all(lm, reference, [(sublayer, states)], log_probs=log_probs, batch_points=batch_points, **options)[
        0
    ]


def continue_all(
    lm: LanguageModel,
    reference: Reference,
    injections: Sequence[tuple[int, Tensor]],
    *,
    position: Position = "last",
    freeze_attention: bool = False,
    log_probs: bool = False,
    batch_points: int = 1024,
) -> list[Continued]:
    """:func:`continue_from` for several ``(sublayer, states)`` at once: the batch grows as each sublayer is reached.

    Faster than one call an injection, since what is late in depth joins what began early. Returns one
    :class:`Continued` for each injection, in the order given.
    """
    _check_model(lm)
    if position not in get_args(Position):
        raise ValueError(f"position={position!r}: must be one of {', '.join(get_args(Position))}.")
    if batch_points < 1:
        raise ValueError(f"batch_points={batch_points}: how many points go together; give at least 1.")
    if log_probs and lm.head is None:
        lm.log_probs(reference.final)  # says how to get the head
    checked = [(s, _check_states(lm, s, states)) for s, states in injections]
    results = [
        Continued(
            torch.empty(len(x), lm.n_sublayers - s, lm.n_units, dtype=lm.dtype, device=lm.device),
            torch.empty_like(x),
            torch.empty(len(x), lm.config.vocab_size, device=lm.device) if log_probs else None,
        )
        for s, x in checked
    ]
    batches: list[list[_Piece]] = [[]]
    room = batch_points
    for i in sorted(range(len(checked)), key=lambda i: checked[i][0]):
        s, x = checked[i]
        start = 0
        while start < len(x):
            if room == 0:
                batches.append([])
                room = batch_points
            rows = slice(start, min(start + room, len(x)))
            batches[-1].append(_Piece(s, x[rows], rows, results[i]))
            room -= rows.stop - start
            start = rows.stop
    batches = [batch for batch in batches if batch]

    def run(pieces: list[_Piece]) -> None:
        _Batch(lm, reference, alone=position == "all", frozen=freeze_attention).run(pieces)

    with closing(side_by_side(run, batches, lm.device)) as work:
        for _ in work:
            pass
    for (s, _), result in zip(checked, results, strict=True):
        _check_result(lm, s, result)
    return results


@dataclass(frozen=True)
class _Piece:
    """Points that are injected together: their sublayer, states, and the rows of a result that they fill."""

    sublayer: int
    states: Tensor
    rows: slice
    result: Continued


class _Batch:
    """One batch of points on its way through the layers."""

    def __init__(self, lm: LanguageModel, reference: Reference, *, alone: bool, frozen: bool):
        self.lm, self.reference, self.alone, self.frozen = lm, reference, alone, frozen
        self.masks: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def run(self, pieces: list[_Piece]) -> None:
        """Carry the pieces, sorted by sublayer, to the end, and write into their results."""
        sites = self.lm.sites
        x = pieces[0].states[:0]
        began = 0
        for s in range(pieces[0].sublayer, self.lm.n_sublayers):
            while began < len(pieces) and pieces[began].sublayer == s:
                x = torch.cat([x, pieces[began].states])
                began += 1
            for piece, rows in zip(pieces, x.split([len(p.states) for p in pieces[:began]]), strict=False):
                piece.result.stream[piece.rows, s - piece.sublayer] = rows
            layer, is_mlp = divmod(s, len(sites.names))
            if is_mlp:
                x = x + sites.blocks[s](sites.norms[s](x[None]))[0]
            elif self.frozen:
                x = x + self.reference.attention[layer].output
            else:
                x = x + self.attend(sites.blocks[s], sites.norms[s](x[None])[0], self.reference.attention[layer])
        for piece, rows in zip(pieces, x.split([len(p.states) for p in pieces]), strict=True):
            piece.result.final[piece.rows] = rows
            if piece.result.log_probs is not None:
                piece.result.log_probs[piece.rows] = self.lm.log_probs(rows)

    def attend(self, attention: nn.Module, x: Tensor, given: _Attention) -> Tensor:
        """What attention adds to each of the points ``x`` ``(n, D)``, behind their norm.

        The points stand in blocks as if they were the tokens of a sequence behind the shared ones, all at the position
        of the last token; the mask lets each see the shared tokens and itself, and no other point.
        """
        n = len(x)
        if self.alone:
            return _first(attention(x[:, None], attention_mask=None, **given.arguments))[:, 0]
        blocks = -(-n // _BLOCK)
        size = -(-n // blocks)
        if blocks * size > n:  # fewer rows than there are blocks, repeated to fill the last one
            x = torch.cat([x, x[-1:].expand(blocks * size - n, -1)])
        mask = self.mask(given, size, x.dtype)
        shared = _Shared(given.keys, given.values, mask.shape[-1] - given.keys.shape[2] - size)
        out = attention(x.view(blocks, size, -1), attention_mask=mask, past_key_values=shared, **given.arguments)
        return _first(out).reshape(blocks * size, -1)[:n]

    def mask(self, given: _Attention, size: int, dtype: torch.dtype) -> Tensor:
        """The mask of a block, to be added to the scores: ``(1, heads or 1, size, filling + T - 1 + size)``."""
        key = (id(given.visible), size)
        if key not in self.masks:
            others = torch.eye(size, dtype=torch.bool, device=given.keys.device)[None, None].logical_not()
            visible = given.visible
            if visible is None:
                visible = others.new_ones(1, 1, 1, given.keys.shape[2])
            if visible.dtype == torch.bool:
                visible = _added(~visible, dtype)
            filling = others.new_ones(1, 1, 1, -(visible.shape[3] + size) % _VECTOR)
            parts = _added(filling, dtype), visible, _added(others, dtype)
            self.masks[key] = torch.cat([part.expand(1, visible.shape[1], size, -1) for part in parts], -1)
        return self.masks[key]


def _added(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask of what is hidden as numbers to add to the scores; eager attention makes the same of its own."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


class _Shared:
    """Stands where attention looks for its cache: puts the shared keys and values in front of a block's own.

    In front of those come ``filling`` of zeros, that the mask hides.
    """

    def __init__(self, keys: Tensor, values: Tensor, filling: int):
        self.keys, self.values, self.filling = keys, values, filling

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._join(self.keys, keys), self._join(self.values, values)

    def _join(self, shared: Tensor, own: Tensor) -> Tensor:
        filling = shared.new_zeros(1, 1, 1, 1).expand(len(own), own.shape[1], self.filling, own.shape[3])
        return torch.cat([filling, shared.expand(len(own), -1, -1, -1), own], 2)


@torch.inference_mode()
def _run_prompt(lm: LanguageModel, ids: Tensor, stream: Tensor) -> tuple[Tensor, tuple[_Attention, ...]]:
    """One forward that fills ``stream`` ``(S, D)``; the final state ``(D,)`` and each layer's attention."""
    from transformers import DynamicCache

    calls: list[dict[str, Any]] = []
    outputs: list[Tensor] = []
    final: list[Tensor] = []

    def at(s: int) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[s] = (args[0] if args else kwargs["hidden_states"])[0, -1]

        return take

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        calls.append({**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})})

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(_first(output)[0, -1].clone())

    sites = lm.sites
    cache: Any = DynamicCache()  # without a config, or the layers with a sliding window forget what lies behind it
    with ExitStack() as hooks:
        for s, module in enumerate(sites.modules):
            hooks.callback(module.register_forward_pre_hook(at(s), with_kwargs=True).remove)
        for attention in sites.blocks[:: len(sites.names)]:
            hooks.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(attention.register_forward_hook(after).remove)
        assert sites.final_norm is not None  # seen by _check_model
        taken = sites.final_norm.register_forward_pre_hook(lambda module, args: final.append(args[0][0, -1].clone()))
        hooks.callback(taken.remove)
        lm.base(input_ids=ids[None], past_key_values=cache, use_cache=True)
    if not len(calls) == len(outputs) == len(cache.layers) == lm.n_layers or len(final) != 1:
        raise RuntimeError(f"{len(calls)} of {lm.n_layers} layers of {lm.name} ran their attention, with a cache.")
    seen: dict[int, Tensor] = {}  # layers share their mask, and so do ours
    layers = []
    for call, output, stored in zip(calls, outputs, cache.layers, strict=True):
        mask = call.pop("attention_mask", None)
        if mask is not None:
            mask = seen.setdefault(id(mask), mask[:1, :, -1:, : len(ids) - 1])
        arguments = {k: _last(v) if k in _PER_TOKEN else v for k, v in call.items()}
        for name in ("hidden_states", "past_key_values"):
            arguments.pop(name, None)
        keys, values = (t[:, :, :-1] for t in (stored.keys, stored.values))
        layers.append(_Attention(keys, values, arguments, mask, output))
    return final[0], tuple(layers)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _last(value: Any) -> Any:
    """The last token's row of ``(1, T, ...)`` or ``(T,)``, or of each in a tuple."""
    if isinstance(value, tuple):
        return tuple(_last(v) for v in value)
    if isinstance(value, Tensor):
        return value[:, -1:] if value.ndim > 1 else value[-1:]
    return value


def _check_tokens(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    ids = torch.as_tensor(np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens))
    if ids.numel() == 0:
        raise UserError("prompt: it is empty; give at least one token, BOS.")
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"prompt: {ids.dtype} of shape {tuple(ids.shape)}; give the token ids of one sequence, (T,).")
    context = lm.config.max_position_embeddings
    if len(ids) > context:
        raise UserError(f"prompt: {len(ids)} tokens, and {lm.name} takes at most {context}; give a shorter one.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= lm.config.vocab_size:
        raise UserError(
            f"prompt: token ids from {low} to {high}, and those of {lm.name} go from 0 to {lm.config.vocab_size - 1}; "
            "encode it with this model's tokenizer."
        )
    return ids.to(lm.device, torch.int64)


def _check_model(lm: LanguageModel) -> None:
    if lm.n_edits:
        raise ValueError(
            f"lm: {lm.n_edits} interventions are open, and they would edit what is continued. Leave them first."
        )
    if not lm.sites.blocks or lm.sites.final_norm is None:
        raise UserError(f"lm.name: {lm.name} cannot be continued from a sublayer, its blocks are not known.")
    used = getattr(lm.config, "_attn_implementation", None)
    if used not in _MASKABLE:
        raise UserError(
            f"lm: {lm.name} uses attention {used!r}, and continuing needs one that takes a mask of its own; choose "
            f"{' or '.join(_MASKABLE)} with set_attn_implementation."
        )


def _check_states(lm: LanguageModel, sublayer: int, states: Tensor) -> Tensor:
    """The states on the model's device in its dtype."""
    if isinstance(sublayer, bool) or not isinstance(sublayer, int) or not 0 <= sublayer < lm.n_sublayers:
        raise ValueError(
            f"sublayer={sublayer}: {lm.name} has {lm.n_sublayers}; give a whole number from 0 to {lm.n_sublayers - 1}."
        )
    if states.ndim != 2 or states.shape[1] != lm.n_units or len(states) == 0:
        raise ValueError(
            f"states: shape {tuple(states.shape)}, and the stream of {lm.name} has {lm.n_units} units; give (P, "
            f"{lm.n_units}), a row a point. A projection of another model gives another width."
        )
    finite = torch.isfinite(states).all(-1)
    if not finite.all():
        raise NonFiniteError(
            f"states: {int((~finite).sum())} of {len(states)} hold NaN or Inf, the first is point "
            f"{int((~finite).nonzero()[0])}; give finite states."
        )
    return states.detach().to(lm.device, lm.dtype)


def _check_result(lm: LanguageModel, sublayer: int, result: Continued) -> None:
    if result.final.isfinite().all():  # the stream is a running sum, which NaN and Inf never leave
        return
    finite = torch.cat([result.stream.isfinite().all(-1), result.final.isfinite().all(-1, keepdim=True)], 1)
    after = int((~finite).any(0).nonzero()[0])  # the first sublayer; behind it a bad point can spoil its block
    point = int((~finite[:, after]).nonzero()[0])
    raise NonFiniteError(
        f"states: point {point}, injected at sublayer {sublayer}, is not finite {after} sublayers later, in "
        f"{lm.dtype}. Compute in a wider type (lm.dtype=float32), or inject nearer to the reference."
    )
