"""The result of a test of rotations against a null model: p, z, false discovery rates, and what a population does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

import torch
from scipy.stats import false_discovery_control
from torch import Tensor

TIE = 1e-5  # rotations this close are equal: float32 is off by a few 1e-6


class RotationTest(NamedTuple):
    """Rotations of ``U`` units against a null model: float64 tensors, NaN for units that have no orientation.

    Those units are constant, or have NaN or Inf somewhere: count them.

    Attributes:
        null: the null model's name.
        n: how many surrogates (or units of the other population) stand behind each p.
        shared: whether all units share each surrogate, as a claim about the population needs.
        observed: ``(U,)`` signed rotations.
        null_mean: ``(U,)`` mean rotations of the surrogates.
        null_std: ``(U,)`` their standard deviation.
        example: ``(U,)`` the first surrogate's rotations, for how they are spread over units (of ``token_shuffled`` the
            difference that the first swaps bring). NaN for a pool of other units.
        delta: ``(U,)`` the effect, ``observed - null_mean``.
        z: ``(U,)`` ``delta / null_std``, NaN where the null does not vary.
        p: ``(U,)`` two-sided, from the rank of ``R`` among the surrogates' (:func:`mid_rank_p`). Exact for any shape
            of the null, and never below ``1 / (n + 1)``. Units that the null cannot move have p = 1.
        q: ``(U,)`` Benjamini-Hochberg over the units that are not NaN.
        population: ``(n,)`` mean of ``|R|`` over units for each surrogate; its spread is that of a population only
            if ``shared``, and far too narrow otherwise. Empty where units have no surrogates in common.
        signed_population: ``(n,)`` the same of ``R``.
        population_observed: ``(2,)`` what to hold ``population`` and ``signed_population`` against.
    """

    null: str
    n: int
    shared: bool
    observed: Tensor
    null_mean: Tensor
    null_std: Tensor
    example: Tensor
    delta: Tensor
    z: Tensor
    p: Tensor
    q: Tensor
    population: Tensor
    signed_population: Tensor
    population_observed: Tensor

    @property
    def p_normal(self) -> Tensor:
        """Two-sided p ``(U,)`` of ``z`` under a normal null, which can be far below ``1 / (n + 1)``.

        For a false discovery rate over more units than ``p`` resolves (see :meth:`units_at_floor`). Far out in the
        tails it is an extrapolation: the nulls are close to normal within the few deviations that surrogates reach.
        """
        return torch.special.erfc(self.z.abs() / math.sqrt(2))

    @property
    def q_normal(self) -> Tensor:
        """Benjamini-Hochberg ``(U,)`` of :attr:`p_normal`."""
        return benjamini_hochberg(self.p_normal)

    @property
    def population_p(self) -> float:
        """The p of the mean of ``|R|`` over units.

        The share of surrogates, the observed value counted among them, that are as far from the mean of all. Raises
        ``ValueError`` unless surrogates are shared.
        """
        if not self.shared:
            raise ValueError(
                "shared=False: units with surrogates of their own lose their correlation, and the population's null "
                "comes out far too narrow. Test with shared=True for a claim about the population."
            )
        return float(self._p_of(self.population_observed[:1], self.population[:, None]))

    @staticmethod
    def _p_of(observed: Tensor, null: Tensor) -> Tensor:
        return two_sided_p(observed, null)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(*(x.to(device) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

    @property
    def population_z(self) -> float:
        """How many standard deviations of ``population`` the observed mean of ``|R|`` lies above its mean."""
        spread = float(self.population.std()) if len(self.population) > 1 else math.nan
        away = float(self.population_observed[0] - self.population.mean())
        return away / spread if spread > TIE else math.nan

    def units_at_floor(self, level: float = 0.05) -> int:
        """How many units must have the smallest possible p before any passes Benjamini-Hochberg at ``level``.

        With 1000 surrogates and 4096 units that is 82: below, use :attr:`q_normal`, or more surrogates.
        """
        tested = int((~self.p.isnan()).sum())
        return math.ceil(tested / (level * (self.n + 1)))


class RegularityTest(RotationTest):
    """The same of Fisher's g in the place of ``R``, where every p is one-sided: large values alone count."""

    __slots__ = ()

    @property
    def p_normal(self) -> Tensor:
        """One-sided p ``(U,)`` of ``z`` under a normal null."""
        return 0.5 * torch.special.erfc(self.z / math.sqrt(2))

    @staticmethod
    def _p_of(observed: Tensor, null: Tensor) -> Tensor:
        return upper_p(observed, null)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Benjamini-Hochberg adjusted p-values, same shape; NaN stay NaN and do not count as tests."""
    q, tested = torch.full_like(p, torch.nan), ~p.isnan()
    if tested.any():
        q[tested] = torch.from_numpy(false_discovery_control(p[tested].cpu().numpy())).to(q)
    return q


def two_sided_p(observed: Tensor, null: Tensor, centre: float | None = None) -> Tensor:
    """Two-sided p ``(U,)`` of ``observed`` ``(U,)`` among ``null`` ``(n, U)``, as :class:`RotationTest` says.

    ``centre`` is what the null is symmetric about, where that is known; by default the mean of all ``n + 1``.
    """
    observed, null = observed.to(torch.float64), null.to(torch.float64)
    middle = (null.sum(0) + observed) / (len(null) + 1)
    about = middle if centre is None else centre
    reach = (observed - about).abs() - TIE
    p = (1 + ((null - about).abs() >= reach).sum(0, dtype=torch.float64)) / (len(null) + 1)
    return torch.where(middle.isnan(), torch.nan, p)


def mid_rank_p(observed: Tensor, null: Tensor) -> Tensor:
    """Two-sided p ``(U,)`` of ``observed`` ``(U,)`` by its rank among ``null`` ``(n, U)``, ties counted half.

    Twice the smaller of the two tails, half of the observed value counted into each. Distances from a mean would
    make p of a unit with ties depend on the seed: where two values share most of the surrogates their mean lies halfway
    between, and its own error decides which of the two is further away (p moves by up to .28). The ranks are those of
    ``|R|`` under every null that makes trajectories, since these turn clockwise alone.
    """
    observed, null = observed.to(torch.float64), null.to(torch.float64)
    below = (null < observed - TIE).sum(0, dtype=torch.float64)
    above = (null > observed + TIE).sum(0, dtype=torch.float64)
    ties = len(null) - below - above
    p = (2 * torch.minimum(below, above) + ties + 1) / (len(null) + 1)
    return torch.where(observed.isnan() | null.isnan().any(0), torch.nan, p)


def upper_p(observed: Tensor, null: Tensor) -> Tensor:
    """One-sided p ``(U,)`` of large values: the share of ``null`` ``(n, U)`` and the observed that are as large."""
    reached = (null.to(torch.float64) >= observed.to(torch.float64) - TIE).sum(0, dtype=torch.float64)
    p = (1 + reached) / (len(null) + 1)
    return torch.where(observed.isnan() | null.isnan().any(0), torch.nan, p)


def brought_to(found: Tensor, away: Tensor, part: float = 1.0) -> Tensor:
    """Statistics ``(n, U)`` of surrogates as they would be with the correlations of the observed trajectories.

    ``away`` ``(n, k)`` is how far the correlations of each are from the observed ones. A statistic that follows them
    varies more over surrogates than it does about its expectation given them, and too few true nulls are rejected:
    none of 60 at a correlation between units of .9. So the linear part is taken out, and the residuals widened by the
    ``k`` degrees of freedom that it took. Where units are few or move together the linear part is itself uncertain, and
    only a ``part`` of the correction is made. Fewer than ``10 (k + 1)`` surrogates don't tell the linear part: they
    stay as they are.
    """
    n, k = away.shape
    found = found.to(torch.float64)
    if n < 10 * (k + 1):
        return found
    centre, middle = away.mean(0), found.mean(0)
    slopes = torch.linalg.pinv(away - centre) @ (found - middle)
    rest = (found - middle - (away - centre) @ slopes) * ((n - 1) / (n - 1 - k)) ** 0.5
    return (1 - part) * found + part * (rest + middle - centre @ slopes)


def join(parts: Sequence[RotationTest]) -> RotationTest:
    """The test of all units, from tests of parts of them with the same arguments but ``first_unit``.

    ``q`` is corrected over all of them. Raises ``ValueError`` for tests of different nulls or numbers of surrogates.
    """
    kinds = {(part.null, part.n, part.shared) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"parts are tests of {sorted(kinds)} (null, n, shared): one kind is needed; join each alone.")
    count = torch.stack([(~part.observed.isnan()).sum() for part in parts]).to(torch.float64)
    share = count / count.sum()

    def all_units(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def weighed(name: str) -> Tensor:  # a part without a unit to test has NaN, and no weight
        each = torch.stack([getattr(part, name) for part in parts], dim=-1)
        return torch.where(share > 0, each * share, 0.0).sum(-1)

    units = [all_units(name) for name in ("observed", "null_mean", "null_std", "example", "delta", "z", "p")]
    population = [weighed(name) for name in ("population", "signed_population", "population_observed")]
    return type(parts[0])(*parts[0][:3], *units, benjamini_hochberg(units[-1]), *population)  # type: ignore[call-arg]


class Part(NamedTuple):
    """What a block of units gives: statistics ``(U,)``, sums ``(2, n)`` of ``|R|`` and ``R``, and their count."""

    null_mean: Tensor
    null_std: Tensor
    example: Tensor
    p: Tensor
    sums: Tensor
    units: int


def summary(
    observed: Tensor, found: Tensor, moving: Tensor, p_of: Callable[[Tensor, Tensor], Tensor] = mid_rank_p
) -> Part:
    """Statistics of surrogates ``found`` ``(n, U')``, of which the first ``len(moving)`` units are not padding."""
    n, width = len(found), len(moving)
    sums = unit_sums(found[:, :width], moving)
    found = found.to(torch.float64)
    mean = found.sum(0) / n
    std = ((found - mean).square().sum(0) / max(1, n - 1)).sqrt()
    p = p_of(observed, found)
    mean, std, first, p = (torch.where(moving, x[:width], torch.nan) for x in (mean, std, found[0], p))
    return Part(mean, std, first, p, sums, int(moving.sum()))


def unit_sums(found: Tensor, moving: Tensor) -> Tensor:
    """Sums ``(2, n)`` of ``|R|`` and ``R`` over units.

    On a grid finer than float32's error they are exact in float64, so they don't depend on how units are split.
    """
    grid = (torch.where(moving, found, 0.0).to(torch.float64) * 2.0**20).round()
    return torch.stack([grid.abs().sum(1), grid.sum(1)]) / 2.0**20


class Whole(NamedTuple):
    """What all blocks of units give: statistics ``(U,)``, and means ``(2, n)`` of ``|R|`` and ``R`` over units."""

    null_mean: Tensor
    null_std: Tensor
    example: Tensor
    p: Tensor
    population: Tensor


def collect(
    blocks: Iterable[Sequence[Part]], n: int, like: Sequence[Tensor], on_block: Callable[[int, int], None] | None
) -> list[Whole]:
    """The parts of all blocks put together, for each statistic that a block has one of, where its ``like`` ``(U,)`` is.

    Written into place: small results kept from each block would pin what malloc could otherwise use for the next.
    """
    width, done = len(like[0]), 0
    each = [x.new_full((4, width), torch.nan, dtype=torch.float64) for x in like]
    sums = [x.new_zeros(2, n, dtype=torch.float64) for x in like]
    counts = [0] * len(like)
    for parts in blocks:
        cols = slice(done, done + len(parts[0].p))
        for i, part in enumerate(parts):
            for row, values in zip(each[i], part[:4], strict=True):
                row[cols] = values
            sums[i] += part.sums
            counts[i] += part.units
        done = cols.stop
        if on_block:
            on_block(done, width)
    means = [x / count if count else torch.full_like(x, torch.nan) for x, count in zip(sums, counts, strict=True)]
    return [Whole(*rows.unbind(), mean) for rows, mean in zip(each, means, strict=True)]  # type: ignore[call-arg]


def result(
    null: str, n: int, shared: bool, observed: Tensor, whole: Whole, delta: Tensor, at_all: Tensor
) -> RotationTest:
    """The test of a null model from what its surrogates gave."""
    mean, std, example, p, population = whole
    z = torch.where(std > TIE, delta / std, torch.nan)
    q = benjamini_hochberg(p)
    return RotationTest(
        null, n, shared, observed, mean, std, example, delta, z, p, q, population[0], population[1], at_all
    )
