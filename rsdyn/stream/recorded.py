"""``Trajectories``: what was recorded of a stream, in memory, with what is known of it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.files import publish
from rsdyn.stream.text.sequence_labels import labels_from

if TYPE_CHECKING:
    import xarray

FORMAT = 2  # of the file that save() writes; 1 had no tokens, notes and digests of its rows


@dataclass(frozen=True, eq=False, repr=False)
class Trajectories:
    """The residual stream of some tokens as trajectories over depth.

    Attributes:
        tensor: ``(N, S, D)``, in the order of the sequences.
        sites: ``S`` names, such as ``resid_pre`` and ``resid_mid`` in turn.
        layers: ``S`` numbers, the layer that each sublayer is in.
        sequence: ``(N,)`` int64, the number of each trajectory's sequence.
        position: ``(N,)`` int64, which token of its sequence each is; the first is 0.
        texts: one of each sequence, where it was given as text.
        groups: a label of each sequence, where they have any; None is no label.
        label: the model's name.
        certificate: how far what was recorded is from being a running sum, by identity; None where nothing checked it.
        tokens: the token ids of each sequence, int64, where they are known.
        notes: what a reader of any result must know, in sentences.
        origin: the model and the tokens that this was recorded from, for controls; not saved, None after loading.

    ``len(x)`` is ``N``. ``x[i]`` is one trajectory ``(S, D)``; a slice, a list of numbers or a mask gives those
    trajectories, with all that is known of them.
    """

    tensor: Tensor
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    sequence: Tensor
    position: Tensor
    texts: tuple[str, ...] | None = None
    groups: tuple[str | None, ...] | None = None
    label: str = "stream"
    certificate: dict[str, Any] | None = None
    tokens: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = ()
    origin: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.tensor.ndim != 3:
            raise UserError(
                f"tensor: it has the shape {tuple(self.tensor.shape)}, and trajectories are (N, S, D): which one, "
                "sublayer, unit."
            )
        n, s, _ = self.tensor.shape
        for name, wanted in (("sites", s), ("layers", s), ("sequence", n), ("position", n)):
            if len(getattr(self, name)) != wanted:
                raise UserError(
                    f"{name}: {len(getattr(self, name))} of them for a tensor of {n} trajectories of {s} sublayers; "
                    f"give {wanted}."
                )
        for name in ("texts", "groups", "tokens"):
            given = getattr(self, name)
            if given is not None and n and len(given) <= int(self.sequence.max()):
                raise UserError(
                    f"{name}: {len(given)} of them, and there is a sequence {int(self.sequence.max())} (counted from "
                    "0). Give one of each sequence."
                )

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def shape(self) -> torch.Size:
        """``(N, S, D)``."""
        return self.tensor.shape

    @property
    def sites_per_layer(self) -> int:
        """How many sublayers of each layer are there: 2, or 1 where attention and MLP are added at once."""
        return len(dict.fromkeys(self.sites))

    def __getitem__(self, which: int | slice | Sequence[int] | np.ndarray | Tensor) -> Any:
        if isinstance(which, (int, np.integer)):
            return self.tensor[int(which)]
        if isinstance(which, slice):
            rows = torch.arange(len(self))[which]
        else:
            rows = torch.as_tensor(which)
            rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return replace(self, tensor=self.tensor[rows], sequence=self.sequence[rows], position=self.position[rows])

    def __repr__(self) -> str:
        n, s, d = self.tensor.shape
        sequences = len(self.sequence.unique())
        which = "1 token of each" if sequences == n else f"{n} tokens"
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        known = [f"{self.label}, {len(set(self.layers))} layers × ({', '.join(dict.fromkeys(self.sites))})"]
        known.append(f"{which} of {sequences} sequences" if sequences != n else f"{which} of {n} sequences")
        if self.groups is not None:
            known.append(f"groups {labels_from(self.groups).taken(self.sequence.unique().numpy()).words()}")
        known.append("not certified" if self.certificate is None else "certified as a running sum")
        return f"Trajectories({n} × {s} × {d}, {dtype}: {'; '.join(known)})"

    def digest(self) -> str:
        """Hex digest of the states, their sequences and positions."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(_row_digests(self).tobytes())

    # -- elsewhere -----------------------------------------------------------------------------------------------------

    def to_xarray(self) -> xarray.DataArray:
        """The tensor with its axes named, as an ``xarray.DataArray`` (bfloat16 becomes float32, which numpy has).

        Raises ``UserError`` where xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise UserError("to_xarray needs the package xarray: pip install xarray.") from error
        words = {**self._words(), "dtype": str(self.tensor.dtype).removeprefix("torch.")}
        if self.tokens is not None:
            words["tokens"] = [ids.tolist() for ids in self.tokens]
        coordinates: dict[str, Any] = {
            "site": ("sublayer", list(self.sites)),
            "layer": ("sublayer", list(self.layers)),
            "sequence": ("trajectory", self.sequence.numpy()),
            "position": ("trajectory", self.position.numpy()),
        }
        if self.groups is not None:
            coordinates["group"] = ("trajectory", [self.groups[i] or "" for i in self.sequence.tolist()])
        return xarray.DataArray(
            self._numpy(),
            dims=("trajectory", "sublayer", "unit"),
            coords=coordinates,
            name=self.label,
            attrs={"rsdyn": json.dumps(words)},
        )

    def to_dsa(self) -> list[np.ndarray]:
        """The trajectories as ``(trials, time, dim)``, an array for each group, or one: what DSA compares.

        Time is depth. The groups come in the order of their names (:attr:`groups`), without the sequences of none; see
        ``DSA(X, Y)`` of the package ``dsa-metric`` (Ostrow et al. 2023, arXiv 2306.10168), which takes such a list.
        """
        x = self._numpy()
        if self.groups is None:
            return [x]
        labels = labels_from(self.groups)
        code = labels.code[self.sequence.numpy()]
        return [x[code == group] for group in range(len(labels.names)) if (code == group).any()]

    def _numpy(self) -> np.ndarray:
        return (self.tensor.float() if self.tensor.dtype == torch.bfloat16 else self.tensor).numpy()

    def _words(self) -> dict[str, Any]:
        return {
            "rsdyn_trajectories": FORMAT,
            "sites": self.sites,
            "layers": self.layers,
            "texts": self.texts,
            "groups": self.groups,
            "label": self.label,
            "certificate": self.certificate,
            "notes": self.notes,
        }

    def save(self, path: str | Path) -> Path:
        """Write everything but ``origin`` as one ``.safetensors`` or ``.npz``, whole or not at all; gives its path.

        In ``.npz`` bfloat16, which numpy lacks, is written as its 16 bits; the file says so.
        """
        path = Path(path).expanduser()
        if path.suffix not in SUFFIXES:
            raise UserError(f"path: {path.name} must end in {' or '.join(SUFFIXES)}, the formats that are written.")
        tensor = self.tensor.contiguous()
        arrays = {"tensor": tensor, "sequence": self.sequence, "position": self.position}
        if self.tokens is not None:
            arrays["token_ids"] = torch.cat([ids.long() for ids in self.tokens])
            arrays["token_counts"] = torch.tensor([len(ids) for ids in self.tokens])
        arrays["row_digests"] = torch.from_numpy(_row_digests(self).view(np.int64))
        words = self._words()
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            publish(path, [save(arrays, metadata={"rsdyn": json.dumps(words)})])
            return path
        words["dtype"] = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.bfloat16:
            arrays["tensor"] = tensor.view(torch.int16)
        file = io.BytesIO()
        np.savez(file, rsdyn=np.array(json.dumps(words)), **{k: v.numpy() for k, v in arrays.items()})  # type: ignore[arg-type]
        publish(path, [file.getvalue()])
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read what :meth:`save` wrote.

        Raises ``UserError`` for another file, one of a later format, and one whose rows are not, or do not stand, as
        they were written.
        """
        path = Path(path).expanduser()
        found = read_saved(path)
        if found is None:
            raise UserError(f"path: {path} was not written by Trajectories.save. rsdyn.load reads others' files.")
        words, arrays = found
        return cls._of(words, arrays, str(path))

    @classmethod
    def _of(cls, words: dict[str, Any], arrays: dict[str, Tensor], name: str) -> Trajectories:
        """Trajectories of what a file or a DataArray holds; ``name`` is what messages call it."""
        if words.get("rsdyn_trajectories") not in (1, FORMAT):
            raise UserError(
                f"path: {name} has format {words.get('rsdyn_trajectories')}, this rsdyn reads format {FORMAT}."
            )
        known = {f.name for f in fields(cls)} - {"tokens"}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in words.items() if k in known}
        given |= {k: arrays[k] for k in ("tensor", "sequence", "position")}
        if "token_ids" in arrays:
            given["tokens"] = arrays["token_ids"].split(arrays["token_counts"].tolist())
        x = cls(**given)
        if "row_digests" in arrays:
            written, here = arrays["row_digests"].numpy().view(np.uint64), _row_digests(x)
            if not np.array_equal(written, here):
                row = int(np.flatnonzero(written != here)[0]) if len(written) == len(here) else 0
                shuffled = np.array_equal(np.sort(written), np.sort(here))
                what = (
                    "its rows are in another order than they were written in, so they do not belong to their sequences"
                    if shuffled
                    else f"trajectory {row} is not the one that was written"
                )
                raise UserError(f"path: {name}: {what}. Write it again.")
        return x


