"""Every curve and finding by group of sequences, with the difference between groups (METHOD section 15).

Groups are subsets of the trajectories that were kept already, so nothing is read or recorded for them. A group is held
against the other, or of several each against the rest. Its interval leaves out the documents that it has; the
difference has an interval that leaves out documents of both, and a p over permutations of labels
(:mod:`rsdyn.dynamics.label_permutation`), adjusted for all that was tested (Holm).

What depends on how many sequences there are (information, dimensions, and whatever is of a mean trajectory) is compared
at equal N: of larger groups as many are drawn as the smallest has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected, no_bar
from rsdyn.analysis.findings import rows as rows_of
from rsdyn.analysis.group_design import LEAST, GroupDesign, Labelled
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import AnalysisResults, ByGroup, ConditionResults, GroupCurve, GroupRow, curves
from rsdyn.analysis.subset_curves import (
    AT_EQUAL_N,
    CURVES,
    INFORMATION,
    LINEAR,
    SINGLE,
    SPECTRAL,
    TURNS,
    Found,
    Members,
    SubsetCurves,
)
from rsdyn.dynamics.label_permutation import (
    Exchange,
    exchange_of,
    holm,
    permutation_p,
    permuted_labels,
    sequential_p,
)
from rsdyn.dynamics.resampling import FEW_CLUSTERS, jackknife, simulate, simulated

FEWEST_PERMUTATIONS, MOST_PERMUTATIONS = 1999, 9999
PER_TEST = 25  # permutations for each row and contrast, so that Holm's p of the smallest can be .04
ENOUGH = 10  # as large ones after which what is costly is permuted no further
COSTLY_SUBSETS = 2000  # of permuted labels at most, for what is costly
AT_ONCE = 256  # subsets of permuted labels that are measured together
LEVELLED = ("correlation/mean", "rotation/mean_abs")  # whose rows have their level already
APART = "_without_massive"


def given_by_group(found: ConditionResults) -> bool:
    """Whether anything that was measured of a stream is given by group."""
    return any(path in CURVES for path, _ in curves(found))


def by_group(
    collected: Collected,
    found: AnalysisResults,
    labelled: Labelled,
    how: How,
    *,
    bar: Callable[[str, int], AbstractContextManager[Callable[[int], object]]] = no_bar,
) -> ByGroup:
    """The main stream of ``found``, which ``collected`` is of, by group: on every process the same.

    ``bar`` shows progress, as in :class:`~rsdyn.analysis.collected.Collected`.
    """
    share = collected.share
    assert share is not None
    sequences = share.sequence.unique().cpu()
    code, cluster = labelled.code[sequences], labelled.cluster[sequences]
    row_of = torch.searchsorted(sequences, share.sequence.cpu())  # of each trajectory, the place of its sequence
    there = [g for g in range(len(labelled.names)) if bool((code == g).any())]
    code = torch.tensor([*range(len(there)), -1])[
        torch.tensor([there.index(int(c)) if int(c) in there else -1 for c in code])
    ]
    design = GroupDesign.of(tuple(labelled.names[g] for g in there), code, cluster, row_of, seed=how.seed)
    paths = {path: m for path, m in curves(found.main) if path in CURVES}
    if how.settings.mi.estimator == "paper_literal":
        paths.pop(INFORMATION, None)  # its sum is no information, and there is nothing to compare
    usable = ~collected.unusable
    variants = [("", SubsetCurves(collected, how, list(paths), usable, few=False))]
    apart = [path for path, m in paths.items() if m.without_massive is not None and path in LINEAR]
    if apart:
        variants.append((APART, SubsetCurves(collected, how, apart, usable & ~collected.massive, few=True)))
    statistics = {suffix: _statistics(found, of.paths, suffix) for suffix, of in variants}
    n_tests = len(design.contrasts) * sum(len(rows) for rows in statistics.values())
    known = code >= 0
    exchange = exchange_of(code[known], cluster[known])
    permutations = min(max(FEWEST_PERMUTATIONS, PER_TEST * n_tests - 1), MOST_PERMUTATIONS) if n_tests else 0
    labels = code.repeat(1 + permutations, 1)
    if permutations:
        labels[1:, known] = permuted_labels(code[known], cluster[known], permutations, seed=how.seed)
    rows: dict[str, GroupRow] = {}
    by_curve: dict[str, GroupCurve] = {}
    for suffix, of in variants:
        values = _values(of, design)
        n_labels = len(labels) + len(_costly(of.paths)) * min(len(labels), COSTLY_SUBSETS // 2)
        with bar("permuted labels" + suffix.replace("_", " "), n_labels) as done:
            p_rows, p_curves = _tested(of, design, labels, statistics[suffix], done)
        by_curve |= {
            CURVES[path].key + suffix: _curve(path, suffix, values[path], p_curves[path], design) for path in of.paths
        }
        rows |= {st.key: _row(st, values[st.path], p_rows[st.key], design) for st in statistics[suffix]}
    adjusted = holm(torch.stack([row.p for row in rows.values()]))
    rows = {key: replace(row, p_holm=p) for (key, row), p in zip(rows.items(), adjusted, strict=True)}
    keys = [st.key for st in statistics[""]]
    order = [key + suffix for key in keys for suffix in statistics]
    return ByGroup(
        names=design.names,
        sequences=design.counts,
        documents=design.documents,
        unlabelled=int((~known).sum()),
        first=design.first,
        second=design.second,
        over=labelled.kind,
        exchange=exchange.kind,
        movable=exchange.movable,
        permutations=permutations,
        curves=by_curve,
        rows={key: rows[key] for key in order if key in rows},
        notes=tuple(_notes(design, labelled.kind, exchange, int((~known).sum()))),
    )


def _notes(design: GroupDesign, kind: str, exchange: Exchange, unlabelled: int) -> list[str]:
    notes = []
    one = {"documents": "document", "blocks": "block", "sequences": "sequence"}[kind]
    if unlabelled:
        said = "sequence has no label: it is" if unlabelled == 1 else "sequences have no label: they are"
        notes.append(f"{unlabelled} {said} in the whole alone.")
    for name, n, documents in zip(design.names, design.counts.tolist(), design.documents.tolist(), strict=True):
        counted = f"{n} sequence{'s' * (n != 1)}"
        if kind != "sequences":
            counted += f" of {documents} {one}{'s' * (documents != 1)}" + " of the text" * (kind == "blocks")
        if documents < 2:
            notes.append(f"Group {name} has {counted}: too small for an interval.")
        elif documents < FEW_CLUSTERS:
            notes.append(f"Intervals of group {name} rest on {counted}: too few.")
        if name not in design.first + design.second and n < LEAST:
            notes.append(f"Group {name} is not compared: it has fewer than {LEAST} sequences.")
    if not design.contrasts:
        notes.append("No two groups are large enough to be compared.")
        return notes
    stays = int(design.counts.sum()) - exchange.movable
    if exchange.kind == "within":
        where = f"Labels vary within {one}s, so permutations exchange them there alone"
        notes.append(where + (f"; {stays} sequences keep theirs." if stays else "."))
    elif exchange.divided:
        notes.append(
            f"{exchange.divided} of the {one}s have sequences of several groups: under a permutation each group's part "
            "counts as one of its own."
        )
    if exchange.log_count < math.log(20):
        notes.append(
            f"Labels can be exchanged in {round(math.exp(exchange.log_count))} ways alone, so that no p can be below "
            f"{math.exp(-exchange.log_count):.2g}: give more {one}s."
        )
    return notes


# -- values, intervals, p ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Statistic:
    """A row of the findings, of one of the curves; ``of`` takes many curves ``(..., S')`` at once."""

    key: str
    measure: str
    words: str
    path: str
    of: Callable[[Tensor], Tensor]
    ranked: bool = False
    under: str = ""
    detail: bool = False


def _statistics(found: AnalysisResults, paths: Sequence[str], suffix: str) -> list[_Statistic]:
    """The rows of some curves: the mean over depth of each, and the findings' own."""
    made = {id(m): path for path, m in curves(found.main)}
    of_findings: dict[str, list[_Statistic]] = {path: [] for path in paths}
    more = ", without massive units" if suffix else ""
    for measure, row in rows_of(found):
        result = getattr(found.main, measure)
        curve = None if result is None else row.curve(result)
        path = made.get(id(curve), "")
        if path in of_findings:
            of = (lambda c: c[..., 0]) if path == TURNS else row.of
            under = row.under + suffix if row.under else ""
            of_findings[path].append(
                _Statistic(row.key + suffix, measure, row.statistic + more, path, of, row.ranked, under, row.detail)
            )
    table = []
    for path in paths:
        if path not in LEVELLED:
            measure, key, words = CURVES[path]
            single = path in SINGLE
            words = words if single else f"{words}, over depth"
            level = (lambda c: c[..., 0]) if single else (lambda c: c.nanmean(-1))
            table.append(_Statistic(f"{key}_level{suffix}", measure, words + more, path, level))
        table += of_findings[path]
    return table


class _Value(NamedTuple):
    """A curve of the groups and of what is compared.

    Attributes:
        groups: ``(L, S')``; ``without`` of each group without some of its documents in turn, ``(G, S')``.
        pairs: of each contrast ``(2, S')``; ``pairs_without`` ``(G, 2, S')``.
        drawn, pairs_drawn: simulated data ``(n, 1, S')`` and ``(n, 2, S')``, where intervals are by simulation.
    """

    groups: Tensor
    without: list[Tensor]
    pairs: list[Tensor]
    pairs_without: list[Tensor]
    drawn: list[Tensor | None]
    pairs_drawn: list[Tensor | None]


def _values(of: SubsetCurves, design: GroupDesign) -> dict[str, _Value]:
    """Every curve of each group and contrast, and without some documents in turn."""
    n = len(design.names)
    groups = design.of_groups()
    alone = [groups.at(g) for g in range(n)]
    alone_without = [part.without(design.left_of(part.full[0])) for part in alone]
    pairs: list[Members] = []
    pairs_without: list[tuple[Members, Members]] = []
    if design.contrasts:
        compared = design.members(design.code[None])
        for i, j in design.contrasts:
            a, b = compared.at(i), compared.at(j)
            left = design.left_of_both(a.full[0], b.full[0])
            pairs.append(a.joined([b]))
            pairs_without.append((a.without(left), b.without(left)))
    wanted = [groups, *alone_without, *pairs, *(part for both in pairs_without for part in both)]
    sizes = [len(part.full) for part in wanted]
    members = wanted[0].joined(wanted[1:]).to(of.device)
    found = of.linear(members) | of.costly(members, of.paths)
    if INFORMATION in found:  # values are of all units, intervals of some
        whole = groups.joined(pairs).to(of.device)
        first = list(found[INFORMATION].split(sizes))
        first[0], *first[1 + n : 1 + n + len(pairs)] = of.information(whole).split([n, *[2] * len(pairs)])
        found[INFORMATION] = torch.cat(first)
    out = {}
    for path, value in found.items():
        parts = list(value.split(sizes))
        if path in AT_EQUAL_N:
            for g in set(range(n)) - set(design.compared):
                parts[0][g], parts[1 + g] = torch.nan, torch.full_like(parts[1 + g], torch.nan)
        drawn: list[Tensor | None] = [None] * n
        pairs_drawn: list[Tensor | None] = [None] * len(pairs)
        if path == TURNS:
            for g in design.compared:
                if len(alone_without[g].full) > 1:
                    drawn[g] = of.turns_drawn(alone[g].to(of.device), [alone_without[g].to(of.device)])
            for c, both in enumerate(pairs_without):
                if len(both[0].full) > 1:
                    pairs_drawn[c] = of.turns_drawn(pairs[c].to(of.device), [part.to(of.device) for part in both])
        both_without = parts[1 + n + len(pairs) :]
        out[path] = _Value(
            parts[0],
            parts[1 : 1 + n],
            parts[1 + n : 1 + n + len(pairs)],
            [torch.stack(two, 1) for two in zip(both_without[0::2], both_without[1::2], strict=True)],
            drawn,
            pairs_drawn,
        )
    return out


def _interval(
    of: Callable[[Tensor], Tensor], ranked: bool, value: Tensor, without: Tensor, drawn: Tensor | None
) -> Tensor:
    """Low and high end ``(2, ...)`` of what ``of`` gives of ``value``; NaN where nothing can be left out of it."""
    found = of(value)
    if drawn is not None:
        ends = simulated(found, of(drawn))[1:]
    elif len(without) < 2:
        return torch.full((2, *found.shape), torch.nan, dtype=torch.float64, device=found.device)
    elif ranked:
        ends = simulated(found, simulate(of, value, without))[1:]
    else:
        ends = jackknife(found, of(without))[1:]
    return torch.stack(list(ends))


def _curve(path: str, suffix: str, value: _Value, p: Tensor, design: GroupDesign) -> GroupCurve:
    def same(curve: Tensor) -> Tensor:
        return curve

    def less(two: Tensor) -> Tensor:
        return two[..., 0, :] - two[..., 1, :]

    single = [d if d is None else d[:, 0] for d in value.drawn]
    ends = [_interval(same, False, v, w, d) for v, w, d in zip(value.groups, value.without, single, strict=True)]
    pairs = zip(value.pairs, value.pairs_without, value.pairs_drawn, strict=True)
    apart = [_interval(less, False, v, w, d) for v, w, d in pairs]
    nothing = value.groups.new_zeros(0, value.groups.shape[-1])
    return GroupCurve(
        path=path,
        words=CURVES[path].words + (", without massive units" if suffix else ""),
        value=value.groups,
        interval=torch.stack(ends, 1),
        difference=torch.stack([less(v) for v in value.pairs]) if value.pairs else nothing,
        difference_interval=torch.stack(apart, 1) if apart else torch.stack([nothing, nothing]),
        p=p,
        n=design.n_of(path),
        equal_n=path in AT_EQUAL_N,
        without_massive=bool(suffix),
    )


def _row(st: _Statistic, value: _Value, p: Tensor, design: GroupDesign) -> GroupRow:
    def less(two: Tensor) -> Tensor:
        return st.of(two[..., 0, :]) - st.of(two[..., 1, :])

    single = [d if d is None else d[:, 0] for d in value.drawn]
    ends = [_interval(st.of, st.ranked, v, w, d) for v, w, d in zip(value.groups, value.without, single, strict=True)]
    pairs = zip(value.pairs, value.pairs_without, value.pairs_drawn, strict=True)
    apart = [_interval(less, st.ranked, v, w, d) for v, w, d in pairs]
    nothing = torch.zeros(0, dtype=torch.float64)
    return GroupRow(
        measure=st.measure,
        statistic=st.words,
        value=torch.stack([st.of(v) for v in value.groups]).to(torch.float64),
        interval=torch.stack(ends, 1),
        difference=torch.stack([less(v) for v in value.pairs]) if value.pairs else nothing,
        difference_interval=torch.stack(apart, 1) if apart else torch.stack([nothing, nothing]),
        p=p,
        p_holm=p,
        n=design.n_of(st.path),
        equal_n=st.path in AT_EQUAL_N,
        under=st.under,
        detail=st.detail,
    )


def _tested(
    of: SubsetCurves,
    design: GroupDesign,
    labels: Tensor,
    statistics: Sequence[_Statistic],
    done: Callable[[int], object],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The p ``(C,)`` of each row by its key, and of each curve by its path: of a difference anywhere over depth.

    ``labels`` ``(1 + P, n)`` are the sequences' own, then permuted ones; where there is nothing to compare, theirs
    alone.
    """
    n_contrasts = len(design.contrasts)
    if not n_contrasts:
        none = torch.zeros(0, dtype=torch.float64)
        return {st.key: none for st in statistics}, dict.fromkeys(of.paths, none)
    n_subsets = len(design.compared) * (2 if design.several else 1)

    def differences(some: Found, paths: Sequence[str]) -> tuple[Found, Found]:
        """Of the rows ``(P, C)`` and of the curves ``(P, C, S')``."""
        of_rows, of_curves = {}, {}
        for path in paths:
            two = some[path].reshape(-1, n_subsets, some[path].shape[-1])
            a, b = ([pair[side] for pair in design.contrasts] for side in (0, 1))
            of_curves[path] = (two[:, a] - two[:, b]).cpu()
            for st in statistics:
                if st.path == path:
                    value = st.of(two)
                    of_rows[st.key] = (value[:, a] - value[:, b]).cpu()
        return of_rows, of_curves

    linear = [path for path in of.paths if path in LINEAR]
    parts = []
    for some in labels.split(max(1, AT_ONCE // n_subsets)):
        parts.append(differences(of.linear(design.members(some).to(of.device)), linear))
        done(len(some))
    by_row = {st.key: torch.cat([rows[st.key] for rows, _ in parts]) for st in statistics if st.path in linear}
    by_path = {path: torch.cat([found[path] for _, found in parts]) for path in linear}
    p_rows = {key: permutation_p(d[0], d[1:]) for key, d in by_row.items()}
    p_curves = {path: _anywhere(d) for path, d in by_path.items()}
    most = max(1, min(len(labels), 1 + COSTLY_SUBSETS // n_subsets))
    for together in _costly(of.paths):
        kept: list[tuple[Found, Found]] = []
        for some in labels[:most].split(20):
            kept.append(differences(of.costly(design.members(some).to(of.device), together), together))
            done(len(some))
            by_row = {key: torch.cat([rows[key] for rows, _ in kept]) for key in kept[0][0]}
            largest = {path: torch.cat([found[path] for _, found in kept]) for path in together}
            largest = {path: d.abs().nan_to_num(0.0).amax(-1) for path, d in largest.items()}
            of_rows = {key: sequential_p(d[0], d[1:], ENOUGH) for key, d in by_row.items()}
            of_curves = {path: sequential_p(d[0], d[1:], ENOUGH) for path, d in largest.items()}
            if all(stopped for _, stopped in (*of_rows.values(), *of_curves.values())):
                break
        p_rows |= {key: p for key, (p, _) in of_rows.items()}
        p_curves |= {path: p for path, (p, _) in of_curves.items()}
    return p_rows, p_curves


def _costly(paths: Sequence[str]) -> list[list[str]]:
    """What is costly among some paths, those together that come of one computation."""
    families = [[INFORMATION], [*SPECTRAL]]
    return [some for family in families if (some := [path for path in family if path in paths])]


def _anywhere(differences: Tensor) -> Tensor:
    """The p ``(C,)`` of the largest of ``(1 + P, C, S')`` over depth, each place in its own spread over labellings."""
    spread = differences.nan_to_num(0.0).std(0)
    size = (differences / torch.where(spread > 0, spread, torch.nan)).abs().nan_to_num(0.0).amax(-1)
    return permutation_p(size[0], size[1:])
