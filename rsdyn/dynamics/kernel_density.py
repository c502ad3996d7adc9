"""Kernel density estimates of mutual information: :func:`kde`, :func:`kde_resub` and :func:`paper_literal`.

All take ``rows`` ``(U, S, N)``, every row one unit at one sublayer over ``N`` sequences, and give ``(U, S - 1)`` for
consecutive sublayers, in float64. A Gaussian kernel with the full sample covariance of a pair becomes a product of two
one-dimensional kernels once the later sublayer is replaced by what the earlier one does not predict of it:
``e = (z_y - ρ z_x) / s``, ``s² = var(z_y - ρ z_x)``. Everything below rests on that shear (METHOD section 6).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

COLLINEAR = 1e-12  # residual variance, as a share of the variance, below which one row is a linear map of the other
SPACING = 0.75  # grid steps, in bandwidths: errs by 1e-6, and by 4e-5 where samples fall into separate clumps
REACH = 4.0  # bandwidths of grid beyond the outermost samples, at least: what lies further adds under 5e-6
CLAMP = -43.0  # exp below -87 is 7-14 times slower in float32; the product of two clamped kernels is still normal
NODE_SPACING = 0.4  # bandwidths between the nodes that split a kernel: exact to 2 exp(-π²/2 / 0.4²) = 8e-14
NODE_REACH = 10  # nodes beyond a sample: what they leave out is exp(-2 (10 * 0.4)²) = 1e-14 of a kernel
NODE_SCALE = NODE_SPACING * math.sqrt(2 / math.pi)
PAPER_GRID = 100
PAPER_EPSILON = 1e-10


class Pairs(NamedTuple):
    """Consecutive rows, standardised and sheared.

    Attributes:
        z: ``(U, S, N)`` z-scores (sample standard deviation, as scipy); meaningless where not usable.
        std: ``(U, S)`` sample standard deviation of each row.
        usable: ``(U, S)`` false where a row is constant or holds a value that is not finite.
        slope: ``(U, S - 1)``, ρ: the regression of the later row's z-scores on the earlier's.
        rest: ``(U, S - 1, N)``, e: what is left of the later row, of unit variance.
        rest_variance: ``(U, S - 1)``, s².
    """

    z: Tensor
    std: Tensor
    usable: Tensor
    slope: Tensor
    rest: Tensor
    rest_variance: Tensor

    @property
    def regular(self) -> Tensor:
        """Pairs with a finite answer, ``(U, S - 1)``."""
        return self.usable[:, 1:] & self.usable[:, :-1] & (self.rest_variance >= COLLINEAR)

    def flagged(self, information: Tensor) -> Tensor:
        """``information`` ``(U, S - 1)`` with NaN for pairs of an unusable row, inf for collinear pairs."""
        usable = self.usable[:, 1:] & self.usable[:, :-1]
        collinear = usable & (self.rest_variance < COLLINEAR)
        return information.masked_fill(collinear, math.inf).masked_fill(~usable, math.nan)


def pairs(rows: Tensor, pairing: Tensor | None = None) -> Pairs:
    """Each row ``(N,)`` of ``rows`` beside the next sublayer's, whose samples are reordered by ``pairing`` ``(N,)``.

    Only exactly rounded operations touch the samples, so that a unit's bits do not depend on its place in a block.
    """
    rows = rows.to(torch.float64)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    usable = (high - low).isfinite() & (high > low)
    # scaled to [0, 1] first: no square overflows, and a mean far above the spread has left before it is taken
    scale = torch.where(usable, high - low, 1.0)
    z = (rows - low).div_(scale)
    z -= z.mean(-1, keepdim=True)
    std = (z.square().sum(-1, keepdim=True) / (z.shape[-1] - 1)).sqrt()
    z /= torch.where(usable, std, 1.0)
    earlier = z[:, :-1]
    later = z[:, 1:] if pairing is None else z[:, 1:].index_select(-1, pairing)
    slope = (earlier * later).sum(-1, keepdim=True) / (z.shape[-1] - 1)
    rest = later - slope * earlier
    # from the residuals: 1 - ρ² has lost half its digits by ρ = 1 - 1e-8
    variance = rest.square().sum(-1, keepdim=True) / (z.shape[-1] - 1)
    rest /= torch.where(variance >= COLLINEAR, variance, 1.0).sqrt()
    return Pairs(z, (std * scale)[..., 0], usable[..., 0], slope[..., 0], rest, variance[..., 0])


def kde(rows: Tensor, pairing: Tensor | None = None) -> Tensor:
    """Mutual information ``(U, S - 1)`` in nats of the Gaussian KDE of each pair, integrated on a grid.

    The density is ``scipy.stats.gaussian_kde``'s, with Scott's bandwidth ``N^(-1/6)`` and both marginals taken from
    that same joint estimate. ``MI = H(z_x) + H(z_y) - H(z_x, e) - ln(s²) / 2``: the joint entropy needs one product of
    two kernel matrices, and the marginal of a sublayer serves both its pairs. Within 1e-5 of the same integral on
    scipy's densities, 5e-5 where samples fall into separate clumps. Costs ``g² N`` with ``g`` grid points: 40 to 48 for
    most rows of 1000 samples, and 200 at most when lone samples lie far out (``g`` grows as ``N^(2/3)`` then).
    """
    data = pairs(rows, pairing)
    bandwidth = rows.shape[-1] ** (-1 / 6)
    earlier, rest = _Axis.of(data.z, bandwidth), _Axis.of(data.rest, bandwidth)
    usable, regular = data.usable.tolist(), data.regular.tolist()
    information = torch.full_like(data.rest_variance, math.nan)
    buffer = earlier.points.new_empty(_cells(rows.device))
    for unit in range(rows.shape[0]):
        # pairs of one unit at a time, never of two: no unit's last digits depend on its neighbours
        marginal = torch.full_like(data.std[unit], math.nan)
        joint = torch.full_like(data.rest_variance[unit], math.nan)
        transitions = [s for s, good in enumerate(regular[unit]) if good]
        for count, chosen in _by_count([earlier, rest], unit, transitions):
            mass, product = _grid_sums([earlier, rest], unit, chosen, count, buffer)
            marginal.index_copy_(0, chosen, _entropy(mass))
            joint.index_copy_(0, chosen, _entropy(product))
        # what no transition starts from: the last sublayer, and others beside a degenerate one
        others = [s for s, good in enumerate(usable[unit]) if good and s not in set(transitions)]
        for count, chosen in _by_count([earlier], unit, others):
            marginal.index_copy_(0, chosen, _entropy(_grid_sums([earlier], unit, chosen, count, buffer)[0]))
        information[unit] = marginal[:-1] + marginal[1:] - joint
    return data.flagged(information - data.rest_variance.log() / 2)


class _Axis(NamedTuple):
    """Rows ``(U, S, N)`` in bandwidths, float32; the middle of each one's range; the grid points that it needs."""

    points: Tensor
    middle: Tensor
    counts: list[list[int]]

    @classmethod
    def of(cls, z: Tensor, bandwidth: float) -> _Axis:
        points = z.to(torch.float32) / bandwidth
        low, high = points.amin(-1), points.amax(-1)
        counts = (high - low + 2 * REACH) / SPACING + 1
        # products of multiples of 8 run 1.3-1.7 times faster a point
        return cls(points, (low + high) / 2, ((counts / 8).ceil() * 8).int().tolist())


