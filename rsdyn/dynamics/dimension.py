"""How many dimensions each sublayer's activations fill (paper 3.3; METHOD section 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from rsdyn.dynamics.step_nulls import StepTest
from rsdyn.errors import UserError

LEAST_STATES = 10  # for a dimension by nearest neighbours
N_MIXED = 9
ROUNDING = 1e-6  # of the largest eigenvalue; smaller ones are taken in float64
MARGIN = 3  # how many times the neighbours asked for are looked up, so that without a group enough remain


class Spectra(NamedTuple):
    """Variances along each sublayer's own components, largest first, ``(..., S, K)``.

    Attributes:
        all: ``(S, K)``.
        groups: ``(G, S, K)`` without each group of sequences.
        left_out: ``(C, S, K)`` without each number of the largest units.
        without_massive: ``(S, K)``; None where there are no massive units.
    """

    all: Tensor
    groups: Tensor
    left_out: Tensor
    without_massive: Tensor | None


def centred(x: Tensor) -> Tensor:
    """Activations ``(N, U)`` of one sublayer about their mean, float32; zero for a unit that is not finite."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    x = (x - x.mean(0, dtype=torch.float64)).to(torch.float32)
    return torch.where(x.isfinite().all(0), x, 0.0)


def spectrum(x: Tensor) -> Tensor:
    """Variances along the principal components of centred ``x`` ``(N, U)``: ``(min(N, U),)`` float64, largest first.

    ``x xᵀ`` and ``xᵀ x`` have the same eigenvalues but for zeros, so the smaller of the two is taken.
    """
    return _variances(products_of(x), len(x))


def products_of(x: Tensor) -> Tensor:
    """Products ``x xᵀ`` or ``xᵀ x``, whichever is smaller, in float64."""
    x = x.to(torch.float64)
    return x @ x.T if len(x) <= x.shape[1] else x.T @ x


def _variances(products: Tensor, n: int) -> Tensor:
    """Variances ``(K,)`` float64, largest first, of ``n`` samples about their mean, of float64 products ``(K, K)``.

    The eigenvalues are taken in float32, which keeps small ones to about 1e-8 of the largest, and in float64 where some
    are that small: where states repeat, or a massive unit outweighs the others. Rounding would count as variance there,
    and as 7 % of an effective rank in SmolLM2's first sublayer.
    """
    values = torch.linalg.eigvalsh(products.to(torch.float32))
    if values[max(0, len(values) - n + 1)] < ROUNDING * values[-1]:  # n states span n - 1 directions about their mean
        values = torch.linalg.eigvalsh(products)
    return values.flip(0).clamp(min=0).to(torch.float64) / n


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


def spectra_of_rows(x: Tensor, chosen: Tensor, products: Tensor | None = None) -> Tensor:
    """:func:`spectrum` of some rows of centred ``x`` ``(N, U)``, centred anew, for each choice ``(M, N)`` of them.

    ``chosen`` is boolean. ``(M, min(N, U))``, filled up with zeros where a choice has fewer components. All choices
    come from the same ``products`` (:func:`products_of`, where they are known), in float64 until their own mean is out:
    with many rows, those of the rows left out are subtracted.
    """
    out = x.new_zeros(len(chosen), min(x.shape), dtype=torch.float64)
    products = products_of(x) if products is None else products
    for found, rows in zip(out, chosen, strict=True):
        n = int(rows.sum())
        if len(x) <= x.shape[1]:
            part = products[rows][:, rows]
            part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
        else:
            left, total = x[~rows].to(torch.float64), x[rows].sum(0, dtype=torch.float64)
            part = torch.addmm(products, left.T, left, alpha=-1).addr_(total, total, alpha=-1 / n)
        variances = _variances(part, n)[:n]
        found[: len(variances)] = variances
    return out


