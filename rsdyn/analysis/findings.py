"""The findings: each claim of the paper, what it reports for Llama 3.1 8B, and what this run measured.

Nothing here says whether a claim holds: the numbers and their intervals do. METHOD sections 0 and 11. A row has one
``key``, set here, by which the table, the page, W&B and ``summary.json`` know it; nobody finds a row by its words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.rotation_rows import rotation_rows
from rsdyn.dynamics.resampling import Interval, jackknife, simulate, simulated

Results = Mapping[str, Any]
Statistic = Callable[[Tensor], Tensor]
UNDEFINED = torch.tensor(torch.nan, dtype=torch.float64)


# -- statistics of a curve over depth ----------------------------------------------------------------------------------


def spearman(curve: Tensor) -> Tensor:
    """Rank correlation of a curve ``(n,)`` with depth, NaN where it has fewer than three values or never moves.

    As ``scipy.stats.spearmanr``, and of many curves ``(..., n)`` at once, since an interval takes it of 400. A value
    that is not finite is left out.
    """
    known = curve.isfinite()
    if not known.all():
        return spearman(curve[known]) if curve.ndim == 1 else torch.stack([spearman(c) for c in curve])
    n = curve.shape[-1]
    if n < 3:
        return UNDEFINED.to(curve.device).expand(curve.shape[:-1])
    below, same = curve[..., :, None] > curve[..., None, :], curve[..., :, None] == curve[..., None, :]
    rank = below.sum(-1, dtype=torch.float64) + same.sum(-1, dtype=torch.float64) / 2 - n / 2
    depth = torch.arange(n, dtype=torch.float64, device=curve.device) - (n - 1) / 2
    return (rank @ depth) / (rank.square().sum(-1) * depth.square().sum()).sqrt()


def fitted_change(curve: Tensor) -> Tensor:
    """What the least-squares line through a curve ``(n,)`` gains from its first value to its last.

    In the curve's own unit, and a smooth function of it, where a rank correlation moves in steps. NaN for fewer than
    two finite values.
    """
    at = torch.arange(len(curve), dtype=torch.float64, device=curve.device)
    known = curve.isfinite()
    if int(known.sum()) < 2:
        return UNDEFINED
    x, y = at[known] - at[known].mean(), curve[known].to(torch.float64)
    return (x * y).sum() / x.square().sum() * (len(curve) - 1)


def relative_change(curve: Tensor) -> Tensor:
    """:func:`fitted_change` as a share of the curve's mean, for curves that have a zero and no end."""
    return fitted_change(curve) / curve[curve.isfinite()].mean()


