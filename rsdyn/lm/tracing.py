"""Find the sites of a decoder by following one short forward of a model without weights.

The model is built on torch's ``meta`` device, where tensors have shapes and no numbers, so a model of any size costs
about a second and no memory. Which tensor is added to which is then read off the operations that were run: the stream
of a layer is the chain of sums from the layer's output back to its input. What stands beside a sum is what a sublayer
adds, and the first module that reads a sum in the middle of the chain is where resid_mid can be had (METHOD section 2).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsdyn.lm.model_lock import one_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_aten = torch.ops.aten
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)
_SCALES = (_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar)
_SAME_VALUES = (_aten._to_copy.default, _aten.clone.default, _aten.lift_fresh.default)  # a cast is the same state
_N_TOKENS = 7


class UntraceableError(Exception):
    """The sites cannot be found; the message says why in a clause, without a full stop."""


class UnbuildableError(UntraceableError):
    """A config that no model can be built from."""


@dataclass(frozen=True)
class Term:
    """One module's output among what a sublayer adds to the stream, and the number it is multiplied by."""

    module: str
    scale: float = 1.0


@dataclass(frozen=True)
class LayerTrace:
    """The names of one layer's modules in the base model.

    Attributes:
        layer: the decoder layer; its input is resid_pre.
        mid: the first module that reads resid_mid; None for parallel attention, and for one block a layer.
        attention, mlp: the two blocks; the same module where the layer has one block alone (Mamba).
        adds: what each of the layer's sublayers adds to the stream: the sum of these modules' outputs.
    """

    layer: str
    mid: str | None
    attention: str
    mlp: str
    adds: tuple[tuple[Term, ...], ...]


@dataclass(frozen=True)
class Trace:
    """The layers of a model, in order, and the module that reads what the last one wrote."""

    layers: tuple[LayerTrace, ...]
    final_norm: str | None


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream among a module's arguments: the first tensor of floats. ``ValueError`` where there is none."""
    found = _first_float([*args, kwargs.get("hidden_states"), *kwargs.values()])
    if found is None:
        raise ValueError("a module that should read the stream was called without a tensor of floats.")
    return found


def output_of(output: Any) -> Tensor:
    """What a module gives to the stream: its output, or the first tensor of floats in it."""
    found = _first_float(tree_leaves(output) if not isinstance(output, dict) else list(output.values()))
    if found is None:
        raise ValueError("a module that should add to the stream gave no tensor of floats.")
    return found