SUFFIXES = (".safetensors", ".npz")


def read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What :meth:`Trajectories.save` wrote: words and arrays; None where a file is of others.

    Raises ``UserError`` where it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npz":
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                if "rsdyn" not in file.files:
                    return None
                words = json.loads(str(file["rsdyn"]))
                arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "rsdyn"}
            if words.get("dtype") == "bfloat16":
                arrays["tensor"] = arrays["tensor"].view(torch.bfloat16)
            return words, arrays
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {}).get("rsdyn", "{}"))
            if "rsdyn_trajectories" not in words:
                return None
            return words, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except FileNotFoundError as error:
        raise UserError(f"path: {path}: no such file.") from error
    except (OSError, SafetensorError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"path: {path} cannot be read as trajectories ({error}).") from error


def _row_digests(x: Trajectories) -> np.ndarray:
    """A digest of each trajectory with its sequence and position, uint64 ``(N,)``."""
    import xxhash

    rows = x.tensor.contiguous().view(torch.uint8).numpy()
    places = np.stack([x.sequence.numpy(), x.position.numpy()], axis=1).astype("<i8")
    seeds = [xxhash.xxh3_64_intdigest(place.tobytes()) for place in places]
    return np.array([xxhash.xxh3_64_intdigest(r.data, seed) for r, seed in zip(rows, seeds, strict=True)], np.uint64)
