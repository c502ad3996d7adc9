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
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected, no_bar
from rsdyn.analysis.findings import rows as rows_of
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import AnalysisResults, ByGroup, ConditionResults, GroupCurve, GroupRow, curves
from rsdyn.dynamics import dimension
from rsdyn.dynamics.information import MIN_SAMPLES, consecutive_information
from rsdyn.dynamics.label_permutation import (
    Exchange,
    exchange_of,
    holm,
    permutation_p,
    permuted_labels,
    sequential_p,
)
from rsdyn.dynamics.resampling import FEW_CLUSTERS, MOST_GROUPS, group_of, jackknife, simulate, simulated
from rsdyn.dynamics.rotation import rotations
from rsdyn.dynamics.step_nulls import StepProducts, curvature_of, path_length_of, step_products, straightness_of
from rsdyn.dynamics.subsets import Subsets, lowest, subset_means, subset_spectra
from rsdyn.errors import UserError
from rsdyn.metrics.processes import from_all

LEAST = 10  # sequences of a group that is compared with others
FEWEST_PERMUTATIONS, MOST_PERMUTATIONS = 1999, 9999
PER_TEST = 25  # permutations for each row and contrast, so that Holm's p of the smallest can be .04
ENOUGH = 10  # as large ones after which what is costly is permuted no further
COSTLY_SUBSETS = 2000  # of permuted labels at most, for what is costly
MOST_SPECTRUM = 100  # sequences of a group whose dimensions are compared, each an eigenproblem of this size
N_UNITS = 8  # whose information is estimated for intervals and p, which take a thousand estimates
AT_ONCE = 256  # subsets of permuted labels that are measured together
APART = "_without_massive"

# path in the results -> the key of its rows, and what it is
LINEAR = {
    "activations/density": ("density", "share of active units"),
    "activations/participation": ("participation", "units that share the mean (participation ratio)"),
    "correlation/mean": ("correlation", "mean correlation"),
    "cosine/mean": ("cosine", "mean cosine"),
    "velocity/speed": ("speed", "mean speed"),
    "velocity/relative": ("relative_speed", "mean speed over the state's norm"),
    "norm/mean": ("norm", "mean norm of the state"),
    "rotation/mean_abs": ("turns", "mean |R| of the mean trajectory"),
    "pca/over_depth/explained": ("explained", "variance that common components explain"),
    "curvature/angle": ("curvature", "angle between successive steps, radians"),
    "curvature/straightness": ("straightness", "straightness of the way"),
    "curvature/length": ("length", "length of the way"),
}
COSTLY = {
    "mutual_information/mean": ("information", "mean information, nats"),
    "pca/over_depth/dimensions": ("dimensions", "dimensions filled (participation ratio)"),
    "pca/over_depth/components_90": ("components_90", "components for 90 % of a sublayer's variance"),
}
CURVES = LINEAR | COSTLY
LEVELLED = ("correlation/mean", "rotation/mean_abs")  # whose rows have their level already
OF_MEANS = ("activations/density", "activations/participation", "rotation/mean_abs")
TURNS = "rotation/mean_abs"  # jumps as means move: its interval is by simulation
SINGLE = ("rotation/mean_abs", "curvature/straightness", "curvature/length")  # numbers, and no curves
AT_EQUAL_N = (*OF_MEANS, *COSTLY)
EXPLAINED, INFORMATION = "pca/over_depth/explained", "mutual_information/mean"
SPECTRAL = ("pca/over_depth/dimensions", "pca/over_depth/components_90")
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Labelled:
    """The groups of the first sequences of a corpus.

    Attributes:
        names: of the groups.
        code: ``(n,)`` int64, each sequence's place in ``names``; -1 where it has no label.
        cluster: ``(n,)`` int64, the document of each, a block of the text, or the sequence itself.
        kind: which of the three, ``documents``, ``blocks`` or ``sequences``.
    """

    names: tuple[str, ...]
    code: Tensor
    cluster: Tensor
    kind: str


def given_by_group(found: ConditionResults) -> bool:
    """Whether anything that was measured of a stream is given by group."""
    return any(path in CURVES for path, _ in curves(found))


