"""From what a probe collected to results: one function a measure of the paper, each with its intervals.

Every function runs on all processes and gives all of them the same result. A result is a flat dictionary of tensors
and numbers; names that end in ``_interval`` are ``(2, ...)``, low and high at 95 %, over groups of sequences. Behind
them stand the values without each group, under names that end in ``_groups``, or for what jumps, as shares and turns
do, values of simulated data, under names that end in ``_draws``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.dynamics import dimension, massive, rotation
from rsdyn.dynamics import rotation_test as surrogates
from rsdyn.dynamics.by_group import between_groups, within_groups
from rsdyn.dynamics.geometry import Pace
from rsdyn.dynamics.information import MIN_SAMPLES, consecutive_information
from rsdyn.dynamics.moments import (
    Moments,
    correlation_of,
    density,
    explained_variance,
    few_levels,
    merge,
    merge_comoments,
    participation_ratio,
)
from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.regularity import LEAST_SUBLAYERS, regularity
from rsdyn.dynamics.resampling import N_DRAWS, group_of, jackknife, simulate, simulated
from rsdyn.dynamics.rotation_test import RotationTest
from rsdyn.dynamics.walks import smoothed_random_walks
from rsdyn.metrics.processes import from_all, shared_out
from rsdyn.metrics.running import Extremes, UnitShare
from rsdyn.threads import side_by_side

Results = dict[str, Any]
# Units whose mutual information is estimated again without each group: the error of their mean is that of all 128 of
# the embedded model, to a tenth, and of twice as many to the same.
N_JACKKNIFE_UNITS = 16
N_JACKKNIFE_GROUPS = 10  # and of how many groups for it, since each takes an estimate of its own
N_CONTROL = 100  # random walks beside the trajectories
CONTROL_D = 256
REGULARITY_NULLS = ("innovation_shuffle", "increment_shuffle_scaled")  # which regularity is held against
WALKS_AT_ONCE = 128  # of the walks that are held against the nulls: a piece for a process or a thread


def _without_each(parts: Sequence[Any], together: Callable[[Any, Any], Any]) -> list[Any]:
    """The merged states of all groups but one, for each group: those before it and those behind it; [] for one."""
    if len(parts) < 2:
        return []
    before = list(accumulate(parts[:-1], together))  # of the first 1, 2, ... groups
    behind = list(accumulate(reversed(parts[1:]), together))[::-1]  # of all but the first 1, 2, ...
    middle = [together(some, others) for some, others in zip(before, behind[1:], strict=False)]
    return [behind[0], *middle, before[-1]]


def _with_interval(name: str, value: Tensor, without: Sequence[Tensor]) -> Results:
    """A curve that is smooth in the samples, with its interval and what it is without each group."""
    if len(without) < 2:
        return {name: value}
    groups = torch.stack(list(without))
    found = jackknife(value, groups)
    return {name: value, f"{name}_interval": torch.stack([found.low, found.high]), f"{name}_groups": groups}


def _of_means(
    name: str, of: Callable[[Tensor], Tensor], mean: Tensor, without: Sequence[Tensor], n: int = N_DRAWS
) -> Results:
    """What jumps as the mean trajectories ``mean`` move, such as a count, with its interval by simulation.

    ``of`` takes ``(..., S, D)``.
    """
    value = of(mean)
    if len(without) < 2:
        return {name: value}
    drawn = simulate(of, mean, torch.stack(list(without)), n=n)
    found = simulated(value, drawn)
    return {name: value, f"{name}_interval": torch.stack([found.low, found.high]), f"{name}_draws": drawn}


def _left_out(probe: ResidualStreamProbe, name: str, of: Callable[[Tensor], Tensor]) -> Results:
    """``of`` a mask of units, without each number of the largest ones: ``<name>_left_out`` ``(C, ...)``."""
    assert probe.largest is not None
    masks = [probe.largest.without(count, ~probe.unusable) for count in probe.largest.counts]
    return {f"{name}_left_out": torch.stack([of(units) for units in masks])}


def _if_massive(probe: ResidualStreamProbe, **values: Tensor) -> Results:
    """What is measured again without the massive units, where there are some."""
    return values if probe.massive.any() else {}


def counts(probe: ResidualStreamProbe) -> Results:
    """How many trajectories were measured, and how many of them are BOS and sinks (``rsdyn.stream.text.positions``)."""
    groups = probe.sequence_groups
    return {
        "n_trajectories": probe.n_trajectories,
        "n_bos": probe.n_bos,
        "n_sinks": probe.n_sinks,
        "n_groups": len(probe.groups),
        "intervals_over": "sequences" if groups is None else groups.counted(),
        "intervals_note": "" if groups is None else groups.too_few,
    }


def flags(probe: ResidualStreamProbe, dtype: torch.dtype) -> Results:
    """Units that a reader must know of: massive, unusable (NaN), constant, frozen by rounding, with few levels."""
    total = Moments(probe.total.n, probe.total.mean, probe.total.m2)
    assert probe.largest is not None
    return {
        "largest_units": probe.largest.order,
        "largest_ratios": probe.largest.ratios[probe.largest.order],
        "massive_ratios": probe.largest.ratios[probe.massive],
        "left_out_counts": torch.tensor(probe.largest.counts),
        "massive_units": probe.massive.nonzero().flatten(),
        "unusable_units": probe.unusable.nonzero().flatten(),
        "constant": probe.constant.sum(1),
        "constant_units": probe.constant.all(0).nonzero().flatten(),
        "few_levels": few_levels(total, dtype).sum(1),
        "frozen_steps": probe.frozen.mean(1),
        "frozen_units": (probe.frozen.mean(0) > 0.5).nonzero().flatten(),
    }


N_MASSIVE = 4  # units whose curves are told


def massive_activations(probe: ResidualStreamProbe) -> Results:
    """The largest activations by class of token, the units they are of, where these are written, norms by position.

    Classes are those of :data:`rsdyn.metrics.running.TOKEN_CLASSES`; a class without tokens is NaN.
    """
    assert probe.extremes is not None
    found: Extremes = probe.extremes.compute()
    units = massive.largest_units(found.largest, found.typical, N_MASSIVE)
    curves = found.largest[..., units].movedim(-1, 1)  # (C, units, S)
    places = massive.written(curves.nan_to_num(nan=0.0))
    largest = found.largest.nan_to_num(nan=-1.0).max(-1)
    out: Results = {
        "massive_largest": found.largest.amax(-1),
        "massive_unit": largest.indices,
        "massive_typical": found.typical,
        "massive_counts": found.counts,
        "massive_top": units,
        "massive_of_top": curves,
        **{f"massive_{name}": value for name, value in places._asdict().items()},
    }
    if not found.norms.isnan().all():
        out["norm_by_position"] = found.norms
    return out


def activations(probe: ResidualStreamProbe, threshold: float | None = None) -> Results:
    """Mean activations, and how dense they are (paper 2.2, Fig. 1B)."""
    usable, few = ~probe.unusable, ~(probe.massive | probe.unusable)
    mean, std = probe.total.mean, (probe.total.m2 / probe.total.n).sqrt()

    def limit(of: Tensor, units: Tensor) -> Tensor:
        """Half the RMS of the last sublayer, of the units that are counted: a massive unit would own it."""
        return 0.5 * of[..., -1, units].square().mean(-1).sqrt()

    def shares(units: Tensor) -> Callable[[Tensor], Tensor]:
        if threshold is not None:
            return lambda m: density(m[..., units], threshold)
        tiny = torch.finfo(mean.dtype).tiny
        return lambda m: density(m[..., units] / limit(m, units).clamp(min=tiny)[..., None, None], 1.0)

    means = [m.mean for m in _without_each(probe.groups, merge_comoments)]
    participation = [participation_ratio(m[:, usable]) for m in means]
    out: Results = {
        "mean": mean,
        "std": std,
        "density_threshold": float(limit(mean, usable)) if threshold is None else threshold,
        **_of_means("density", shares(usable), mean, means),
        **_with_interval("participation", participation_ratio(mean[:, usable]), participation),
        **_left_out(probe, "density", lambda units: shares(units)(mean)),
        **_left_out(probe, "participation", lambda units: participation_ratio(mean[:, units])),
    }
    if probe.massive.any():
        out["density_threshold_without_massive"] = float(limit(mean, few)) if threshold is None else threshold
        out |= _of_means("density_without_massive", shares(few), mean, means)
        rest = [participation_ratio(m[:, few]) for m in means]
        out |= _with_interval("participation_without_massive", participation_ratio(mean[:, few]), rest)
    return out


def correlation(probe: ResidualStreamProbe, bins: int = 50) -> Results:
    """Correlation of each unit between sublayers (paper 2.3, Fig. 1C and D)."""
    assert probe.all_pairs is not None
    r = correlation_of(probe.total)
    without = [correlation_of(m) for m in _without_each(probe.groups, merge_comoments)]
    few = ~probe.massive
    without_massive: Results = {}
    if probe.massive.any():
        rest = [w[:, few].nanmean(1) for w in without]
        without_massive = _with_interval("r_mean_without_massive", r[:, few].nanmean(1), rest)
    # the paper's bins run from 0 to 1; what is negative is counted beside them
    index = (probe.all_pairs * bins).floor().clamp(0, bins - 1)
    inside = probe.all_pairs >= 0
    counts = torch.zeros(r.shape[1], bins, dtype=torch.float64, device=r.device)
    counts.scatter_add_(1, torch.where(inside, index, 0).long().T, inside.T.to(torch.float64))
    below = (probe.all_pairs < 0).sum(0).to(torch.float64)
    return {
        "r": r,
        **_with_interval("r_mean", r.nanmean(1), [w.nanmean(1) for w in without]),
        **without_massive,
        **_left_out(probe, "r_mean", lambda units: r[:, units].nanmean(1)),
        **_by_last_token(probe),
        "r_undefined": r.isnan().sum(1),
        "r_all_counts": counts,
        "r_all_edges": torch.linspace(0, 1, bins + 1, dtype=torch.float64),
        "r_all_below": below,
        "r_all_mean": probe.all_pairs.nanmean(1),
        "r_all_unit_mean": probe.all_pairs.nanmean(0),
        "r_all_negative": below.sum() / probe.all_pairs.isfinite().sum(),
    }


def _by_last_token(probe: ResidualStreamProbe) -> Results:
    """Correlation at the first transition between last tokens, and at the first of the second layer within them.

    ``r_first_between_tokens`` and ``r_second_layer_within_tokens`` ``(D,)``, with the number of different last tokens.
    """
    if probe.by_last_token is None:
        return {}
    n, mean = probe.by_last_token
    sites, total = probe.sites_per_layer, probe.total
    out: Results = {
        "n_last_tokens": int((n > 0).sum()),
        "r_first_between_tokens": between_groups(n, mean[:, :2]),
    }
    if sites + 1 < probe.n_sublayers:
        after = mean[:, [1, 2] if sites == 1 else [2, 3]]
        m2, cross = total.m2[sites : sites + 2], total.cross[sites]
        out["r_second_layer_within_tokens"] = within_groups(n, after, m2, cross)
    return out | {f"{name}_mean": value.nanmean() for name, value in out.items() if name.startswith("r_")}


def _moments_over_sequences(name: str, groups: list[Moments]) -> Results:
    total = reduce(merge, groups)
    without = [m.mean for m in _without_each(groups, merge)]
    return {**_with_interval(name, total.mean, without), f"{name}_std": total.std}


def cosine(probe: ResidualStreamProbe) -> Results:
    """Cosine of successive stream vectors (paper 2.3, Fig. 1E)."""
    return _pace(probe, ("cosine",))


def velocity(probe: ResidualStreamProbe) -> Results:
    """Speed of the stream, raw and relative to the norm of the state (paper 2.4, Fig. 1F; METHOD section 0.12)."""
    return _pace(probe, ("speed", "relative_speed"))


def _pace(probe: ResidualStreamProbe, names: Sequence[str]) -> Results:
    """Curves that are means over sequences, with and without massive units, and without the largest units."""
    out: Results = {}
    for name in names:
        for suffix in ("", "_without_massive"):
            if groups := getattr(probe, f"{name}{suffix}"):
                out |= _moments_over_sequences(f"{name}{suffix}", groups)
        if probe.pace is not None:
            out[f"{name}_left_out"] = probe.pace.mean[Pace._fields.index(name)]
    return out


def information(probe: ResidualStreamProbe, estimator: str, seed: int) -> Results:
    """Mutual information of each unit between successive sublayers, its interval and its floor (paper 2.5, Fig. 1G, H).

    The interval and the floor (pairs made of different sequences at random) come from some of the units: the interval
    of their mean is wider than that of all units' mean, if anything.
    """
    share = probe.share
    assert share is not None
    out: Results = {"mi_estimator": estimator, "mi_samples": len(share.x)}
    if estimator == "paper_literal":  # it is not an information: the true one goes beside it
        true = share.gather(consecutive_information(share.x, "kde"))
        out |= {"mi_true": true, "mi_true_mean": torch.where(true.isfinite(), true, torch.nan).nanmean(1)}
    n_blocks = share.x.shape[-1]
    with probe.bar(f"{probe.name}: mutual information", n_blocks) as done:
        mi = share.gather(consecutive_information(share.x, estimator, on_block=done))
    finite = torch.where(mi.isfinite(), mi, torch.nan)
    some = _some_units(share)
    generator = torch.Generator().manual_seed(seed)
    pairing = torch.randperm(len(share.x), generator=generator).to(share.x.device)
    floor = _gathered(consecutive_information(some, estimator, pairing=pairing))
    groups = group_of(probe.group_of(share.sequence), N_JACKKNIFE_GROUPS)
    without: list[Tensor] = []
    for g in groups.unique():
        if int((groups != g).sum()) < MIN_SAMPLES[estimator]:  # a few sequences, most tokens of one: no interval
            without = []
            break
        part = _gathered(consecutive_information(some[groups != g], estimator))
        without.append(torch.where(part.isfinite(), part, torch.nan).nanmean(1))
    mean = finite.nanmean(1)
    if without:
        centre = torch.stack(without).mean(0)
        without = [w - centre + mean for w in without]
    return out | {
        "mi": mi,
        **_with_interval("mi_mean", mean, without),
        "mi_floor": torch.where(floor.isfinite(), floor, torch.nan).nanmean(1),
        "mi_undefined": mi.isnan().sum(1),
        "mi_infinite": mi.isinf().sum(1),
        **_if_massive(probe, mi_mean_without_massive=finite[:, ~probe.massive].nanmean(1)),
        **_left_out(probe, "mi_mean", lambda units: finite[:, units].nanmean(1)),
        **_information_between_tokens(probe, share, some, estimator),
    }


def _information_between_tokens(probe: ResidualStreamProbe, share: UnitShare, some: Tensor, estimator: str) -> Results:
    """The curve of information between last tokens, each one sample: the mean state of the sequences that end in it.

    Of the units that the interval is of. Nothing where there are fewer tokens than the estimator needs.
    """
    if probe.last_token is None:
        return {}
    token = probe.last_token.to(some.device)[share.sequence]
    tokens, at = token.unique(return_inverse=True)
    if len(tokens) < MIN_SAMPLES[estimator]:
        nothing = torch.full((some.shape[1] - 1,), torch.nan, dtype=torch.float64)
        return {"mi_tokens": len(tokens), "mi_between_tokens_mean": nothing}
    total = torch.zeros(len(tokens), *some.shape[1:], dtype=torch.float64, device=some.device)
    mean = total.index_add_(0, at, some.to(torch.float64)) / at.bincount()[:, None, None]
    found = _gathered(consecutive_information(mean, estimator))
    found = torch.where(found.isfinite(), found, torch.nan)
    return {"mi_tokens": len(tokens), "mi_between_tokens_mean": found.nanmean(1)}


def _some_units(share: UnitShare) -> Tensor:
    """Evenly spaced units of all, those of them that are this process': the same ones whatever the processes."""
    chosen = torch.linspace(0, share.n_units - 1, min(N_JACKKNIFE_UNITS, share.n_units)).round().long()
    at = chosen[(chosen >= share.first_unit) & (chosen < share.first_unit + share.x.shape[-1])] - share.first_unit
    return share.x[..., at.to(share.x.device)]


