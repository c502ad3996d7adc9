"""Counts, means, variances and covariances that can be taken in pieces and merged in any order.

Everything is held in float64 and merged by Chan's rule, since naive float32 sums give NaN once a unit's mean is a
thousand times its spread, which massive units reach.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.dynamics.correlation import Comoments as Comoments
from rsdyn.dynamics.correlation import comoments as comoments
from rsdyn.dynamics.correlation import correlation as correlation
from rsdyn.dynamics.correlation import correlation_of as correlation_of
from rsdyn.dynamics.correlation import merge_comoments as merge_comoments
from rsdyn.dynamics.correlation import unvarying

_PRODUCT_ROWS = 512  # vectors to a float32 product, before float64 takes the sum over
_PRODUCT_PANEL = 256  # columns of a covariance at a time


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of some samples, elementwise.

    Attributes:
        n: number of samples, a float64 scalar tensor.
        mean: their mean, float64, any shape.
        m2: the sum of squared deviations from that mean, same shape.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance (divided by the count, as explained variance wants it); NaN for no samples."""
        return self.m2 / self.n

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    @property
    def constant(self) -> Tensor:
        """Where nothing varies: a boolean mask. Merging leaves up to an ulp of the mean, far below any real spread."""
        return unvarying(*self)


def moments(x: Tensor, chunk_elements: int = 1 << 23) -> Moments:
    """Moments of ``x`` ``(N, ...)`` over its first axis, in float64.

    A float64 copy of a whole shard would take a GiB for Llama 3.1 8B, so rows go in chunks of ``chunk_elements``.
    """
    rows = max(1, chunk_elements // max(1, x[:1].numel()))
    if x.shape[0] > rows:
        return merge_all([moments(part) for part in x.split(rows)])
    x = x.to(torch.float64)
    count = torch.tensor(float(x.shape[0]), dtype=torch.float64, device=x.device)
    if x.shape[0] == 0:
        zero = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
        return Moments(count, zero, zero.clone())
    mean = x.mean(0)
    return Moments(count, mean, (x - mean).square_().sum(0))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of samples together (Chan, Golub and LeVeque 1979); either set may be empty."""
    count = a.n + b.n
    share = torch.where(count > 0, b.n / count.clamp(min=1), 0.0)
    delta = b.mean - a.mean
    return Moments(count, a.mean + delta * share, a.m2 + b.m2 + delta.square() * a.n * share)


def merge_all(parts: list[Moments]) -> Moments:
    """All parts merged, in the order given."""
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    return total


def pool(parts: Moments) -> Moments:
    """Moments over sublayers and samples together: ``(S, D)`` per sublayer becomes ``(D,)``."""
    return merge_all([Moments(parts.n, mean, m2) for mean, m2 in zip(parts.mean, parts.m2, strict=True)])


def explained_variance(sse: Tensor, data: Moments, units: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Explained variance ``1 - SSE / SST`` of a reconstruction, from sums (METHOD section 8).

    Args:
        sse: ``(S, D)`` squared errors summed over sequences.
        data: ``(S, D)`` moments of the same sequences' data.
        units: ``(D,)`` boolean mask of the units to count; default all.

    Returns:
        ``(S,)`` with SST about each sublayer's own mean, ``(S,)`` with SST about the mean of all sublayers together,
        and the scalar over all sublayers about that global mean. NaN where there is no variance to explain.
    """
    keep = slice(None) if units is None else units
    total = pool(data)
    about_global = data.m2 + data.n * (data.mean - total.mean).square()
    errors = sse[:, keep].sum(1)
    own = 1 - errors / _nan_if_zero(data.m2[:, keep].sum(1))
    overall = 1 - errors.sum() / _nan_if_zero(total.m2[keep].sum())
    return own, 1 - errors / _nan_if_zero(about_global[:, keep].sum(1)), overall


def _nan_if_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


def massive_ratios(mean: Tensor) -> Tensor:
    """How large each unit's mean becomes beside the others': ``(D,)`` from ``mean`` ``(S, D)``.

    The largest, over sublayers, of ``|mean|`` over the median ``|mean|`` of all units there (METHOD section 5). A
    sublayer where most means are exactly zero has no scale to compare with, and does not count; 0 where none has.
    """
    size = mean.abs()
    median = size.median(dim=-1, keepdim=True).values
    return torch.where(median > 0, size / median, 0).amax(dim=0)


def massive_units(mean: Tensor, factor: float = 100.0) -> Tensor:
    """Units whose mean is enormous at some sublayer: a boolean mask ``(D,)`` from ``mean`` ``(S, D)``.

    Those whose :func:`massive_ratios` exceed ``factor``. A few such units own the variance and hide everything else in
    a cosine. The threshold is a cliff: look at the ratios, and at what is measured without the largest units.
    """
    return massive_ratios(mean) > factor


def few_levels(m: Moments, dtype: torch.dtype = torch.bfloat16, ratio: float = 30.0) -> Tensor:
    """Units that storage in ``dtype`` left few distinct values: a boolean mask of the shape of ``m.mean``.

    True where ``|mean| / std`` passes ``ratio``: numbers there are then an eighth of a standard deviation apart or
    more, and correlation and information are partly of the rounding (METHOD sections 4 and 6). ``ratio`` is for
    bfloat16 and grows with the precision of ``dtype``: 240 for float16, 2e6 for float32, whose storage therefore marks
    no real unit. Constant units, and those that are not finite, are other flags and False here.
    """
    limit = ratio * torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps
    return (m.mean.abs() > limit * m.std) & ~m.constant  # without a finite mean, std is NaN


def density(mean: Tensor, threshold: float) -> Tensor:
    """Fraction of units whose ``|mean|`` is above ``threshold``, per sublayer (paper 2.2, METHOD section 3).

    Args:
        mean: ``(S, D)``.
        threshold: at least 0, in the units of the stream.

    Returns:
        ``(S,)`` in float64; NaN for a sublayer that holds NaN: leave such units out first.

    Raises:
        ValueError: for a negative threshold or NaN.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: |mean| is compared with it; give a number of at least 0.")
    above = (mean.abs() > threshold).to(torch.float64)
    return above.masked_fill(mean.isnan(), torch.nan).mean(-1)


def participation_ratio(mean: Tensor) -> Tensor:
    """How many units share a mean vector, ``(sum m^2)^2 / sum m^4``: 1 for one unit alone, ``D`` for all alike.

    Of ``mean`` ``(S, D)``, per sublayer: ``(S,)`` in float64 (METHOD section 3). NaN for a vector of zeros, and for one
    that is not finite.
    """
    size = mean.to(torch.float64).abs()
    square = (size / size.amax(-1, keepdim=True)).square()  # no size over- or underflows
    return square.sum(-1).square() / square.square().sum(-1)


class Covariance(NamedTuple):
    """Count, mean ``(D,)`` and scatter ``(D, D)`` (sum of outer products of deviations) of some vectors, float64."""

    n: Tensor
    mean: Tensor
    scatter: Tensor


def covariance(x: Tensor) -> Covariance:
    """Covariance state of vectors ``x`` ``(N, D)``: deviations and products in float32, sums in float64.

    The mean is taken out first, so the products stay accurate for units far from zero; within 3e-8 of a full SVD. Many
    vectors go in chunks, each several times longer than it is wide, so that no copy of all of them is made. Float64
    input, and any input on another device than a CPU, where float32 products may be TF32, is multiplied in float64.
    """
    n, d = x.shape
    rows = max(4 * d, 1 << 14)
    if n > rows:
        parts = [covariance(part) for part in x.split(rows)]
        return reduce(merge_covariance, parts)
    count = torch.tensor(float(n), dtype=torch.float64, device=x.device)
    mean = torch.zeros(d, dtype=torch.float64, device=x.device)
    scatter = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    pieces = x.split(_PRODUCT_ROWS) if n > 0 else ()
    for piece in pieces:
        mean += piece.to(torch.float64).sum(0)
    mean /= max(n, 1)
    exact = x.dtype == torch.float64 or x.device.type != "cpu"
    for piece in pieces:
        deviations = (piece.to(torch.float64) - mean).to(torch.float64 if exact else torch.float32)
        for a in range(0, d, _PRODUCT_PANEL):  # the scatter is symmetric: only what is right of the diagonal
            scatter[a : a + _PRODUCT_PANEL, a:] += deviations[:, a : a + _PRODUCT_PANEL].T @ deviations[:, a:]
    for a in range(0, d, _PRODUCT_PANEL):
        b = a + _PRODUCT_PANEL
        scatter[b:, a:b] = scatter[a:b, b:].T
    return Covariance(count, mean, scatter)


def merge_covariance(a: Covariance, b: Covariance) -> Covariance:
    """The covariance state of both sets of vectors together; either may be empty."""
    count = a.n + b.n
    share = torch.where(count > 0, b.n / count.clamp(min=1), 0.0)
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(delta, delta) * (a.n * share)
    return Covariance(count, a.mean + delta * share, scatter)
