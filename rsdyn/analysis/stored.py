"""Results as flat arrays, as ``results.npz`` keeps them, and back: driven by the fields of the dataclasses alone.

An array is named by the path of fields that leads to it, such as ``original/correlation/mean/interval``; the ``value``
of a :class:`~rsdyn.analysis.results.Measured` has the path of the measured itself, ``original/correlation/mean``.
Numbers and texts are arrays without axes; what is None has none.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured
from rsdyn.errors import UserError

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
AGAIN = "Run the script again into a new folder."
NAMED = "conditions"  # the field whose keys begin the names, and whose order is kept beside them


def flatten(results: AnalysisResults) -> dict[str, np.ndarray]:
    """The results of a run as arrays by name, with the conditions' names in order."""
    found: dict[str, np.ndarray] = {NAMED: np.array(list(results.conditions))}
    for f in fields(results):
        if f.name != NAMED:
            found |= flatten_part(getattr(results, f.name), f.name)
    for condition, part in results.conditions.items():
        found |= flatten_part(part, condition)
    return found


def flatten_part(found: Any, name: str) -> dict[str, np.ndarray]:
    """A part of the results, such as one condition's, as arrays whose names begin with ``name``."""
    return dict(_leaves(found, name))


def _leaves(found: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if found is None:
        return
    if is_dataclass(found):
        for f in fields(found):
            here = isinstance(found, Measured) and f.name == "value"
            yield from _leaves(getattr(found, f.name), name if here else f"{name}/{f.name}")
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _leaves(value, f"{name}/{key}")
    elif isinstance(found, Tensor):
        yield name, found.detach().cpu().numpy()
    else:
        yield name, np.asarray(found)


def unflatten(arrays: Arrays, where: str = "results.npz") -> AnalysisResults:
    """The results of a run from what :func:`flatten` gave, to the bit.

    Raises:
        UserError: where an array is missing; ``where`` names the file.
    """
    tree, kinds = _Tree(arrays, where), _kinds(AnalysisResults)
    parts = {
        f.name: _read(_without_none(kinds[f.name]), tree.at(f.name))
        for f in fields(AnalysisResults)
        if f.name != NAMED and (f.default is MISSING or tree.at(f.name).there)
    }
    names: tuple[str, ...] = _read(tuple[str, ...], tree.at(NAMED))
    return AnalysisResults(conditions={c: _read(ConditionResults, tree.at(c)) for c in names}, **parts)


def unflatten_part(kind: type[T], arrays: Arrays, name: str, where: str = "results.npz") -> T:
    """A part of the results of the class ``kind``, from arrays whose names begin with ``name``."""
    found: T = _read(kind, _Tree(arrays, where).at(name))
    return found


class _Tree:
    """The arrays as a tree of the parts of their names; an array itself is read when it is asked for."""

    def __init__(self, arrays: Arrays, where: str, name: str = "", parts: dict[str, Any] | None = None) -> None:
        self.arrays, self.where, self.name = arrays, where, name
        self.parts: dict[str, Any] = {} if parts is None else parts
        if parts is None:
            for key in arrays:
                node = self.parts
                for part in key.split("/"):
                    node = node.setdefault(part, {})

    def at(self, part: str) -> _Tree:
        name = f"{self.name}/{part}" if self.name else part
        return _Tree(self.arrays, self.where, name, self.parts.get(part, {}))

    @property
    def there(self) -> bool:
        return bool(self.parts) or self.name in self.arrays

    @property
    def array(self) -> np.ndarray:
        if self.name not in self.arrays:
            raise UserError(f"{self.where}: the array {self.name!r} is missing. {AGAIN}")
        return np.asarray(self.arrays[self.name])


def _read(kind: Any, tree: _Tree) -> Any:
    if is_dataclass(kind):
        kinds, found = _kinds(kind), {}  # type: ignore[arg-type]
        for f in fields(kind):
            node = tree if kind is Measured and f.name == "value" else tree.at(f.name)
            required = f.default is MISSING and f.default_factory is MISSING
            if required or node.there:
                found[f.name] = _read(_without_none(kinds[f.name]), node)
        return kind(**found)  # type: ignore[operator]
    if get_origin(kind) is dict:
        return {key: _read(get_args(kind)[1], tree.at(key)) for key in tree.parts}
    if kind is Tensor:
        return torch.from_numpy(tree.array)
    if get_origin(kind) is tuple:
        return tuple(tree.array.tolist())
    return kind(tree.array.item())


def _kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, localns={"Tensor": Tensor})


def _without_none(kind: Any) -> Any:
    """A type without ``None``."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(of for of in get_args(kind) if of is not type(None))
    return kind
