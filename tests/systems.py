"""Dynamical systems with exact answers, in float64: streams ``(N, S, D)`` whose planes, rates and angles are known.

Nothing here is an estimate: where a sample is drawn, its empirical covariance is made exactly the one that is asked
for, so that tests need no statistical tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    """``k`` random orthonormal columns, ``(d, k)``."""
    return torch.linalg.qr(_normal(d, k, seed=seed)).Q


class Planted(NamedTuple):
    """A stream ``x`` ``(N, S, D)`` of known ``mean`` ``(D,)``, ``plane`` ``(D, K)`` and ``eigenvalues`` ``(D,)``.

    The eigenvalues are those of the covariance of all ``N S`` vectors, falling: ``variances + noise`` for the plane's
    columns, ``noise`` for the rest, so PCA with ``K`` components explains ``sum(eigenvalues[:K]) / sum(eigenvalues)``.
    """

    x: Tensor
    mean: Tensor
    plane: Tensor
    eigenvalues: Tensor


def planted_plane(
    n: int, s: int, d: int, variances: tuple[float, ...] = (9.0, 4.0), noise: float = 0.25, seed: int = 0
) -> Planted:
    """A low-rank stream in isotropic noise of variance ``noise``; needs ``n s > d``."""
    basis = orthonormal(d, d, seed)
    eigenvalues = torch.full((d,), noise, dtype=torch.float64)
    eigenvalues[: len(variances)] += torch.tensor(variances, dtype=torch.float64)
    sample = _normal(n * s, d, seed=seed + 1)
    white = torch.linalg.qr(sample - sample.mean(0)).Q * (n * s) ** 0.5  # mean 0 and covariance 1, exactly
    mean = 3 * _normal(d, seed=seed + 2)
    x = mean + (white * eigenvalues.sqrt()) @ basis.T
    return Planted(x.reshape(n, s, d), mean, basis[:, : len(variances)], eigenvalues)


def closed_curve(n: int, d: int, harmonics: int = 3, seed: int = 0) -> Tensor:
    """``n`` points ``(n, d)`` evenly along a closed curve with ``harmonics`` equal harmonics, of mean 0.

    One dimension, yet all ``2 harmonics`` principal components weigh the same: PCA with ``K`` of them explains exactly
    ``K / (2 harmonics)``, a curved map with a bottleneck of 2 everything.
    """
    angle = torch.arange(n, dtype=torch.float64) * (2 * torch.pi / n)
    waves = [f(j * angle) for j in range(1, harmonics + 1) for f in (torch.cos, torch.sin)]
    return torch.stack(waves, dim=1) @ orthonormal(d, 2 * harmonics, seed).T


def contraction(n: int, s: int, d: int, rate: float = 0.8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``h_{t+1} = p + rate (h_t - p)``; returns the stream and the fixed point ``p`` ``(D,)``.

    The distance to ``p``, and the speed, fall by ``rate`` a step; successive velocities are parallel.
    """
    point = _normal(d, seed=seed)
    start = _normal(n, 1, d, seed=seed + 1)
    return point + start * rate ** torch.arange(s, dtype=torch.float64)[:, None], point


def norm_growth(n: int, s: int, d: int, factor: float = 1.2, seed: int = 0) -> Tensor:
    """``h_{t+1} = factor h_t``: cosines are 1, the norm grows by ``factor`` and the speed is ``(factor - 1) |h_t|``."""
    return _normal(n, 1, d, seed=seed) * factor ** torch.arange(s, dtype=torch.float64)[:, None]


def rotation(n: int, s: int, d: int, angle: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A turn by ``angle`` a step in one plane about the origin; returns the stream and the plane ``(D, 2)``.

    Cosines are ``cos(angle)``, norms constant, the speed ``2 sin(angle / 2) |h|``; nothing leaves the plane.
    """
    plane = orthonormal(d, 2, seed)
    radius, phase = _normal(2, n, 1, seed=seed + 1)
    turn = phase + angle * torch.arange(s, dtype=torch.float64)
    return torch.stack([radius * turn.cos(), radius * turn.sin()], dim=-1) @ plane.T, plane


def random_walks(s: int, u: int, scale: Tensor | float = 1.0, seed: int = 0) -> Tensor:
    """``u`` plain walks ``(S, U)`` with independent normal steps; ``scale`` is a number, or ``(S - 1, 1)`` over depth.

    Nothing turns here that is not noise: 64 points make 10.95 rotations (standard deviation 1.7) all the same.
    """
    steps = _normal(s - 1, u, seed=seed) * scale
    return torch.cat([torch.zeros(1, u, dtype=torch.float64), steps.cumsum(0)])


def orbits(s: int, u: int, period: float, noise: float = 0.0, seed: int = 0) -> Tensor:
    """``u`` circles ``cos(2 pi s / period + phase)`` ``(S, U)`` with random phases, plus normal noise of that size."""
    phase = 2 * torch.pi * torch.rand(u, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = 2 * torch.pi / period * torch.arange(s, dtype=torch.float64)[:, None]
    return (turn + phase).cos() + noise * _normal(s, u, seed=seed + 1)
