"""What somebody says of a stream that they bring: by arguments, or in a JSON file beside it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError

AXES = ("trajectory", "sequence", "token", "sublayer", "layer", "site", "unit")
SITES = ("resid_pre", "resid_mid")
EXAMPLE = '{"axes": ["trajectory", "sublayer", "unit"], "sites": ["resid_pre", "resid_mid"], "label": "my model"}'


@dataclass(frozen=True)
class Declared:
    """What an array is said to be; None where nobody said.

    Attributes:
        axes: the name of each axis, of :data:`AXES`.
        sites: which states of each layer there are, in their order.
        layers: the number of each layer that is there, rising; default from 0 on without a gap.
        label: the model's name.
        tokens: the ids of each sequence.
        mask: ``(B, T)``, 0 where a token is padding.
        sequence: ``(N,)``, the sequence of each trajectory; default one each.
        position: ``(N,)``, the token of each trajectory.
        texts, groups: of each sequence; a group may be None.
    """

    axes: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    label: str | None = None
    tokens: Any = None
    mask: Any = None
    sequence: Any = None
    position: Any = None
    texts: tuple[str, ...] | None = None
    groups: tuple[str | None, ...] | None = None

    def over(self, other: Declared) -> Declared:
        """This, and what ``other`` says where this says nothing."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(other, **mine)


def declared(where: str, **given: Any) -> Declared:
    """Check what is declared; ``where`` is what messages call the place it comes from.

    Raises ``UserError`` for names, axes, sites and layers that cannot be.
    """
    known = [f.name for f in fields(Declared)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{where}: {name!r} is not known{f'; did you mean {near[0]}?' if near else ''} There is "
                            f"{', '.join(known)}.")  # fmt: skip
    axes, sites, layers = given.get("axes"), given.get("sites"), given.get("layers")
    if axes is not None:
        axes = tuple(axes.replace(",", " ").split() if isinstance(axes, str) else axes)
        wrong = [axis for axis in axes if axis not in AXES]
        if wrong or len(set(axes)) != len(axes):
            raise UserError(f"{where}: axes={list(axes)}: {wrong[0] if wrong else 'one'!r} cannot be. Axes are of "
                            f"{', '.join(AXES)}, each once.")  # fmt: skip
        _check_axes(where, axes)
    if sites is not None:
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        if sites not in (("resid_pre",), SITES):
            raise UserError(
                f"{where}: sites={list(sites)}: a layer has resid_pre (its input) or resid_pre and resid_mid (before "
                "its MLP), in this order."
            )
    if layers is not None:
        layers = tuple(range(layers)) if isinstance(layers, int) else tuple(int(n) for n in layers)
        if not layers or any(b <= a for a, b in pairwise(layers)) or layers[0] < 0:
            raise UserError(f"{where}: layers={list(layers)}: they are numbers from 0 on that rise, at least one.")
    given |= {"axes": axes, "sites": sites, "layers": layers}
    if given.get("texts") is not None:
        given["texts"] = tuple(map(str, given["texts"]))
    if given.get("groups") is not None:
        given["groups"] = tuple(None if label is None else str(label) for label in given["groups"])
    return Declared(**given)


def _check_axes(where: str, axes: tuple[str, ...]) -> None:
    depth = [axis for axis in axes if axis in ("sublayer", "layer", "site")]
    rows = [axis for axis in axes if axis in ("trajectory", "sequence", "token")]
    if "unit" not in axes or sorted(depth) not in (["sublayer"], ["layer"], ["layer", "site"]):
        raise UserError(f"{where}: axes={list(axes)}: one is unit, and depth is sublayer, or layer, or layer and site.")
    if sorted(rows) not in (["trajectory"], ["sequence"], ["sequence", "token"]):
        raise UserError(f"{where}: axes={list(axes)}: rows are trajectory, or sequence, or sequence and token.")


def beside(path: Path) -> Declared | None:
    """What a JSON file beside a file or in a folder declares; None without one.

    ``acts.npy`` has ``acts.json``, a folder ``stream.json``. Raises ``UserError`` where it cannot be read.
    """
    file = path / "stream.json" if path.is_dir() else path.with_suffix(".json")
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: it is not JSON that can be read ({error}). It says, say, {EXAMPLE}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: it is not a mapping. It says, say, {EXAMPLE}.")
    return declared(str(file), **found)


def as_ids(tokens: Any, where: str) -> tuple[Tensor, ...]:
    """Token ids of each sequence as tensors; ``UserError`` where they are none."""
    if isinstance(tokens, (Mapping, str, bytes)):
        raise UserError(f"{where}: tokens are lists of ids, one for each sequence, not {type(tokens).__name__}.")
    rows: Sequence[Any] = list(tokens)
    try:
        ids = tuple(torch.as_tensor(np.asarray(row)) for row in rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: tokens are lists of ids, one for each sequence.") from error
    if any(row.ndim != 1 or row.is_floating_point() or len(row) == 0 for row in ids):
        raise UserError(f"{where}: tokens are lists of whole numbers, one for each sequence, none empty.")
    return tuple(row.long() for row in ids)
