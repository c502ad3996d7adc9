"""How alike two sets of states are, whatever basis each is written in: debiased centred kernel alignment.

Linear CKA (Kornblith et al. 2019) of few samples in many units is near 1 for unrelated states. The debiased one puts
the unbiased estimator of HSIC (Song et al. 2012, equation 5) in its three places: its expectation is 0 where the states
are independent, and it can be a little below 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 4  # the unbiased estimator divides by n - 3
_BLOCK = 1 << 15


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA of two sets of states of the same ``N`` samples; a scalar, float64.

    Args:
        x: ``(N, D)``.
        y: ``(N, E)``, row by row of the same samples.

    Returns:
        1 for copies that are rotated, shifted or scaled, 0 in expectation for independent states; NaN where either is
        constant. The expectation over sequences is that of a sample: no bias from ``N`` or ``D`` is left.

    Raises:
        ValueError: for other shapes, numbers of samples that differ, or fewer than four.
    """
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: give (N, D), samples by units.")
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y {len(y)}: they must be the same samples, row by row.")
    a, b = centred_gram(x), centred_gram(y)
    return _aligned((a * b).sum(), (a * a).sum(), (b * b).sum())


def cka_map(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Debiased linear CKA between all sublayers, ``(S, S)``, or of one stream's with another's, ``(S, S')``; float64.

    Each sublayer's Gram matrix is made once, and all pairs come from one product.

    Args:
        x: ``(N, S, D)``.
        y: ``(N, S', E)`` of the same samples, such as another model's; default ``x`` itself.

    Raises:
        ValueError: as :func:`cka`.
    """
    for name, value in (("x", x), ("y", x if y is None else y)):
        if value.ndim != 3:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: give (N, S, D), samples by sublayers by units.")
    if y is not None and len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y {len(y)}: they must be the same samples, row by row.")
    a = _flat_grams(x)
    b = a if y is None else _flat_grams(y)
    products = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_BLOCK, dim=1), b.split(_BLOCK, dim=1), strict=True):
        products += left @ right.T  # float32 products, summed in float64
    of_a, of_b = (f.square().sum(1, dtype=torch.float64) for f in (a, b))
    return _aligned(products, of_a[:, None], of_b[None, :])


def centred_gram(x: Tensor) -> Tensor:
    """The Gram matrix of states ``(N, D)`` without its diagonal, centred so that products of two are unbiased.

    ``(N, N)`` float64. Each entry loses its row's and column's sums over ``N - 2`` and gains the whole sum over
    ``(N - 1)(N - 2)``; the mean product of two such matrices over ``N (N - 3)`` is the unbiased HSIC.
    """
    n = len(x)
    if n < LEAST:
        raise ValueError(f"x has {n} samples: the debiased estimator needs at least {LEAST}.")
    x = x.to(torch.float64)
    x = x - x.mean(0)
    gram = (x @ x.T).fill_diagonal_(0)
    rows = gram.sum(0)
    gram -= (rows[:, None] + rows[None, :]) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


def _flat_grams(x: Tensor) -> Tensor:
    """The upper triangles of the sublayers' :func:`centred_gram`, of unit length: ``(S, N (N - 1) / 2)`` float32."""
    n, s, _ = x.shape
    above = torch.triu_indices(n, n, 1, device=x.device)
    out = torch.empty(s, above.shape[1], dtype=torch.float32, device=x.device)
    for k in range(s):
        found = centred_gram(x[:, k])[above[0], above[1]]
        size = found.norm()
        out[k] = (found / torch.where(size > 0, size, torch.nan)).to(torch.float32)
    return out


def _aligned(product: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    sizes = (of_x * of_y).sqrt()
    return product.to(torch.float64) / torch.where(sizes > 0, sizes, torch.nan)
