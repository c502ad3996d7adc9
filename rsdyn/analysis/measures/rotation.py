"""Turns of each unit in the plane of activation and gradient, against null models (paper 2.6, Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis.checks import nulls_of
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import left_out, means_without_each, of_means, with_interval
from rsdyn.analysis.measure import How, Measure, Row
from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured, NullTest, Regularity, Rotation
from rsdyn.analysis.rotation_rows import rotation_rows
from rsdyn.analysis.settings import NULLS
from rsdyn.dynamics import rotation as turning
from rsdyn.dynamics.regularity import LEAST_SUBLAYERS, regularity
from rsdyn.dynamics.rotation_test import (
    join,
    paired_swap_test,
    pooled_test,
    rotation_and_regularity_test,
    rotation_test,
)
from rsdyn.dynamics.significance import RotationTest
from rsdyn.dynamics.surrogates import pooled_over_units
from rsdyn.metrics.processes import from_all, shared_out

LINEAR = "innovation_shuffle"  # keeps what units have in common, so its surrogates are shared in any case
REGULARITY_NULLS = (LINEAR, "increment_shuffle_scaled")  # which regularity is held against
WALKS_AT_ONCE = 128  # of the walks that are held against the nulls: a piece for a process or a thread


def rotation(
    collected: Collected,
    nulls: Sequence[str],
    *,
    n: int,
    shared: bool,
    window: int,
    sites_per_layer: int,
    seed: int,
) -> Rotation:
    """Turns of each unit's mean trajectory, and ``n`` surrogates of each of the null models ``nulls``.

    ``shared`` gives all units the same random numbers; ``window`` is that of the windowed nulls.
    """
    share = collected.share
    assert share is not None
    mean = collected.total.mean
    means = means_without_each(collected)

    r = turning.rotations(mean)
    units = [torch.ones_like(collected.massive), *([~collected.massive] if collected.massive.any() else [])]

    def turns(m: Tensor) -> Tensor:
        found = turning.rotations(m).abs()
        return torch.stack([found[..., some].nanmean(-1) for some in units], -1)

    mean_abs, *rest = _apart(of_means(turns, mean, means))
    own = slice(share.first_unit, share.first_unit + share.x.shape[-1])
    options: Any = {"window": window, "sites_per_layer": sites_per_layer, "first_unit": share.first_unit}
    regular = REGULARITY_NULLS if len(mean) >= LEAST_SUBLAYERS else ()
    tests, regular_tests = {}, {}
    for null in nulls:
        options["of_all"] = _enough_units(collected) if null == LINEAR else mean
        alike = shared or null == LINEAR
        with collected.bar(f"{collected.name}: {null}", mean[:, own].shape[1]) as done:
            on_block = _steps_of(done)
            if not alike:
                each = rotation_test(mean[:, own], null, n, seed, on_block=on_block, **options)
            # units are correlated, so a claim about all of them needs surrogates that they share
            common = options | {"shared": True, "on_block": on_block if alike else None}
            if null in regular:
                together, found = rotation_and_regularity_test(mean[:, own], null, n, seed, **common)
                regular_tests[null] = _regular(_over_processes(found))
            else:
                together = rotation_test(mean[:, own], null, n, seed, **common)
        together = _over_processes(together)
        test = together if alike else _over_processes(each)
        # one surrogate of each unit's own, for the distribution over units that a figure shows
        one = rotation_test(mean[:, own], null, 1, seed, **options) if alike else each
        tests[null] = replace(_named(test, together), example=share.gather(one.example))
    return Rotation(
        turns=r,
        mean_abs=replace(
            mean_abs,
            left_out=left_out(collected, lambda units: r[units].abs().nanmean()),
            without_massive=rest[0] if rest else None,
        ),
        trajectory=mean,
        per_sequence=share.gather(turning.sequence_rotations(share.x).mean(0, dtype=torch.float64)),
        zero_tangents=turning.zero_tangents(mean),
        nulls=tests,
        regularity=_regularity(collected, regular_tests) if regular else None,
    )


def _apart(several: Measured) -> list[Measured]:
    """Each of several numbers ``(k,)`` that were measured together."""

    def at(values: Tensor | None, k: int) -> Tensor | None:
        return None if values is None else values[..., k]

    return [
        Measured(value, at(several.interval, k), draws=at(several.draws, k)) for k, value in enumerate(several.value)
    ]


def _enough_units(collected: Collected) -> Tensor:
    """What a linear process is estimated on: the mean trajectories, or with few units those of single sequences."""
    mean, share = collected.total.mean, collected.share
    assert share is not None
    steps, n_units = len(mean) - 1, mean.shape[1]
    if n_units > steps:
        return mean
    some = share.x[: 1 + 4 * steps // n_units].to(torch.float64)
    return torch.cat(from_all(some, some.device), dim=-1)


def _named(test: RotationTest, together: RotationTest) -> NullTest:
    """What surrogates say of each unit, and those that all units share of mean |R|."""
    return NullTest(
        mean=test.null_mean,
        std=test.null_std,
        z=test.z,
        p=test.p,
        q_normal=test.q_normal,
        over_units=float(together.population.mean()),
        delta=test.delta,
        q=test.q,
        over_units_std=float(together.population.std()) if together.n > 1 else torch.nan,
        over_units_z=together.population_z,
        over_units_p=together.population_p,
        surrogates=together.population,
    )


def _regular(test: RotationTest) -> NullTest:
    return replace(_named(test, test), delta=None, q=None)


def _regularity(collected: Collected, tests: dict[str, NullTest]) -> Regularity:
    """How much of each unit's steps has one frequency, and the mean over units with its interval."""
    without = [regularity(m).nanmean() for m in means_without_each(collected)]
    g = regularity(collected.total.mean)
    rest = Measured(g[~collected.massive].nanmean()) if collected.massive.any() else None
    return Regularity(g, replace(with_interval(g.nanmean(), without), without_massive=rest), tests)


