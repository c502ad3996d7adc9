"""Mutual information of each unit between successive sublayers (paper 2.5, Fig. 1G and H)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import left_out, with_interval
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, Measured, MutualInformation
from rsdyn.analysis.statistics import early_fall, second_layer, within_minus_cross
from rsdyn.dynamics.information import MIN_SAMPLES, consecutive_information
from rsdyn.dynamics.resampling import group_of
from rsdyn.metrics.processes import from_all
from rsdyn.metrics.samples import UnitShare

PAPER_LITERAL = "paper_literal"  # the paper's sum as printed, which is no information
SUM = "the paper's sum, no information"
# between last tokens only what was asked for is estimated, the paper's sum
NOT_OF_BOTH = ("information_early_fall_between_tokens",)
# Units whose mutual information is estimated again without each group: the error of their mean is that of all 128 of
# the embedded model, to a tenth, and of twice as many to the same.
N_JACKKNIFE_UNITS = 16
N_JACKKNIFE_GROUPS = 10  # and of how many groups for it, since each takes an estimate of its own


def mutual_information(collected: Collected, estimator: str, seed: int) -> MutualInformation:
    """Information of each unit, its mean's interval and its floor.

    The interval and the floor (pairs made of different sequences at random) come from some of the units: the interval
    of their mean is wider than that of all units' mean, if anything.
    """
    share = collected.share
    assert share is not None
    n_samples = len(share.x)
    true = None
    if estimator == PAPER_LITERAL:  # it is not an information: the true one goes beside it
        true = share.gather(consecutive_information(share.x, "kde"))
    with collected.bar(f"{collected.name}: mutual information", share.x.shape[-1]) as done:
        mi = share.gather(consecutive_information(share.x, estimator, on_block=done))
    finite = _finite(mi)
    some = _some_units(share)
    generator = torch.Generator().manual_seed(seed)
    pairing = torch.randperm(n_samples, generator=generator).to(share.x.device)
    floor = _gathered(consecutive_information(some, estimator, pairing=pairing))
    groups = group_of(collected.group_of(share.sequence), N_JACKKNIFE_GROUPS)
    without: list[Tensor] = []
    for g in groups.unique():
        if int((groups != g).sum()) < MIN_SAMPLES[estimator]:  # a few sequences, most tokens of one: no interval
            without = []
            break
        part = _gathered(consecutive_information(some[groups != g], estimator))
        without.append(_finite(part).nanmean(1))
    mean = finite.nanmean(1)
    if without:
        centre = torch.stack(without).mean(0)
        without = [w - centre + mean for w in without]
    rest = None
    if collected.massive.any():
        rest = Measured(finite[:, ~collected.massive].nanmean(1), n=n_samples)
    return MutualInformation(
        estimator=estimator,
        units=mi,
        mean=replace(
            with_interval(mean, without),
            left_out=left_out(collected, lambda units: finite[:, units].nanmean(1)),
            n=n_samples,
            without_massive=rest,
        ),
        floor=_finite(floor).nanmean(1),
        undefined=mi.isnan().sum(1),
        infinite=mi.isinf().sum(1),
        between_tokens=_between_tokens(collected, share, some, estimator),
        true=None if true is None else Measured(_finite(true).nanmean(1), n=n_samples),
        true_units=true,
    )


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def _between_tokens(collected: Collected, share: UnitShare, some: Tensor, estimator: str) -> Measured | None:
    """The curve of information between last tokens, each one sample: the mean state of the sequences that end in it.

    Of the units that the interval is of. NaN where there are fewer tokens than the estimator needs.
    """
    if collected.last_token is None:
        return None
    token = collected.last_token.to(some.device)[share.sequence]
    tokens, at = token.unique(return_inverse=True)
    if len(tokens) < MIN_SAMPLES[estimator]:
        nothing = torch.full((some.shape[1] - 1,), torch.nan, dtype=torch.float64)
        return Measured(nothing, n=len(tokens))
    total = torch.zeros(len(tokens), *some.shape[1:], dtype=torch.float64, device=some.device)
    mean = total.index_add_(0, at, some.to(torch.float64)) / at.bincount()[:, None, None]
    found = _finite(_gathered(consecutive_information(mean, estimator)))
    return Measured(found.nanmean(1), n=len(tokens))


def _some_units(share: UnitShare) -> Tensor:
    """Evenly spaced units of all, those of them that are this process': the same ones whatever the processes."""
    chosen = torch.linspace(0, share.n_units - 1, min(N_JACKKNIFE_UNITS, share.n_units)).round().long()
    at = chosen[(chosen >= share.first_unit) & (chosen < share.first_unit + share.x.shape[-1])] - share.first_unit
    return share.x[..., at.to(share.x.device)]


def _gathered(values: Tensor) -> Tensor:
    """The values ``(..., u)`` of all processes' chosen units side by side."""
    return torch.cat(from_all(values, values.device), dim=-1)


def _rows(key: str, curve: Callable[[MutualInformation], Measured | None], sites: int) -> list[Row[MutualInformation]]:
    """The rows of an information, or of the paper's sum, under keys that begin with ``key``."""
    nats = ", nats" if key == "information" else ""
    return [
        Row(f"{key}_early_fall", f"mean information, first transition minus mean of the last two thirds{nats}",
            curve, early_fall, "information falls sharply in early layers", "falls"),
        Row(f"{key}_early_fall_between_tokens", "between last tokens, each counted once", lambda r: r.between_tokens,
            early_fall, under=f"{key}_early_fall",
            why="its estimator needs sequences that end in more different tokens"),
        Row(f"{key}_second_layer_fall", "from the second layer's first transition on", curve,
            lambda c: second_layer(c, sites) - c[..., c.shape[-1] // 3 :].nanmean(-1), under=f"{key}_early_fall"),
        *trend(key, "mean information", curve, sites=sites),
        Row(f"{key}_within_minus_cross", f"mean information, within minus cross{nats}", curve,
            within_minus_cross, "most at cross-layer transitions", "cross lower", both_sites=True),
    ]  # fmt: skip


def rows(found: AnalysisResults) -> list[Row[MutualInformation]]:
    """Where information falls; the paper's sum, which is none, stands behind the true one under a name of its own."""
    sites = found.sites_per_layer
    measured = [r.mutual_information for r in found.conditions.values() if r.mutual_information is not None]
    if not any(r.estimator == PAPER_LITERAL for r in measured):
        return _rows("information", lambda r: r.mean, sites)
    both: list[Row[MutualInformation]] = []
    true, literal = _rows("information", lambda r: r.true, sites), _rows("paper_sum", lambda r: r.mean, sites)
    for head, row in zip(true, literal, strict=True):
        both.append(replace(head, statistic=f"{head.statistic} (true, kde)", detail=False))
        both.append(replace(row, statistic=f"{row.statistic}: {SUM}", claim="", paper="", under=head.key))
    return [row for row in both if row.key not in NOT_OF_BOTH]


MEASURE = Measure(
    lambda collected, how: mutual_information(collected, how.settings.mi.estimator, how.seed),
    rows,
    keeps_samples=True,
)
