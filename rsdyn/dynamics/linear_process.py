"""The linear process that steps over depth follow, as far as second-order facts tell: for ``innovation_shuffle``.

A unit's steps are a scale of its own, times a scale of each place, times a process over depth that is the same for all
units: mixes of independent innovations up to that place. Surrogates with other innovations keep the scales, the
correlation of steps over depth and, if all units' innovations change together, the correlation between units.

The correlation is that of near lags, and what an autoregression makes of them further apart, as in the autoregressive
and the linear process bootstrap (Buehlmann 1997, Bernoulli 3:123; McMurry and Politis 2010, J. Time Series Anal.
31:471), not all ``T x T`` of it. Factors that units share show up in the full matrix as correlations of places far
apart; a process fitted to them has their realisation built in, and its surrogates then vary far too little: 37 % false
rejections at a correlation between units of .5, and 50 % at .9 (160 units, the step sizes of SmolLM2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAGS = 3  # up to which correlations are kept, for each kind of step
ENOUGH = 0.05  # standard error of a lag's correlation above which two lags of all kinds together are kept
LEAST = 0.05  # eigenvalue of a correlation matrix


class LinearProcess(NamedTuple):
    """The process of ``T`` steps, in float64.

    Attributes:
        scale: ``(T,)`` of each place.
        mix: ``(T, T)`` lower triangular: scaled steps are ``mix @ innovations``.
        correlation: ``(T, T)`` of scaled steps between places, over units.
        first, second: places of the pairs whose mean correlation is kept, a tensor of each per lag and kind.
        certain: whether the units move independently enough for all lags and kinds.
    """

    scale: Tensor
    mix: Tensor
    correlation: Tensor
    first: list[Tensor]
    second: list[Tensor]
    certain: bool

    def innovations(self, steps: Tensor) -> Tensor:
        """Innovations ``(T, U)`` of steps ``(T, U)``."""
        return torch.linalg.solve_triangular(self.mix, steps / self.scale[:, None], upper=False)

    def kept(self, signs: Tensor | None = None) -> Tensor:
        """The correlations that the process keeps, ``(k,)``; as ``(n, k)`` in surrogates by ``signs`` ``(n, T)``."""
        return _lags(self.correlation if signs is None else _flipped(self, signs), self.first, self.second)


def place_rms(steps: Tensor) -> Tensor:
    """RMS ``(T,)`` over units of each step, each unit's steps scaled to unit RMS first; 1 where nothing moves."""
    unit = steps.square().mean(0).sqrt()
    scaled = steps[:, unit > 0] / unit[unit > 0]
    found = scaled.square().mean(1).sqrt() if scaled.shape[1] else torch.zeros(len(steps), dtype=steps.dtype)
    return torch.where(found > 0, found, 1.0)


def place_scale(steps: Tensor, rounds: int = 10) -> Tensor:
    """Scale ``(T,)`` of each place, of steps ``(T, U)`` whose units have scales of their own, by alternating medians.

    Medians, since by RMS one outlier of a heavy tail squeezes its whole unit. A place or unit whose median step is 0
    takes the RMS, and 1 where all are 0.
    """
    size = steps.abs()
    place = torch.ones_like(size[:, 0])
    for _ in range(rounds):
        unit = _typical(size / place[:, None], 0)
        place = _typical(size / unit, 1)
    return place


def _typical(size: Tensor, dim: int) -> Tensor:
    middle = size.quantile(0.5, dim) if size.numel() < 1 << 24 else size.median(dim).values
    rms = size.square().mean(dim).sqrt()
    return torch.where(middle > 0, middle, torch.where(rms > 0, rms, 1.0))