def _steps_of(done: Callable[[int], object]) -> Callable[[int, int], None]:
    """A bar that is moved on by steps, for a function that tells how far it is."""
    before = 0

    def at(n: int, total: int) -> None:
        nonlocal before
        done(n - before)
        before = n

    return at


def _over_processes(test: RotationTest) -> RotationTest:
    """The test of all units, from those of each process."""
    parts = from_all(test, test.p.device)
    return test if len(parts) == 1 else join(parts)


def against_stream(collected: Collected, other: Collected, null: str, *, n: int, seed: int) -> NullTest:
    """The two null models that need the LM: the same text with its tokens shuffled, and an untrained model."""
    theirs = turning.rotations(other.total.mean)
    with collected.bar(f"{collected.name}: {null}", 1) as done:
        if null == "token_shuffled":
            assert collected.share is not None and other.share is not None
            ours, shuffled = collected.share, other.share
            if not torch.equal(ours.number, shuffled.number):
                raise ValueError("collected and other keep different tokens, which make no pairs: give them one text.")
            test = _over_processes(paired_swap_test(ours.x, shuffled.x, n=n, seed=seed, groups=ours.sequence))
        else:
            test = pooled_test(turning.rotations(collected.total.mean), theirs)
        done(1)
    return NullTest(
        mean=test.null_mean,
        std=test.null_std,
        z=test.z,
        p=test.p,
        q_normal=test.q_normal,
        over_units=float(theirs.abs().nanmean()),
        delta=test.delta,
        q=test.q,
        over_units_std=float(test.population.std()) if test.shared else None,
        over_units_z=test.population_z if test.shared else None,
        over_units_p=test.population_p if test.shared else None,
    )


def random_walks(
    n_sublayers: int, nulls: Sequence[str], *, n: int, window: int, sites_per_layer: int, seed: int, n_walks: int = 1000
) -> tuple[float, dict[str, float]]:
    """What units without any dynamics do.

    Returns:
        Mean |R| of random walks of equal length, and by null the share of them that it rejects at p < .05.
    """
    generator = torch.Generator().manual_seed(seed)
    walks = torch.randn(n_sublayers, n_walks, generator=generator).cumsum(0)
    options: Any = {"window": window, "sites_per_layer": sites_per_layer}
    of_all = {LINEAR: pooled_over_units(LINEAR, walks, None, sites_per_layer)} if LINEAR in nulls else {}

    def beyond(some: tuple[str, int]) -> Tensor:
        null, first = some
        piece, every = walks[:, first : first + WALKS_AT_ONCE], of_all.get(null, walks)
        return (rotation_test(piece, null, n, seed, first_unit=first, of_all=every, **options).p < 0.05).sum()

    # null by null would be uneven: iaaft costs as much as all others together
    pieces = [(null, first) for null in nulls for first in range(0, n_walks, WALKS_AT_ONCE)]
    counts = dict(zip(pieces, shared_out(beyond, pieces, "cpu"), strict=True))
    shares = {null: sum(int(n) for (name, _), n in counts.items() if name == null) / n_walks for null in nulls}
    return float(turning.rotations(walks).abs().mean()), shares


def compare_streams(
    collected: Mapping[str, Collected], results: Mapping[str, ConditionResults], how: How
) -> dict[str, ConditionResults]:
    """The results with what needs several streams, or none: nulls that are other streams, and random walks."""
    chosen = how.settings.rotation
    walk, beyond = random_walks(
        next(iter(collected.values())).n_sublayers,  # what a unit without dynamics does is the same for every stream
        nulls_of(how.settings, own=True),
        n=min(chosen.surrogates, 199),
        window=chosen.window,
        sites_per_layer=how.sites_per_layer,
        seed=how.seed,
    )
    found = {}
    for name, r in results.items():
        assert r.rotation is not None
        tests = {null: replace(test, walks_beyond=beyond[null]) for null, test in r.rotation.nulls.items()}
        for null in nulls_of(how.settings, own=False) if name == "original" else []:
            tests[null] = against_stream(collected[name], collected[null], null, n=chosen.surrogates, seed=how.seed)
        ladder = {null: tests[null] for null in NULLS if null in tests}
        found[name] = replace(r, rotation=replace(r.rotation, random_walk=walk, nulls=ladder))
    return found


def _measure(collected: Collected, how: How) -> Rotation:
    chosen = how.settings.rotation
    nulls = nulls_of(how.settings, own=True) if how.nulls else []
    return rotation(
        collected, nulls, n=chosen.surrogates, shared=chosen.shared, window=chosen.window,
        sites_per_layer=how.sites_per_layer, seed=how.seed,
    )  # fmt: skip


def rows(found: AnalysisResults) -> list[Row[Rotation]]:
    """How often units turn; the null models' rows are :func:`rsdyn.analysis.rotation_rows.rotation_rows`."""
    return [
        Row("turns", "mean |R| of the mean trajectory", lambda r: r.mean_abs, lambda c: c, "units rotate",
            "10.74 turns over 64 sublayers")
    ]  # fmt: skip


MEASURE = Measure(_measure, rows, more=rotation_rows, keeps_samples=True)
