"""``load``: trajectories out of files and objects that somebody else made."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.stream.exchange.against_model import compare_with_model
from rsdyn.stream.exchange.checks import check
from rsdyn.stream.exchange.declared import EXAMPLE, SITES, Declared, as_ids, beside, declared
from rsdyn.stream.exchange.raw import Raw
from rsdyn.stream.recorded import Trajectories, read_saved

FILES = (".safetensors", ".npz", ".npy")
NO_MID = (
    "This stream has the input of each layer alone (resid_pre): what attention and MLP add is not told apart, so the "
    "rows and curves on transitions within layers and across them, and on attention and MLP, are left out."
)
HOOK = "blocks.{}.hook_{}"


def load(
    source: Any,
    *,
    axes: str | Sequence[str] | None = None,
    sites: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    label: str | None = None,
    tokens: Any = None,
    mask: Any = None,
    sequence: Any = None,
    position: Any = None,
    texts: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    positions: Literal["last", "all"] = "last",
    model: Any = None,
    compared: int = 4,
) -> Trajectories:
    """Bring a stream that was recorded elsewhere, and refuse what is none.

    What is not said here may stand in a JSON file beside the data, with the same names: ``acts.json`` beside
    ``acts.npy``, ``stream.json`` in a folder.

    Args:
        source: what :meth:`rsdyn.Trajectories.save` or ``to_xarray`` made; a ``.npy``, ``.npz`` or ``.safetensors``, an
            array or a tensor, with ``axes``; a folder or file of vLLM's exported hidden states (``hidden_states`` and
            ``token_ids`` for each request), with ``layers``; the ``hidden_states`` of transformers, a tuple; a
            TransformerLens ``ActivationCache``, or any mapping with its names.
        axes: of an array, such as ``trajectory sublayer unit`` or ``sequence token layer unit``.
        sites: ``resid_pre``, or ``resid_pre`` and ``resid_mid``.
        layers: the number of each layer that is there, or how many, from 0 on.
        label: the model's name.
        tokens: the ids of each sequence: with them more can be checked.
        mask: ``(B, T)``, 0 where a token is padding.
        sequence, position: of each trajectory, where the rows are trajectories.
        texts, groups: of each sequence.
        positions: which tokens to take, where there are several of each sequence.
        model: the model it is said to be from, by name or as an object: some sequences are recorded again and compared.
        compared: how many.

    Raises:
        UserError: axes, sizes, layers or a model other than declared; a file that cannot be read or says nothing of
            itself; states that are not finite, stand behind the final norm, are off by one layer, begin with two BOS,
            are padded on the left, or were shuffled.
        TypeError: a source of a kind that is not taken.
    """
    where = "load"
    said = {"axes": axes, "sites": sites, "layers": layers, "label": label, "tokens": tokens, "mask": mask}
    said |= {"sequence": sequence, "position": position, "texts": texts, "groups": groups}
    told = declared(where, **said)
    if positions not in ("last", "all"):
        raise UserError(f"positions={positions!r}: give last or all.")
    if isinstance(source, (str, PathLike)):
        path = Path(source).expanduser()
        where = str(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
        told = told.over(beside(path) or Declared())
        found = _of_path(path, told)
    else:
        found = _of_object(source, told)
    if isinstance(found, Trajectories):
        _whole(found, where)
        if model is not None:
            compare_with_model(_raw_of(found, where), model, compared)
        return found
    check(found)
    if model is not None:
        compare_with_model(found, model, compared)
    return _trajectories(found, told, positions, certified=model is not None)


def _whole(x: Trajectories, where: str) -> None:
    """What was recorded here is believed, but for numbers that are none."""
    check(_raw_of(x, where))


def _raw_of(x: Trajectories, where: str) -> Raw:
    counts = torch.unique_consecutive(x.sequence, return_counts=True)[1].tolist()
    numbers = torch.unique_consecutive(x.sequence).tolist()
    if len(set(numbers)) != len(numbers) or numbers != sorted(numbers):
        raise UserError(
            f"{where}: the trajectories of a sequence do not stand together, in the order of the sequences."
        )
    tokens = None if x.tokens is None else tuple(x.tokens[i] for i in numbers)
    return Raw(x.tensor.split(counts), x.position.split(counts), x.sites, x.layers, tokens, False, where)


# -- what is given -----------------------------------------------------------------------------------------------------


def _of_path(path: Path, told: Declared) -> Raw | Trajectories:
    if path.is_dir():
        return _vllm(path, sorted(path.glob("*.safetensors")), told)
    if path.suffix not in FILES:
        raise UserError(f"{path}: files of type {path.suffix or '(none)'} are not read. Known: {', '.join(FILES)}.")
    if path.suffix == ".npy":
        return _of_array(_numpy(path), told, str(path))
    saved = read_saved(path)
    if saved is not None:
        return Trajectories._of(*saved, str(path))
    arrays = _arrays(path)
    if {"hidden_states", "token_ids"} <= arrays.keys() and told.axes is None:
        return _vllm(path, [path], told)
    if HOOK.format(0, "resid_pre") in arrays:
        return _hooks(arrays, told, str(path))
    tensors = {name: t for name, t in arrays.items() if t.ndim >= 3}
    if len(tensors) != 1:
        raise UserError(
            f"{path} holds {', '.join(f'{name} {tuple(t.shape)}' for name, t in arrays.items()) or 'nothing'}, and one "
            "array of three or more axes is looked for."
        )
    for name in ("tokens", "mask", "sequence", "position"):
        if getattr(told, name) is None and name in arrays:
            given: dict[str, Any] = {name: arrays[name]}
            told = Declared(**given).over(told)
    return _of_array(next(iter(tensors.values())), told, str(path))


def _numpy(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        return _as_tensor(array, str(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an array ({error}).") from error


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz or .safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npz":
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {name: _as_tensor(file[name], f"{path}: {name}") for name in file.files}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


def _as_tensor(array: Any, where: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    array = np.asarray(array)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise UserError(f"{where} holds {array.dtype}, not numbers of a stream.")
    return torch.from_numpy(np.ascontiguousarray(array))


def _of_object(source: Any, told: Declared) -> Raw | Trajectories:
    if isinstance(source, Trajectories):
        return source
    if hasattr(source, "dims") and hasattr(source, "coords"):
        return _of_xarray(source)
    if isinstance(source, (Tensor, np.ndarray)):
        return _of_array(_as_tensor(source, "load"), told, "load")
    if isinstance(source, Mapping) or hasattr(source, "cache_dict"):
        return _hooks(source, told, "load")
    if isinstance(source, (tuple, list)) and source:
        if isinstance(source[0], (tuple, list)):
            raise UserError(
                "load: a tuple of tuples is what generate() gives, whose steps see one token each. Give "
                "hidden_states of "
                "one forward over whole sequences."
            )
        return _transformers(source, told)
    raise TypeError(
        f"load: {type(source).__name__} is not taken; give a path, an array with axes, transformers' hidden_states, an "
        "ActivationCache or a DataArray of to_xarray."
    )


def _of_xarray(array: Any) -> Trajectories:
    words = json.loads(array.attrs.get("rsdyn", "{}"))
    if array.dims != ("trajectory", "sublayer", "unit") or "rsdyn_trajectories" not in words:
        raise UserError("load: this DataArray was not made by to_xarray. Give its values with axes=... instead.")
    tensor = torch.from_numpy(np.array(array.values)).to(getattr(torch, words["dtype"]))
    arrays = {"tensor": tensor} | {
        name: torch.from_numpy(np.array(array.coords[name].values, np.int64)) for name in ("sequence", "position")
    }
    x = Trajectories._of({k: v for k, v in words.items() if k != "tokens"}, arrays, "DataArray")
    if words.get("tokens") is None:
        return x
    from dataclasses import replace

    return replace(x, tokens=as_ids(words["tokens"], "DataArray"))


# -- arrays with declared axes -----------------------------------------------------------------------------------------


def _of_array(array: Tensor, told: Declared, where: str) -> Raw:
    if told.axes is None or told.sites is None:
        missing = " and ".join(name for name in ("axes", "sites") if getattr(told, name) is None)
        raise UserError(
            f"{where}: nothing says what this array of {tuple(array.shape)} is. Give {missing}, or a JSON file beside "
            "it: "
            f"{EXAMPLE}."
        )
    if array.ndim != len(told.axes):
        raise UserError(
            f"{where}: it has {array.ndim} axes {tuple(array.shape)}, and {len(told.axes)} are declared: "
            f"{', '.join(told.axes)}."
        )
    n_sites = len(told.sites)
    order = [a for a in ("trajectory", "sequence", "token", "layer", "site", "sublayer", "unit") if a in told.axes]
    x = array.permute([told.axes.index(axis) for axis in order])
    if "site" in told.axes:
        if x.shape[order.index("site")] != n_sites:
            raise UserError(
                f"{where}: the axis site has {x.shape[order.index('site')]} entries and {n_sites} are declared: "
                f"{', '.join(told.sites)}."
            )
        x = x.flatten(order.index("layer"), order.index("site"))
    depth = x.shape[-2]
    each = 1 if "layer" in told.axes and "site" not in told.axes else n_sites
    if each != n_sites:
        raise UserError(
            f"{where}: with an axis layer and no axis site there is one state of each layer, and {n_sites} are "
            "declared: "
            f"{', '.join(told.sites)}. Declare sites=[resid_pre] if these are the inputs of the layers."
        )
    layers = told.layers if told.layers is not None else tuple(range(depth // n_sites))
    if len(layers) * n_sites != depth:
        missing = " (one half of the sublayers is missing: declare sites=[resid_pre])" if len(layers) == depth else ""
        raise UserError(
            f"{where}: it has {depth} sublayers, and {len(layers)} layers of {n_sites} sites are declared, "
            f"{len(layers) * n_sites}{missing}."
        )
    names, numbers = _sublayers(told.sites, layers)
    if "token" in told.axes:
        return _padded_batch(x, names, numbers, told, where)
    n = len(x)
    tokens = None if told.tokens is None else as_ids(told.tokens, where)
    if told.sequence is None:
        counts = [1] * n
    else:
        of = torch.as_tensor(np.asarray(told.sequence)).long()
        numbers_of = torch.unique_consecutive(of)
        if len(of) != n or len(numbers_of.unique()) != len(numbers_of) or (numbers_of.diff() < 0).any():
            raise UserError(
                f"{where}: sequence is {len(of)} numbers for {n} trajectories; those of a sequence stand together, in "
                "the order of the sequences."
            )
        counts = torch.unique_consecutive(of, return_counts=True)[1].tolist()
    if tokens is not None and len(tokens) != len(counts):
        raise UserError(f"{where}: tokens of {len(tokens)} sequences are declared, and there are {len(counts)}.")
    at = _positions(told, tokens, counts, n, where)
    if tokens is not None and any(int(a.max()) >= len(ids) for a, ids in zip(at, tokens, strict=True)):
        raise UserError(f"{where}: a position is declared that is not in the tokens of its sequence.")
    return Raw(x.split(counts), at, names, numbers, tokens, False, where)


def _positions(
    told: Declared, tokens: tuple[Tensor, ...] | None, counts: list[int], n: int, where: str
) -> tuple[Tensor, ...]:
    if told.position is not None:
        given = torch.as_tensor(np.asarray(told.position)).long()
        if given.shape != (n,):
            raise UserError(f"{where}: position is {tuple(given.shape)}, and there are {n} trajectories.")
        return given.split(counts)
    if tokens is not None and set(counts) == {1}:
        return tuple(torch.tensor([len(ids) - 1]) for ids in tokens)  # the last, as everywhere
    return tuple(torch.arange(count) for count in counts)


def _sublayers(sites: tuple[str, ...], layers: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return sites * len(layers), tuple(layer for layer in layers for _ in sites)


def _padded_batch(x: Tensor, names: tuple[str, ...], numbers: tuple[int, ...], told: Declared, where: str) -> Raw:
    """Sequences ``(B, T, S, D)`` of one array, cut to their lengths."""
    n, width = x.shape[:2]
    ids = None if told.tokens is None else as_ids(told.tokens, where)
    lengths = [width] * n
    if told.mask is not None:
        mask = torch.as_tensor(np.asarray(told.mask)).long()
        if mask.shape != (n, width):
            raise UserError(f"{where}: mask is {tuple(mask.shape)}, and there are {n} sequences of {width} tokens.")
        lengths = mask.sum(1).tolist()
        if min(lengths) == 0:
            raise UserError(f"{where}: mask leaves no token of sequence {lengths.index(0)}.")
        left = [i for i in range(n) if mask[i, : lengths[i]].sum() != lengths[i]]
        if left:
            raise UserError(
                f"{where}: mask leaves out tokens before others in sequence {left[0]}: padding on the left, which "
                "moves "
                "the positions of all tokens behind it. Pad on the right, or record sequences one by one."
            )
    elif ids is not None and len(ids) == n:
        lengths = [min(width, len(row)) for row in ids]
    if ids is not None:
        if len(ids) != n or any(len(row) < length for row, length in zip(ids, lengths, strict=True)):
            raise UserError(f"{where}: tokens are not those of {n} sequences of these lengths.")
        ids = tuple(row[:length] for row, length in zip(ids, lengths, strict=True))
    states = tuple(x[i, :length] for i, length in enumerate(lengths))
    at = tuple(torch.arange(length) for length in lengths)
    return Raw(states, at, names, numbers, ids, told.mask is None, where)


# -- what other tools make ---------------------------------------------------------------------------------------------


def _transformers(states: Sequence[Any], told: Declared) -> Raw:
    """What transformers gives: the embedding, the output of each layer, the last one behind the final norm."""
    tensors = [_as_tensor(state, "hidden_states") for state in states]
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1 or len(next(iter(shapes))) not in (2, 3):
        raise UserError(
            f"hidden_states: they are of the shapes {', '.join(map(str, sorted(shapes)))}, and (B, T, D) each are "
            "taken."
        )
    if told.sites not in (None, ("resid_pre",)):
        raise UserError("hidden_states: transformers gives the input of each layer alone: sites=resid_pre.")
    n_layers = len(told.layers) if told.layers is not None else len(tensors) - 1
    if len(tensors) != n_layers + 1 or (told.layers is not None and told.layers != tuple(range(n_layers))):
        raise UserError(
            f"hidden_states: there are {len(tensors)}, and a model of {n_layers} layers gives {n_layers + 1}: the "
            "embedding, and behind each layer. Give them all, as they come."
        )
    x = torch.stack(tensors[:-1], dim=-2)  # the last one stands behind the final norm, and is no part of the stream
    x = x[None] if x.ndim == 3 else x
    names, numbers = _sublayers(("resid_pre",), range(n_layers))
    return _padded_batch(x, names, numbers, told, "hidden_states")


def _vllm(path: Path, files: list[Path], told: Declared) -> Raw:
    """What vLLM exports: a file for each request, ``hidden_states (T, layers, D)`` and ``token_ids (T,)``.

    ``eagle_aux_hidden_state_layer_ids`` said which layers; the files do not. Layer ``i`` is the state in front of layer
    ``i``, the number of layers the one behind the last, ahead of the final norm (vLLM's page on hidden states).
    """
    found: list[tuple[Tensor, Tensor]] = []
    for file in files:
        arrays = _arrays(file)
        if not {"hidden_states", "token_ids"} <= arrays.keys():
            raise UserError(
                f"{file} holds {', '.join(arrays) or 'nothing'}, and vLLM writes hidden_states and token_ids."
            )
        states, ids = arrays["hidden_states"], arrays["token_ids"]
        if states.ndim != 3 or ids.shape != states.shape[:1]:
            raise UserError(
                f"{file}: hidden_states are {tuple(states.shape)} and token_ids {tuple(ids.shape)}; (T, layers, D) and "
                "(T,) are what vLLM writes."
            )
        found.append((states, ids.long()))
    if not found:
        raise UserError(f"{path}: the folder holds no .safetensors.")
    widths = {tuple(states.shape[1:]) for states, _ in found}
    if len(widths) != 1:
        raise UserError(
            f"{path}: its files are of {', '.join(map(str, sorted(widths)))} (layers, units): of two models?"
        )
    if told.layers is None:
        raise UserError(
            f"{path}: vLLM's files do not say which layers they hold. Give layers, those of "
            'eagle_aux_hidden_state_layer_ids, or a file stream.json in the folder: {"layers": [0, 1, 2, 3]}.'
        )
    if len(told.layers) != next(iter(widths))[0]:
        raise UserError(f"{path}: {len(told.layers)} layers are declared and {next(iter(widths))[0]} are there.")
    names, numbers = _sublayers(("resid_pre",), told.layers)
    at = tuple(torch.arange(len(ids)) for _, ids in found)
    return Raw(tuple(s for s, _ in found), at, names, numbers, tuple(i for _, i in found), False, str(path))


def _hooks(cache: Any, told: Declared, where: str) -> Raw:
    """A TransformerLens ActivationCache: ``blocks.L.hook_resid_pre`` and ``hook_resid_mid``, ``(B, T, D)`` each."""
    arrays = getattr(cache, "cache_dict", cache)
    names = set(map(str, arrays))
    n_layers = 0
    while HOOK.format(n_layers, "resid_pre") in names:
        n_layers += 1
    if n_layers == 0:
        raise UserError(
            f"{where}: it has no {HOOK.format(0, 'resid_pre')}. Run the model with a cache of names that end in "
            "hook_resid_pre and hook_resid_mid."
        )
    beyond = [n for n in names if n.endswith("hook_resid_pre") and int(n.split(".")[1]) >= n_layers]
    if beyond:
        raise UserError(f"{where}: it has {sorted(beyond)[0]} and not {HOOK.format(n_layers, 'resid_pre')}.")
    sites = told.sites or tuple(s for s in SITES if all(HOOK.format(i, s) in names for i in range(n_layers)))
    if any(HOOK.format(i, site) not in names for i in range(n_layers) for site in sites):
        raise UserError(f"{where}: {', '.join(sites)} are declared, and not all are there for {n_layers} layers.")
    wanted = [_as_tensor(arrays[HOOK.format(i, site)], where) for i in range(n_layers) for site in sites]
    if len({tuple(t.shape) for t in wanted}) != 1 or wanted[0].ndim not in (2, 3):
        raise UserError(f"{where}: its states are of several shapes, and (B, T, D) each are taken.")
    x = torch.stack(wanted, dim=-2)
    x = x[None] if x.ndim == 3 else x
    return _padded_batch(x, *_sublayers(sites, range(n_layers)), told, where)


# -- what comes out ----------------------------------------------------------------------------------------------------


def _trajectories(raw: Raw, told: Declared, positions: str, *, certified: bool) -> Trajectories:
    take = slice(None) if positions == "all" else slice(-1, None)
    states, at = [x[take] for x in raw.states], [p[take] for p in raw.position]
    tensor = torch.cat(states)
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    notes = [] if "resid_mid" in raw.sites else [NO_MID]
    gaps = sorted(set(range(raw.layers[0], raw.layers[-1] + 1)) - set(raw.layers))
    if gaps or raw.layers[0]:
        notes.append(
            f"Not every layer is there (layers {', '.join(map(str, dict.fromkeys(raw.layers)))}): a step leads from "
            "one of "
            "them to the next, over what lies between."
        )
    if not certified:
        notes.append("Nothing compared this stream with the model that it is said to be from.")
    return Trajectories(
        tensor.contiguous(),
        sites=raw.sites,
        layers=raw.layers,
        sequence=torch.arange(len(states)).repeat_interleave(torch.tensor([len(x) for x in states])),
        position=torch.cat(at),
        texts=told.texts,
        groups=told.groups,
        label=told.label or "stream",
        tokens=raw.tokens,
        notes=tuple(notes),
    )
