"""How far a number would move with other sequences: the delete-a-group jackknife."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, all of the estimate's shape."""

    value: Tensor
    low: Tensor
    high: Tensor


def jackknife(value: Tensor, without: Tensor, level: float = 0.95) -> Interval:
    """Confidence interval of a statistic from its values with one group of samples left out at a time.

    Args:
        value: the statistic of all samples, any shape ``(...)``.
        without: ``(G, ...)``, the statistic of all samples but those of group g. The groups are of about equal size and
            chosen without looking at the samples.
        level: of confidence.

    The standard error is ``sqrt((G - 1) / G sum (without_g - mean)^2)`` and the interval takes Student's t with
    ``G - 1`` degrees of freedom (Efron 1982). It holds for smooth functions of means, such as correlations and their
    averages over units; dependence among units does not matter to it, since whole sequences are left out. Raises
    ``ValueError`` for fewer than two groups.
    """
    groups = without.shape[0]
    if groups < 2:
        raise ValueError(f"without has {groups} group(s), but a jackknife needs at least 2: split the samples further.")
    spread = (without - without.mean(0)).square().sum(0)
    error = (spread * (groups - 1) / groups).sqrt() * float(student.ppf(0.5 + level / 2, groups - 1))
    value = torch.as_tensor(value, dtype=without.dtype, device=without.device)
    return Interval(value, value - error, value + error)
