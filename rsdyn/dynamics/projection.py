"""Projections of the stream onto few dimensions and back.

One interface, so that whatever works in a plane found by PCA works in an autoencoder's latent space too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self, final

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from rsdyn.dynamics.moments import Covariance, covariance


class Projection(nn.Module, ABC):
    """A map of stream vectors ``(..., D)`` to latents ``(..., K)``, and back."""

    @abstractmethod
    def encode(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        """Latents ``(..., K)`` of vectors ``x`` ``(..., D)``; ``sublayer`` ``(...)`` where the projection needs it."""

    @abstractmethod
    def decode(self, z: Tensor, sublayer: Tensor | None = None) -> Tensor:
        """Vectors ``(..., D)`` of latents ``z`` ``(..., K)``."""

    def reconstruct(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        """``decode(encode(x))``, same shape as ``x``."""
        return self.decode(self.encode(x, sublayer), sublayer)


@final
class PCA(Projection):
    """Principal components of stream vectors about their global mean (paper 2.8, METHOD section 9).

    Args:
        mean: ``(D,)``.
        components: ``(D, K)``, orthonormal columns; the sign is fixed so that each column's largest loading is
            positive, and runs compare.
        variance: ``(K,)`` variance along each component.
        total_variance: the variance of all ``D`` dimensions together.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    total_variance: Tensor

    def __init__(self, mean: Tensor, components: Tensor, variance: Tensor, total_variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("variance", variance)
        self.register_buffer("total_variance", total_variance)

    @classmethod
    def fit(cls, x: Tensor, n_components: int = 2) -> Self:
        """PCA of the rows of ``x`` ``(N, D)``."""
        return cls.from_covariance(covariance(x), n_components)

    @classmethod
    def from_covariance(cls, state: Covariance, n_components: int = 2) -> Self:
        """PCA from an accumulated covariance; raises ``ValueError`` for more components than the data can have."""
        rank = min(state.mean.numel(), int(state.n) - 1)
        if not 1 <= n_components <= rank:
            raise ValueError(
                f"n_components={n_components}: {int(state.n)} vectors of {state.mean.numel()} units have between "
                f"1 and {rank} components; ask for fewer or give more vectors."
            )
        matrix = state.scatter / state.n
        values, vectors = _top_eigenpairs(matrix, n_components)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        return cls(state.mean, vectors, values, matrix.trace())

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the variance along each component, ``(K,)``."""
        return self.variance / self.total_variance

    def encode(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        return (x - self.mean.to(x.dtype)) @ self.components.to(x.dtype)

    def decode(self, z: Tensor, sublayer: Tensor | None = None) -> Tensor:
        return z @ self.components.to(z.dtype).T + self.mean.to(z.dtype)


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues ``(k,)`` of a covariance matrix, largest first, and their vectors ``(D, k)``."""
    width = matrix.shape[0]
    if width < 1024 and k <= width // 50 and matrix.device.type == "cpu":
        found, columns = eigh(matrix.numpy(), subset_by_index=[width - k, width - 1], driver="evr")
        values, vectors = torch.from_numpy(found), torch.from_numpy(columns)
        return values.flip(0).clamp(min=0), vectors.flip(1)
    if width < 1024 or k > width // 10:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:k].clamp(min=0), vectors.flip(1)[:, :k]
    # Lanczos for a few components of a wide matrix: as accurate, and ten times cheaper at D = 4096
    start = np.random.default_rng(0).standard_normal(width)  # ARPACK's own start differs from call to call
    found, columns = eigsh(matrix.cpu().numpy(), k=k, which="LA", v0=start)
    order = np.argsort(-found)
    values, vectors = torch.from_numpy(found[order].copy()), torch.from_numpy(columns[:, order].copy())
    return values.clamp(min=0).to(matrix.device), vectors.to(matrix.device)