def _cells(device: torch.device) -> int:
    """Size of the kernel buffer: 2 MiB of float32, as much as stays in a CPU's cache; an accelerator wants more."""
    return 1 << (19 if device.type == "cpu" else 26)


def _by_count(axes: list[_Axis], unit: int, sublayers: list[int]) -> list[tuple[int, Tensor]]:
    """The sublayers that need each number of grid points: one whose samples lie far out costs alone."""
    counts = {s: max(axis.counts[unit][s] for axis in axes) for s in sublayers}
    device = axes[0].points.device
    return [
        (count, torch.tensor([s for s in sublayers if counts[s] == count], device=device))
        for count in sorted(set(counts.values()))
    ]


def _grid_sums(axes: list[_Axis], unit: int, sublayers: Tensor, count: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels of ``P`` sublayers of a unit, summed over samples on ``count`` grid points an axis.

    Returns ``(P, count)`` for the first axis and ``(P, count, count)`` for the product with the second, if any.
    Some sublayers, and some samples, at a time, as many as fit the ``buffer``, which is grown as needed and used again:
    fresh memory for the kernels costs as much as a pass over them.
    """
    points = torch.stack([axis.points[unit].index_select(0, sublayers) for axis in axes])
    middle = torch.stack([axis.middle[unit].index_select(0, sublayers) for axis in axes])
    steps = torch.arange(count, dtype=points.dtype, device=points.device) - (count - 1) / 2
    grid = (middle[..., None] + SPACING * steps)[..., None]
    n_axes, n_pairs, n = points.shape
    mass, product = points.new_zeros(n_pairs, count), points.new_zeros(n_pairs, count, count)
    cells = _cells(points.device)
    size = max(1, cells // (n_axes * count * n))
    part = min(n, max(512, cells // (n_axes * size * count)))
    if buffer.numel() < n_axes * size * count * part:
        buffer.resize_(n_axes * size * count * part)
    zero, furthest = points.new_zeros(()), math.sqrt(-2 * CLAMP)
    for first in range(0, n_pairs, size):
        some = slice(first, first + size)
        for samples in points[:, some, None].split(part, dim=-1):
            shape = (n_axes, samples.shape[1], count, samples.shape[-1])
            kernel = buffer[: math.prod(shape)].view(shape)
            torch.sub(grid[:, some], samples, out=kernel)
            kernel.clamp_(-furthest, furthest)
            # of exp(x) = 2^(x / ln 2) the latter is more than twice as fast
            torch.addcmul(zero, kernel, kernel, value=-0.5 / math.log(2), out=kernel)
            kernel.exp2_()
            mass[some] += kernel[0].sum(-1)
            if n_axes == 2:
                product[some].baddbmm_(kernel[0], kernel[1].mT)
    return mass, product


def _entropy(q: Tensor) -> Tensor:
    """Entropy ``(P,)`` of densities proportional to ``q`` ``(P, ...)``, up to the logarithm of a grid cell.

    That is ``ln Q - Σ q ln q / Q`` with ``Q = Σ q``. Kernel constants drop out; so does the cell from a mutual
    information, as every axis has the same cell and enters once with either sign.
    """
    total = _sum(q)
    # q ln q has the limit 0 at 0, which a clamped logarithm gives, twice as fast as xlogy
    return total.log() - _sum(q.clamp(min=torch.finfo(q.dtype).tiny).log_().mul_(q)) / total


def _sum(q: Tensor) -> Tensor:
    """``(P,)`` float64, from float32 sums along the last axis of ``q`` ``(P, ...)``."""
    return q.sum(-1).to(torch.float64).flatten(1).sum(1) if q.ndim > 2 else q.sum(-1, dtype=torch.float64)


def kde_resub(rows: Tensor, pairing: Tensor | None = None) -> Tensor:
    """Mean log-ratio ``(U, S - 1)`` of joint to marginal densities at the samples, in nats, all in float64.

    The joint estimate and the two marginals are each ``scipy.stats.gaussian_kde`` of its own (bandwidths ``N^(-1/6)``
    and ``N^(-1/5)``), equal to scipy's to 1e-12. Each sample counts in its own density, which biases the result up.
    Costs ``g² N`` with about 70 nodes ``g`` at ``N = 1000``, not ``N²``.
    """
    data = pairs(rows, pairing)
    n = rows.shape[-1]
    wide, narrow = n ** (-1 / 6), n ** (-1 / 5)
    information = torch.full_like(data.rest_variance, math.nan)
    marginals = torch.full_like(data.std, math.nan)
    for unit, s in data.usable.nonzero().tolist():
        halves = _half_kernels(data.z[unit, s] / narrow)
        marginals[unit, s] = (halves.sum(1) @ halves).log_().mean()
    for unit, s in data.regular.nonzero().tolist():
        halves, others = _half_kernels(data.z[unit, s] / wide), _half_kernels(data.rest[unit, s] / wide)
        sums = ((others @ halves.T) @ halves).mul_(others).sum(0)
        information[unit, s] = sums.log_().mean() - marginals[unit, s] - marginals[unit, s + 1]
    # of kernels: 1 / (2π s wide² N) for the joint estimate, 1 / (√(2π) narrow N) for either marginal; what the nodes
    # add, NODE_SCALE for each axis, cancels
    constants = math.log(n) + 2 * math.log(narrow / wide)
    return data.flagged(information + constants - data.rest_variance.log() / 2)


def _nodes(points: Tensor) -> Tensor:
    """Nodes ``(g,)`` near samples ``points`` ``(N,)``: a lattice with gaps, so that a sample far out adds few."""
    near = torch.arange(-NODE_REACH, NODE_REACH + 1, device=points.device)
    cells = (points / NODE_SPACING).round().long().unique()
    return (cells[:, None] + near).unique().to(points.dtype) * NODE_SPACING


def _half_kernels(points: Tensor, nodes: Tensor | None = None) -> Tensor:
    """``(g, ...)``, whose product over nodes is the unit kernel, ``h(x) @ h(y) = exp(-(x - y)² / 2) / NODE_SCALE``.

    A Gaussian is the convolution of two narrower ones, and the trapezoidal rule on a lattice integrates that to the
    last digits: ``exp(-(x - y)²/2) ~ Σ_a exp(-(x - a)²) exp(-(y - a)²)``. So a sum over all pairs of ``N`` samples
    takes ``g N`` exponentials, not ``N²``. ``points`` are in bandwidths; ``nodes`` default to those near the points.
    """
    nodes = _nodes(points) if nodes is None else nodes
    distance = points - nodes.view(-1, *[1] * points.ndim)
    # exp below -708 is slow; what is left of e^-300 is nothing beside a sample's own kernel
    return distance.square_().neg_().clamp_(min=-300.0).exp_()


def paper_literal(rows: Tensor, pairing: Tensor | None = None) -> Tensor:
    """The paper's sum ``Σ p(x, y) log(p(x, y) / (p(x) p(y)))`` as printed: **not** a mutual information.

    Gives ``(U, S - 1)``. Densities on a 100 × 100 grid over the range of the data are summed without the area of a grid
    cell, so the value carries the unit ``1 / (σ_x σ_y)``: the same data times 0.001 gives a million times as much, and
    growing activations alone make it fall. The paper's 1e-10 is added to both densities inside the logarithm. The paper
    does not say where the marginals come from: here each is a one-dimensional KDE of its own (bandwidth ``N^(-1/5)``).
    For reproducing the paper's curve; show :func:`kde` beside it (paper 2.5, METHOD section 6).
    """
    data = pairs(rows, pairing)
    n = rows.shape[-1]
    wide, narrow = n ** (-1 / 6), n ** (-1 / 5)
    steps = torch.linspace(0, 1, PAPER_GRID, dtype=torch.float64, device=rows.device)
    low, high = data.z.amin(-1, keepdim=True), data.z.amax(-1, keepdim=True)
    grid = low + (high - low) * steps
    marginals = torch.full_like(grid, math.nan)
    for unit, s in data.usable.nonzero().tolist():
        kernels = _kernels(grid[unit, s], data.z[unit, s], narrow)
        marginals[unit, s] = kernels.sum(1) / (n * narrow * math.sqrt(2 * math.pi) * data.std[unit, s])
    information = torch.full_like(data.rest_variance, math.nan)
    for unit, s in data.regular.nonzero().tolist():
        x, y, spread = grid[unit, s], grid[unit, s + 1], data.rest_variance[unit, s].sqrt()
        rest = data.rest[unit, s] / wide
        nodes = _nodes(rest)
        weights = _half_kernels(rest, nodes) @ _kernels(x, data.z[unit, s], wide).T
        # on this grid the rest takes another value at each point: a product of kernels needs the sheared grid of `kde`
        points = (y - data.slope[unit, s] * x[:, None]) / (spread * wide)
        sums = NODE_SCALE * (_half_kernels(points, nodes) * weights[..., None]).sum(0)
        joint = sums / (n * 2 * math.pi * wide**2 * spread * data.std[unit, s] * data.std[unit, s + 1])
        product = marginals[unit, s, :, None] * marginals[unit, s + 1]
        information[unit, s] = (joint * ((joint + PAPER_EPSILON) / (product + PAPER_EPSILON)).log()).sum()
    return data.flagged(information)


def _kernels(grid: Tensor, samples: Tensor, bandwidth: float) -> Tensor:
    """Unit Gaussian kernels of ``samples`` ``(N,)`` at ``grid`` ``(g,)``: ``(g, N)``."""
    distance = (grid[:, None] - samples) / bandwidth
    return distance.square_().mul_(-0.5).clamp_(min=-300.0).exp_()
