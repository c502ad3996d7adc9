"""How regular a unit's steps over depth are: Fisher's g, which sees orbits that the number of turns cannot.

An orbit of period 5 or 6 makes as many turns as a random walk of equal length does (10 to 12 in 64 sublayers), so no
number of turns tells it apart. Its steps have one frequency, theirs have all.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from rsdyn.dynamics.linear_process import place_rms
from rsdyn.dynamics.rotation import check_sublayers, increments

LEAST_SUBLAYERS = 6  # with fewer there is one frequency, and its share is all


@cache
def waves(length: int) -> Tensor:
    """Cosines and sines of 1 to ``length // 2`` periods in ``length`` steps, ``(2, length // 2, length)`` float64.

    For Fourier transforms by matrix products: lengths are short and often prime, which a fast transform dislikes (59
    steps take it three times as long).
    """
    periods, step = torch.arange(1, length // 2 + 1, dtype=torch.float64), torch.arange(length, dtype=torch.float64)
    angle = 2 * math.pi / length * periods[:, None] * step
    return torch.stack([angle.cos(), angle.sin()])


def fisher_g(steps: Tensor) -> Tensor:
    """Largest share of the periodogram at one frequency, of ``steps`` ``(T, ...)`` to ``(...)`` (Fisher 1929).

    Steps are centred; the frequencies are 1 to ``(T - 1) // 2`` in ``T`` steps. Between 1 over their number and 1, the
    latter for a pure sinusoid of a whole number of periods; NaN where nothing is left but the mean. Raises
    ``ValueError`` for fewer than 5 steps.
    """
    length = len(steps)
    if length < LEAST_SUBLAYERS - 1:
        raise ValueError(
            f"steps has the shape {tuple(steps.shape)}: at least {LEAST_SUBLAYERS - 1} steps are needed, since with "
            "one frequency its share is always 1."
        )
    centred = (steps - steps.mean(0)).flatten(1)
    cos, sin = waves(length)[:, : (length - 1) // 2].to(centred)
    power = (cos @ centred).square_() + (sin @ centred).square_()
    total = power.sum(0)
    largest = power.amax(0)
    noise = centred.new_tensor(torch.finfo(centred.dtype).eps) ** 2 * steps.flatten(1).square().sum(0) * length
    return torch.where(total > noise, largest / total, torch.nan).view(steps.shape[1:])


def regularity(a: Tensor, of_all: Tensor | None = None) -> Tensor:
    """Fisher's g ``(U,)`` float64 of the steps of trajectories ``a`` ``(S, U)``, scaled by the RMS of their place.

    The RMS is over the units of ``of_all`` ``(S, U')``, by default of ``a``, each scaled to unit RMS first: steps grow
    with depth, and the largest would own the periodogram. NaN for units that do not move or are not finite. Raises
    ``ValueError`` for fewer than 6 sublayers.
    """
    check_sublayers(a)
    steps, _ = increments(a, torch.float64)
    every = steps if of_all is None else increments(of_all, torch.float64)[0]
    scale = place_rms(every[:, every.isfinite().all(0)].cpu()).to(steps.device)
    return fisher_g(steps / scale[:, None])