def spectra_without_largest(x: Tensor, order: Tensor, counts: Sequence[int], products: Tensor | None = None) -> Tensor:
    """:func:`spectrum` of centred ``x`` ``(N, U)`` without the first ``counts`` units of ``order`` (METHOD 0.10).

    ``(C, min(N, U))``, one row per count, filled up with zeros. The ``products`` of all units are taken once, where
    they are not known; with few rows those of the other units, to which those of units in ``order`` are added from the
    last one up.
    """
    out = x.new_zeros(len(counts), min(x.shape), dtype=torch.float64)
    if x.shape[1] < len(x):
        products = products_of(x) if products is None else products
        for found, count in zip(out, counts, strict=True):
            stays = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
            stays[order[:count]] = False
            values = _variances(products[stays][:, stays] if count else products, len(x))
            found[: len(values)] = values
        return out
    rest = products_of(x.index_fill(1, order, 0))
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        some = x[:, order[counts[i] :]].to(torch.float64)
        out[i] = _variances(rest + some @ some.T, len(x))
    return out


# -- intrinsic dimension and entropy (METHOD section 14) ---------------------------------------------------------------


def distinct(x: Tensor) -> tuple[np.ndarray, int]:
    """The states of ``x`` ``(N, D)`` without repeated ones, float64, and how many were left out.

    Two equal states are at distance 0, which says nothing of the dimension and breaks estimators by nearest neighbours.
    """
    return _distinct(x)[:2]


def _distinct(x: Tensor) -> tuple[np.ndarray, int, np.ndarray]:
    """:func:`distinct`, and where the first of each stands in ``x``."""
    if x.ndim != 2:
        raise ValueError(f"x of shape {tuple(x.shape)}: give (N, D), samples by units.")
    rows = x.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise ValueError("x: it holds NaN or infinities. Leave those samples or units out.")
    # rows as single items of bytes sort many times faster than column by column; + 0.0 makes one zero of both
    items = np.ascontiguousarray(rows + 0.0).view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first = np.unique(items, return_index=True)
    first.sort()
    return rows[first], len(rows) - len(first), first


class IntrinsicDimension(NamedTuple):
    """Intrinsic dimensions of some states, and without each group of them.

    Attributes:
        twonn, mle: of all states.
        twonn_groups, mle_groups: ``(G,)`` float64, without each group, in rising order.
        repeated: states that repeat others, which were left out.
    """

    twonn: float
    mle: float
    twonn_groups: Tensor
    mle_groups: Tensor
    repeated: int


def intrinsic_dimension(x: Tensor, group: Tensor | None = None, *, k: int = 20) -> IntrinsicDimension:
    """:func:`twonn` and :func:`mle` of ``x`` ``(N, D)``, and without each group, from one table of distances.

    ``group`` ``(N,)`` is the group of each state; a single one gives no ``_groups``. Where states repeat, the first
    one's group counts. Raises as :func:`twonn` does.
    """
    kept, repeated, first = _distinct(x)
    squared = _distances(kept)
    known = torch.zeros(1) if group is None else group.cpu().unique()
    near = _nearest(squared, MARGIN * k if len(known) > 1 else k)
    of = torch.zeros(len(kept)) if group is None else group.cpu()[torch.from_numpy(first)]
    found = [_by_neighbours(near.values[:, :k])]
    for g in known if len(known) > 1 else []:
        found.append(_by_neighbours(_nearest_of(near, squared, of != g, k)))
    each = torch.tensor(found, dtype=torch.float64)
    return IntrinsicDimension(*found[0], each[1:, 0], each[1:, 1], repeated)


def _distances(x: np.ndarray) -> Tensor:
    """Squared distances of states ``(N, D)`` from each other, infinite from themselves.

    By products of float64 about the mean: one matrix product, where subtracting first reads all units of every pair.
    """
    about = torch.from_numpy(x - x.mean(0)) if len(x) else torch.from_numpy(x)
    return _distances_of(about @ about.T)


def _distances_of(products: Tensor) -> Tensor:
    """The same of the products of all pairs of states."""
    square = products.diagonal()
    away = (square[:, None] + square[None, :] - 2 * products).clamp_(min=0)
    return away.fill_diagonal_(torch.inf)


def _nearest(squared: Tensor, k: int) -> torch.return_types.topk:
    """The ``k`` others at the least squared distance of each state, or as many as there are: values, and which."""
    return squared.topk(max(0, min(k, len(squared) - 1)), dim=1, largest=False)