def fit_linear_process(steps: Tensor, kinds: int) -> LinearProcess:
    """The process of steps ``(T, U)`` of ``kinds`` kinds that take turns (attention's and the MLP's are 2).

    Three lags are kept for each kind, or two of all kinds together where the units move so much together that they tell
    no more: the correlations of places far apart say how much. The surrogates shall have them, whose innovations are
    not all of one size, so the mixing is found by iteration.

    Raises ``ValueError`` unless there are more units that move than steps.
    """
    length = len(steps)
    steps = steps[:, (steps != 0).any(0)].to(torch.float64)
    if 0 < steps.shape[1] <= length:
        raise ValueError(
            f"innovation_shuffle: {steps.shape[1]} units that move make {length} steps each. The correlation of steps "
            "over depth is pooled over units, and needs more units than steps: give of_all the trajectories of single "
            "sequences, (sequences, sublayers, units), or take increment_shuffle_scaled."
        )
    if steps.shape[1] == 0:
        one = torch.eye(length, dtype=torch.float64)
        return LinearProcess(one.diagonal().clone(), one, one, [], [], False)
    place = place_scale(steps)
    scaled = steps / place[:, None]
    # each unit weighs the same, whatever its outliers. To clip these would change what a correlation is: beside a step
    # of 10 a lag of -.3 makes one of -3, which clipped values would take for -.75
    scaled = scaled / scaled.square().mean(0).sqrt()
    correlation = _unit_diagonal(scaled @ scaled.T)
    far = torch.ones_like(correlation).triu(2 * LAGS + 1).bool()
    common = float(correlation[far].square().mean()) if far.any() else 1.0
    certain = (common * kinds / length) ** 0.5 < ENOUGH
    lags, kinds = (LAGS, kinds) if certain else (LAGS - 1, 1)
    lags = min(lags, (length - 1) // kinds)
    starts = [torch.arange(kind, length - lag, kinds) for lag in range(1, lags + 1) for kind in range(kinds)]
    steps_on = [lag for lag in range(1, lags + 1) for _ in range(kinds)]
    pairs = [(first, first + lag) for first, lag in zip(starts, steps_on, strict=True) if len(first)]
    first, second = [p[0] for p in pairs], [p[1] for p in pairs]
    wanted = _lags(correlation, first, second)
    used = wanted.clone()
    for _ in range(4):
        process = LinearProcess(place, _mix(used, first, second, length), correlation, first, second, certain)
        used = (used + wanted - _lags(_expected(process), first, second)).clamp(-0.95, 0.95)
    return process._replace(mix=_mix(used, first, second, length))


def _lags(correlation: Tensor, first: list[Tensor], second: list[Tensor]) -> Tensor:
    if not first:
        return correlation.new_zeros(*correlation.shape[:-2], 0)
    return torch.stack([correlation[..., a, b].mean(-1) for a, b in zip(first, second, strict=True)], -1)


def _mix(used: Tensor, first: list[Tensor], second: list[Tensor], length: int) -> Tensor:
    """Mixing ``(T, T)`` of the autoregression that has these correlations at its lags, and goes on beyond them."""
    matrix = torch.eye(length, dtype=torch.float64)
    for value, a, b in zip(used, first, second, strict=True):
        matrix[a, b] = matrix[b, a] = value
    order = int(second[-1][0] - first[-1][0]) if first else 0
    whiten = torch.eye(length, dtype=torch.float64)
    for s in range(1, length):
        past = slice(max(0, s - order), s)
        inside, with_it = matrix[past, past], matrix[past, s]
        values = torch.linalg.eigvalsh(matrix[past.start : s + 1, past.start : s + 1])
        if float(values[0]) < LEAST:  # estimates of few units: no process has them all, so all are weakened alike
            weaken = (1 - LEAST) / (1 - float(values[0]))
            inside, with_it = (
                inside * weaken + torch.eye(len(inside), dtype=torch.float64) * (1 - weaken),
                with_it * weaken,
            )
        weights = torch.linalg.solve(inside, with_it)
        whiten[s, past] = -weights
        whiten[s] /= (1 - weights @ with_it).sqrt()
    return torch.linalg.inv(whiten)


def _whitened(process: LinearProcess) -> Tensor:
    half = torch.linalg.solve_triangular(process.mix, process.correlation, upper=False)
    return torch.linalg.solve_triangular(process.mix, half.T, upper=False)


def _expected(process: LinearProcess) -> Tensor:
    """Correlations of surrogates on average: flipped signs leave the innovations' sizes, and no correlation."""
    return _unit_diagonal(process.mix * _whitened(process).diagonal() @ process.mix.T)


def _flipped(process: LinearProcess, signs: Tensor) -> Tensor:
    """Correlations ``(n, T, T)`` of surrogates by ``signs`` ``(n, T)``."""
    mixes = process.mix * signs[:, None, :]
    return _unit_diagonal(mixes @ _whitened(process) @ mixes.mT)


def _unit_diagonal(matrix: Tensor) -> Tensor:
    size = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    return matrix / size[..., :, None] / size[..., None, :]
