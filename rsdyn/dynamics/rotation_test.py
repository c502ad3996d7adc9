"""Null models for rotations: surrogates of a unit's trajectory that keep one thing and destroy another.

What each keeps, and so what it tests (METHOD section 7); the rates are of 63 increments, at p <= 0.05:

==============================  =======================================================================================
``innovation_shuffle``          the scale of each unit and each place, the correlation of near steps and, shared, that
                                of units: a linear process of symmetric innovations, whose signs are drawn anew
                                (:mod:`rsdyn.dynamics.linear_process`). It keeps most, and is the one for claims: of a
                                unit and, shared, of all units.
``increment_shuffle_scaled``    as the windowed one, each increment brought to the size of its new place: a walk of any
                                sizes, whose increments are independent over depth. For claims about single units.
``layer_shuffle``               the points (a_s, g_s) of the portrait, in any order: the paper's null. No trajectory is
                                like that: it rejects white noise and nearly every random walk, and lets a clean orbit
                                of period 16 pass. ``R`` is 0, give or take 3.25.
``layer_shuffle_regradient``    the activations in any order, their gradient taken anew: white noise, ``R`` about -15.
``increment_shuffle_windowed``  the increments, in any order within ``window`` successive ones, attention's and the
                                MLP's apart: a walk whose scale changes slowly with depth.
``increment_shuffle``           the same over the whole depth: a walk with one distribution for each kind of increment.
``sign_flip``                   the sizes of the increments about their mean, each kind's own, with random signs: a walk
                                with symmetric increments. The mean must hold over the whole depth: with heavy tails
                                and a scale that grows sevenfold 8 % are rejected, under a steady drift 2 %.
``iaaft``                       the spectrum and the values of the increments, so it tests nonlinearity only: a linear
                                Gaussian process seen through any monotone map. Short for its Fourier transform: it
                                rejects 5 % of white increments, 10 % of those with a correlation of 0.9.
==============================  =======================================================================================

Random numbers depend on the seed, the null and the unit's index alone, so units can be split over blocks, threads and
processes in any way. A *shared* surrogate treats all units alike and keeps their correlation; with an *own* one
for each unit they are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsdyn.dynamics.linear_process import LinearProcess, place_rms
from rsdyn.dynamics.regularity import fisher_g, regularity
from rsdyn.dynamics.rotation import Portrait, gradient_steps, increments, power_of_two, rotations, turns, zero_tangents
from rsdyn.dynamics.significance import (
    TIE,
    Part,
    RegularityTest,
    RotationTest,
    Whole,
    benjamini_hochberg,
    brought_to,
    collect,
    join,
    mid_rank_p,
    result,
    summary,
    two_sided_p,
    unit_sums,
    upper_p,
)
from rsdyn.dynamics.surrogates import NULLS, Source, check, padded, pooled_over_units, scaled_steps
from rsdyn.threads import side_by_side

__all__ = [
    "NULLS",
    "RegularityTest",
    "RotationTest",
    "benjamini_hochberg",
    "join",
    "mid_rank_p",
    "paired_swap_test",
    "pooled_test",
    "regularity_test",
    "rotation_and_regularity_test",
    "rotation_test",
    "surrogate_turns",
    "surrogates",
    "two_sided_p",
]


def rotation_test(
    a: Tensor,
    null: str = "increment_shuffle_windowed",
    n: int = 1000,
    seed: int = 0,
    *,
    shared: bool = False,
    window: int = 8,
    sites_per_layer: int = 2,
    first_unit: int = 0,
    of_all: Tensor | LinearProcess | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> RotationTest:
    """Rotations of each unit of ``a`` ``(S, U)`` against ``n`` surrogates (paper 2.6, Fig. 2B and C; METHOD section 7).

    Args:
        a: trajectories, any float dtype and device; the work is done on the CPU in float32, results go back.
        null: one of :data:`NULLS`; the paper's is ``layer_shuffle``.
        n: surrogates per unit.
        seed: with the null and the unit's index, it fixes every random number.
        shared: one random order for all units (for a claim about the population) instead of one for each.
        window: for the windowed nulls, how many successive increments make a window, all kinds together: 8 are 4 of
            attention and 4 of the MLP. Of orbits of period 16 in noise of a tenth of their size it finds 86 %, with 16
            all; but wider windows trust the scale of increments for longer.
        sites_per_layer: 2, or 1 for a stream without ``resid_mid``, whose increments are of one kind. Increments
            trade places only within their kind.
        first_unit: the index, in the whole, of ``a``'s first unit, when units are split; :func:`join` puts the parts
            together.
        of_all: trajectories of all units ``(S, U')``, where ``a`` holds some of them, or of single sequences
            ``(N, S, U')``, where units are too few: two nulls estimate over them what the units have in common. Or
            the process that :func:`rsdyn.dynamics.surrogates.pooled_over_units` made of them.
        on_block: called with the number of units done and of all, for a progress bar.

    Raises ``ValueError`` for an unknown null, fewer than 3 sublayers, or a count out of range, and with
    ``innovation_shuffle`` for fewer units that move than steps. A trajectory too short for anything to trade places (3
    sublayers of 2 kinds) is no error: every p is 1.
    """
    check(a, null, n, seed, window, sites_per_layer, first_unit)
    options = _Options(null, n, seed, shared, window, sites_per_layer, first_unit)
    return _against(a.cpu(), [_turns(a.cpu())], options, of_all, on_block)[0].to(a.device)


def regularity_test(
    a: Tensor,
    null: str = "increment_shuffle_scaled",
    n: int = 1000,
    seed: int = 0,
    *,
    shared: bool = False,
    window: int = 8,
    sites_per_layer: int = 2,
    first_unit: int = 0,
    of_all: Tensor | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> RegularityTest:
    """Regularity of each unit of ``a`` ``(S, U)`` against the surrogates that its turns are held against.

    The arguments and the random numbers are those of :func:`rotation_test`, and so is the result, with Fisher's g in
    the place of ``R``; ``p`` is one-sided, the share of surrogates at least as regular, and ``population`` the mean g
    over units. Raises ``ValueError`` for fewer than 6 sublayers too.
    """
    check(a, null, n, seed, window, sites_per_layer, first_unit)
    options = _Options(null, n, seed, shared, window, sites_per_layer, first_unit)
    return RegularityTest(*_against(a.cpu(), [_regular(a.cpu(), of_all)], options, of_all, on_block)[0]).to(a.device)


def rotation_and_regularity_test(
    a: Tensor,
    null: str = "increment_shuffle_scaled",
    n: int = 1000,
    seed: int = 0,
    *,
    shared: bool = False,
    window: int = 8,
    sites_per_layer: int = 2,
    first_unit: int = 0,
    of_all: Tensor | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> tuple[RotationTest, RegularityTest]:
    """:func:`rotation_test` and :func:`regularity_test` with the same arguments, on surrogates that are made once."""
    check(a, null, n, seed, window, sites_per_layer, first_unit)
    options = _Options(null, n, seed, shared, window, sites_per_layer, first_unit)
    both = [_turns(a.cpu()), _regular(a.cpu(), of_all)]
    turning, regular = _against(a.cpu(), both, options, of_all, on_block)
    return turning.to(a.device), RegularityTest(*regular).to(a.device)


class _Options(NamedTuple):
    null: str
    n: int
    seed: int
    shared: bool
    window: int
    sites_per_layer: int
    first_unit: int


class _Statistic(NamedTuple):
    """A statistic of tangents ``(S - 1, ...)``, what it is ``(U,)`` of the units, NaN for none, and its p."""

    of: Callable[[Tensor, Tensor], Tensor]
    exact: Tensor
    p_of: Callable[[Tensor, Tensor], Tensor]


def _turns(a: Tensor) -> _Statistic:
    return _Statistic(turns, torch.where(zero_tangents(a) < 1, rotations(a), torch.nan), mid_rank_p)


def _regular(a: Tensor, of_all: Tensor | None) -> _Statistic:
    every = a if of_all is None else of_all.cpu()
    mean = every if every.dim() == 2 else every.mean(0)
    steps, _ = increments(mean, torch.float64)
    scale = place_rms(steps[:, steps.isfinite().all(0)]).to(torch.float32)

    def of(x: Tensor, y: Tensor) -> Tensor:
        return fisher_g(x / scale.view(-1, *[1] * (x.dim() - 1)))

    return _Statistic(of, regularity(a, mean), upper_p)


def _pooled(
    a: Tensor, moving: Tensor, of_all: Tensor | LinearProcess | None, options: _Options
) -> Tensor | LinearProcess | None:
    if isinstance(of_all, LinearProcess):
        return of_all
    every, counted = (a, moving) if of_all is None else (of_all.cpu(), None)
    return pooled_over_units(options.null, every, counted, options.sites_per_layer)


def _against(
    a: Tensor,
    statistics: Sequence[_Statistic],
    options: _Options,
    of_all: Tensor | LinearProcess | None,
    on_block: Callable[[int, int], None] | None,
) -> list[RotationTest]:
    """Statistics of the units of ``a`` against those of their surrogates, each surrogate made once for all of them.

    The units that the first one is of are those that have surrogates.
    """
    null, n, seed, shared, window, sites_per_layer, first_unit = options
    width, size = a.shape[1], 256
    moving = statistics[0].exact.isfinite()
    pooled = _pooled(a, moving, of_all, options)

    def source_of(cols: slice) -> Source:
        units = (
            None if shared else range(first_unit + cols.start, first_unit + cols.start + padded(cols.stop - cols.start))
        )
        return Source(scaled_steps(a[:, cols], moving[cols]), null, seed, units, window, sites_per_layer, pooled)

    away = source_of(slice(0, 1)).away(n) if shared else None

    def block(start: int) -> list[Part]:
        cols = slice(start, min(start + size, width))
        source = source_of(cols)
        found = _of_surrogates(source, [statistic.of for statistic in statistics], n)
        observed, parts = source.observed(), []
        for values, statistic in zip(found, statistics, strict=True):
            drawn = values if away is None else brought_to(values, *away)
            counted = statistic.exact[cols].isfinite()
            parts.append(summary(statistic.of(*observed), drawn, counted, statistic.p_of))
        return parts

    blocks = side_by_side(block, range(0, width, size), "cpu")
    tests = []
    exacts = [statistic.exact for statistic in statistics]
    for exact, whole in zip(exacts, collect(blocks, n, exacts, on_block), strict=True):
        at_all = torch.stack([exact.abs().nanmean(), exact.nanmean()])
        tests.append(result(null, n, shared, exact, whole, exact - whole.null_mean, at_all))
    return tests


def _of_surrogates(source: Source, statistics: Sequence[Callable[[Tensor, Tensor], Tensor]], n: int) -> Tensor:
    """Statistics of ``n`` surrogates ``(statistics, n, U)``, 0 for units that don't move; units in whole lanes."""
    found = torch.empty(len(statistics), n, source.width)
    for rows, some, x, y in source.blocks(n):
        for values, statistic in zip(found, statistics, strict=True):
            values[rows, some] = statistic(x, y)[: max(0, n - rows.start)]
    return found.nan_to_num_(0.0)


def surrogate_turns(
    a: Tensor,
    null: str,
    units: Sequence[int],
    n: int = 1000,
    seed: int = 0,
    *,
    shared: bool = False,
    window: int = 8,
    sites_per_layer: int = 2,
) -> Tensor:
    """Turns ``(n, units)`` of the surrogates that :func:`rotation_test` counts, of some ``units`` of ``a`` ``(S, U)``.

    Counter-clockwise is positive. The arguments are those of :func:`rotation_test`, and so are the random numbers;
    units that do not move or are not finite have 0 turns. ``innovation_shuffle``, shared, is as drawn, where the test
    brings it to the observed correlations.
    """
    check(a, null, n, seed, window, sites_per_layer)
    a, some = a.cpu(), [*units]
    moving = zero_tangents(a[:, some]) < 1
    pooled = _pooled(a, moving, a, _Options(null, n, seed, shared, window, sites_per_layer, 0))
    lanes = None if shared else [*some, *range(padded(len(some)) - len(some))]
    source = Source(scaled_steps(a[:, some], moving), null, seed, lanes, window, sites_per_layer, pooled)
    return _of_surrogates(source, [turns], n)[0, :, : len(some)]


def surrogates(
    a: Tensor,
    null: str = "increment_shuffle_windowed",
    n: int = 1000,
    seed: int = 0,
    *,
    shared: bool = False,
    window: int = 8,
    sites_per_layer: int = 2,
    first_unit: int = 0,
    of_all: Tensor | None = None,
) -> Iterator[Portrait]:
    """Portraits of the surrogates that :func:`rotation_test` counts, in blocks of some surrogates ``(m, S, U)``.

    For plots and for tests: the arguments are those of :func:`rotation_test`, and so are the random numbers. ``x`` is
    the surrogate's trajectory less its first value, in ``a``'s own unit and in float32; units that do not move or are
    not finite stay at 0. Blocks stay near 16 MiB.
    """
    check(a, null, n, seed, window, sites_per_layer, first_unit)
    a = a.cpu()
    depth, width = a.shape
    units = None if shared else range(first_unit, first_unit + padded(width))
    moving = zero_tangents(a) < 1
    pooled = _pooled(a, moving, of_all, _Options(null, n, seed, shared, window, sites_per_layer, first_unit))
    source = Source(scaled_steps(a, moving), null, seed, units, window, sites_per_layer, pooled)
    length = torch.where(moving, increments(a, torch.float64)[1], 1.0).to(torch.float32)
    rows = max(8, (1 << 21) // (depth * source.width) // 8 * 8)
    for some, cols, dx, dy in source.blocks(n, rows):
        if cols.start == 0:
            found = torch.zeros(2, dx.shape[1], depth, source.width)
        found[0, :, 1:, cols], found[1, :, 1:, cols] = dx.cumsum(0).movedim(0, 1), dy.cumsum(0).movedim(0, 1)
        if cols.stop >= source.width:
            yield Portrait(*(found[:, : n - some.start, :, :width] * length))


def paired_swap_test(
    a: Tensor,
    b: Tensor,
    n: int = 1000,
    seed: int = 0,
    *,
    groups: Tensor | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> RotationTest:
    """Rotations of the mean of trajectories ``a`` ``(N, S, U)`` against those of the mean of ``b``, row ``i`` its pair.

    ``a`` is the text as it is and ``b`` the same sequences with their tokens shuffled (METHOD section 7). If the order
    of tokens made no difference, swapping the two within any sequence would change nothing: the null swaps them at
    random, alike for all units, so units may be split and the population's null holds. In the result ``null_mean`` is
    ``R`` of the mean of ``b``, ``delta`` the difference, ``null_std`` its standard deviation under swaps and ``p`` the
    share of swaps that bring one as large; ``population`` is the mean ``|R|`` of the one less that of the other, and
    ``signed_population`` the same of ``R``. With few sequences p can not fall below ``2 / 2**N``. Where a sequence has
    several rows, ``groups`` ``(N,)`` says which sequence each is of: they are swapped together, since the tokens of a
    sequence are not independent of one another, and N above is the number of sequences.

    Works block by block on the tensors' own device, in float32 (float64 for float64 input). Raises ``ValueError`` for
    shapes that differ, fewer than 2 sequences, fewer than 3 sublayers, or ``n < 1``.
    """
    if a.shape != b.shape or a.dim() != 3 or len(a) < 2:
        raise ValueError(
            f"a has the shape {tuple(a.shape)} and b {tuple(b.shape)}: both must be (sequences, sublayers, units), row "
            "i of each the same sequence, of at least 2; give both conditions of the same corpus."
        )
    check(a[0], NULLS[0], n, seed)
    count, _, width = a.shape
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    bits = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(1 << 16,))))
    of_group = None if groups is None else groups.unique(return_inverse=True)[1].cpu()
    n_groups = count if of_group is None else int(of_group.max()) + 1
    signs = torch.from_numpy(bits.integers(0, 2, (n, n_groups), dtype=np.int8) * np.int8(2) - np.int8(1))
    signs = (signs if of_group is None else signs[:, of_group]).to(a.device)
    size = 32
    both = torch.full((2, width), torch.nan, dtype=torch.float64, device=a.device)

    def block(start: int) -> list[Part]:
        cols = slice(start, min(start + size, width))
        middle, half, swapped = _swaps(a[..., cols], b[..., cols], signs, dtype)
        observed = torch.stack([turns(steps, gradient_steps(steps)) for steps in (middle + half, middle - half)])
        moving = observed.isfinite().all(0) & (middle.abs() + half.abs() > 0).any(0)
        both[:, cols] = torch.where(moving, observed, torch.nan)
        found = swapped.new_empty(2, n, cols.stop - start)
        for some in _slices(n, 64):
            steps = swapped[some].movedim(1, 0).contiguous()
            for label, sign in enumerate((1, -1)):
                mean = torch.add(middle[:, None].to(dtype), steps, alpha=sign)
                found[label, some] = turns(mean, gradient_steps(mean))
        # to swap all pairs turns the sign of the difference, so its null is symmetric about 0
        part = summary(observed[0] - observed[1], found[0] - found[1], moving, partial(two_sided_p, centre=0.0))
        return [part._replace(sums=unit_sums(found[0], moving) - unit_sums(found[1], moving))]

    blocks = side_by_side(block, range(0, width, size), a.device)
    (whole,) = collect(blocks, n, [both[0]], on_block)
    of_a, of_b = both
    at_all = torch.stack([of_a.abs().nanmean() - of_b.abs().nanmean(), (of_a - of_b).nanmean()])
    return result("token_shuffled", n, True, of_a, whole._replace(null_mean=of_b), of_a - of_b, at_all)


def pooled_test(observed: Tensor, null: Tensor) -> RotationTest:
    """Rotations ``observed`` ``(U,)`` of each unit among those of all units of another stream, ``null`` ``(M,)``.

    For a model of the same shape that was never trained (METHOD section 7): it has no unit to pair with, so each unit
    is ranked in the pool, and the smallest p is ``1 / (M + 1)``. NaN in either is left out. Raises ``ValueError`` for
    an empty pool. There is no population null: correlated units do not make one.
    """
    observed, null = observed.to(torch.float64), null.to(observed.device, torch.float64)
    null = null[~null.isnan()]
    if observed.dim() != 1 or null.numel() == 0:
        raise ValueError(
            f"observed has the shape {tuple(observed.shape)} and null has {null.numel()} values that are not NaN: "
            "(units,) and at least 1 are needed; give the rotations of a stream whose units move."
        )
    # as mid_rank_p, but the pool is sorted and each unit searched in it: no (M, U) array
    pool = null.sort().values
    below = torch.searchsorted(pool, observed - TIE)
    above = len(pool) - torch.searchsorted(pool, observed + TIE, right=True)
    ties = len(pool) - below - above
    p = (2 * torch.minimum(below, above) + ties + 1).to(torch.float64) / (len(pool) + 1)
    p = torch.where(observed.isnan(), torch.nan, p)
    mean, std, none = (x.expand(len(p)) for x in (null.mean(), null.std(), null.new_tensor(torch.nan)))
    whole = Whole(mean, std, none, p, null.new_zeros(2, 0))
    return result("untrained", len(null), False, observed, whole, observed - mean, null.new_full((2,), torch.nan))


def _swaps(a: Tensor, b: Tensor, signs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of two means over sequences, and of the means after swaps, each unit's scaled by a power of two.

    Of ``a`` and ``b`` ``(N, S, U)`` and ``signs`` ``(n, N)``: half the sum of the two means ``(S - 1, U)``, half their
    difference, and ``(n, S - 1, U)`` half their difference when the pairs whose sign is -1 are swapped: a matrix
    product, in pieces of the sequences.
    """
    shape = (a.shape[1] - 1, a.shape[2])
    middle, half = torch.zeros(2, *shape, dtype=torch.float64, device=a.device)
    swapped = torch.zeros(len(signs), shape[0] * shape[1], dtype=dtype, device=a.device)
    for some in _slices(len(a), 256):
        steps, other = (x[some].to(dtype).diff(dim=1) for x in (a, b))
        difference = steps.sub(other).mul_(0.5)
        middle += steps.add_(other).sum(0, dtype=torch.float64) / (2 * len(a))
        half += difference.sum(0, dtype=torch.float64) / len(a)
        swapped.addmm_(signs[:, some].to(dtype), difference.flatten(1), alpha=1 / len(a))
    length = power_of_two((middle.abs() + half.abs()).amax(0))
    return middle / length, half / length, swapped.view(-1, *shape).div_(length.to(dtype))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
