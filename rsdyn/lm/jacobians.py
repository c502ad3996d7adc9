"""Derivatives of the last token's stream from each sublayer to the next, in context (METHOD section 12).

In a causal model the earlier tokens never see the last one, so with their keys and values held, the derivative of a
sublayer is the *exact* total derivative, a layer's is the product of its two, and products over depth are exact too.
All rows of a derivative come from one backward pass: as many copies of the state as there are units go through the
sublayer side by side, and the sum of ``output[i, i]`` is differentiated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from rsdyn.dynamics import jacobian
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.continuation import frozen_attention, run_reference
from rsdyn.lm.continuing.layer_calls import BLOCK, Masks, reading_sites
from rsdyn.lm.continuing.reference import Reference
from rsdyn.lm.model import LanguageModel

Context = Literal["full", "none", "first", "rest"]
_FORMATS = (torch.float32, torch.float64)
BLOCK_BYTES = 2**29  # of the activations of the copies that go through a sublayer together, at most about
ROUNDS, TOLERANCE = 40, 1e-2  # of the leading exponents; nats over the whole depth


def sublayer_jacobians(
    lm: LanguageModel,
    tokens: Sequence[int] | np.ndarray | Tensor,
    sublayers: Sequence[int] | None = None,
    context: Context = "full",
    dtype: torch.dtype | None = None,
    *,
    reference: Reference | None = None,
) -> Tensor:
    """The derivative of the last token's stream from each sublayer to the next, ``(n, D, D)``; row i is of output i.

    Entry k is ``d h[s + 1] / d h[s]`` at ``s = sublayers[k]``, at the states of a run of the prompt; the last sublayer
    goes to the state behind the last layer. The product over a range of sublayers is the exact derivative over it.

    Args:
        lm: comes back as it was.
        tokens: one sequence, BOS included.
        sublayers: which; default all ``S``.
        context: ``full`` holds the other tokens' keys and values: the exact derivative in context. ``none`` feeds the
            state at the start of each layer to that layer as a sequence of one token, as arXiv 2605.14258 is said to
            do: the derivative of a layer, but of nothing that the model does with this text. So do two between them:
            ``first`` has the keys and values of the first token alone, which is where attention that has nothing to
            look for goes (a sink), and ``rest`` has those of all but the first.
        dtype: float32 or float64, of the computation and the result; default the model's own, float32 for a model in
            half precision. Another format than the model's takes a copy of its weights. In float64 the layers compute
            in it throughout, also where their code would pass through float32 (norms, softmax); what is looked up,
            such as rotary angles, stays as it is.
        reference: of :func:`reference_run` on the same model and tokens, where it is there already.

    Raises:
        UserError: an empty or over-long prompt, ids outside the vocabulary, a model that does not continue, with the
            reason, before anything is differentiated.
        ValueError: a sublayer that is not there, another context or dtype, an intervention that is open.
        NonFiniteError: a stream or a derivative that is not finite.
    """
    dtype = format_of(lm, dtype)
    if context not in get_args(Context):
        raise ValueError(f"context={context!r}: must be one of {', '.join(get_args(Context))}.")
    chosen = _check_sublayers(lm, sublayers)
    lm = in_format(lm, dtype)
    with double_layers(lm):
        reference = run_reference(lm, tokens) if reference is None else reference
        out = torch.empty(len(chosen), lm.n_units, lm.n_units, dtype=lm.dtype, device=lm.device)
        with _Sublayers(lm, reference, context) as step:
            for s, rows in zip(chosen, out, strict=True):
                for dims in torch.arange(lm.n_units).split(step.block):
                    rows[dims] = step.rows(s, dims)
                if not torch.isfinite(rows).all():
                    raise NonFiniteError(
                        f"the derivative of {lm.name} over sublayer {s} is not finite at these states, in {lm.dtype}. "
                        "Compute in a wider type (float64), or leave the text out."
                    )
    return out


def linear_prediction(
    lm: LanguageModel,
    tokens: Sequence[int] | np.ndarray | Tensor,
    sublayer: int,
    displacements: Tensor,
    *,
    reference: Reference | None = None,
) -> Tensor:
    """What displacements ``(P, D)`` of the last token's state become at first order, ``(P, S - s + 1, D)``.

    At the sublayers ``s, s + 1, ..., S - 1`` and behind the last layer; no ``D x D`` matrix is held. In the format of
    the model, float32 for half precision. Raises what :func:`sublayer_jacobians` does.
    """
    _check_sublayers(lm, [sublayer])
    lm = in_format(lm, format_of(lm))
    moved = [displacements.to(lm.device, lm.dtype).T]
    with double_layers(lm):
        reference = run_reference(lm, tokens) if reference is None else reference
        with sdpa_kernel(SDPBackend.MATH), _Sublayers(lm, reference) as step:
            for s in range(sublayer, lm.n_sublayers):
                moved.append(step.forward(s, moved[-1]))
    return torch.stack(moved, -1).permute(1, 2, 0)


def leading_exponents(
    lm: LanguageModel,
    tokens: Sequence[int] | np.ndarray | Tensor,
    k: int,
    *,
    context: Context = "full",
    dtype: torch.dtype | None = None,
    reference: Reference | None = None,
) -> Tensor:
    """The ``k`` largest Lyapunov exponents over the whole depth, nats per layer, ``(k,)`` float64, falling.

    Those of the product of :func:`sublayer_jacobians`, without ever holding a ``D x D`` matrix: block Lanczos on three
    quarters of ``k`` columns at a time, ``J^T u`` by a backward pass and ``J v`` by a backward pass through that one,
    orthonormalised at every sublayer. It ends when no exponent moves by more than a hundredth of a nat over the whole
    depth in a sweep.

    Raises what :func:`sublayer_jacobians` does, and ``ValueError`` for ``k`` not from 1 to ``D`` or exponents that are
    still moving after 40 rounds.
    """
    jacobian.check_k(k, lm.n_units)
    dtype = format_of(lm, dtype)
    if context not in get_args(Context):
        raise ValueError(f"context={context!r}: must be one of {', '.join(get_args(Context))}.")
    lm = in_format(lm, dtype)
    with double_layers(lm):
        reference = run_reference(lm, tokens) if reference is None else reference
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH), _Sublayers(lm, reference, context, keep=True) as step:
            found = jacobian.leading_exponents(
                [partial(step.forward, s) for s in range(lm.n_sublayers)],
                [partial(step.backward, s) for s in range(lm.n_sublayers)],
                lm.n_units,
                k,
                rounds=ROUNDS,
                tolerance=TOLERANCE,
                device=lm.device,
            )
    if found.value is None:
        raise ValueError(
            f"k={k}: the leading exponents of {lm.name} still move after {ROUNDS} rounds, since the next ones are too "
            f"near. Ask for another number, or for all {lm.n_units} (sublayer_jacobians and lyapunov)."
        )
    return found.value * len(lm.sites.names)


def reference_run(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> Reference:
    """The run of a prompt whose states are differentiated, for several calls to share; ``lm`` in its final format."""
    with double_layers(lm):
        return run_reference(lm, tokens)


def format_of(lm: LanguageModel, dtype: torch.dtype | None = None) -> torch.dtype:
    """The format that derivatives of a model are computed in; ``ValueError`` for half precision, asked for by name."""
    if dtype is None:
        return lm.dtype if lm.dtype in _FORMATS else torch.float32
    if dtype not in _FORMATS:
        raise ValueError(
            f"dtype={dtype}: derivatives are computed in float32 or float64, also those of a model in half precision."
        )
    return dtype


def in_format(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model itself, or a copy of it in another format; the copy has no LM head."""
    if lm.dtype == dtype:
        return lm
    if lm.is_spread:
        raise UserError(
            f"device_map: {lm.name} is spread over devices in {lm.dtype}, and its derivatives are computed in "
            f"{dtype}. Load it in that format."
        )
    base: Any = copy.deepcopy(lm.base)
    return LanguageModel(base.to(dtype), name=lm.name)


