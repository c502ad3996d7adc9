"""Null models of curvature and straightness: what the angles of a path's steps are when nothing relates the steps.

Everything about the shape of a path is in the products of its steps, and everything about what sequences share is in
the products of their steps at one sublayer. Both are sums over units, so processes that hold some of the units add up.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from scipy.stats import norm as normal
from torch import Tensor

from rsdyn.dynamics.significance import two_sided_p

StepNull = Literal["shuffled_steps", "rotated_steps", "random_walk"]
STEP_NULLS: tuple[StepNull, ...] = get_args(StepNull)
MOST_PAIRED = 256  # sequences whose steps are held against each other: more hardly move the mean over pairs


class StepProducts(NamedTuple):
    """Products of the steps of some paths.

    Attributes:
        of_path: ``(N, S - 1, S - 1)`` float64, of each sequence's steps with each other.
        of_place: ``(S - 1, M, M)`` float64, of the first ``M`` sequences' steps at each place.
        n_units: how many units the products are sums over.
    """

    of_path: Tensor
    of_place: Tensor
    n_units: int

    def __add__(self, other: StepProducts) -> StepProducts:  # type: ignore[override]
        """Of the units of both."""
        return StepProducts(self.of_path + other.of_path, self.of_place + other.of_place, self.n_units + other.n_units)


def step_products(x: Tensor, units: Tensor | None = None) -> StepProducts:
    """Products of the steps of trajectories ``(N, S, D)``, over the ``units`` ``(D,)`` that count; default all.

    Raises ``ValueError`` for another shape, or fewer than three sublayers.
    """
    if x.ndim != 3 or x.shape[1] < 3:
        raise ValueError(f"x of shape {tuple(x.shape)}: give (N, S, D) with at least three sublayers.")
    counted = x.shape[2] if units is None else int(units.sum())
    excluded = None
    if units is not None and 4 * counted < len(units):
        x = x[..., units]
    elif units is not None:  # to write a few zeros costs less than to gather all the rest
        excluded = (~units).nonzero().flatten()
    n, s, d = x.shape
    of_path = torch.empty(n, s - 1, s - 1, dtype=torch.float64, device=x.device)
    rows = max(1, (1 << 22) // max(1, s * d))
    for part, out in zip(x.split(rows), of_path.split(rows), strict=True):
        steps = _steps(part, excluded)
        torch.bmm(steps, steps.mT, out=out)
    of_place = torch.empty(s - 1, min(n, MOST_PAIRED), min(n, MOST_PAIRED), dtype=torch.float64, device=x.device)
    places = max(1, (1 << 22) // max(1, len(x[:MOST_PAIRED]) * d))
    for first, out in zip(range(0, s - 1, places), of_place.split(places), strict=True):
        steps = _steps(x[:MOST_PAIRED, first : first + places + 1], excluded).transpose(0, 1)
        torch.bmm(steps, steps.mT, out=out)
    return StepProducts(of_path, of_place, counted)


def _steps(x: Tensor, excluded: Tensor | None) -> Tensor:
    x = x.to(torch.float64)
    steps = x[:, 1:] - x[:, :-1]
    return steps if excluded is None else steps.index_fill_(-1, excluded, 0)


def curvature_of(products: StepProducts) -> Tensor:
    """Angle between successive steps, ``(N, S - 2)`` radians: :func:`rsdyn.dynamics.geometry.curvature`.

    NaN where a step is zero. From products, an angle below 1e-7 is lost to rounding.
    """
    size = _sizes(products.of_path)
    return (products.of_path.diagonal(1, 1, 2) / (size[:, :-1] * size[:, 1:])).clamp(-1, 1).arccos()


def straightness_of(products: StepProducts, scale: Tensor | None = None) -> Tensor:
    """Distance from first state to last over the length of the way, ``(N,)``: as ``geometry.straightness``.

    ``scale`` ``(S - 1,)`` divides the steps first.
    """
    of_path = _scaled(products.of_path, scale)
    ends = of_path.sum((1, 2)).clamp(min=0).sqrt()
    length = _lengths(of_path).sum(1)
    return ends / torch.where(length > 0, length, torch.nan)


def path_length_of(products: StepProducts) -> Tensor:
    """Length of the whole way, ``(N,)``."""
    return _lengths(products.of_path).sum(1)


def step_sizes(products: StepProducts) -> Tensor:
    """Root mean square over sequences of the steps' lengths, ``(S - 1,)``."""
    return products.of_path.diagonal(0, 1, 2).mean(0).sqrt()


class StepTest(NamedTuple):
    """Mean curvature, or straightness, beside what a null model gives.

    Attributes:
        value: of the paths.
        mean, std: of the null model.
        z: the value's distance from that mean, in these standard deviations.
        p: two-sided.
    """

    value: float
    mean: float
    std: float
    z: float
    p: float


