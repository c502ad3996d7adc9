"""How many dimensions each sublayer's activations fill (paper 3.3; METHOD section 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    """Activations ``(N, U)`` of one sublayer about their mean, float32; zero for a unit that is not finite."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    x = (x - x.mean(0, dtype=torch.float64)).to(torch.float32)
    return torch.where(x.isfinite().all(0), x, 0.0)


def spectrum(x: Tensor) -> Tensor:
    """Variances along the principal components of centred ``x`` ``(N, U)``: ``(min(N, U),)`` float64, largest first.

    ``x xᵀ`` and ``xᵀ x`` have the same eigenvalues but for zeros, so the smaller of the two is taken.
    """
    product = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(product).flip(0).clamp(min=0).to(torch.float64) / len(x)


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


def participation_of(x: Tensor, chosen: Tensor) -> Tensor:
    """Participation ratio of some rows of centred ``x`` ``(N, U)``, for each choice ``(M, N)`` of them, ``(M,)``.

    ``chosen`` is boolean. The trace and the sum of squares of the rows' products, centred anew, give it without any
    eigenvalues; all choices come from the same products, in float64.
    """
    products, weights = (x @ x.T).to(torch.float64), chosen.to(torch.float64)
    n = weights.sum(1)
    of_row = weights @ products  # (M, N), of each row with the chosen ones
    within = (of_row * weights).sum(1) / n.square()  # the mean product of two chosen rows
    trace = weights @ products.diagonal() - n * within
    squares = ((weights @ products.square()) * weights).sum(1)
    sides = ((of_row / n[:, None]).square() * weights).sum(1)
    return trace.square() / (squares - 2 * n * sides + n.square() * within.square())


def spectra_of_rows(x: Tensor, chosen: Tensor) -> Tensor:
    """:func:`spectrum` of some rows of centred ``x`` ``(N, U)``, centred anew, for each choice ``(M, N)`` of them.

    ``chosen`` is boolean. ``(M, min(N, U))``, filled up with zeros where a choice has fewer components. Where rows are
    few, all choices come from the same products, in float64 until their own mean is out.
    """
    out = x.new_zeros(len(chosen), min(x.shape), dtype=torch.float64)
    products = (x @ x.T).to(torch.float64) if len(x) <= x.shape[1] else None
    for found, rows in zip(out, chosen, strict=True):
        if products is None:
            variances = spectrum(x[rows] - x[rows].mean(0))
        else:
            part = products[rows][:, rows]
            part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
            variances = torch.linalg.eigvalsh(part.to(x.dtype)).flip(0).clamp(min=0).to(torch.float64) / len(part)
        found[: len(variances)] = variances
    return out


def spectra_without_largest(x: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """:func:`spectrum` of centred ``x`` ``(N, U)`` without the first ``counts`` units of ``order`` (METHOD 0.10).

    ``(C, min(N, U))``, one row per count, filled up with zeros. The products of the other units are taken once, and
    those of the units in ``order`` added from the last one up.
    """
    out = x.new_zeros(len(counts), min(x.shape), dtype=torch.float64)
    if x.shape[1] < len(x):
        product = (x.T @ x).to(torch.float64)
        for found, count in zip(out, counts, strict=True):
            stays = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
            stays[order[:count]] = False
            values = torch.linalg.eigvalsh(product[stays][:, stays].to(x.dtype)).flip(0).clamp(min=0)
            found[: len(values)] = values.to(torch.float64) / len(x)
        return out
    rest = x.index_fill(1, order, 0)
    product = (rest @ rest.T).to(torch.float64)
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        some = x[:, order[counts[i] :]].to(torch.float64)
        values = torch.linalg.eigvalsh((product + some @ some.T).to(x.dtype)).flip(0).clamp(min=0)
        out[i] = values.to(torch.float64) / len(x)
    return out