def _check_sublayers(lm: LanguageModel, sublayers: Sequence[int] | None) -> list[int]:
    if sublayers is None:
        return list(range(lm.n_sublayers))
    for s in sublayers:
        if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < lm.n_sublayers:
            raise ValueError(
                f"sublayers: {s} is not one of {lm.name}, which has {lm.n_sublayers}; give whole numbers from 0 to "
                f"{lm.n_sublayers - 1}."
            )
    return list(sublayers)


# --- one sublayer at a time -------------------------------------------------------------------------------------------


class _LeaveLayerError(Exception):
    """Raised at the site that ends a sublayer: nothing behind it is needed."""


class _Maps(NamedTuple):
    """A sublayer as two linear maps of rows: ``J^T`` from ends to points, ``J`` from what is pulled back to weights."""

    points: Tensor
    ends: Tensor
    weights: Tensor
    pulled: Tensor


class _Sublayers:
    """The maps from each sublayer to the next at the reference's states, many points at once; a context manager.

    With ``keep``, what was computed of a sublayer is kept for the next round through it: about as much memory as a
    training step takes on as many tokens as there are columns.
    """

    def __init__(
        self, lm: LanguageModel, reference: Reference, context: Context = "full", *, keep: bool = False
    ) -> None:
        self.lm, self.reference, self.keep = lm, reference, keep
        self.exact, self.alone = context == "full", context == "none"
        self.calls = reference.calls
        if context in ("first", "rest"):
            n_before = len(reference.tokens) - 1
            before = range(min(1, n_before)) if context == "first" else range(1, n_before)
            self.calls = tuple(call.keeping(before) for call in reference.calls)
        self._made: dict[tuple[int, int], _Maps] = {}
        self.masks: Masks = {}
        self._states = list(reference.stream)
        config: Any = lm.config
        inner = int(getattr(config, "intermediate_size", None) or 4 * lm.n_units)
        seen = 1 if self.alone else len(reference.tokens) + BLOCK
        floats = 8 * lm.n_units + 4 * inner + 3 * int(config.num_attention_heads) * seen
        self.block = max(BLOCK, BLOCK_BYTES // (floats * lm.dtype.itemsize) // BLOCK * BLOCK)
        self._at: Callable[[int, Tensor], None] = lambda s, stream: None
        self._running = SimpleNamespace(batch=SimpleNamespace(points=None))
        self._hooks = ExitStack()

    def __enter__(self) -> _Sublayers:
        later = [s for s in range(self.lm.n_sublayers) if s % len(self.lm.sites.names)]
        if later:
            reading_sites(self.lm, self._hooks, lambda s, stream: self._at(s, stream), sublayers=later)
        if not self.exact:  # within a layer, the state is what the layer makes of that at its start in this context
            with torch.no_grad():
                for s in later:
                    self._states[s] = self(s - 1, self._states[s - 1][None])[0]
        self._hooks.enter_context(torch.enable_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def __call__(self, s: int, points: Tensor) -> Tensor:
        """What points ``(n, D)`` at sublayer ``s`` become at the next one, ``(n, D)``."""
        layer, site = divmod(s, len(self.lm.sites.names))
        found: list[Tensor] = []

        def at(here: int, stream: Tensor) -> None:
            if here == s:  # the layer began with the reference's states, and goes on from the points
                stream[: len(points)].copy_(points)
            else:
                found.append(stream)
                raise _LeaveLayerError

        self._at = at
        with ExitStack() as frozen:
            start = points
            if site:
                start = self._states[s - site].expand(len(points), -1)
                self._running.batch.points = start
                attention = self.lm.sites.attention[layer]
                frozen.enter_context(frozen_attention(attention, self.calls[layer], self._running))
            try:
                ends = self.calls[layer](
                    self.lm.sites.layers[layer], self._in_rows(start), alone=self.alone, masks=self.masks
                )
            except _LeaveLayerError:
                ends = found[0]
        return ends.reshape(-1, ends.shape[-1])[: len(points)]

    def rows(self, s: int, dims: Tensor) -> Tensor:
        """Rows ``dims`` of the derivative, ``(n, D)``."""
        points, ends = self._run(s, len(dims))
        picked = ends.gather(1, dims.to(ends.device)[:, None])
        return torch.autograd.grad(picked.sum(), points)[0]

    def backward(self, s: int, columns: Tensor) -> Tensor:
        """``J^T u`` of columns ``(D, n)``."""
        return self._in_blocks(self._backward, s, columns)

    def forward(self, s: int, columns: Tensor) -> Tensor:
        """``J v`` of columns ``(D, n)``: the derivative of ``J^T w`` by ``w``, which does not depend on ``w``."""
        return self._in_blocks(self._forward, s, columns)

    def _in_blocks(self, by: Callable[[int, Tensor], Tensor], s: int, columns: Tensor) -> Tensor:
        parts = [by(s, part) for part in columns.T.to(self.lm.dtype).split(self.block)]
        return torch.cat(parts).T.to(columns.dtype)

    def _backward(self, s: int, rows: Tensor) -> Tensor:
        maps = self._maps(s, len(rows))
        return torch.autograd.grad(maps.ends, maps.points, rows, retain_graph=True)[0]

    def _forward(self, s: int, rows: Tensor) -> Tensor:
        maps = self._maps(s, len(rows))
        return torch.autograd.grad(maps.pulled, maps.weights, rows, retain_graph=True)[0]

    def _maps(self, s: int, n: int) -> _Maps:
        """The graphs of a sublayer for ``n`` points, made once where many rounds go through them."""
        if (s, n) in self._made:
            return self._made[s, n]
        points, ends = self._run(s, n)
        weights = torch.zeros_like(ends, requires_grad=True)
        (pulled,) = torch.autograd.grad(ends, points, weights, create_graph=True)
        maps = _Maps(points, ends, weights, pulled)
        if self.keep:
            self._made[s, n] = maps
        return maps

    def _run(self, s: int, n: int) -> tuple[Tensor, Tensor]:
        points = self._states[s].expand(n, -1).clone().requires_grad_()
        return points, self(s, points)

    def _in_rows(self, points: Tensor) -> Tensor:
        """The points as a layer takes them: blocks of them as successive tokens where that is right."""
        n = len(points)
        rows = n if self.alone or not self.reference.blocks else -(-n // BLOCK)
        size = -(-n // rows)
        missing = rows * size - n
        x = torch.cat([points, points[-1:].expand(missing, -1)]) if missing else points
        return x.reshape(rows, size, -1)


# --- float64 ----------------------------------------------------------------------------------------------------------


class _Double(TorchFunctionMode):
    """While active, what is in float64 stays in it: models' own code casts to float32 in norms and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def double_layers(lm: LanguageModel) -> Iterator[None]:
    """While open, the layers of a model in float64 compute in it throughout; nothing for another format."""
    if lm.dtype != torch.float64:
        yield
        return
    modes: list[_Double] = []

    def enter(*_: Any) -> None:
        modes.append(_Double())
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        experts = lm.base.get_experts_implementation()
        if "grouped_mm" in experts.values():  # which has no float64
            lm.base.set_experts_implementation("eager")
            hooks.callback(lm.base.set_experts_implementation, experts)
        for layer in lm.sites.layers:
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield
