"""A pretend GPU: tensors that say they are on another device, are computed on the CPU, and refuse what a GPU refuses.

No machine of the project has a GPU, and most mistakes that show only there are of one kind: a tensor made on the CPU
meets one of the GPU, or one of the GPU is given to numpy. Those are found here, with the values of the CPU to compare
with. Kernels, memory, streams and speed are not pretended. The device is called ``gpu``, so what asks for ``cuda`` by
name is not reached. For a process of its own: torch registers a device for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("gpu", _Backend())
GPU = torch.device("gpu", 0)
_aten = torch.ops.aten
COPIES = (_aten._to_copy, _aten.copy_)
COMPUTED: set[str] = set()  # what was done there
INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index)


class _OnGpu(Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> _OnGpu:
        tensor = Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, device=GPU,
        )  # fmt: skip
        tensor.content = content
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.content!r} on a pretend GPU"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert a tensor of the GPU to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.content.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.content, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a checkpoint
        return self.content.__reduce_ex__(protocol)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, _OnGpu)]
    kind = func.overloadpacket
    if there and kind not in COPIES:
        here = [t for t in tensors if not isinstance(t, _OnGpu) and t.ndim > 0]  # single numbers may come along
        if kind in INDEXED and isinstance(args[0], _OnGpu):  # so may indices
            here = [t for t in here if len(args) > 2 and t is args[2]]
        if here:
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but got {shapes}")
    result_there = bool(there) if kind is not _aten.copy_ else isinstance(args[0], _OnGpu)
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]) == GPU
        kwargs = kwargs | ({"device": torch.device("cpu")} if result_there else {})
    if result_there:
        COMPUTED.add(str(kind))
    known = {id(t.content if isinstance(t, _OnGpu) else t): t for t in tensors}
    args, kwargs = tree_map(_content, (args, kwargs))

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else _OnGpu(x) if result_there else x

    return tree_map(place, func(*args, **kwargs))


def _content(x: Any) -> Any:
    return x.content if isinstance(x, _OnGpu) else x


class _Mode(TorchDispatchMode):
    """Makes what is asked for on the GPU there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_library = library.Library("aten", "IMPL")  # where torch turns modes off
for _name in ("empty_strided", "empty.memory_format", "copy_"):
    _op = getattr(_aten, _name.split(".")[0])
    _op = getattr(_op, _name.split(".")[1]) if "." in _name else _op.default
    _library.impl(_name, lambda *args, _op=_op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """While open, tensors can be made on and moved to the pretend GPU, whose device this gives."""
    # a view of a tensor that is ours cannot be taken in inference mode
    with _Mode(), mock.patch("torch._C._InferenceMode", lambda on: torch.no_grad() if on else nullcontext()):
        yield GPU