def check_groups(labelled: Labelled, n: int) -> None:
    """Raise ``UserError`` unless the first ``n`` sequences are of two groups at least."""
    known = labelled.code[:n]
    there = known[known >= 0].unique().tolist()
    if len(there) < 2:
        said = f"are of one group, {labelled.names[there[0]]}" if there else "have no label"
        raise UserError(
            f"groups: all {len(known)} sequences that are compared {said}, so there is nothing to compare. Measure "
            "more sequences (`samples`, `keep`, `limit`), or leave the groups out."
        )


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
    design = _Design.of(tuple(labelled.names[g] for g in there), code, cluster, row_of, seed=how.seed)
    paths = {path: m for path, m in curves(found.main) if path in CURVES}
    if how.settings.mi.estimator == "paper_literal":
        paths.pop(INFORMATION, None)  # its sum is no information, and there is nothing to compare
    usable = ~collected.unusable
    variants = [("", _Curves(collected, how, list(paths), usable, few=False))]
    apart = [path for path, m in paths.items() if m.without_massive is not None and path in LINEAR]
    if apart:
        variants.append((APART, _Curves(collected, how, apart, usable & ~collected.massive, few=True)))
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
            CURVES[path][0] + suffix: _curve(path, suffix, values[path], p_curves[path], design) for path in of.paths
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


def _notes(design: _Design, kind: str, exchange: Exchange, unlabelled: int) -> list[str]:
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


class _Design:
    """Which subsets of the kept trajectories are compared.

    Attributes:
        names: of the L groups; ``counts`` and ``documents`` ``(L,)`` their sequences, and what these are part of.
        compared: those that are large enough.
        contrasts: pairs of places in what :meth:`members` gives: the compared groups, then the rest to each, if there
            are more than two groups.
        first, second: the names of each contrast.
    """

    def __init__(self, names: tuple[str, ...], code: Tensor, cluster: Tensor, row_of: Tensor, chance: Tensor) -> None:
        self.names, self.code, self.cluster, self.row_of, self.chance = names, code, cluster, row_of, chance
        groups = range(len(names))
        self.counts = torch.tensor([int((code == g).sum()) for g in groups])
        self.documents = torch.tensor([len(cluster[code == g].unique()) for g in groups])
        total = int((code >= 0).sum())
        several = len(names) > 2
        large = [g for g in groups if self.counts[g] >= LEAST and self.documents[g] >= 2]
        if several:
            large = [g for g in large if total - int(self.counts[g]) >= LEAST]
        self.compared, self.several = large, several
        k = len(large)
        self.contrasts = [(i, k + i) for i in range(k)] if several else [(0, 1)] * (k == 2)
        self.first = tuple(names[large[i]] for i, _ in self.contrasts)
        self.second = tuple("the rest" if several else names[large[j]] for _, j in self.contrasts)

    @classmethod
    def of(cls, names: tuple[str, ...], code: Tensor, cluster: Tensor, row_of: Tensor, *, seed: int) -> _Design:
        """The design; ``seed`` draws what of larger groups is compared."""
        return cls(names, code, cluster, row_of, torch.rand(len(row_of), generator=torch.Generator().manual_seed(seed)))

    def n_of(self, path: str) -> Tensor:
        """On how many trajectories each group's curve is measured, ``(L,)``."""
        some = self.of_groups()
        part = some.few if path in SPECTRAL else some.equal if path in AT_EQUAL_N else some.full
        return part.sum(1)

    def full(self, labels: Tensor) -> Tensor:
        """Under labellings ``(P, n)`` of the sequences the trajectories of each subset, ``(P, K, N)``."""
        each = torch.stack([labels == g for g in self.compared], dim=1)
        if self.several:
            each = torch.cat([each, (labels >= 0)[:, None] & ~each], dim=1)
        return each[..., self.row_of]

    def members(self, labels: Tensor) -> _Members:
        """The subsets of labellings ``(P, n)``, ``(P K, N)``; N is equal over those of one labelling."""
        full = self.full(labels)
        p, k, n = full.shape
        most = full.sum(2).amin(1, keepdim=True).expand(p, k).reshape(-1)
        full = full.reshape(p * k, n)
        equal = lowest(full, self.chance, most)
        return _Members(full, equal, lowest(equal, self.chance, most.clamp(max=MOST_SPECTRUM)))

    def of_groups(self) -> _Members:
        """The subsets of all L groups under their own labels; those that are not compared have none at equal N."""
        full = torch.stack([self.code == g for g in range(len(self.names))])[:, self.row_of]
        none = torch.zeros_like(full)
        if not self.compared:
            return _Members(full, none, none.clone())
        some = self.members(self.code[None])
        few = none.clone()
        for place, g in enumerate(self.compared):
            none[g], few[g] = some.equal[place], some.few[place]
        return _Members(full, none, few)

    def left_of(self, rows: Tensor) -> Tensor:
        """The trajectories that an interval of the subset ``rows`` ``(N,)`` leaves out in turn, ``(G, N)``."""
        place = torch.full((len(rows),), -1)
        place[rows] = group_of(self.cluster[self.row_of][rows])
        return torch.stack([place == g for g in range(int(place.max()) + 1)])

    def left_of_both(self, a: Tensor, b: Tensor) -> Tensor:
        """Those that an interval of a difference leaves out in turn: whole documents, an equal share of each subset's.

        Documents that have sequences of both go with the subset that has more of them.
        """
        cluster = self.cluster[self.row_of].unique(return_inverse=True)[1]
        n = int(cluster.max()) + 1
        ours, theirs = (torch.bincount(cluster[rows], minlength=n) for rows in (a, b))
        sides = [side for side in ((ours >= theirs) & (ours > 0), theirs > ours) if side.any()]
        most = min(MOST_GROUPS, *(int(side.sum()) for side in sides))
        place = torch.full((len(a),), -1)
        for side in sides:
            rows = side[cluster] & (a | b)
            place[rows] = group_of(cluster[rows], most)
        return torch.stack([place == g for g in range(most)])


