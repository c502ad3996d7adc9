"""What a training of the autoencoder left, typed, for its panels and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pairs = tuple[tuple[float, float], ...]  # of epoch and value
VIEWS = {"own": "ev_{}", "global": "ev_global_{}", "raw": "ev_{}_raw", "raw_global": "ev_global_{}_raw"}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained autoencoder on the test split, beside PCA with as many components. ``S`` sublayers, ``K`` latents.

    Attributes:
        widths: of the encoder, from the units to the latents.
        standardise: ``cae.standardise``.
        n_sublayers, sites: of the stream; ``sites`` is None where nobody knows.
        n_test: test sequences.
        latents: ``(S, K)`` the mean path.
        samples: ``(n, S, K)`` single sequences, ``sequences`` their numbers.
        distance, distance_std: ``(S - 1,)`` between successive latents, over sequences.
        explained: ``(autoencoder, PCA)``, ``(S,)`` each, by ``VIEWS``: 1 - SSE/SST in the space of the loss and in raw
            activations, about each sublayer's own mean and about the global one.
        train, val: losses by epoch; ``best_epoch`` is the one whose weights were tested.
        fill: how many dimensions the latents fill (participation ratio); None where it was not measured.
    """

    widths: tuple[int, ...]
    standardise: str
    n_sublayers: int
    sites: int | None
    n_test: int
    latents: Tensor
    samples: Tensor
    sequences: tuple[int, ...]
    distance: Tensor
    distance_std: Tensor
    explained: dict[str, tuple[Tensor, Tensor]]
    train: Pairs
    val: Pairs
    best_epoch: float | None = None
    fill: float | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, Any], summary: Mapping[str, Any]) -> Trained:
        """From the arrays of a run, as they are or from ``results.npz``, and its ``summary.json``.

        Raises:
            KeyError: where an array is missing.
        """
        test = summary["test"]
        views = {view: tuple(_tensor(arrays[form.format(of)]) for of in ("cae", "pca"))
                 for view, form in VIEWS.items() if form.format("cae") in arrays}  # fmt: skip
        samples = _tensor(arrays["latent_samples"])
        known = arrays["latent_sample_sequences"] if "latent_sample_sequences" in arrays else range(len(samples))
        fill = test.get("latent_participation")
        return cls(
            widths=tuple(int(w) for w in summary["widths"]),
            standardise=str(summary.get("standardise", "none")),
            n_sublayers=int(summary["n_sublayers"]),
            sites=summary.get("sites_per_layer"),
            n_test=int(test["n_test_sequences"]),
            latents=_tensor(arrays["mean_latents"]),
            samples=samples,
            sequences=tuple(int(i) for i in known),
            distance=_tensor(arrays["latent_distance"]),
            distance_std=_tensor(arrays["latent_distance_std"]),
            explained=views,  # type: ignore[arg-type]
            train=_pairs(summary["history"]["train"]),
            val=_pairs(summary["history"]["val"]),
            best_epoch=summary.get("best_epoch"),
            fill=None if fill is None else float(fill),
        )


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", torch.float64)


def _pairs(values: Sequence[Sequence[float | None]]) -> Pairs:
    return tuple((float(e or 0.0), float("nan") if v is None else float(v)) for e, v in values)
