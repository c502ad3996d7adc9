"""The plane that points are chosen in: of the text's stream, or of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.dynamics.moments import massive_units
from rsdyn.dynamics.projection import PCA, Projection
from rsdyn.errors import UserError
from rsdyn.perturbation.settings import PerturbConfig
from rsdyn.perturbation.states import grid_ranges
from rsdyn.stream.trajectories import TrajectoryStream

OWNED = 0.5  # share of a component's squared loadings from which its massive units are said to own it


class Recorded(NamedTuple):
    """Trajectories of a stream.

    Attributes:
        x: ``(N, S, D)``, in the cache's dtype.
        sequence: ``(N,)`` int64, the number of each one's sequence in the text.
        swappable: ``(N,)`` boolean, whose states may be swapped in; None for all.
    """

    x: Tensor
    sequence: Tensor
    swappable: Tensor | None = None

    def of_group(self, members: np.ndarray, words: str) -> Recorded:
        """The same, of which the states of ``members`` ``(sequences,)`` alone are swapped in.

        Raises ``UserError``, which begins with ``words``, where none of them was recorded.
        """
        swappable = torch.from_numpy(members)[self.sequence]
        if not swappable.any():
            n = len(self.sequence.unique())
            raise UserError(
                f"{words}: none of the first {n} sequences, whose states are there to be swapped in, is of that group. "
                "Take more (`samples`, `limit`)."
            )
        return self._replace(swappable=swappable)


def read_trajectories(stream: TrajectoryStream, samples: int, done: Callable[[int], object]) -> Recorded:
    """The trajectories of the first ``samples`` sequences of a stream, recorded where they are missing."""
    parts, numbers = [], []
    for k in range(stream.shards_of(samples)):
        shard = stream.shard(k)
        parts.append(shard.activations)
        numbers.append(shard.index)
        done(1)
    stream.release_lm()
    n = stream.n_trajectories(0, samples)
    return Recorded(torch.cat(parts)[:n], torch.cat(numbers)[:n])


class Plane(NamedTuple):
    """The projection that points are chosen in.

    Attributes:
        projection: PCA or an autoencoder.
        ranges: ``(2, 2)``, of the grid.
        ratio: ``(2,)`` share of the variance along each component; None for an autoencoder.
        name: what its axes are called.
        massive: the massive units of the stream (|mean| above 100 times the median at some sublayer).
        owned: ``(2,)`` share of each component's squared loadings that the massive units hold; None for an autoencoder.
    """

    projection: Projection
    ranges: Tensor
    ratio: Tensor | None
    name: str
    massive: tuple[int, ...] = ()
    owned: Tensor | None = None

    def words(self) -> list[str]:
        """Whose plane it is, where massive units own it."""
        if self.owned is None or self.ratio is None or float(self.owned.max()) < OWNED:
            return []
        shares = " and ".join(
            f"{100 * float(share):.0f} % of {self.name} {i + 1}" for i, share in enumerate(self.owned)
        )
        units = f"unit {self.massive[0]}" if len(self.massive) == 1 else f"units {', '.join(map(str, self.massive))}"
        of = " and ".join(f"{100 * float(share):.0f} %" for share in self.ratio)
        return [
            f"Massive {units} (|mean| above 100 times the median) hold {shares}, which have {of} of the variance: "
            "the plane is theirs, and what points do in it is what these units do."
        ]


def open_autoencoder(settings: PerturbConfig, n_units: int) -> CompressingAutoencoder | None:
    """The autoencoder that the settings name, or None; ``UserError`` for one that does not fit the stream."""
    if settings.checkpoint is None:
        return None
    cae = CompressingAutoencoder.from_checkpoint(settings.checkpoint).eval()
    if cae.widths[0] != n_units:
        raise UserError(
            f"checkpoint={settings.checkpoint}: the autoencoder takes {cae.widths[0]} units and this "
            f"model's stream has {n_units}. Take one that was trained on this model."
        )
    if cae.widths[-1] != 2 and settings.kind == "teleport":
        raise UserError(
            f"checkpoint={settings.checkpoint}: the autoencoder has {cae.widths[-1]} latents, and a grid "
            "needs 2. Take one with bottleneck=2."
        )
    return cae


def find_plane(settings: PerturbConfig, trajectories: Tensor, autoencoder: CompressingAutoencoder | None) -> Plane:
    """The plane of an autoencoder, or that of PCA with two components of the stream's vectors ``(N, S, D)``.

    Raises ``UserError`` where the vectors are too few, or too much alike, for a plane.
    """
    n, s, n_units = trajectories.shape
    if autoencoder is None:
        if n * s < 3:
            raise UserError(
                f"limit: {n} sequence{'s' * (n > 1)} of {s} sublayer{'s' * (s > 1)} give {n * s} vectors, and two "
                "components need 3 at least. Give more text (`limit`, `samples`)."
            )
        pca = PCA.fit(trajectories.reshape(-1, n_units), 2)
        mean = sum(part.to(torch.float64).sum(0) for part in trajectories.split(256)) / n
        massive = massive_units(torch.as_tensor(mean))
        owned = pca.components[massive].square().sum(0)
        which = tuple(massive.nonzero().flatten().tolist())
        plane = Plane(pca, torch.zeros(2, 2), pca.explained_variance_ratio, "PC", which, owned)
    else:
        plane = Plane(autoencoder, torch.zeros(2, 2), None, "latent")
    if settings.grid.range is not None:
        return plane._replace(ranges=torch.tensor(settings.grid.range).reshape(2, 2))
    if settings.kind != "teleport":
        return plane  # no grid is made
    latents = torch.cat([encode(plane.projection, part) for part in trajectories.split(100)])
    try:
        return plane._replace(ranges=grid_ranges(latents))
    except ValueError as error:
        raise UserError(
            "data: the recorded states are all alike, or not finite, along one axis of the plane, so that it has no "
            "range for a grid. Give other text, or grid.range=[min1,max1,min2,max2]."
        ) from error


@torch.no_grad()
def encode(projection: Projection, x: Tensor, first_sublayer: int = 0) -> Tensor:
    """Latents ``(..., S', K)`` of trajectories ``(..., S', D)`` that begin at ``first_sublayer``."""
    sublayer = torch.arange(first_sublayer, first_sublayer + x.shape[-2], device=x.device).expand(x.shape[:-1])
    return projection.encode(x.to(torch.float32), sublayer)