class _Members(NamedTuple):
    """Subsets of the kept trajectories, ``(P, N)`` boolean each.

    Attributes:
        full: all of them.
        equal: as many of each as are compared at equal N.
        few: of these the ones whose dimensions are taken.
    """

    full: Tensor
    equal: Tensor
    few: Tensor

    def at(self, i: int) -> _Members:
        """One subset, as the only one."""
        return _Members(*(part[i : i + 1] for part in self))

    def joined(self, others: Sequence[_Members]) -> _Members:
        return _Members(*(torch.cat(parts) for parts in zip(self, *others, strict=True)))

    def without(self, left: Tensor) -> _Members:
        """The only subset without the trajectories ``left`` ``(G, N)`` in turn: ``(G, N)``."""
        return _Members(*(part & ~left for part in self))

    def to(self, device: torch.device) -> _Members:
        return _Members(*(part.to(device) for part in self))


class _Curves:
    """The curves of subsets of what was kept of a stream, all units or without massive ones, on every process."""

    def __init__(self, collected: Collected, how: How, paths: Sequence[str], units: Tensor, *, few: bool) -> None:
        share = collected.share
        assert share is not None
        self.share, self.how, self.collected, self.device = share, how, collected, share.x.device
        self.paths = [p for p in CURVES if p in paths]
        self.units, self.few = units, few
        mine = units[share.first_unit : share.first_unit + share.x.shape[-1]]
        self.x = share.x if bool(mine.all()) else share.x[..., mine]
        self.numbers = mine.nonzero().flatten() + share.first_unit
        self.subsets = Subsets(self.x)
        self.each = self._of_each()
        some = torch.linspace(0, int(units.sum()) - 1, min(N_UNITS, int(units.sum()))).round().long()
        chosen = units.nonzero().flatten()[some.to(units.device)]
        self.some = self.x[..., torch.isin(self.numbers, chosen)]
        self.gram: Tensor | None = None

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over processes of what is a sum over units."""
        return reduce(add, from_all(values, self.device))

    def _of_each(self) -> Found:
        """The curves of each trajectory ``(N, ...)``, and what explained variance takes."""
        x, found = self.x, dict[str, Tensor]()
        n, s = x.shape[:2]
        sums = torch.zeros(3, n, s, dtype=torch.float64, device=self.device)
        for rows in torch.arange(n, device=self.device).split(64):
            part = x[rows].to(torch.float64)
            sums[0, rows] = part.square().sum(-1)
            sums[1, rows, 1:] = (part[:, 1:] * part[:, :-1]).sum(-1)
            sums[2, rows, 1:] = (part[:, 1:] - part[:, :-1]).square().sum(-1)
        size, dot, step = (self._sum(value) for value in sums)
        size, dot, step = size.sqrt(), dot[:, 1:], step[:, 1:].sqrt()
        before = torch.where(size[:, :-1] > 0, size[:, :-1], torch.nan)
        known = {
            "cosine/mean": (dot / before / size[:, 1:]).clamp(-1, 1),
            "velocity/speed": step,
            "velocity/relative": step / before,
            "norm/mean": size,
        }
        found = {path: value for path, value in known.items() if path in self.paths}
        if any(path.startswith("curvature/") for path in self.paths):
            products: StepProducts = reduce(add, from_all(step_products(x), self.device))
            found |= {
                "curvature/angle": curvature_of(products),
                "curvature/straightness": straightness_of(products)[:, None],
                "curvature/length": path_length_of(products)[:, None],
            }
        if EXPLAINED in self.paths:
            pca = self.collected.pca_without_massive if self.few else self.collected.pca
            assert pca is not None
            # in float64, so that sums over processes do not move what lies near the observed difference
            components = pca.components[self.numbers].to(torch.float64)
            mean = pca.mean[self.numbers].to(torch.float64)
            latents = torch.zeros(n, s, components.shape[1], dtype=torch.float64, device=self.device)
            away = torch.zeros(n, s, dtype=torch.float64, device=self.device)
            for rows in torch.arange(n, device=self.device).split(64):
                part = x[rows].to(torch.float64) - mean
                latents[rows], away[rows] = part @ components, part.square().sum(-1)
            away = self._sum(away)
            missed = away - self._sum(latents).square().sum(-1)
            found["missed"] = torch.where(missed > 1e-12 * away, missed, 0.0)  # below is rounding, of all components
            found["about_centre"] = self._sum(self.subsets.squares())
        return found

    def linear(self, members: _Members) -> Found:
        """Those of subsets ``(P, ...)`` that are means and products of means."""
        found: Found = {}
        for path in self.paths:
            if path in self.each:
                found[path] = subset_means(self.each[path], members.full)
        if "correlation/mean" in self.paths:
            found["correlation/mean"] = _mean_of(self._sum(self.subsets.correlation_sums(members.full)))
        if EXPLAINED in self.paths:
            spread = subset_means(self.each["about_centre"], members.full)
            spread = spread - self._sum(self.subsets.mean_squares(members.full))
            missed = subset_means(self.each["missed"], members.full)
            found[EXPLAINED] = 1 - missed / torch.where(spread > 0, spread, torch.nan)
        of_means = [path for path in OF_MEANS if path in self.paths]
        if of_means:
            limit = self.how.settings.density_threshold
            n_units = int(self.units.sum())
            if limit is None:  # half the RMS of the last sublayer, as of the whole
                last = self._sum(self.subsets.last_squares(members.equal))
                limits = 0.5 * (last / n_units).sqrt()
            else:
                limits = torch.full((len(members.equal),), limit, dtype=torch.float64, device=self.device)
            sums = self._sum(self.subsets.of_means(members.equal, limits, turns=TURNS in of_means))
            above, square, fourth, turns, counted = sums.unbind(1)
            of = {
                "activations/density": above / n_units,
                "activations/participation": square.square() / fourth,
                TURNS: torch.where(counted > 0, turns / counted, torch.nan)[:, :1],
            }
            found |= {path: of[path] for path in of_means}
        return found

    def turns_drawn(self, value: _Members, without: Sequence[_Members]) -> Tensor:
        """Mean |R| ``(n, K, 1)`` of simulated data about K subsets that scatter as ``without`` says."""
        mean = self.subsets.means(value.equal)
        others = torch.stack([self.subsets.means(part.equal) for part in without], dim=1)

        def sums(drawn: Tensor) -> Tensor:
            r = rotations(drawn).abs()
            return torch.stack([r.nansum(-1), r.isfinite().sum(-1).to(torch.float64)], -1)

        return _mean_of(self._sum(simulate(sums, mean, others)))[..., None]

    def costly(self, members: _Members, paths: Sequence[str]) -> Found:
        """Those of subsets ``(P, ...)`` that each take a computation of their own."""
        found: Found = {}
        if INFORMATION in paths:
            found[INFORMATION] = _mean_of(self._sum(self._information_sums(members.equal, self.some)))
        if any(path in paths for path in SPECTRAL):
            spectra = self._spectra(members.few)
            of = {SPECTRAL[0]: dimension.participation, SPECTRAL[1]: dimension.components_for}
            found |= {path: of[path](spectra) for path in SPECTRAL if path in paths}
        return found

    def information(self, members: _Members) -> Tensor:
        """Mean information ``(P, S - 1)`` over all units."""
        return _mean_of(self._sum(self._information_sums(members.equal, self.x)))

    def _information_sums(self, members: Tensor, x: Tensor) -> Tensor:
        """Over some units: ``(P, S - 1, 2)``, the sum of what is finite, and of how many."""
        estimator, out = self.how.settings.mi.estimator, []
        for rows in members:
            part = x[rows]
            if len(part) < MIN_SAMPLES[estimator] or not part.shape[-1]:
                out.append(torch.zeros(x.shape[1] - 1, 2, dtype=torch.float64, device=self.device))
                continue
            mi = consecutive_information(part, estimator)
            known = mi.isfinite()
            out.append(torch.stack([torch.where(known, mi, 0.0).sum(-1), known.sum(-1).to(torch.float64)], -1))
        return torch.stack(out)

    def _spectra(self, members: Tensor) -> Tensor:
        """Variances along own components ``(P, S, K)``; each sublayer by one process."""
        if self.gram is None:
            whole = self.share.by_sublayer()[..., self.units]
            self.gram = torch.zeros(whole.shape[1], len(whole), len(whole), device=self.device)
            for s, product in enumerate(self.gram):
                states = dimension.centred(whole[:, s])
                product.copy_(states @ states.T)
        n = int(members.sum(1).max())
        out = self.gram.new_zeros(len(members), len(self.gram), n)
        for k, rows in enumerate(members):
            chosen = rows.nonzero().flatten()
            if len(chosen) > 1 and len(self.gram):
                out[k, :, : len(chosen)] = subset_spectra(self.gram, chosen)
        return torch.cat(from_all(out, self.device), dim=1).to(torch.float64)


def _mean_of(sums: Tensor) -> Tensor:
    """From sums and counts ``(..., 2)``; NaN where nothing was counted."""
    return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.nan)


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
        key, words = CURVES[path]
        if path not in LEVELLED:
            single = path in SINGLE
            words = words if single else f"{words}, over depth"
            level = (lambda c: c[..., 0]) if single else (lambda c: c.nanmean(-1))
            table.append(_Statistic(f"{key}_level{suffix}", path.split("/")[0], words + more, path, level))
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


def _values(of: _Curves, design: _Design) -> dict[str, _Value]:
    """Every curve of each group and contrast, and without some documents in turn."""
    n = len(design.names)
    groups = design.of_groups()
    alone = [groups.at(g) for g in range(n)]
    alone_without = [part.without(design.left_of(part.full[0])) for part in alone]
    pairs: list[_Members] = []
    pairs_without: list[tuple[_Members, _Members]] = []
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


def _curve(path: str, suffix: str, value: _Value, p: Tensor, design: _Design) -> GroupCurve:
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
        words=CURVES[path][1] + (", without massive units" if suffix else ""),
        value=value.groups,
        interval=torch.stack(ends, 1),
        difference=torch.stack([less(v) for v in value.pairs]) if value.pairs else nothing,
        difference_interval=torch.stack(apart, 1) if apart else torch.stack([nothing, nothing]),
        p=p,
        n=design.n_of(path),
        equal_n=path in AT_EQUAL_N,
    )


def _row(st: _Statistic, value: _Value, p: Tensor, design: _Design) -> GroupRow:
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
    of: _Curves,
    design: _Design,
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
