"""Massive activations: the few units that are thousands of times larger than the rest, and where they come from.

Sun et al. 2024 (arXiv 2402.17762) found that they stand at the first token and at a few others, are written by one
layer and stay until the last ones. A mean over tokens hides them, so the largest absolute value is kept instead, by
class of token. Beside it stands how far the largest unit of a state is from the median one of the same state, as their
definition has it, and how far it would be in states of independent normal units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import erf
from scipy.stats import beta, halfnorm
from scipy.stats import t as student
from torch import Tensor

from rsdyn.dynamics.resampling import Interval

LARGE, TIMES = 100.0, 1000.0
"""An activation is massive beyond ``LARGE`` and from ``TIMES`` the median of its state on (Sun et al. 2024, section 2:
"surpasses 100 and is at least or around 1,000 times larger than the median magnitude of its hidden state")."""
SAME = 1e-5  # of a logarithm: what rounding makes of one state that is recorded many times
POSITIONS = (0, 1, 4, 16, 64)
"""The first position of each range in which norms are averaged; the last one has no end."""


class StandsOut(NamedTuple):
    """How far the largest unit of each state stands out.

    Attributes:
        log_ratio: ``(...)`` logarithm of the largest absolute value over the median one; NaN where the median is 0.
        is_massive: ``(...)`` whether the state has a massive activation.
    """

    log_ratio: Tensor
    is_massive: Tensor


def stands_out(sizes: Tensor) -> StandsOut:
    """How far the largest unit stands out in states of absolute values ``(..., D)``; what is not finite counts as 0."""
    peak = sizes.amax(-1)
    if not peak.isfinite().all():
        sizes = sizes.nan_to_num(nan=0.0, posinf=0.0)
        peak = sizes.amax(-1)
    typical = _median(sizes)
    log_ratio = torch.where(typical > 0, peak.double().log() - typical.double().log(), torch.nan)
    return StandsOut(log_ratio, (peak > LARGE) & (typical > 0) & (peak >= TIMES * typical))


def _median(sizes: Tensor) -> Tensor:
    """The median of finite ``(..., D)`` over units, the lower one of two: ``Tensor.median`` in a third of its time."""
    if sizes.device.type != "cpu" or sizes.requires_grad:
        return sizes.median(-1).values
    middle = (sizes.shape[-1] - 1) // 2
    return torch.from_numpy(np.partition(sizes.numpy(), middle, axis=-1)[..., middle].copy())


class NormalStates(NamedTuple):
    """How far the largest unit stands out in states of independent normal units of one size.

    Attributes:
        mean_log: the mean of :attr:`StandsOut.log_ratio`.
        quantile: what the ratio is below in 95 % of such states.
    """

    mean_log: float
    quantile: float


def normal_states(n_units: int) -> NormalStates:
    """The null model of :func:`stands_out`, by quadrature over the median; whatever the units' common size.

    Given the median, the units above it are independent, each with the half-normal distribution beyond the median, so
    the distribution of the largest one is a power. Raises ``ValueError`` for fewer than three units.
    """
    if n_units < 3:
        raise ValueError(f"n_units={n_units}: give at least 3, so that units lie on both sides of the median.")
    rank = (n_units + 1) // 2  # the lower one of two, as torch has it
    below = beta.ppf((np.arange(400) + 0.5) / 400, rank, n_units - rank + 1)
    median = halfnorm.ppf(below)
    log_ratio = np.linspace(0, np.log(9 / median[0]), 4000)
    within = erf(np.exp(log_ratio)[:, None] * median / np.sqrt(2))
    cdf = (((within - below) / (1 - below)).clip(0, 1) ** (n_units - rank)).mean(1)
    mean = float(np.trapezoid(1 - cdf, log_ratio))
    return NormalStates(mean, float(np.exp(np.interp(0.95, cdf, log_ratio))))


def beyond_normal(mean_log: Interval, groups: int, n_units: int) -> Tensor:
    """``(...)``: two-sided p of a mean log ratio and its jackknife over ``groups``, against :func:`normal_states`.

    Student's t of the difference from the null model's mean: below .05 where the 95 % interval does not hold that mean.
    NaN where nothing varies, as in the state of a BOS token, which is one and the same in every text.
    """
    error = (mean_log.high - mean_log.low) / 2 / float(student.ppf(0.975, groups - 1))
    error = torch.where(error > SAME, error, torch.nan)
    distance = ((mean_log.value - normal_states(n_units).mean_log) / error).abs()
    return torch.from_numpy(np.asarray(2 * student.sf(distance.cpu().numpy(), groups - 1)))


class Written(NamedTuple):
    """Where curves over depth rise and fall.

    Attributes:
        onset: ``(...)`` the sublayer at which the largest step up has been made.
        before, after: ``(...)`` the values on either side of it.
        unwritten: ``(...)`` the first sublayer behind the peak with less than half of it; -1 where there is none.
    """

    onset: Tensor
    before: Tensor
    after: Tensor
    unwritten: Tensor


def written(curves: Tensor) -> Written:
    """Where curves of largest absolute values ``(..., S)`` are written and unwritten.

    Raises ``ValueError`` for fewer than two sublayers.
    """
    if curves.shape[-1] < 2:
        raise ValueError(f"curves: {curves.shape[-1]} sublayers, and a step needs two.")
    at = curves.diff(dim=-1).argmax(-1)
    values = curves.gather(-1, torch.stack([at, at + 1], -1))
    peak, where = curves.max(-1)
    sublayers = torch.arange(curves.shape[-1], device=curves.device)
    fallen = (sublayers > where[..., None]) & (curves < peak[..., None] / 2)
    unwritten = torch.where(fallen.any(-1), fallen.int().argmax(-1), -1)
    return Written(at + 1, values[..., 0], values[..., 1], unwritten)


def largest_units(largest: Tensor, typical: Tensor, n: int) -> Tensor:
    """The ``n`` units that stand out most, the first one first.

    Args:
        largest: ``(C, S, D)`` the largest absolute value of each unit, by class of token; NaN where a class is empty.
        typical: ``(C, S)`` the size of a typical unit there.
        n: how many.
    """
    ratio = (largest / typical[..., None].clamp_min(torch.finfo(typical.dtype).tiny)).nan_to_num(nan=0.0)
    return ratio.flatten(0, 1).amax(0).topk(min(n, largest.shape[-1])).indices


def position_range(position: Tensor) -> Tensor:
    """The range of :data:`POSITIONS` that positions ``(n,)`` lie in: ``(n,)`` int64."""
    return torch.bucketize(position, torch.tensor(POSITIONS[1:], device=position.device), right=True)


def range_names() -> tuple[str, ...]:
    """What the ranges of :data:`POSITIONS` are called: ``0``, ``1 to 3``, ..., ``64 on``."""
    ends = [*(stop - 1 for stop in POSITIONS[1:]), None]
    spans = zip(POSITIONS, ends, strict=True)
    return tuple(f"{a} on" if b is None else str(a) if a == b else f"{a} to {b}" for a, b in spans)