def curvature_test(
    products: StepProducts, null: StepNull, *, sites_per_layer: int = 1, n: int = 999, seed: int = 0
) -> StepTest:
    """Mean curvature over sequences and sublayers, against a null model.

    ``shuffled_steps``
        The steps in another order, the same for all sequences; steps of one site change places among themselves. It
        keeps every step and what sequences share, and loses which step follows which. ``p`` is by rank.
    ``rotated_steps``
        The steps of each sublayer turned by one random rotation. It keeps what sequences share at a sublayer, and loses
        every relation between sublayers: the mean is pi/2, and the spread follows in closed form from the products of
        the sequences' steps, since a random rotation's entries have variance 1 / D. ``p`` is from the normal.
    ``random_walk``
        Each step of each sequence in a direction of its own: pi/2, and a spread of ``1 / sqrt(N D)`` per sublayer.

    Sequences with a step of zero do not count.

    Args:
        products: of the paths.
        null: one of ``STEP_NULLS``.
        sites_per_layer: 1 or 2; with 2 the steps of attention and MLP are shuffled apart.
        n, seed: of the orders drawn.
    """
    angles = curvature_of(products)
    known = angles.isfinite().all(1)
    if not known.any():
        return StepTest(*[math.nan] * 5)
    value = float(angles[known].mean())
    if null == "shuffled_steps":
        between = _angles(products.of_path if known.all() else products.of_path[known]).mean(0)
        orders = _orders(len(between), sites_per_layer, n, seed)
        drawn = torch.stack([between[order[:-1], order[1:]].mean() for order in orders])
        mean, std = float(drawn.mean()), float(drawn.std())
        p = float(two_sided_p(torch.tensor([value], dtype=torch.float64), drawn[:, None]))
        return StepTest(value, mean, std, _z(value, mean, std), p)
    shared = _shared(products, null, int(known.sum()))
    between = shared[:-1, 1:].diagonal() if null == "rotated_steps" else shared
    std = float((between / products.n_units).sum().clamp(min=0).sqrt() / (len(products.of_place) - 1))
    return _normal_test(value, math.pi / 2, std)


def straightness_test(products: StepProducts, null: StepNull, *, scale: Tensor | None = None) -> StepTest:
    """Mean over sequences of the *squared* straightness, against ``rotated_steps`` or ``random_walk``.

    Squared, since that is linear in the products of different steps, which both null models make zero on average: the
    mean is ``sum l^2 / (sum l)^2`` of the lengths l. The order of steps does not matter to it, so no shuffle can.

    Raises ``ValueError`` for ``shuffled_steps``.
    """
    if null == "shuffled_steps":
        raise ValueError("null=shuffled_steps: the order of steps does not change straightness; take another.")
    of_path = _scaled(products.of_path, scale)
    length = _lengths(of_path).sum(1)
    known = length > 0
    if not known.any():
        return StepTest(*[math.nan] * 5)
    squared = of_path.sum((1, 2))[known] / length[known].square()
    mean = of_path.diagonal(0, 1, 2).sum(1)[known] / length[known].square()
    # of each pair of sublayers the mean over sequences of 2 a.b / length^2: its variance under random rotations
    n, m = int(known.sum()), len(products.of_place[0])
    some = known[:m].nonzero().flatten()
    of_place = products.of_place[:, some][:, :, some]
    if scale is not None:
        of_place = of_place / scale.to(of_place).square()[:, None, None]
    of_place = of_place / (length[some][:, None] * length[some][None, :])
    own = of_place.diagonal(0, 1, 2).clone()
    variance = own @ own.T / len(some) / n
    if null == "rotated_steps" and len(some) > 1:
        of_place.diagonal(0, 1, 2).zero_()
        apart = of_place.flatten(1)
        variance = variance + (1 - 1 / n) * (apart @ apart.T) / (len(some) * (len(some) - 1))
    variance = 4 * variance.triu(1).sum() / products.n_units
    return _normal_test(float(squared.mean()), float(mean.mean()), float(variance.clamp(min=0).sqrt()))


def _shared(products: StepProducts, null: StepNull, n: int) -> Tensor:
    """``D`` times the variance of the mean cosine between the steps of two places, under random rotations.

    With unit steps ``u_n``, ``v_n`` it is ``mean over n, m of (u_n.u_m)(v_n.v_m)``: 1 for one sequence, less the more
    the sequences' steps differ. ``(S - 1, S - 1)`` for ``rotated_steps``, ``(S - 2,)`` of 1 / n for ``random_walk``.
    """
    of_place = products.of_place
    if null == "random_walk":
        return torch.full((len(of_place) - 1,), 1 / n, dtype=torch.float64)
    size = of_place.diagonal(0, 1, 2).sqrt()
    cosines = of_place / (size[:, :, None] * size[:, None, :])
    m = of_place.shape[1]
    known = cosines.isfinite().all(0)
    cosines = torch.where(known & ~torch.eye(m, dtype=torch.bool, device=cosines.device), cosines, 0.0).flatten(1)
    pairs = int(known.sum()) - int(known.diagonal().sum())
    apart = cosines @ cosines.T / max(1, pairs)
    return 1 / n + (1 - 1 / n) * apart


def _angles(of_path: Tensor) -> Tensor:
    """Angles between all steps of each path; NaN where one is zero."""
    size = _sizes(of_path)
    return (of_path / (size[:, :, None] * size[:, None, :])).clamp_(-1, 1).arccos_()


def _sizes(of_path: Tensor) -> Tensor:
    size = _lengths(of_path)
    return torch.where(size > 0, size, torch.nan)


def _lengths(of_path: Tensor) -> Tensor:
    return of_path.diagonal(0, 1, 2).clamp(min=0).sqrt()


def _scaled(of_path: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return of_path
    if scale.shape != of_path.shape[-1:]:
        raise ValueError(f"scale of shape {tuple(scale.shape)}: give ({of_path.shape[-1]},), one size per step.")
    scale = torch.where(scale > 0, scale, torch.nan).to(of_path)
    return of_path / (scale[:, None] * scale[None, :])


def _orders(n_steps: int, sites: int, n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for _ in range(n):
        order = torch.arange(n_steps)
        for site in range(sites):
            of_site = torch.arange(site, n_steps, sites)
            order[of_site] = of_site[torch.randperm(len(of_site), generator=generator)]
        orders.append(order)
    return orders


def _z(value: float, mean: float, std: float) -> float:
    return (value - mean) / std if std > 0 else math.nan


def _normal_test(value: float, mean: float, std: float) -> StepTest:
    z = _z(value, mean, std)
    return StepTest(value, mean, std, z, float(2 * normal.sf(abs(z))))
