"""How many dimensions each sublayer's activations fill (paper 3.3; METHOD section 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from rsdyn.dynamics.parallel import side_by_side


def gram(trajectories: Tensor, sublayers: list[int] | None = None) -> Tensor:
    """Products between sequences of their centred activations at each sublayer: ``(N, S, U)`` to ``(S, N, N)`` float32.

    The Gram matrices of two sets of units add up to that of both together, so units can be shared out over processes.
    A unit that is not finite at a sublayer is left out there.
    """

    def one(s: int) -> Tensor:
        x = trajectories[:, s].to(torch.float64 if trajectories.dtype == torch.float64 else torch.float32)
        x = (x - x.mean(0, dtype=torch.float64)).to(torch.float32)
        x = torch.where(x.isfinite().all(0), x, 0.0)
        return x @ x.T

    wanted = range(trajectories.shape[1]) if sublayers is None else sublayers
    return torch.stack(list(side_by_side(one, wanted, trajectories.device)))


def spectra(grams: Tensor) -> Tensor:
    """Variances along each sublayer's own principal components, ``(S, N, N)`` to ``(S, N)``, largest first.

    The nonzero eigenvalues of the Gram matrix are those of the scatter matrix, and N x N is the smaller problem for a
    wide stream.
    """

    def one(s: int) -> Tensor:
        return torch.linalg.eigvalsh(grams[s]).flip(0).clamp(min=0).to(torch.float64)

    return torch.stack(list(side_by_side(one, range(len(grams)), grams.device))) / grams.shape[-1]


def components_for(variances: Tensor, share: float = 0.9) -> Tensor:
    """How many of the largest variances ``(..., K)`` make up ``share`` of their sum: ``(...)``, NaN where it is 0."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1: give the share of variance to reach.")
    total = variances.sum(-1, keepdim=True)
    reached = variances.cumsum(-1) >= share * total * (1 - 1e-12)
    count = reached.to(torch.float64).argmax(-1).to(torch.float64) + 1
    return torch.where(total.squeeze(-1) > 0, count, torch.nan)


def participation(variances: Tensor) -> Tensor:
    """Participation ratio ``(sum v)^2 / sum v^2`` of variances ``(..., K)``: 1 for a line, K for a ball."""
    return variances.sum(-1).square() / variances.square().sum(-1)


def participation_of_gram(grams: Tensor, rows: Tensor) -> Tensor:
    """Participation ratio of some of the sequences, from Gram matrices ``(S, N, N)`` of all: ``(S,)`` float64.

    The trace and the sum of squares of the re-centred part give it without any eigenvalues.
    """

    def one(s: int) -> Tensor:
        g = grams[s][rows][:, rows].to(torch.float64)
        side = g.mean(0)
        g = g - side - side[:, None] + side.mean()
        return g.trace().square() / g.square().sum()

    return torch.stack(list(side_by_side(one, range(len(grams)), grams.device)))
