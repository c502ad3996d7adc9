"""``Trajectories``: what was recorded of a stream, in memory, with what is known of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.files import publish

if TYPE_CHECKING:
    import xarray

FORMAT = 1  # of the file that save() writes


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
        groups: a label of each sequence, where they have any.
        label: the model's name.
        certificate: how far what was recorded is from being a running sum, by identity; None where nothing checked it.
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
    groups: tuple[str, ...] | None = None
    label: str = "stream"
    certificate: dict[str, Any] | None = None
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
        for name in ("texts", "groups"):
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
            known.append(f"groups {', '.join(sorted(set(self.groups)))}")
        known.append("not certified" if self.certificate is None else "certified as a running sum")
        return f"Trajectories({n} × {s} × {d}, {dtype}: {'; '.join(known)})"

    # -- elsewhere -----------------------------------------------------------------------------------------------------

    def to_xarray(self) -> xarray.DataArray:
        """The tensor with its axes named, as an ``xarray.DataArray`` (bfloat16 becomes float32, which numpy has).

        Raises ``UserError`` where xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise UserError("to_xarray needs the package xarray: pip install xarray.") from error
        coordinates: dict[str, Any] = {
            "site": ("sublayer", list(self.sites)),
            "layer": ("sublayer", list(self.layers)),
            "sequence": ("trajectory", self.sequence.numpy()),
            "position": ("trajectory", self.position.numpy()),
        }
        if self.groups is not None:
            coordinates["group"] = ("trajectory", [self.groups[i] for i in self.sequence.tolist()])
        return xarray.DataArray(
            self._numpy(), dims=("trajectory", "sublayer", "unit"), coords=coordinates, name=self.label
        )

    def _numpy(self) -> np.ndarray:
        return (self.tensor.float() if self.tensor.dtype == torch.bfloat16 else self.tensor).numpy()

    def save(self, path: str | Path) -> Path:
        """Write everything but ``origin`` as one safetensors file, whole or not at all; gives its path."""
        from safetensors.torch import save

        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise UserError(f"path: {path.name} must end in .safetensors, which is the format that is written.")
        words = {
            "rsdyn_trajectories": FORMAT,
            "sites": self.sites,
            "layers": self.layers,
            "texts": self.texts,
            "groups": self.groups,
            "label": self.label,
            "certificate": self.certificate,
        }
        arrays = {"tensor": self.tensor.contiguous(), "sequence": self.sequence, "position": self.position}
        publish(path, [save(arrays, metadata={"rsdyn": json.dumps(words)})])
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read what :meth:`save` wrote. Raises ``UserError`` for another file, or one of a later format."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        try:
            with safe_open(path, "pt") as file:
                words = json.loads((file.metadata() or {}).get("rsdyn", "{}"))
                if words.get("rsdyn_trajectories") != FORMAT:
                    raise UserError(f"path: {path} was not written by Trajectories.save of format {FORMAT}.")
                arrays = {name: file.get_tensor(name) for name in ("tensor", "sequence", "position")}
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"path: {path} cannot be read as trajectories ({error}).") from error
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in words.items() if k in known}
        given |= arrays
        return cls(**given)
