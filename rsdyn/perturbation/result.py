"""What came of perturbed points, typed: table, words, figures, page and W&B are all made from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rsdyn.dynamics.recovery import mean_over_prompts, median_over_prompts
from rsdyn.dynamics.resampling import Interval
from rsdyn.perturbation.linear import LinearRange
from rsdyn.perturbation.said import Said

STILL, WRITES = "stays put", "random writes"
RANDOM, SWAPPED, FROZEN = "random directions", "swapped-in state", "attention frozen"
SCALARS = (
    *("plane_mse", "relative_put", "relative", "cosine_put", "cosine", "nearer", "nearer_absolute", "nearer_relative"),
    *("contraction", "absolute_rate", "relative_rate", "undefined", "kl"),
)
SHARES = ("nearer", "nearer_absolute", "nearer_relative", "undefined")
At = tuple[int, str]  # a layer of injection and what was put in there


@dataclass(frozen=True)
class Row:
    """One row of the closing table: what was put in at a layer, over ``prompts`` prompts.

    Shares are means, the rest medians.
    """

    layer: int
    condition: str
    prompts: int
    values: dict[str, Interval]

    def __getitem__(self, name: str) -> float:
        return float(self.values[name].value)

    def to_dict(self) -> dict[str, Any]:
        """For ``summary.json``: ``<name>``, and ``<name>_interval`` where the row is of several prompts."""
        row: dict[str, Any] = {"layer": self.layer, "condition": self.condition, "n_prompts": self.prompts}
        for name, found in self.values.items():
            row |= as_dict(name, found)
        return row


@dataclass(frozen=True)
class BeyondStill:
    """What points do at one layer beyond points that stay put: differences within each prompt, then over prompts.

    Attributes:
        nearer: share of the points that end nearer, less that share of points that stay put.
        contraction: the slope, less that of points that stay put.
        mse_ratio: the paper's MSE in the plane, over that of points that stay put.
        prompts: how many.
    """

    layer: int
    nearer: Interval
    contraction: Interval
    mse_ratio: Interval
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        names = ("nearer", "contraction", "mse_ratio")
        values = [as_dict(name, getattr(self, name)) for name in names]
        return {"layer": self.layer, "n_prompts": self.prompts} | values[0] | values[1] | values[2]


def as_dict(name: str, found: Interval) -> dict[str, Any]:
    """``{name: value}``, and its interval under ``<name>_interval`` where there is one."""
    out: dict[str, Any] = {name: float(found.value)}
    if found.low.isfinite() and found.high.isfinite():
        out[f"{name}_interval"] = [float(found.low), float(found.high)]
    return out


@dataclass
class Found:
    """What came of the points, by layer and condition.

    ``values`` are means over points and ``ends`` are of every point, an entry for each prompt that has the condition:
    ``prompts`` are their numbers, since a prompt may find no other state to swap in. ``of_points`` are the curves of
    every point of the first prompt, which the figures draw. What is given over prompts is over those that were
    ``drawn`` from the text, a sample of it; where none were, over all. Shares, and differences within a prompt, are
    means over prompts; what has a size is skewed over prompts, and medians are given.
    """

    kind: str
    n_prompts: int
    n_points: int
    sublayers: dict[int, int]
    drawn: tuple[int, ...] = ()
    prompts: dict[At, list[int]] = field(default_factory=dict)
    values: dict[At, dict[str, list[Tensor]]] = field(default_factory=dict)
    ends: dict[At, dict[str, list[Tensor]]] = field(default_factory=dict)
    of_points: dict[At, dict[str, Tensor]] = field(default_factory=dict)
    reference: Tensor | None = None
    alike: dict[int, int] = field(default_factory=dict)
    """How many trajectories have the first prompt's own state at a layer, and are not swapped in."""
    several: bool = False
    """Whether a sequence has several trajectories, one a token."""
    linear: dict[int, LinearRange] = field(default_factory=dict)
    """Of the first prompt, by layer: how far outside the linear range the points lie; none with position=all."""

    said: dict[int, Said] = field(default_factory=dict)
    """Of the first prompt, by layer: the likeliest token of some points at every sublayer from the injection on."""

    @property
    def sample(self) -> Sequence[int]:
        """The numbers of the prompts that means and intervals are over."""
        return self.drawn or range(self.n_prompts)

    def conditions(self, layer: int) -> list[str]:
        """What was done at a layer, the points first."""
        return [condition for at, condition in self.values if at == layer]

    def counted(self, layer: int, condition: str) -> list[int]:
        """The prompts of the sample that have a condition; where none of them has, all that have."""
        has = self.prompts[layer, condition]
        return [number for number in has if number in self.sample] or has

    def by_prompt(self, layer: int, condition: str, name: str) -> Tensor:
        """``(prompts, ...)`` of what is a mean over points: a row for each of the prompts that are counted."""
        of = dict(zip(self.prompts[layer, condition], self.values[layer, condition][name], strict=True))
        return torch.stack([of[number] for number in self.counted(layer, condition)]).to(torch.float64)

    def measured(self, layer: int, condition: str, name: str) -> Interval:
        """One number over prompts with its 95 % interval: the mean of shares, else the median; NaN ends of too few."""
        over = mean_over_prompts if name in SHARES else median_over_prompts
        return over(self.by_prompt(layer, condition, name))

    def of_prompt(self, layer: int, condition: str, name: str, number: int = 0) -> float:
        """One prompt's own mean over points; NaN where it does not have the condition."""
        has = self.prompts[layer, condition]
        return float(self.values[layer, condition][name][has.index(number)]) if number in has else float("nan")

    @cached_property
    def rows(self) -> list[Row]:
        """The closing table: one row per layer and condition."""
        return [
            Row(
                layer,
                condition,
                len(self.counted(layer, condition)),
                {name: self.measured(layer, condition, name) for name in SCALARS},
            )
            for layer in self.sublayers
            for condition in self.conditions(layer)
        ]

    @cached_property
    def beyond_still(self) -> list[BeyondStill]:
        """What the points do beyond standing still, layer by layer."""
        table = []
        for layer in self.sublayers:
            ours, still = (
                {name: self.by_prompt(layer, c, name) for name in ("nearer", "contraction", "plane_mse")}
                for c in (self.kind, STILL)
            )
            table.append(
                BeyondStill(
                    layer,
                    mean_over_prompts(ours["nearer"] - still["nearer"]),
                    mean_over_prompts(ours["contraction"] - still["contraction"]),
                    mean_over_prompts(ours["plane_mse"] / still["plane_mse"]),
                    len(ours["nearer"]),
                )
            )
        return table

    def arrays(self) -> dict[str, Any]:
        """Everything as arrays.

        Means ``(prompts, ...)``, ends of every point ``(prompts, points)``, and the curves of the first prompt's
        points. A prompt with fewer states to swap in has NaN for the points it lacks, and NaN all along where it has
        none.
        """
        out: dict[str, Any] = {}
        for at, values in self.values.items():
            for name, v in values.items():
                rows = self._of_every_prompt(at, v, torch.full_like(v[0], torch.nan))
                out[f"{_folder(at)}/{name}"] = torch.stack(rows).numpy()
        for at, ends in self.ends.items():
            for name, v in ends.items():
                rows = self._of_every_prompt(at, v, v[0][:0])
                padded = pad_sequence(rows, batch_first=True, padding_value=torch.nan)
                out[f"{_folder(at)}/ends_{name}"] = padded.numpy()
        for at, points in self.of_points.items():
            out |= {f"{_folder(at)}/points_{name}": v.numpy() for name, v in points.items()}
        for layer, said in self.said.items():
            out[f"layer{layer}/said_tokens"] = said.tokens.numpy()
            out[f"layer{layer}/said_reference"] = said.reference.numpy()
        out["sample"] = torch.tensor([*self.sample]).numpy()
        if self.reference is not None:
            out["reference"] = self.reference.numpy()
        return out

    def to_dict(self) -> dict[str, Any]:
        """What ``summary.json`` has of it."""
        return {
            "layers": [*self.sublayers],
            "n_prompts": self.n_prompts,
            "n_drawn": len(self.drawn),
            "n_points": self.n_points,
            "sequences_alike": self.alike,
            "linear_range": {
                str(layer): linear._asdict() | {"measured": self.of_prompt(layer, self.kind, "contraction")}
                for layer, linear in self.linear.items()
            },
            "said": {str(layer): {"back": said.back, "astray": said.astray} for layer, said in self.said.items()},
            "rows": [row.to_dict() for row in self.rows],
            "beyond_still": [beyond.to_dict() for beyond in self.beyond_still],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> Found:
        """What :meth:`arrays` gave, read back; numbers that no array has are those of ``summary.json``.

        Raises:
            KeyError: where an array is missing.
        """
        n = len(arrays["reference"])
        sample = [int(i) for i in arrays["sample"]] if "sample" in arrays else []
        drawn = tuple(sample) if summary.get("n_drawn") else ()
        found = cls(str(summary["kind"]), int(summary["n_prompts"]), int(summary["n_points"]), {}, drawn)
        found.reference = torch.from_numpy(np.asarray(arrays["reference"]))
        for row in summary["rows"]:
            at = int(row["layer"]), str(row["condition"])
            curves = np.asarray(arrays[f"{_folder(at)}/relative_curve"])
            found.sublayers[at[0]] = n - curves.shape[1]
            has = np.flatnonzero(~np.isnan(curves).all(1)) if len(curves) > 1 else np.arange(len(curves))
            found.prompts[at] = has.tolist()
            for name in (*SCALARS, "relative_curve", "cosine_curve"):
                if (key := f"{_folder(at)}/{name}") in arrays:
                    found.values.setdefault(at, {})[name] = [*torch.from_numpy(np.asarray(arrays[key])[has])]
            for name in ("relative", "cosine", "kl", "latents"):
                if (key := f"{_folder(at)}/points_{name}") in arrays:
                    found.of_points.setdefault(at, {})[name] = torch.from_numpy(np.asarray(arrays[key]))
        for layer in found.sublayers:
            if (key := f"layer{layer}/said_tokens") in arrays:
                own = arrays[f"layer{layer}/said_reference"]
                found.said[layer] = Said(*(torch.from_numpy(np.asarray(ids)) for ids in (arrays[key], own)))
        return found

    def _of_every_prompt(self, at: At, values: list[Tensor], none: Tensor) -> list[Tensor]:
        of = dict(zip(self.prompts[at], values, strict=True))
        return [of.get(number, none) for number in range(self.n_prompts)]


def _folder(at: At) -> str:
    layer, condition = at
    return f"layer{layer}/{condition.replace(' ', '_')}"
