"""Sequences end to end in one row, without padding, each attending to itself alone.

Everything but attention looks at one token at a time, and does not care which sequence it is of. Attention is asked for
by name: transformers looks the function up under the name in the model's config. While :func:`packed_attention` is open
that name is ours, and in a forward inside :func:`one_row` the model's own kernel runs for one sequence after the other,
with the mask that transformers makes for that sequence: the same calls as for the sequence alone. Any other forward
(another thread's, another model's) gets the function it had.

transformers can pack too, by one mask over the whole row: six times slower in attention, and silently wrong with a
cache or an attention mask. Whether a model takes part in ours is found by trying (``layout.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rsdyn.errors import UserError

_KERNELS = ("sdpa", "eager")  # what transformers gives a model that nobody asked for another


class NotPackedError(UserError):
    """A model cannot be run in packed rows; ``reason`` says why in a clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"layout: the language model cannot be run in packed rows: {reason}. Use layout=sorted.")
        self.reason = reason


@dataclass
class Row:
    """The sequences of a row: where each begins and ends, and how often attention was called for all of them."""

    bounds: list[tuple[int, int]]
    calls: int = 0


class _Masks(list[Tensor | None]):
    """One for each sequence of a row; None is plain causal attention."""


_row: ContextVar[Row | None] = ContextVar("row", default=None)  # each thread has its own


@contextmanager
def packed_attention(base: nn.Module) -> Iterator[None]:
    """While open, forwards of ``base`` inside :func:`one_row` attend within each sequence.

    Raises :class:`NotPackedError` when its attention is none of transformers' own two. What the model's config says of
    attention is put back at the end, whatever happens.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    if not set(before.values()) <= set(_KERNELS):
        others = sorted({str(name) for name in before.values()} - set(_KERNELS))
        raise NotPackedError(f"its attention is {', '.join(others)}, and only {' and '.join(_KERNELS)} are known")
    for kernel in _KERNELS:
        AttentionInterface.register(f"rsdyn_packed_{kernel}", partial(_attend, kernel))
        AttentionMaskInterface.register(f"rsdyn_packed_{kernel}", partial(_masks, kernel))
    try:
        for key, config in configs.items():  # not through the property, which would set a config's parts too
            config._attn_implementation_internal = f"rsdyn_packed_{before[key]}"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def one_row(lengths: Sequence[int]) -> Iterator[Row]:
    """While open, in this thread, a row of tokens is sequences of these lengths, end to end."""
    row = Row(list(pairwise(accumulate(lengths, initial=0))))
    token = _row.set(row)
    try:
        yield row
    finally:
        _row.reset(token)


def _kernel_of(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that a module would call; eager ones stand beside each model's code, in no register."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if kernel != "eager":
        return ALL_ATTENTION_FUNCTIONS[kernel]
    found = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if found is None:
        raise NotPackedError("its code has an eager attention that cannot be found")
    return found


def _attend(
    kernel: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **options: Any
) -> Any:
    """Attention ``(1, heads, T, ·) -> (1, T, heads, ·)`` of each sequence of the row alone, by the model's kernel."""
    own = _kernel_of(kernel, module)
    row = _row.get()
    if row is None:
        return own(module, query, key, value, mask, *args, **options)
    if options.get("position_bias") is not None:
        raise NotPackedError("its attention takes a bias for each place in the row")
    if not (mask is None or isinstance(mask, _Masks)):
        raise NotPackedError("its code makes attention masks of its own")
    n_tokens = row.bounds[-1][1]
    if query.shape[0] != 1 or {query.shape[2], key.shape[2]} != {n_tokens}:
        raise NotPackedError("its attention is called with other tokens than those of the row")
    row.calls += 1
    masks = mask or [None] * len(row.bounds)
    parts = [
        own(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], masks[i], *args, **options)[0]
        for i, (a, b) in enumerate(row.bounds)
    ]
    return torch.cat(parts, 1), None


def _masks(kernel: str, **options: Any) -> Any:
    """The mask of each sequence of the row; None where the kernel needs none, all being plain causal.

    A mask is its sequence's block of the row's: what stands before in the row shifts queries and keys alike, and what
    transformers adds to keep packed sequences apart is true everywhere in a block.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    own: Callable[..., Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS[kernel]
    row = _row.get()
    if row is None:
        return own(**options)

    def block(start: int, stop: int) -> Tensor | None:
        n = stop - start
        where = {"batch_size": 1, "q_length": n, "kv_length": n, "q_offset": start, "kv_offset": start}
        mask = own(**{**options, **where, "allow_is_causal_skip": False})
        is_causal = mask is not None and mask.dtype == torch.bool and torch.equal(mask, torch.ones_like(mask).tril())
        return None if is_causal else mask

    # a window or chunk that holds the longest sequence holds them all
    if block(*max(row.bounds, key=lambda bounds: bounds[1] - bounds[0])) is None:
        return None
    return _Masks(block(*bounds) for bounds in row.bounds)