def _first_float(values: Sequence[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def model_without_weights(config: PreTrainedConfig, kind: Any = None, *, trust_remote_code: bool = False) -> nn.Module:
    """The base model of a config on the meta device; ``kind`` is its class, by default the one transformers opens.

    Raises :class:`UnbuildableError` when it cannot be built.
    """
    from transformers import AutoModel

    config = copy.deepcopy(config)  # building a model writes into its config
    # bfloat16, since some mixtures of experts have no operator for float32 there
    with one_at_a_time(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind is not None:
                return kind._from_config(config, dtype=torch.bfloat16).eval()
            return AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code).eval()
        except Exception as error:  # whatever the model's code raises: a package that it lacks, a setting it refuses
            raise UnbuildableError(f"it cannot be built from its config ({_told(error)})") from error


def _told(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def trace(base: nn.Module) -> Trace:
    """Follow one forward of a base model on the meta device. Raises :class:`UntraceableError`."""
    flow, calls = _follow(base)
    names = _stack(base, calls)
    after = calls[names[-1]]
    reads = (c for c in calls.values() if c.read == after.wrote and c.began > after.ended)
    final = min(reads, key=lambda c: c.began, default=None)
    return Trace(tuple(_layer(base, name, calls, flow) for name in names), None if final is None else final.name)


@dataclass
class _Call:
    """One module's run: when it began and ended, and the values that it read and wrote."""

    name: str
    began: int
    read: int | None
    ended: int = -1
    wrote: int | None = None
    n: int = 1


class _Flow(TorchDispatchMode):
    """Numbers every value of a forward and remembers how it came about.

    A value is known by its memory and size, so all views of it are one; writing in place makes another value.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[Any, tuple[int, ...], float | None]] = []  # operation, what it read, a number beside it
        self._values: dict[int, dict[int, int]] = {}
        self._alive: list[Tensor] = []  # an address may be used again once its tensor is gone

    def value(self, tensor: Tensor) -> int:
        of_memory = self._values.setdefault(tensor.untyped_storage()._cdata, {})
        if tensor.numel() not in of_memory:
            of_memory[tensor.numel()] = self._new(None, tuple(of_memory.values())[:1], None)
            self._alive.append(tensor)
        return of_memory[tensor.numel()]

    def _new(self, operation: Any, read: tuple[int, ...], number: float | None) -> int:
        self.made.append((operation, read, number))
        return len(self.made) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:  # the code asks for a number: there is none, any will do
            return True if args[0].dtype == torch.bool else args[0].dtype.is_floating_point * 1.0 or 1
        if func is _aten.nonzero.default:  # the tokens of an expert: say there is one
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.int64)
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        read = tuple(self.value(t) for t in tensors if t.is_floating_point())
        numbers = [a for a in (*args, *kwargs.values()) if isinstance(a, int | float) and not isinstance(a, bool)]
        out = func(*args, **kwargs)
        memory = {t.untyped_storage()._cdata for t in tensors}
        for result in tree_leaves(out):
            if not isinstance(result, Tensor) or not result.is_floating_point():
                continue
            cdata = result.untyped_storage()._cdata
            if cdata in memory and not func._schema.is_mutable:
                continue  # a view
            if func in _SAME_VALUES and read:
                value = read[0]
            else:
                value = self._new(func, read, float(numbers[0]) if len(numbers) == 1 else None)
            self._values[cdata] = {result.numel(): value}
            self._alive.append(result)
        return out

    def sums(self, end: int, start: int) -> list[tuple[int, int]] | None:
        """The additions that lead from ``start`` to ``end``: (sum, what was added) of each; None if none do."""
        if end == start:
            return []
        operation, read, number = self.made[end]
        if operation not in _ADDS or len(read) != 2 or number is not None:
            return None
        for stream, added in (read, read[::-1]):
            before = self.sums(stream, start)
            if before is not None:
                return [*before, (end, added)]
        return None

    def depends(self, value: int, on: int) -> bool:
        """Whether a value was computed from another one."""
        seen, left = set(), [value]
        while left:
            v = left.pop()
            if v == on:
                return True
            if v > on and v not in seen:  # values are numbered as they are made
                seen.add(v)
                left += self.made[v][1]
        return False


def _follow(base: nn.Module) -> tuple[_Flow, dict[str, _Call]]:
    flow, calls = _Flow(), dict[str, _Call]()
    clock = iter(range(1 << 62))

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = _first_float([*args, kwargs.get("hidden_states"), *kwargs.values()])
            again = calls[name].n + 1 if name in calls else 1
            calls[name] = _Call(name, next(clock), None if stream is None else flow.value(stream), n=again)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            out = _first_float(tree_leaves(output)) if not isinstance(output, dict) else None
            calls[name].ended, calls[name].wrote = next(clock), None if out is None else flow.value(out)

        return hook

    handles = []
    for name, module in base.named_modules():
        if name:
            handles += [
                module.register_forward_pre_hook(before(name), with_kwargs=True),
                module.register_forward_hook(after(name)),
            ]
    try:
        with torch.no_grad(), flow:
            base(input_ids=torch.zeros(1, _N_TOKENS, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # whatever the model's code raises without numbers, it is told to the user
        raise UntraceableError(f"its code does not run without weights ({_told(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    return flow, calls


def _stack(base: nn.Module, calls: dict[str, _Call]) -> list[str]:
    """The names of the decoder layers: the longest list of modules of which each reads what the one before wrote."""
    best: list[str] = []
    for list_name, modules in base.named_modules():
        if not isinstance(modules, nn.ModuleList | nn.Sequential):
            continue
        names = [f"{list_name}.{child}" for child, _ in modules.named_children()]
        runs = [calls[n] for n in names if n in calls]
        if len(runs) < len(names) or len(names) <= len(best):
            continue
        if any(run.n > 1 or run.read is None or run.wrote is None for run in runs):
            continue
        if all(a.wrote == b.read for a, b in pairwise(runs)):
            best = names
    if not best:
        raise UntraceableError("it has no stack of layers of which each reads what the one before wrote")
    return best


def _layer(base: nn.Module, name: str, calls: dict[str, _Call], flow: _Flow) -> LayerTrace:
    layer = calls[name]
    assert layer.read is not None and layer.wrote is not None  # _stack saw to it
    inside = [c for n, c in calls.items() if n.startswith(f"{name}.")]
    inside.sort(key=lambda c: c.began)
    chain = flow.sums(layer.wrote, layer.read)
    if chain is None:
        raise UntraceableError(
            f"the output of {name} is not its input plus what its blocks give, but a norm (post-norm) or a factor "
            "stands behind the sum, so there is no running sum to record"
        )
    # a dropout hands on what a block wrote, and the block is the better name for it
    writers = [c for c in inside if not isinstance(base.get_submodule(c.name), nn.Dropout)]
    between = []
    for i, (value, _) in enumerate(chain[:-1]):
        reader = next((c for c in inside if c.read == value), None)
        if reader is not None:
            between.append((i, reader))
        elif any(flow.depends(added, value) for _, added in chain[i + 1 :]):
            raise UntraceableError(f"no module of {name} reads the stream between its blocks, so no hook can")
    if len(between) > 1:
        raise UntraceableError(f"{name} adds to the stream {len(between) + 1} times, and two are expected at most")
    cuts = [0, *(i + 1 for i, _ in between), len(chain)]
    adds = tuple(
        tuple(term for _, added in chain[start:stop] for term in _terms(name, added, writers, flow))
        for start, stop in pairwise(cuts)
    )
    if not between and len(adds[0]) == 1:
        block = adds[0][0].module
        return LayerTrace(name, None, block, block, adds)
    # what else mixes tokens (xLSTM) stands where attention does: first
    attention = next((c.name for c in inside if _is_attention(base, c.name)), adds[0][0].module)
    mid = between[0][1] if between else None
    mlp = _mlp(base, name, attention, mid, adds, inside)
    return LayerTrace(name, None if mid is None else mid.name, attention, mlp, adds)


def _is_attention(base: nn.Module, name: str) -> bool:
    return "attention_mask" in inspect.signature(base.get_submodule(name).forward).parameters


def _terms(layer: str, added: int, inside: Sequence[_Call], flow: _Flow, scale: float = 1.0) -> Iterator[Term]:
    """The modules whose outputs make up a value that is added to the stream."""
    wrote = [c for c in inside if c.wrote == added]
    if wrote:  # the outermost of those that hand it on
        yield Term(max(wrote, key=lambda c: c.ended).name, scale)
        return
    operation, read, number = flow.made[added]
    if operation in _SCALES and number is not None and len(read) == 1:
        yield from _terms(layer, read[0], inside, flow, scale * number)
    elif operation in _ADDS and number is None and len(read) == 2:
        for part in read:
            yield from _terms(layer, part, inside, flow, scale)
    else:
        raise UntraceableError(f"what {layer} adds to the stream is not a module's output, times a number")


def _mlp(
    base: nn.Module,
    layer: str,
    attention: str,
    mid: _Call | None,
    adds: tuple[tuple[Term, ...], ...],
    inside: Sequence[_Call],
) -> str:
    """The feed-forward block: a child of the layer beside attention; else the module whose output is added (OPT)."""
    start = 0 if mid is None else mid.began
    blocks = [
        c.name
        for c in inside
        if c.began >= start
        and c.name.count(".") == layer.count(".") + 1
        and not f"{attention}.".startswith(f"{c.name}.")
        and next(base.get_submodule(c.name).children(), None) is not None
    ]
    if blocks:
        return blocks[-1]
    return next(t.module for t in adds[-1][::-1] if not t.module.startswith(attention))