def _nearest_of(near: torch.return_types.topk, squared: Tensor, stays: Tensor, k: int) -> Tensor:
    """Squared distances ``(n, k)`` of the states that stay from the nearest ``k`` others that do.

    From what is nearest among all, ``near``; where too few of those stay, from the whole row of ``squared``.
    """
    k = min(k, int(stays.sum()) - 1)
    values, inside = near.values[stays], stays[near.indices[stays]]
    out = values.new_empty(len(values), max(0, k))
    if k <= 0:
        return out
    place = inside.cumsum(1)
    enough = place[:, -1] >= k
    out[enough] = values[inside & (place <= k) & enough[:, None]].view(-1, k)
    rest = stays.nonzero().flatten()[~enough]
    out[~enough] = squared[rest][:, stays].topk(k, dim=1, largest=False).values
    return out


def _by_neighbours(squared: Tensor) -> tuple[float, float]:
    """TwoNN and MLE of squared distances ``(N, k)`` from each state's nearest others; NaN for fewer than ten states.

    The likelihood's estimate is scikit-dimension's in closed form, which that takes state by state in Python: 800,000
    calls for a jackknife of 60 sublayers.
    """
    if len(squared) < LEAST_STATES:
        return math.nan, math.nan
    distances = squared[squared[:, 0] > 0].sqrt()  # of two states that differ by rounding alone the products may make 0
    by_two = _scikit_dimension().TwoNN(dist=True).fit(distances[:, :2].numpy()).dimension_
    k = distances.shape[1]
    inverse = (distances[:, -1:] / distances).log().sum(1) / (k - 1)
    return float(by_two), float(1 / inverse.mean())


def mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sums of the states ``(N, D)`` that have their mean and covariance exactly, and are Gaussian otherwise.

    About their mean, the states are multiplied from the left by a random rotation of the ``N - 1`` directions that keep
    it. Independent Gaussian states of any covariance have one distribution before and after, so their dimension by
    nearest neighbours is an exact null model: that of a flat cloud which fills the same directions as much.
    """
    x = x.to(torch.float64)
    mean = x.mean(0)
    return mean + _mixing(len(x), generator).to(x.device) @ _without_mean(x - mean)


def _mixing(n: int, generator: torch.Generator) -> Tensor:
    """A random orthonormal basis ``(n, n - 1)`` of the directions whose entries sum to 0."""
    drawn = torch.randn(n, n - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn - drawn.mean(0))
    return q * r.diagonal().sign()


@lru_cache(maxsize=1)
def _mixings(n_states: int, n: int, seed: int) -> tuple[Tensor, ...]:
    """``n`` such bases; every sublayer takes the same."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(_mixing(n_states, generator) for _ in range(n))


def _without_mean(x: Tensor) -> Tensor:
    """States ``(N, D)`` of mean zero in an orthonormal basis of what has no mean: ``(N - 1, D)`` (Helmert's)."""
    n = torch.arange(1, len(x), dtype=x.dtype, device=x.device)[:, None]
    return (x[:-1].cumsum(0) - n * x[1:]) / (n * (n + 1)).sqrt()


def of_mixed(x: Tensor, *, n: int = N_MIXED, seed: int = 0, k: int = 20) -> Tensor:
    """TwoNN and MLE of states ``(N, D)``, then of ``n`` times :func:`mixed` ones: ``(n + 1, 2)`` float64.

    Repeated states are left out first, also of what is mixed; NaN where fewer than ten remain.
    """
    kept, _, _ = _distinct(x)
    if len(kept) < LEAST_STATES:
        return torch.full((n + 1, 2), torch.nan, dtype=torch.float64)
    found, states = [_by_neighbours(_nearest(_distances(kept), k).values)], torch.from_numpy(kept)
    reduced = _without_mean(states - states.mean(0))
    products = reduced @ reduced.T
    for onto in _mixings(len(kept), n, seed):
        found.append(_by_neighbours(_nearest(_distances_of(onto @ products @ onto.T), k).values))
    return torch.tensor(found, dtype=torch.float64)


