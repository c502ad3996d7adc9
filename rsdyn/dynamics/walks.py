"""A random walk with the stream's steps: what a plane of PCA shows of trajectories that have no dynamics.

The first two principal components of any smooth walk in many dimensions trace a smooth curve (Antognini and
Sohl-Dickstein 2018, "PCA of high dimensional random walks": Lissajous curves), so a curved trajectory needs this
beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothed_random_walks(common: Tensor, own: Tensor, *, n: int, d: int, smooth: float = 2.0, seed: int = 0) -> Tensor:
    """Random walks of ``n`` sequences in ``d`` dimensions over ``S`` sublayers, ``(n, S, d)`` float32.

    Each step is a random direction that all sequences share, of length ``common`` ``(S - 1,)``, and one of its own, of
    length ``own`` ``(S - 1,)`` (root mean square): set them to the length of the stream's mean step and to the spread
    of its steps about that mean. The walks start at a spread of ``own[0]`` and are smoothed over depth by a Gaussian
    of ``smooth`` sublayers. Their geometry does not depend on ``d`` once that is well above ``S``.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(common)
    shared = torch.randn(steps, d, generator=generator)
    shared *= common.to(torch.float32).cpu()[:, None] / shared.norm(dim=1, keepdim=True)
    scale = own.to(torch.float32).cpu() / d**0.5
    single = torch.randn(n, steps, d, generator=generator) * scale[:, None]
    start = torch.randn(n, 1, d, generator=generator) * scale[0]
    walks = torch.cat([start, start + (shared + single).cumsum(1)], dim=1)
    if smooth <= 0:
        return walks
    at = torch.arange(steps + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * ((at[:, None] - at) / smooth) ** 2)
    return torch.einsum("st,ntd->nsd", kernel / kernel.sum(1, keepdim=True), walks)
