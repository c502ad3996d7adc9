"""The weights of a language model before they are read: how many, are their files whole, do they fit into memory.

Nothing here reads a weight: counts come from the model built without memory (PyTorch's meta device), the state of the
files from their headers.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rsdyn.errors import UserError
from rsdyn.lm.head import class_with_head
from rsdyn.lm.model_lock import one_at_a_time

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as the headers call them
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the names that transformers looks for
# What a process needs beside the weights at the very least; the plan has the rest.
_MARGIN = 2**28
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def empty_model(config: Any, *, dtype: str = "float32", head: bool = False, trust_remote_code: bool = False) -> Any:
    """The model of a config on the meta device: all its shapes, none of its numbers; with ``head`` the causal LM."""
    from transformers import AutoModel

    kind: Any = class_with_head(config, trust_remote_code=trust_remote_code) if head else AutoModel
    config = copy.deepcopy(config)  # building a model writes into its config
    with one_at_a_time(), torch.device("meta"):
        return kind.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)


def n_parameters(model: nn.Module) -> int:
    """How many numbers a model's parameters hold; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


# --- files ------------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """The safetensors files of a model.

    Attributes:
        files: their paths.
        n_bytes: their size, headers included.
        dtype: the format of all of them, such as ``bfloat16``; None where there are several, or another kind.
        names: of the tensors in them.
    """

    files: tuple[Path, ...]
    n_bytes: int
    dtype: str | None
    names: frozenset[str]


def check_files(name: str, folder: Path) -> Stored:
    """See that a folder's weights are all there and whole, from their index and headers; ``UserError`` otherwise.

    Without this a shard that is missing or cut short shows after minutes of reading, and an index that names files
    outside of the folder would be followed.
    """
    if (folder / SINGLE).is_file():
        files: dict[str, list[str]] = {SINGLE: []}
    elif (folder / INDEX).is_file():
        files = _index(name, folder)
    elif any(folder.glob("*.safetensors")):
        raise UserError(
            f"name={name}: the folder has *.safetensors files, but neither {SINGLE} nor {INDEX}, which says what is "
            "in them. Copy or download the folder again, whole."
        )
    else:
        raise UserError(
            f"name={name}: the folder has no *.safetensors file, and other formats can run code when opened. Save "
            "the model with save_pretrained(), which writes safetensors."
        )
    kinds: set[str] = set()
    names: set[str] = set()
    for file, wanted in files.items():
        path = folder / file
        if not path.is_file():
            raise UserError(
                f"name={name}: {INDEX} names {file}, which is not in the folder. Copy or download it again."
            )
        try:
            with safe_open(path, framework="pt") as opened:  # compares the header with the file's size, reads no weight
                here = set(opened.keys())
                lacking = set(wanted) - here
                kinds |= {opened.get_slice(tensor).get_dtype() for tensor in here}
                names |= here
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"name={name}: {file} is damaged or cut short ({error}). Copy or download it again."
            ) from error
        if lacking:
            raise UserError(
                f"name={name}: {file} lacks {min(lacking)}, which {INDEX} says is in it. Copy or download the "
                "folder again."
            )
    paths = tuple(folder / file for file in files)
    dtype = _STORED.get(kinds.pop()) if len(kinds) == 1 else None
    return Stored(paths, sum(path.stat().st_size for path in paths), dtype, frozenset(names))


def _index(name: str, folder: Path) -> dict[str, list[str]]:
    """The shards that the index names, each with the tensors in it."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(tensor), str(file)) for tensor, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"name={name}: {INDEX} is not an index of weights ({type(error).__name__}). Copy or download it again."
        ) from error
    shards: dict[str, list[str]] = {}
    for tensor, file in entries:
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise UserError(
                f"name={name}: {INDEX} names {file!r}, which is no safetensors file of this folder, and nothing "
                "else is opened. Do not use this folder unless you know who made it."
            )
        shards.setdefault(file, []).append(tensor)
    if not shards:
        raise UserError(f"name={name}: {INDEX} names no weights. Copy or download it again.")
    return shards


def cached_folder(name: str, commit: str) -> Path | None:
    """The folder of a Hub model's commit in the local Hub cache, if its weights are in it."""
    from huggingface_hub import try_to_load_from_cache

    for file in (SINGLE, INDEX):
        found = try_to_load_from_cache(name, file, revision=commit)
        if isinstance(found, str):
            return Path(found).parent
    return None


# --- memory -----------------------------------------------------------------------------------------------------------


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be had on a device; on the CPU what the machine, and the cgroup this runs in, have left.

    What the operating system would give up for a program that asks (its file cache) counts as free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        words = Path("/proc/meminfo").read_text().split()
        free = 1024 * int(words[words.index("MemAvailable:") + 1])
    except (OSError, ValueError, IndexError):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_cgroups_left()])


def _cgroups_left() -> list[int]:
    """What each control group above this process leaves, versions 1 and 2 (containers, SLURM jobs)."""
    left = []
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # inside a container the path is the host's and the files lie at the root
        folders = [root / group.lstrip("/"), *(root / group.lstrip("/")).parents]
        for folder in (f for f in folders if f == root or root in f.parents):
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max", or not there
                continue
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left.append(most - used + cache)
    return left


def check_memory(
    name: str, parameters: int, *, dtype: str, device: torch.device | str = "cpu", processes: int = 1, cure: str = ""
) -> None:
    """Raise ``UserError`` when so many parameters do not fit into what memory is left, for each of some processes.

    ``cure`` is a further setting that would help.
    """
    needed, free = parameters * DTYPES[dtype].itemsize * processes, available_memory(device)
    if needed + _MARGIN <= free:
        return
    where = "this machine" if torch.device(device).type == "cpu" else f"device {device}"
    times = f" for each of {processes} processes" if processes > 1 else ""
    cures = []
    half = parameters * 2 * processes
    if DTYPES[dtype].itemsize > 2 and half + _MARGIN <= free:
        cures.append(f"dtype=bfloat16 ({half / 2**30:.1f} GiB)")
    if processes > 1 and needed // processes + _MARGIN <= free:
        cures.append(f"devices={max(1, free // (needed // processes + _MARGIN))}")
    cures += [cure] if cure else []
    cures.append("a smaller model, or a larger machine")
    raise UserError(
        f"name={name}: its {parameters:,} parameters take {needed / processes / 2**30:.1f} GiB in "
        f"{dtype}{times}, and {where} has {free / 2**30:.1f} GiB of memory free. What helps: {'; '.join(cures)}."
    )