def _gathered(values: Tensor) -> Tensor:
    """The values ``(..., u)`` of all processes' chosen units side by side."""
    return torch.cat(from_all(values, values.device), dim=-1)


def rotations(
    probe: ResidualStreamProbe,
    nulls: Sequence[str],
    *,
    n: int,
    shared: bool,
    window: int,
    sites_per_layer: int,
    seed: int,
) -> Results:
    """Turns of each unit in the plane of activation and gradient, against null models (paper 2.6, Fig. 2)."""
    share = probe.share
    assert share is not None
    mean = probe.total.mean
    r = rotation.rotations(mean)
    per_sequence = share.gather(rotation.sequence_rotations(share.x).mean(0, dtype=torch.float64))
    means = [m.mean for m in _without_each(probe.groups, merge_comoments)]

    def turns(units: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda m: rotation.rotations(m[..., units]).abs().nanmean(-1)

    out: Results = {
        "rotation": r,
        "rotation_mean_trajectory": mean,
        **_left_out(probe, "rotation_abs_mean", lambda units: r[units].abs().nanmean()),
        "rotation_per_sequence": per_sequence,
        "rotation_zero_tangents": rotation.zero_tangents(mean),
        **_of_means("rotation_abs_mean", turns(torch.ones_like(probe.massive)), mean, means),
    }
    if probe.massive.any():
        out |= _of_means("rotation_abs_mean_without_massive", turns(~probe.massive), mean, means)
    own = slice(share.first_unit, share.first_unit + share.x.shape[-1])
    options: Any = {"window": window, "sites_per_layer": sites_per_layer, "first_unit": share.first_unit}
    regular = REGULARITY_NULLS if len(mean) >= LEAST_SUBLAYERS else ()
    if regular:
        out |= _regularity(probe)
    for null in nulls:
        options["of_all"] = _enough_units(probe) if null == "innovation_shuffle" else mean
        # a linear process keeps what units have in common, so its surrogates are shared in any case
        alike = shared or null == "innovation_shuffle"
        with probe.bar(f"{probe.name}: {null}", mean[:, own].shape[1]) as done:
            test = surrogates.rotation_test(
                mean[:, own], null, n, seed, shared=alike, on_block=_steps_of(done), **options
            )
            test = _over_processes(test)
            # units are correlated, so a claim about all of them needs surrogates that they share
            together = test if alike else surrogates.rotation_test(mean[:, own], null, n, seed, shared=True, **options)
            together = test if alike else _over_processes(together)
        out |= named_results(test) | _of_population(together)
        # one surrogate of each unit, for the distribution over units that a figure shows
        one = surrogates.rotation_test(mean[:, own], null, 1, seed, **options)
        out[f"null_{null}_example"] = share.gather(one.null_mean)
        if null in regular:
            found = surrogates.regularity_test(mean[:, own], null, n, seed, shared=True, **options)
            out |= _named_regularity(_over_processes(found))
    return out


def _enough_units(probe: ResidualStreamProbe) -> Tensor:
    """What a linear process is estimated on: the mean trajectories, or with few units those of single sequences."""
    mean, share = probe.total.mean, probe.share
    assert share is not None
    steps, n_units = len(mean) - 1, mean.shape[1]
    if n_units > steps:
        return mean
    some = share.x[: 1 + 4 * steps // n_units].to(torch.float64)
    return torch.cat(from_all(some, some.device), dim=-1)


def _of_population(test: RotationTest) -> Results:
    """What surrogates that all units share say of mean |R|: theirs, its spread, and where the stream's lies."""
    null = test.null
    return {
        f"null_{null}_population": test.population,
        f"null_{null}_population_p": test.population_p,
        f"null_{null}_turns": test.population.mean(),
        f"null_{null}_turns_std": test.population.std() if test.n > 1 else torch.tensor(torch.nan),
        f"null_{null}_turns_z": torch.tensor(test.population_z, dtype=torch.float64),
    }


def _regularity(probe: ResidualStreamProbe) -> Results:
    """How much of each unit's steps has one frequency, and the mean over units with its interval."""
    without = [regularity(m.mean).nanmean() for m in _without_each(probe.groups, merge_comoments)]
    g = regularity(probe.total.mean)
    return {
        "regularity": g,
        **_with_interval("regularity_mean", g.nanmean(), without),
        **_if_massive(probe, regularity_mean_without_massive=g[~probe.massive].nanmean()),
    }


def _named_regularity(test: RotationTest) -> Results:
    """A test of regularity under names that begin with ``regularity_<null>_``."""
    each = {"mean": test.null_mean, "std": test.null_std, "z": test.z, "p": test.p, "q_normal": test.q_normal}
    each |= {"population": test.population, "population_z": torch.tensor(test.population_z, dtype=torch.float64)}
    named: Results = {f"regularity_{test.null}_{k}": v for k, v in each.items()}
    return named | {f"regularity_{test.null}_population_p": test.population_p}


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
    return test if len(parts) == 1 else surrogates.join(parts)


def named_results(test: RotationTest, name: str | None = None) -> Results:
    """A rotation test's numbers under names that begin with ``null_<name>_``."""
    each = {"mean": test.null_mean, "std": test.null_std, "delta": test.delta, "z": test.z, "p": test.p, "q": test.q}
    return {f"null_{name or test.null}_{k}": v for k, v in (each | {"q_normal": test.q_normal}).items()}


def compare_rotations(
    probe: ResidualStreamProbe, other: ResidualStreamProbe, results: Mapping[str, Any], null: str, *, n: int, seed: int
) -> Results:
    """The two null models that need the LM: the same text with its tokens shuffled, and an untrained model."""
    with probe.bar(f"{probe.name}: {null}", 1) as done:
        if null == "token_shuffled":
            assert probe.share is not None and other.share is not None
            ours, theirs = probe.share, other.share
            if not torch.equal(ours.number, theirs.number):
                raise ValueError("probe and other keep different tokens, which make no pairs: give them one text.")
            test = surrogates.paired_swap_test(ours.x, theirs.x, n=n, seed=seed, groups=ours.sequence)
            test = _over_processes(test)
        else:
            test = surrogates.pooled_test(results["rotation"], rotation.rotations(other.total.mean))
        done(1)
    theirs_turn = rotation.rotations(other.total.mean).abs().nanmean()
    out = named_results(test, null) | {f"null_{null}_turns": theirs_turn}
    if test.shared:
        out |= {
            f"null_{null}_turns_std": test.population.std(),
            f"null_{null}_turns_z": torch.tensor(test.population_z, dtype=torch.float64),
            f"null_{null}_population_p": test.population_p,
        }
    return out


def random_walks(
    n_sublayers: int, nulls: Sequence[str], *, n: int, window: int, sites_per_layer: int, seed: int, n_walks: int = 1000
) -> Results:
    """What units without any dynamics do: mean |R| of random walks as long, and how many of them beat each null."""
    generator = torch.Generator().manual_seed(seed)
    walks = torch.randn(n_sublayers, n_walks, generator=generator).cumsum(0)
    options: Any = {"window": window, "sites_per_layer": sites_per_layer}

    def beyond(some: tuple[str, int]) -> Tensor:
        null, first = some
        test = surrogates.rotation_test(
            walks[:, first : first + WALKS_AT_ONCE], null, n, seed, first_unit=first, of_all=walks, **options
        )
        return (test.p < 0.05).sum()

    # null by null would be uneven: one that takes a Fourier transform costs as much as all others together
    pieces = [(null, first) for null in nulls for first in range(0, n_walks, WALKS_AT_ONCE)]
    counts = dict(zip(pieces, shared_out(beyond, pieces, "cpu"), strict=True))
    shares = {null: sum(int(n) for (name, _), n in counts.items() if name == null) / n_walks for null in nulls}
    return {
        "rotation_random_walk": rotation.rotations(walks).abs().mean(),
        **{f"walks_beyond_{null}": torch.tensor(share, dtype=torch.float64) for null, share in shares.items()},
    }


def principal_components(probe: ResidualStreamProbe, seed: int) -> Results:
    """Principal components of the stream, and how many dimensions each sublayer fills (paper 2.8, Fig. 4A-C)."""
    pca, share = probe.pca, probe.share
    assert pca is not None and share is not None
    usable = ~probe.unusable

    def of_units(units: Tensor, m: Any) -> Moments:
        return Moments(m.n, m.mean[:, units], m.m2[:, units])

    def unexplained(groups: list[Moments], of: Moments) -> Tensor:
        missed = reduce(merge, groups)
        own, _, _ = explained_variance(
            (missed.mean * of.n)[:, None], Moments(of.n, of.mean.new_zeros(len(of.mean), 1), of.m2.sum(1, keepdim=True))
        )
        return own

    parts = [of_units(usable, m) for m in probe.groups]
    ev = unexplained(probe.residual, of_units(usable, probe.total))
    others = zip(_without_each(probe.residual, merge), _without_each(parts, merge), strict=True)
    ev_without = [unexplained([missed], of) for missed, of in others]
    dims = _dimensions(probe, share)
    without_massive: Results = {}
    if probe.massive.any():
        assert probe.pca_without_massive is not None and dims.without_massive is not None
        without_massive = {
            "dimensions_without_massive": dimension.participation(dims.without_massive),
            "components_90_without_massive": dimension.components_for(dims.without_massive, 0.9),
            "ev_without_massive": unexplained(
                probe.residual_without_massive, of_units(usable & ~probe.massive, probe.total)
            ),
        }
    return components(probe, seed) | {
        "n_kept": len(share.x),
        "latent_mean": probe.latents.mean,
        "latent_samples": probe.latent_samples,
        **_with_interval("ev", ev, ev_without),
        **_with_interval("dimensions", *_both(dimension.participation, dims)),
        **_with_interval("components_90", *_both(dimension.components_for, dims)),
        "dimensions_left_out": dimension.participation(dims.left_out),
        "components_90_left_out": dimension.components_for(dims.left_out),
        "ev_left_out": torch.stack([ev, *_explained_left_out(probe)]),
        **without_massive,
    }


def components(probe: ResidualStreamProbe, seed: int) -> Results:
    """The components themselves, which one pass gives, and the control that stands beside their plane."""
    pca = probe.pca
    assert pca is not None
    out: Results = {
        "pca_ratio": pca.explained_variance_ratio,
        "pca_components": pca.components.T[:10],
        "pca_massive_loadings": pca.components[probe.massive].T.square(),
        **_control(probe, seed),
    }
    if (few := probe.pca_without_massive) is not None:
        out |= {
            "pca_ratio_without_massive": few.explained_variance_ratio,
            "pca_components_without_massive": few.components.T[:10],
        }
    if len(probe.half_pca) == 2:
        a, b = (half.components for half in probe.half_pca)
        out["half_angles"] = torch.rad2deg(torch.arccos(torch.linalg.svdvals(a.T @ b).clamp(-1, 1)))
    return out


class Variances(NamedTuple):
    """Variances along each sublayer's own components, largest first, ``(..., S, K)``.

    Attributes:
        all: ``(S, K)``.
        groups: ``(G, S, K)`` without each group of sequences.
        left_out: ``(C, S, K)`` without each number of the largest units.
        without_massive: ``(S, K)``; None where there are no massive units.
    """

    all: Tensor
    groups: Tensor
    left_out: Tensor
    without_massive: Tensor | None


def _both(of: Callable[[Tensor], Tensor], dims: Variances) -> tuple[Tensor, list[Tensor]]:
    """A measure of all sequences' variances, and of those without each group."""
    return of(dims.all), list(of(dims.groups))


def _dimensions(probe: ResidualStreamProbe, share: UnitShare) -> Variances:
    """The variances of each sublayer; each sublayer is done by one process, whole."""
    assert probe.largest is not None
    usable, group, x = ~probe.unusable, probe.group_of(share.sequence), share.by_sublayer()
    known = group.unique()
    chosen = torch.stack([group != g for g in known]) if len(known) > 1 else known.new_zeros(0, len(group)).bool()
    counts, massive = probe.largest.counts, bool(probe.massive.any())
    wanted = [*counts, *([int(probe.massive.sum())] if massive else [])]
    by_size = probe.largest.ratios[usable].argsort(descending=True, stable=True)[: max(wanted)]
    with probe.bar(f"{probe.name}: dimensions", x.shape[1]) as done:

        def one(s: int) -> tuple[Tensor, Tensor]:
            here = dimension.centred(x[:, s] if usable.all() else x[:, s, usable])
            return dimension.spectra_of_rows(here, chosen), dimension.spectra_without_largest(here, by_size, wanted)

        mine = []
        for found in side_by_side(one, range(x.shape[1]), x.device):
            mine.append(found)
            done(1)
    of_all = chain.from_iterable(from_all(mine, x.device))
    groups, left_out = (torch.stack(values, dim=1) for values in zip(*of_all, strict=True))
    return Variances(left_out[0], groups, left_out[: len(counts)], left_out[-1] if massive else None)


def _explained_left_out(probe: ResidualStreamProbe) -> list[Tensor]:
    """What as many components explain at each sublayer ``(S,)`` without 1, 2, ... of the largest units."""
    if probe.residual_left_out is None or probe.largest is None:
        return []
    found = []
    for count, missed in zip(probe.largest.counts[1:], probe.residual_left_out, strict=True):
        units = probe.largest.without(count, ~probe.unusable)
        total = probe.total.m2[:, units].sum(1) / probe.total.n
        found.append(1 - missed / torch.where(total > 0, total, torch.nan))
    return found


def _control(probe: ResidualStreamProbe, seed: int) -> Results:
    """Random walks with the steps of the stream, and the plane of PCA that they make."""
    usable, total = ~probe.unusable, probe.total
    mean = total.mean[:, usable]
    common = (mean[1:] - mean[:-1]).norm(dim=1)
    # the spread of the steps about the mean step, from variances and covariances of successive sublayers
    own = ((total.m2[1:] + total.m2[:-1] - 2 * total.cross)[:, usable].sum(1) / total.n).clamp(min=0).sqrt()
    walks = smoothed_random_walks(common, own, n=N_CONTROL, d=CONTROL_D, seed=seed)
    pca = PCA.fit(walks.reshape(-1, walks.shape[-1]), 2)
    latents = pca.encode(walks)
    return {
        "control_mean": latents.mean(0),
        "control_samples": latents,
        "control_ratio": pca.explained_variance_ratio,
    }
