"""How surrogate trajectories are drawn: random orders, signs and spectra, for a block of units at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsdyn.dynamics.linear_process import LinearProcess, fit_linear_process, place_rms
from rsdyn.dynamics.regularity import waves
from rsdyn.dynamics.rotation import check_sublayers, gradient_steps, increments
from rsdyn.labels import SURROGATES

NULLS = tuple(SURROGATES)
WINDOWED = ("increment_shuffle_windowed", "increment_shuffle_scaled")
POOLED = ("increment_shuffle_scaled", "innovation_shuffle")  # those that estimate something over all units
# Where each takes its random numbers from: they stay as they are when the ladder grows.
BRANCHES = {
    "layer_shuffle": 0,
    "layer_shuffle_regradient": 1,
    "increment_shuffle_windowed": 2,
    "increment_shuffle": 3,
    "sign_flip": 4,
    "iaaft": 5,
    "increment_shuffle_scaled": 6,
    "innovation_shuffle": 7,
}

COLUMNS = 2048  # trajectories at a time: arrays of 64 sublayers stay near a core's cache, and malloc keeps their pages
LANES = 32  # columns come in multiples of this, so that no result depends on where a SIMD loop ends


def _groups(null: str, length: int, window: int, kinds: int) -> NDArray[np.int64]:
    """Which positions may trade places: ``(length,)`` group numbers."""
    position = np.arange(length)
    if null in WINDOWED:
        return position // window * kinds + position % kinds
    if null in ("increment_shuffle", "sign_flip"):
        return position % kinds
    return np.zeros(length, dtype=np.int64)


def _orders(words: NDArray[Any], groups: NDArray[np.int64]) -> Tensor:
    """Random orders ``(..., length)`` within the groups, from random ``words`` of that shape.

    Each word keeps its high random bits, under the number of its group and above its own index: one sort of such words
    is several times faster than an argsort, and two words that draw the same random bits are rare enough to ignore.
    """
    bits, index_bits = 8 * words.itemsize, int(groups.size - 1).bit_length()
    group_bits = int(groups.max()).bit_length()
    mask = words.dtype.type((1 << index_bits) - 1)
    words = words >> words.dtype.type(group_bits)
    words &= ~mask
    words |= ((groups << (bits - group_bits)) | np.arange(groups.size)).astype(words.dtype)
    words.sort(axis=-1)
    words &= mask
    places = np.argsort(groups, kind="stable")  # where the sorted words of each group go
    if group_bits:
        words = np.take(words, np.argsort(places), axis=-1)
    return torch.from_numpy(words.view(f"i{words.itemsize}"))


def _iaaft(series: Tensor, starts: Tensor, iterations: int = 10) -> Tensor:
    """Series ``(U, m, length)`` that have the values of ``series`` ``(U, length)`` and nearly its spectrum.

    Iterated amplitude-adjusted Fourier transform (Schreiber and Schmitz 1996), from the orders ``starts``
    ``(U, m, length)``: impose the amplitudes, then the values by rank (of 63 values the spectrum is as near as it gets
    after 10 ``iterations``: 5 % off). Ranks mind neither the mean nor a common factor, so both are left out. The
    transforms are matrix products (:func:`rsdyn.dynamics.regularity.waves`), one per unit, so that its bits don't
    depend on the units beside it.
    """
    width, count, length = starts.shape
    basis = waves(length).to(series.dtype)
    amplitude = torch.hypot(*(basis @ series.T)).T  # (U, frequencies)
    if length % 2 == 0:
        amplitude[:, -1] /= 2  # the highest frequency is its own mirror image
    # products with multiples of 16 columns take a quarter to a half less than with 59 or 31
    back = torch.nn.functional.pad((basis * amplitude[:, None, :, None]).flatten(1, 2), (0, -length % 16))
    basis = basis.flatten(0, 1).expand(width, -1, -1)
    ordered = series.sort(-1).values[:, None].expand(starts.shape)
    index, index_bits = torch.arange(length), (1 << (length - 1).bit_length()) - 1
    found = series[:, None].expand(starts.shape).gather(-1, starts.long())
    near, keys = found.new_empty(width, count, back.shape[-1]), torch.empty(starts.shape, dtype=torch.float64)
    spectrum, scale = found.new_empty(width, 2, length // 2, count), found.new_empty(width, length // 2, count)
    ranks, tiny = keys.view(torch.int64), found.new_tensor(1e-37)
    for _ in range(iterations):
        torch.bmm(basis, found.mT, out=spectrum.flatten(1, 2))
        cosines, sines = spectrum.unbind(1)
        torch.addcmul(tiny, cosines, cosines, out=scale).addcmul_(sines, sines).rsqrt_()
        torch.bmm(spectrum.mul_(scale[:, None]).flatten(1, 2).mT, back, out=near)
        # the low bits of a float32 in 64 bits are free, for its index: one sort of both is fastest
        keys.copy_(near[..., :length])
        ranks.bitwise_or_(index)
        keys.numpy().sort(axis=-1)
        found.scatter_(-1, ranks.bitwise_and_(index_bits), ordered)
    return found


class Source:
    """What the surrogates of some units are made from: their steps, scaled, and their random numbers."""

    def __init__(
        self,
        steps: Tensor,
        null: str,
        seed: int,
        units: Sequence[int] | None,
        window: int,
        kinds: int,
        pooled: Tensor | LinearProcess | None = None,
    ) -> None:
        """``steps`` ``(S - 1, U)`` float64; ``units`` the index of each column in all, or None to share the numbers.

        ``pooled`` is what :func:`pooled_over_units` says of the null.
        """
        points = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])
        self.null, self.shared, self.pooled = null, units is None, pooled
        self.steps = (points if null.startswith("layer_shuffle") else steps).to(torch.float32)
        if isinstance(pooled, LinearProcess):
            self.series = pooled.innovations(steps)
        elif pooled is not None:
            self.series = (steps / pooled[:, None]).to(torch.float32)
        else:
            self.series = self.steps
        self.slopes = torch.gradient(points, dim=0)[0].to(torch.float32) if null == "layer_shuffle" else None
        self.length, self.width = self.series.shape
        self.groups = _groups(null, self.length, window, kinds)
        self.centre = torch.zeros_like(self.series)
        for kind in range(kinds):
            self.centre[kind::kinds] = steps[kind::kinds].mean(0) if null == "sign_flip" else 0.0
        self.word = np.uint32 if int(self.groups.max()).bit_length() + self.length.bit_length() <= 14 else np.uint64
        keys = [0] if units is None else [1 + unit for unit in units]
        seeds = [np.random.SeedSequence(seed, spawn_key=(BRANCHES[null], key)) for key in keys]
        self.draws = [np.random.SFC64(one) for one in seeds]
        self.again = np.random.SFC64(seeds[0])

    def observed(self) -> tuple[Tensor, Tensor]:
        """Tangents ``(S - 1, U)`` of the trajectories themselves, rounded as those of the surrogates are."""
        return self._tangents(self.steps, self.slopes)

    def away(self, n: int) -> tuple[Tensor, float] | None:
        """How far the correlations that a linear process keeps are in each shared surrogate from those observed.

        ``(n, k)``, and how much of what follows from that is to be taken out: all, or half where units move together.
        None for other nulls and where each unit has signs of its own.
        """
        if not (self.shared and isinstance(self.pooled, LinearProcess) and self.pooled.first):
            return None
        signs = self._draw([self.again], n)[0].to(torch.float64)
        away = torch.cat([self.pooled.kept(some) - self.pooled.kept() for some in signs.split(64)])
        return away, 1.0 if self.pooled.certain else 0.5

    def blocks(self, n: int, rows: int | None = None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Slices of ``n`` surrogates and of the units, and tangents ``(S - 1, surrogates, units)`` for them.

        All units come before the next surrogates; the last surrogates may be more than ``n``.
        """
        units = self.width if self.shared and self.null != "iaaft" else 8
        rows = rows or max(8, COLUMNS // units)
        lot = -(-256 // rows) * rows if self.shared else rows  # drawn at once
        for first in range(0, n, lot):
            count = min(lot, -(-(n - first) // 8) * 8)  # with units a multiple of 8, this fills the lanes
            drawn = self._draw(self.draws, count) if self.shared else None
            for row in range(0, count, rows):
                some = slice(row, min(row + rows, count))
                for start in range(0, self.width, units):
                    cols = slice(start, start + units)
                    mine = self._draw(self.draws[cols], count) if drawn is None else drawn[:, some]
                    yield slice(first + row, first + some.stop), cols, *self._surrogates(mine, cols)

    def _draw(self, draws: list[np.random.SFC64], rows: int) -> Tensor:
        """Orders, or signs where a null flips them, ``(units, rows, length)`` from the next random words of units."""
        per_row = -(-self.length * np.dtype(self.word).itemsize // 8)
        raw = np.stack([draw.random_raw(rows * per_row) for draw in draws])
        words: NDArray[Any] = raw.view(self.word).reshape(len(draws), rows, -1)[..., : self.length]
        if self.null in ("sign_flip", "innovation_shuffle"):
            return torch.from_numpy((words >> self.word(8 * words.itemsize - 1)).astype(np.float32)).mul_(-2).add_(1)
        return _orders(words, self.groups)

    def _surrogates(self, drawn: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        series = self.series[:, cols]
        if self.null == "sign_flip":
            centre = self.centre[:, None, cols]
            return self._tangents(_depth_first(drawn) * (series[:, None] - centre) + centre)
        if self.null == "iaaft":
            return self._tangents(_depth_first(_iaaft(series.T.contiguous(), drawn.expand(series.shape[1], -1, -1))))
        if isinstance(self.pooled, LinearProcess):
            flipped = _depth_first(drawn).to(torch.float64) * series[:, None]
            # in float64, so that no number depends on how many columns a product has
            mixed = (self.pooled.mix @ flipped.flatten(1)).mul_(self.pooled.scale[:, None])
            return self._tangents(mixed.to(torch.float32).view(flipped.shape))
        if self.pooled is not None:
            return self._tangents(_permuted(series, drawn) * self.pooled.to(torch.float32)[:, None, None])
        slopes = None if self.slopes is None else _permuted(self.slopes[:, cols], drawn)
        return self._tangents(_permuted(series, drawn), slopes)

    def _tangents(self, series: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = series.diff(dim=0) if self.null.startswith("layer_shuffle") else series
        return steps, gradient_steps(steps) if slopes is None else slopes.diff(dim=0)


def _permuted(series: Tensor, order: Tensor) -> Tensor:
    """``series`` ``(length, U)`` as ``(length, m, U)``, in orders ``(1, m, length)`` for all or ``(U, m, length)``."""
    length, width = series.shape
    if len(order) == 1:
        return series.index_select(0, order[0].T.reshape(-1)).view(length, -1, width)
    order = order + torch.arange(0, width * length, length, dtype=order.dtype)[:, None, None]
    return _depth_first(series.T.reshape(-1).index_select(0, order.view(-1)).view(order.shape))


def _depth_first(rows: Tensor) -> Tensor:
    """``(units, m, length)`` to ``(length, m, units)``, in memory with the length outermost, as the kernel reads it."""
    return rows.permute(2, 0, 1).contiguous().transpose(1, 2)


def padded(width: int) -> int:
    """The width that is worked on, in whole lanes."""
    return -(-width // LANES) * LANES


def scaled_steps(a: Tensor, moving: Tensor) -> Tensor:
    """Scaled steps ``(S - 1, U')`` float64 of ``a`` ``(S, U)``, zero for units not ``moving``, padded to full lanes."""
    steps = torch.where(moving, increments(a, torch.float64)[0], 0.0)
    return torch.nn.functional.pad(steps, (0, padded(a.shape[1]) - a.shape[1]))


def pooled_over_units(
    null: str, trajectories: Tensor, moving: Tensor | None, kinds: int
) -> Tensor | LinearProcess | None:
    """What a null takes from all units: the RMS of each place, a linear process, or nothing.

    ``trajectories`` ``(..., S, U)``, of which only units ``moving`` ``(U,)`` count, where given.
    """
    if null not in POOLED:
        return None
    steps, _ = increments(trajectories, torch.float64)
    steps = torch.where(moving, steps, 0.0) if moving is not None else steps.nan_to_num(0.0, 0.0, 0.0)
    steps = steps.flatten(1)
    return place_rms(steps) if null == "increment_shuffle_scaled" else fit_linear_process(steps, kinds)


def check(
    a: Tensor, null: str, n: int, seed: int, window: int = 8, sites_per_layer: int = 2, first_unit: int = 0
) -> None:
    """Raise ``ValueError`` for trajectories or settings that a null model does not take."""
    check_sublayers(a)
    if a.dim() != 2:
        raise ValueError(
            f"a has the shape {tuple(a.shape)}: (sublayers, units) is needed; test one trajectory at a time."
        )
    if null not in NULLS:
        near = get_close_matches(null, NULLS, 1, 0.0)[0]
        raise ValueError(f"null={null!r} is not known: one of {', '.join(reversed(NULLS))}; did you mean {near!r}?")
    for name, value, least, cure in (
        ("n", n, 1, "1000 is the paper's"),
        ("seed", seed, 0, "any number from 0"),
        ("sites_per_layer", sites_per_layer, 1, "2 with resid_mid, 1 without"),
        ("first_unit", first_unit, 0, "the index of the first unit"),
        ("window", window, 2 * sites_per_layer, "below, no two increments of a kind share a window; 8 is the default"),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed ({cure}).")
