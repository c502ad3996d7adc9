"""Run a model's decoder layers in another order: one left out, two exchanged.

As in ``layer_calls.py`` no architecture is known here. A plain run of the text is recorded, what each layer was called
with included, and layers are then called again with that, one on what another gave. What stands ahead of the first
layer that changes its place is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.layer_calls import first, refusing
from rsdyn.lm.continuing.self_check import rounding
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.tracing import stream_of


@dataclass(frozen=True)
class _Call:
    """What a layer was called with, and where among it the stream stood: at a number, or under a name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        args, kwargs = [*self.args], self.kwargs
        if isinstance(self.place, int):
            args[self.place] = x
        else:
            kwargs = {**kwargs, self.place: x}
        return first(layer(*args, **kwargs))


@dataclass(frozen=True)
class WholeRun:
    """An unperturbed run of one text, and what running its layers in another order needs.

    Attributes:
        tokens: ``(T,)`` int64.
        inputs: ``L`` of them, ``(1, T, D)``: the stream that each layer was given.
        final: ``(T, D)``, the states behind the last layer, ahead of the final norm.
    """

    tokens: Tensor
    inputs: tuple[Tensor, ...]
    final: Tensor
    calls: tuple[_Call, ...] = field(repr=False)


@torch.inference_mode()
def run_whole(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> WholeRun:
    """Run a text ``(T,)``, BOS included, and keep what each layer was given.

    Raises ``ValueError`` while an intervention is open; ``UserError`` for a model whose layers are not called one after
    another, or do not give the same again when they are called by themselves; ``NonFiniteError``.
    """
    if lm.n_edits:
        raise ValueError(f"lm: {lm.n_edits} interventions are open, and they would edit what is run. Leave them first.")
    ids = torch.as_tensor(np.asarray(tokens)).to(lm.device, torch.int64)
    inputs: list[Tensor] = []
    calls: list[_Call] = []
    final: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = stream_of(args, kwargs)
        inputs.append(stream.clone())  # a layer may add to it in place
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        (place,) = (name for name, value in given.items() if value is stream)
        without = {name: None if name == place else value for name, value in given.items()}
        calls.append(_Call(tuple(without[i] for i in range(len(args))), {k: without[k] for k in kwargs}, place))

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        final.append(first(output)[0].clone())

    with ExitStack() as hooks:
        for layer in lm.sites.layers:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(lm.sites.layers[-1].register_forward_hook(behind).remove)
        with refusing(lm, "its layers cannot be called again by themselves"):
            lm.base(input_ids=ids[None], use_cache=False)
    if len(inputs) != lm.n_layers:
        raise UserError(f"name: in {lm.name} {len(inputs)} layers were called, and it has {lm.n_layers}.")
    if not torch.isfinite(final[0]).all():
        raise NonFiniteError(
            f"the stream of {lm.name} is not finite on this text of {len(ids)} tokens, in {lm.dtype}. Check the "
            "weights, or compute in a wider type (dtype=float32)."
        )
    run = WholeRun(ids, tuple(inputs), final[0], tuple(calls))
    error = _apart(_run(lm, run, run.inputs[0].clone(), range(lm.n_layers)), run.final)
    if error > rounding(lm):
        raise UserError(
            f"name: the layers of {lm.name} cannot be run in another order: called one by one in their own, they "
            f"end {error:.1e} of the state's norm away from the model's own run, and {rounding(lm):.0e} is allowed in "
            f"{lm.dtype}. Something beside the stream goes from layer to layer. Perturb another model."
        )
    return run


@torch.inference_mode()
def run_in_order(lm: LanguageModel, run: WholeRun, order: Sequence[int]) -> Tensor:
    """The states ``(T, D)`` behind the last layer when layers run in ``order``; one may be missing, or come twice.

    Each layer is called with its own arguments of the plain run (its mask, its angles), whatever its place. Raises
    ``ValueError`` for a layer that is not there. What comes out need not be finite.
    """
    if any(not 0 <= layer < lm.n_layers for layer in order):
        raise ValueError(f"order={[*order]}: {lm.name} has {lm.n_layers} layers, 0 to {lm.n_layers - 1}.")
    same = next((i for i, layer in enumerate(order) if layer != i), len(order))  # so many are where they were
    if same == lm.n_layers == len(order):
        return run.final
    return _run(lm, run, (run.inputs[same] if same < lm.n_layers else run.final[None]).clone(), order[same:])


def _run(lm: LanguageModel, run: WholeRun, x: Tensor, order: Sequence[int]) -> Tensor:
    for layer in order:
        # layers may lie on several devices
        x = run.calls[layer](lm.sites.layers[layer], x.to(run.inputs[layer].device))
    return x[0].to(lm.device)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest relative distance of states ``(T, D)`` from others; inf for NaN."""
    apart = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-30)
    return float(apart.nan_to_num(nan=torch.inf).max())