def ends_of(curve: Tensor) -> tuple[float, float, float]:
    """First, middle and last value of a curve ``(n,)``; of an even number of values the middle is that before it."""
    return float(curve[0]), float(curve[(len(curve) - 1) // 2]), float(curve[-1])


def per_layer(curve: Tensor, sites_per_layer: int) -> Tensor:
    """The mean of each layer's transitions, so that a zigzag between within and across layers is not taken for a trend.

    Of curves ``(..., n)``.
    """
    if sites_per_layer == 1:
        return curve
    pairs = curve[..., : curve.shape[-1] // 2 * 2].reshape(*curve.shape[:-1], -1, 2)
    return pairs.nanmean(-1)


def _late_steepening(curve: Tensor) -> Tensor:
    """Slope over the last third less the slope before it, as a share of the curve's mean."""
    if len(curve) < 3:
        return UNDEFINED
    turn = len(curve) - 1 - max(1, (len(curve) - 1) // 3)
    late = (curve[-1] - curve[turn]) / (len(curve) - 1 - turn)
    before = (curve[turn] - curve[0]) / turn
    return (late - before) / curve.nanmean()


def _early_fall(curve: Tensor) -> Tensor:
    if len(curve) < 3:
        return UNDEFINED
    return curve[0] - curve[len(curve) // 3 :].nanmean()


def _second_layer(curve: Tensor, sites: int) -> Tensor:
    """The value at the first transition of the second layer."""
    return curve[sites] if len(curve) > sites else UNDEFINED


def _kinds(curve: Tensor) -> tuple[Tensor, Tensor]:
    return curve[0::2].nanmean(), curve[1::2].nanmean()


def _within_minus_cross(curve: Tensor) -> Tensor:
    within, cross = _kinds(curve)
    return within - cross


def _cross_over_within(curve: Tensor) -> Tensor:
    within, cross = _kinds(curve)
    return cross / within


# -- the rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """How a row is made: a statistic of a curve of the results.

    Attributes:
        key, measure, claim, paper, statistic: as in :class:`Finding`.
        curve: the curve's name in the results.
        of: the statistic, of a curve or a number.
        both_sites: whether it needs both sites of a layer.
        ranked: whether it moves in steps, so that its interval is by simulation; ``of`` then takes many curves at once.
        why: why it is undefined, where the row itself knows.
        shown: what of the curve's values are shown beside it as first, middle and last; None shows none.
        counted: the entry of the results that says on how many trajectories it was measured.
        under, detail: as in :class:`Finding`.
    """

    key: str
    measure: str
    statistic: str
    curve: str
    of: Statistic
    claim: str = ""
    paper: str = ""
    both_sites: bool = False
    ranked: bool = False
    shown: Statistic | None = None
    why: str = ""
    counted: str = "n_trajectories"
    under: str = ""
    detail: bool = False


DEPTH = "rank correlation with depth"
FITTED = "fitted change from first to last layer"


def rows(sites: int, n_components: int = 100) -> list[Row]:
    """The rows that are a statistic of a curve; those on null models are elsewhere.

    Args:
        sites: recorded per layer, 1 or 2.
        n_components: of the common components whose explained variance is measured.
    """

    def layers(curve: Tensor) -> Tensor:
        return per_layer(curve, sites)

    def trend(
        key: str, measure: str, what: str, curve: str, *, claim: str = "", paper: str = "", by_layer: bool = True,
        relative: bool = False, **more: Any,
    ) -> list[Row]:  # fmt: skip
        """Rank correlation with depth, and the fitted change beside it: one says whether, the other how much."""
        shown = layers if by_layer else lambda c: c
        change = relative_change if relative else fitted_change
        words = f"{FITTED}, of the mean" if relative else FITTED
        return [
            Row(f"{key}_trend", measure, f"{what}, {DEPTH}", curve, lambda c: spearman(shown(c)), claim, paper,
                ranked=True, shown=shown, **more),
            Row(f"{key}_change", measure, words, curve, lambda c: change(shown(c)), under=f"{key}_trend", detail=True,
                **more),
        ]  # fmt: skip

    return [
        *trend("density", "activations", "share of active units", "density", by_layer=False,
               claim="activations grow dense over the layers", paper="rises"),
        *trend("participation", "activations", "units that share the mean (participation ratio)", "participation",
               by_layer=False, relative=True),
        Row("correlation_first", "correlation", "mean correlation, first transition", "r_mean", lambda c: c[0],
            "units correlate from sublayer to sublayer", "above 0.8 from the start"),
        Row("correlation_first_between_tokens", "correlation", "between last tokens, each counted once",
            "r_first_between_tokens_mean", lambda c: c, counted="n_last_tokens", under="correlation_first",
            why="a correlation between last tokens needs sequences that end in at least 3 different ones"),
        Row("correlation_second_layer", "correlation", "first transition of the second layer", "r_mean",
            lambda c: _second_layer(c, sites), under="correlation_first"),
        Row("correlation_second_layer_within_tokens", "correlation",
            "first transition of the second layer, within last tokens", "r_second_layer_within_tokens_mean",
            lambda c: c, under="correlation_first",
            why="among sequences that end in the same token nothing varies there"),
        Row("correlation_mean", "correlation", "mean correlation, all transitions", "r_mean", lambda c: c.nanmean()),
        *trend("correlation", "correlation", "mean correlation", "r_mean", claim="correlations rise with depth",
               paper="rise"),
        Row("correlation_within_minus_cross", "correlation", "mean correlation, within minus cross", "r_mean",
            _within_minus_cross, "within-layer correlations are higher", "within > cross", both_sites=True),
        *trend("cosine", "cosine", "mean cosine", "cosine", claim="successive states align more and more",
               paper="rises"),
        *trend("speed", "velocity", "mean speed", "speed", claim="the stream accelerates", paper="rises",
               relative=True),
        *trend("relative_speed", "velocity", "mean speed over the state's norm", "relative_speed", relative=True),
        Row("speed_late_steepening", "velocity", "mean speed, slope there less before, of the mean", "speed",
            lambda c: _late_steepening(layers(c)), "most steeply in the last third", "steepest there"),
        Row("speed_cross_over_within", "velocity", "mean speed, cross over within", "speed", _cross_over_within,
            "cross-layer steps are longer", "cross > within", both_sites=True),
        Row("information_early_fall", "mutual_information",
            "mean information, first transition minus mean of the last two thirds, nats",
            "mi_mean", _early_fall, "information falls sharply in early layers", "falls", counted="mi_samples"),
        Row("information_early_fall_between_tokens", "mutual_information", "between last tokens, each counted once",
            "mi_between_tokens_mean", _early_fall, counted="mi_tokens", under="information_early_fall",
            why="its estimator needs sequences that end in more different tokens"),
        Row("information_second_layer_fall", "mutual_information", "from the second layer's first transition on",
            "mi_mean", lambda c: _second_layer(c, sites) - c[len(c) // 3 :].nanmean(), counted="mi_samples",
            under="information_early_fall"),
        *trend("information", "mutual_information", "mean information", "mi_mean", counted="mi_samples"),
        Row("information_within_minus_cross", "mutual_information", "mean information, within minus cross, nats",
            "mi_mean", _within_minus_cross, "most at cross-layer transitions", "cross lower", both_sites=True,
            counted="mi_samples"),
        Row("turns", "rotation", "mean |R| of the mean trajectory", "rotation_abs_mean", lambda c: c, "units rotate",
            "10.74 turns over 64 sublayers"),
        *trend("dimensions", "pca", "dimensions filled (participation ratio)", "dimensions", by_layer=False,
               relative=True, claim="later layers need fewer components", paper="fewer", counted="n_kept"),
        *trend("components_90", "pca", "components for 90 % of a sublayer's variance", "components_90", by_layer=False,
               relative=True, counted="n_kept"),
        *trend("explained", "pca", f"variance that {n_components} common components explain (rises if fewer)", "ev",
               by_layer=False),
    ]  # fmt: skip


def findings(results: Mapping[str, Results], measures: Sequence[str], sites_per_layer: int) -> list[Finding]:
    """The rows for what was measured; ``results`` maps a condition to its results, the first one being the main one."""
    table: list[Finding] = []
    literal = any(r.get("mi_estimator") == "paper_literal" for r in results.values())
    for row in rows(sites_per_layer, n_components(results)):
        if row.measure not in measures or (row.both_sites and sites_per_layer == 1):
            continue
        if row.measure == "mutual_information" and literal:
            table += _literal(row, results)
            continue
        table += _finding(row, results)
        if row.key == "turns":
            table += rotation_rows(results)
    return table


def n_components(results: Mapping[str, Results]) -> int:
    """How many common components were kept; 100 where none were asked for."""
    return next((len(r["pca_ratio"]) for r in results.values() if "pca_ratio" in r), 100)


def _finding(row: Row, results: Mapping[str, Results], **changed: str) -> list[Finding]:
    """A row and, where there are massive units, the row without them."""
    found = {"key": row.key, "measure": row.measure, "claim": row.claim, "paper": row.paper, "under": row.under}
    found |= {"statistic": row.statistic} | changed
    values = {c: measured(r, row, row.curve) for c, r in results.items() if row.curve in r}
    if not values:  # measured by nobody, as on the way of a training
        return []
    table = [Finding(**found, values=values, detail=row.detail)]  # type: ignore[arg-type]
    without = f"{row.curve}_without_massive"
    rest = {c: measured(r, row, without) for c, r in results.items() if without in r}
    if rest:
        key, of = f"{found['key']}_without_massive", found["under"] or found["key"]
        table.append(Finding(key, row.measure, "", "", _without(row), rest, under=of, detail=row.detail))
    return table


def _without(row: Row) -> str:
    return "without massive units" if not row.under else f"{row.statistic}, without massive units"


def _literal(row: Row, results: Mapping[str, Results]) -> list[Finding]:
    """The paper's sum, which is not an information, behind the true one: each under a name of its own."""
    has_true = {c: r for c, r in results.items() if "mi_true_mean" in r}
    true = {c: measured(r, row, "mi_true_mean") for c, r in has_true.items()}
    head = Finding(row.key, row.measure, row.claim, row.paper, f"{row.statistic} (true, kde)", true, row.under)
    words = f"{row.statistic.removesuffix(', nats')}: the paper's sum, no information"
    key = row.key.replace("information", "paper_sum", 1)
    return [head, *_finding(row, results, key=key, claim="", paper="", statistic=words, under=row.key)]


def measured(results: Results, row: Row, name: str) -> Value:
    """A row's statistic of the curve ``name`` with its interval, the curve's ends, N, and why it is undefined."""
    curve, n = results[name], results.get(row.counted)
    value = float(row.of(curve))
    more = results.get(f"{name}_seeds")
    seeds = () if more is None else tuple(float(row.of(other)) for other in more)
    shown = row.shown(curve) if row.shown is not None else None
    ends = ends_of(shown) if shown is not None and len(shown) else None
    if value != value:
        return Value(value, ends=ends, n=n, seeds=seeds, reason=row.why or why_undefined(results, curve, shown))
    interval, few = _interval(row, results, name), results.get("intervals_note", "")
    if interval is None:
        alone = f" (no interval: {few})" if results.get("n_groups") == 1 and few else ""
        return Value(value, ends=ends, n=n, seeds=seeds, note=alone)
    note = f" ({few})" if few else ""
    return Value(value, float(interval.low), float(interval.high), ends, n, seeds, note=note)


def _interval(row: Row, results: Results, name: str) -> Interval | None:
    """The 95 % interval: by the jackknife or, for ranks, shares and turns, which move in steps, by simulation."""
    curve, groups, drawn = results[name], results.get(f"{name}_groups"), results.get(f"{name}_draws")
    if drawn is not None:
        of_drawn = row.of(drawn) if row.ranked else torch.stack([row.of(c) for c in drawn])
        return simulated(row.of(curve), of_drawn)
    if groups is None:
        return None
    if row.ranked:
        return simulated(row.of(curve), simulate(row.of, curve, groups))
    return jackknife(row.of(curve), torch.stack([row.of(g) for g in groups]))


def why_undefined(results: Results, curve: Tensor, shown: Tensor | None = None) -> str:
    """Why a statistic of a curve is not a number, in words."""
    constant, mean = results.get("constant"), results.get("mean")
    undefined = (~curve.isfinite()).nonzero().flatten().tolist() if curve.ndim == 1 else []
    if undefined and constant is not None and mean is not None and int(constant[0]) == mean.shape[1]:
        return "all sequences are one state at the first sublayer, since they end in the same token: nothing varies"
    if undefined:
        where = "the first transition" if undefined == [0] else f"{len(undefined)} of {len(curve)} places"
        return f"the curve itself is not defined at {where}"
    values = curve if shown is None else shown
    if values.ndim and len(values) < 3:
        return f"it needs at least 3 values over depth, and there are {len(values)}"
    return "the curve never moves" if values.ndim and bool((values == values[0]).all()) else "nothing was measured"
