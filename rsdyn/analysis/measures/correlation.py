"""Correlation of each unit between sublayers (paper 2.3, Fig. 1C and D)."""

from __future__ import annotations

from dataclasses import replace

import torch

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import left_out, with_interval, without_each
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, ByLastToken, Correlation, Measured
from rsdyn.analysis.statistics import second_layer, within_minus_cross
from rsdyn.dynamics.by_group import between_groups, within_groups
from rsdyn.dynamics.moments import correlation_of, merge_comoments


def correlation(collected: Collected, bins: int = 50) -> Correlation:
    """Pearson's r over sequences, from each sublayer to the next and of all pairs."""
    assert collected.all_pairs is not None
    r = correlation_of(collected.total)
    without = [correlation_of(m) for m in without_each(collected.groups, merge_comoments)]
    few = ~collected.massive
    rest = None
    if collected.massive.any():
        rest = with_interval(r[:, few].nanmean(1), [w[:, few].nanmean(1) for w in without])
    # the paper's bins run from 0 to 1; what is negative is counted beside them
    pairs = collected.all_pairs
    index = (pairs * bins).floor().clamp(0, bins - 1)
    inside = pairs >= 0
    counts = torch.zeros(r.shape[1], bins, dtype=torch.float64, device=r.device)
    counts.scatter_add_(1, torch.where(inside, index, 0).long().T, inside.T.to(torch.float64))
    below = (pairs < 0).sum(0).to(torch.float64)
    return Correlation(
        units=r,
        mean=replace(
            with_interval(r.nanmean(1), [w.nanmean(1) for w in without]),
            left_out=left_out(collected, lambda units: r[:, units].nanmean(1)),
            without_massive=rest,
        ),
        undefined=r.isnan().sum(1),
        pair_counts=counts,
        pair_edges=torch.linspace(0, 1, bins + 1, dtype=torch.float64),
        pairs_below=below,
        negative_pairs=float(below.sum() / pairs.isfinite().sum()),
        pair_means=pairs.nanmean(1),
        unit_means=pairs.nanmean(0),
        by_last_token=_by_last_token(collected),
    )


def _by_last_token(collected: Collected) -> ByLastToken | None:
    """Correlation at the first transition between last tokens, and at the first of the second layer within them."""
    if collected.by_last_token is None:
        return None
    n, mean = collected.by_last_token
    sites, total = collected.sites_per_layer, collected.total
    n_tokens = int((n > 0).sum())
    first = between_groups(n, mean[:, :2])
    between = Measured(first.nanmean(), n=n_tokens)
    if sites + 1 >= collected.n_sublayers:
        return ByLastToken(between, first)
    after = mean[:, [1, 2] if sites == 1 else [2, 3]]
    second = within_groups(n, after, total.m2[sites : sites + 2], total.cross[sites])
    return ByLastToken(between, first, Measured(second.nanmean()), second)


def rows(found: AnalysisResults) -> list[Row[Correlation]]:
    """How far units correlate from sublayer to sublayer, where, and whether that rises with depth."""
    sites = found.sites_per_layer
    return [
        Row("correlation_first", "mean correlation, first transition", lambda r: r.mean, lambda c: c[..., 0],
            "units correlate from sublayer to sublayer", "above 0.8 from the start"),
        Row("correlation_first_between_tokens", "between last tokens, each counted once",
            lambda r: r.by_last_token.between if r.by_last_token else None, lambda c: c, under="correlation_first",
            why="a correlation between last tokens needs sequences that end in at least 3 different ones"),
        Row("correlation_second_layer", "first transition of the second layer", lambda r: r.mean,
            lambda c: second_layer(c, sites), under="correlation_first"),
        Row("correlation_second_layer_within_tokens", "first transition of the second layer, within last tokens",
            lambda r: r.by_last_token.within if r.by_last_token else None, lambda c: c, under="correlation_first",
            why="among sequences that end in the same token nothing varies there"),
        Row("correlation_mean", "mean correlation, all transitions", lambda r: r.mean, lambda c: c.nanmean(-1)),
        *trend("correlation", "mean correlation", lambda r: r.mean, sites=sites,
               claim="correlations rise with depth", paper="rise"),
        Row("correlation_within_minus_cross", "mean correlation, within minus cross", lambda r: r.mean,
            within_minus_cross, "within-layer correlations are higher", "within > cross", both_sites=True),
    ]  # fmt: skip


MEASURE = Measure(lambda collected, how: correlation(collected), rows)
