"""Phases over depth: where curves change their level, and whether curves without phases would seem to as well.

Any path seems to have phases: cut a random walk in two, and the halves differ. So each number of change points is held
against the same curves with the phases of their steps' Fourier components drawn anew, which keeps trend, spectrum and
the curves' relation to each other. Change points are found by ruptures (Truong et al. 2020), exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError

MOST = 4  # change points that are looked for
SHORTEST = 2  # places of a phase
LEAST_PLACES = 8  # with fewer, curves hold no more than one change point
_TIE = 1e-9


class Phases(NamedTuple):
    """The change points of some curves.

    Attributes:
        n: how many are beyond chance: the largest k whose ``p`` is at most .05.
        places: for 1, 2, ... change points, where the best ones are: the first place of each new phase.
        gain: ``(K,)`` by how much the k-th change point lowers the logarithm of the cost.
        null_gain: ``(K, n)`` the same of the surrogates.
        p: ``(K,)`` of each ``gain``, for all k together: how often surrogates have at *any* k a gain as rare among
            theirs (Westfall & Young 1993). A third phase can show where two of the three look alike.
    """

    n: int
    places: tuple[tuple[int, ...], ...]
    gain: Tensor
    null_gain: Tensor
    p: Tensor


def phases(curves: Tensor, *, most: int = MOST, n: int = 199, seed: int = 0) -> Phases:
    """The change points of curves over depth, and how many of them curves without phases would not have.

    Args:
        curves: ``(S, K)``, finite; each is standardised, and all change together.
        most: how many change points are looked for at most; fewer where depth has no room for more.
        n, seed: of the surrogates.

    Raises:
        UserError: where ruptures is not installed.
        ValueError: for other shapes, fewer than ``LEAST_PLACES`` places, what is not finite, or curves that never move.
    """
    if curves.ndim != 2 or len(curves) < LEAST_PLACES:
        raise ValueError(f"curves of shape {tuple(curves.shape)}: give (S, K) of at least {LEAST_PLACES} places.")
    if not curves.isfinite().all():
        raise ValueError("curves: they hold NaN or infinities. Leave those curves or places out.")
    moves = curves.amax(0) > curves.amin(0)
    if not moves.any():
        raise ValueError("curves: none of them ever changes.")
    curves = _standardised(curves[:, moves].to(torch.float64))
    most = min(most, len(curves) // SHORTEST - 1)
    places, costs = best_change_points(curves, most)
    drawn = [best_change_points(_standardised(one), most)[1] for one in phase_randomised(curves, n, seed)]
    gain, null_gain = _gains(costs), torch.stack([_gains(one) for one in drawn], dim=1)
    p = _p_of_any(gain, null_gain)
    beyond = (p <= 0.05).nonzero().flatten()
    return Phases(int(beyond[-1]) + 1 if len(beyond) else 0, places, gain, null_gain, p)


def best_change_points(curves: Tensor, most: int) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
    """For 1 to ``most`` change points of ``curves`` ``(S, K)``, the places of least cost, and the costs from 0 on.

    The cost is the squared distance from the mean of each phase, summed: ``(most + 1,)``.
    """
    signal = np.ascontiguousarray(curves.to(torch.float64).cpu().numpy())
    search = _ruptures().KernelCPD(kernel="linear", min_size=SHORTEST).fit(signal)
    places = tuple(tuple(int(end) for end in search.predict(n_bkps=k)[:-1]) for k in range(1, most + 1))
    costs = [_cost(signal, ()), *(_cost(signal, found) for found in places)]
    return places, torch.tensor(costs, dtype=torch.float64)


def phase_randomised(curves: Tensor, n: int, seed: int = 0) -> list[Tensor]:
    """``n`` surrogates of ``curves`` ``(S, K)``: their steps with other Fourier phases, summed again.

    All curves of a surrogate are turned by the same phases, which keeps their relation (Prichard & Theiler 1994); the
    mean step, and so the trend from end to end, stays.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = curves.to(torch.float64).diff(dim=0)
    spectrum = torch.fft.rfft(steps, dim=0)
    found = []
    for _ in range(n):
        phase = 2 * math.pi * torch.rand(len(spectrum), 1, generator=generator, dtype=torch.float64)
        phase[0] = 0
        if len(steps) % 2 == 0:  # the highest frequency of an even number of steps is real: its sign is drawn
            phase[-1] = (phase[-1] > math.pi) * math.pi
        turned = torch.fft.irfft(spectrum * torch.polar(torch.ones_like(phase), phase), n=len(steps), dim=0)
        found.append(torch.cat([curves[:1].to(torch.float64), curves[:1] + turned.cumsum(0)]))
    return found


def _gains(costs: Tensor) -> Tensor:
    before, after = costs[:-1], costs[1:]
    return torch.log(before.clamp(min=1e-12) / after.clamp(min=1e-12))


def _p_of_any(gain: Tensor, null_gain: Tensor) -> Tensor:
    """``(K,)``: the share of all curves, the observed ones among them, whose rarest gain is as rare as each gain is."""
    together = torch.cat([gain[:, None], null_gain], dim=1)
    rarity = (together[:, None, :] >= together[:, :, None] - _TIE).sum(-1)  # how many are as large, at this k
    return (rarity.amin(0)[None, :] <= rarity[:, :1]).to(torch.float64).mean(1)


def _cost(signal: np.ndarray, places: Sequence[int]) -> float:
    parts = np.split(signal, list(places))
    return float(sum(((part - part.mean(0)) ** 2).sum() for part in parts))


def _standardised(curves: Tensor) -> Tensor:
    spread = curves.std(0)
    return (curves - curves.mean(0)) / torch.where(spread > 0, spread, 1.0)


def _ruptures() -> Any:
    try:
        import ruptures
    except ImportError as error:
        raise UserError(
            "phases over depth need the package ruptures: pip install ruptures, or leave phases out of the measures."
        ) from error
    return ruptures