def against_mixed(values: Tensor) -> StepTest:
    """A number of some states, and of ``n`` times mixed ones behind it ``(n + 1,)``: p by Student's t of the latter."""
    value, drawn = float(values[0]), values[1:]
    mean, std = float(drawn.mean()), float(drawn.std())
    if not std > 0:
        return StepTest(value, mean, std, math.nan, math.nan)
    z = (value - mean) / std
    return StepTest(value, mean, std, z, float(2 * student.sf(abs(z) / math.sqrt(1 + 1 / len(drawn)), len(drawn) - 1)))


def twonn(x: Tensor) -> float:
    """Intrinsic dimension by the ratio of each state's two nearest distances (Facco et al. 2017), of ``x`` ``(N, D)``.

    Repeated states are left out first (:func:`distinct` counts them); NaN where fewer than ten remain. scikit-dimension
    computes it.

    Raises:
        UserError: where scikit-dimension is not installed.
        ValueError: for another shape, or what is not finite.
    """
    kept, _ = distinct(x)
    if len(kept) < LEAST_STATES:
        return math.nan
    return float(_scikit_dimension().TwoNN().fit(kept).dimension_)


def mle(x: Tensor, k: int = 20) -> float:
    """Intrinsic dimension by maximum likelihood over ``k`` neighbours (Levina & Bickel 2004), of ``x`` ``(N, D)``.

    Repeated states are left out first; NaN where fewer than ten remain. ``k`` is at most the states less one.

    Raises:
        UserError: where scikit-dimension is not installed.
        ValueError: for another shape, what is not finite, or a ``k`` below 2.
    """
    if k < 2:
        raise ValueError(f"k={k}: the likelihood needs at least 2 neighbours.")
    kept, _ = distinct(x)
    if len(kept) < LEAST_STATES:
        return math.nan
    found = _scikit_dimension().MLE().fit(kept, n_neighbors=min(k, len(kept) - 1))
    return float(found.dimension_)


def effective_rank(x: Tensor, *, centre: bool = True) -> Tensor:
    """The exponential of the entropy of the singular values' shares (Roy & Vetterli 2007), of ``x`` ``(..., N, D)``.

    1 for a line, ``k`` for ``k`` directions of one size; NaN where nothing varies. A scalar per matrix, float64. Raises
    ``ValueError`` for another shape, or what is not finite.
    """
    values = torch.linalg.svdvals(_about(x, centre))
    return _entropy(values).exp()


def matrix_entropy(x: Tensor, *, centre: bool = True) -> Tensor:
    """Von Neumann entropy in nats of the Gram matrix of trace 1, of ``x`` ``(..., N, D)`` (Giraldo et al. 2015).

    The entropy of the shares of variance along the principal components: from 0 to ``log min(N, D)``; NaN where nothing
    varies. Float64. Raises as :func:`effective_rank` does.
    """
    return _entropy(torch.linalg.svdvals(_about(x, centre)).square())


def rank_of_variances(variances: Tensor) -> Tensor:
    """:func:`effective_rank` from variances ``(..., K)`` along components: ``(...)``."""
    return _entropy(variances.clamp(min=0).sqrt()).exp()


def entropy_of_variances(variances: Tensor) -> Tensor:
    """:func:`matrix_entropy` from variances ``(..., K)`` along components: ``(...)``."""
    return _entropy(variances.clamp(min=0))


def _about(x: Tensor, centre: bool) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"x of shape {tuple(x.shape)}: give (N, D), samples by units.")
    x = x.detach().to(torch.float64)
    if not x.isfinite().all():
        raise ValueError("x: it holds NaN or infinities. Leave those samples or units out.")
    if not centre or not x.shape[-2]:
        return x
    x = x - x[..., :1, :]  # exactly zero where all are equal, which less their mean they need not be
    return x - x.mean(-2, keepdim=True)


def _entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of non-negative weights ``(..., K)`` over their sum; NaN where that is 0."""
    total = weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(weights / torch.where(total > 0, total, torch.nan)).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy, torch.nan)


def _scikit_dimension() -> Any:
    try:
        from skdim import id as estimators
    except ImportError as error:
        raise UserError(
            "intrinsic dimensions need the package scikit-dimension: pip install scikit-dimension."
        ) from error
    return estimators
