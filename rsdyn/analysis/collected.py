"""``Collected``: what the measures need of a stream, taken batch by batch in one pass or two, exact over processes."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Sequence, ValuesView
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rsdyn.analysis.measure import PerSequence
from rsdyn.analysis.measures import OF_STREAM, measure_of
from rsdyn.dynamics.dimension import Spectra
from rsdyn.dynamics.geometry import curves_without_largest
from rsdyn.dynamics.massive import POSITIONS, position_range
from rsdyn.dynamics.moments import Comoments, Covariance, Moments, massive_ratios, merge_comoments, merge_covariance
from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.resampling import MOST_GROUPS
from rsdyn.errors import UserError
from rsdyn.metrics.processes import from_all, shared_out
from rsdyn.metrics.running import (
    Correlation,
    FrozenSteps,
    GroupSums,
    KindCounts,
    LargestByKind,
    StreamCovariance,
    StreamMoments,
)
from rsdyn.metrics.samples import FirstSequences, UnitShare, UnitTrajectories
from rsdyn.metrics.tokens import ByPosition, Positional, TokenCurvature, Triples
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

MASSIVE = 100.0  # a unit is massive from so many times the median on (METHOD section 5)
KEPT_AT_POSITIONS = 200  # trajectories of each range of positions, for measures that need several states at once
LEFT_OUT = (0, 1, 2, 4, 8, 16)  # of the largest units, in the curves of each finding (METHOD section 0.10)


@contextmanager
def no_bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar that shows nothing; :func:`rsdyn.run.progress.stage_bar` shows one."""
    yield lambda n: None


class Grouped(nn.Module):
    """One metric per group of sequences, so that an interval can leave a group out.

    Args:
        make: makes a metric.
        n_groups: how many.
    """

    def __init__(self, make: Callable[[], Any], n_groups: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([make() for _ in range(n_groups)])

    def update(self, values: Tensor, group: Tensor) -> None:
        """Count ``values`` ``(n, ...)`` of the groups ``group`` ``(n,)`` in."""
        sizes = group.bincount(minlength=len(self.parts)).tolist()
        in_order = values[group.argsort(stable=True)]
        for part, rows in zip(self.parts, in_order.split(sizes), strict=True):
            if len(rows):
                part.update(rows)  # type: ignore[operator]

    def states(self, read: Callable[[Any], Any]) -> list[Any]:
        """``read`` of each group's metric, over all processes."""
        found = []
        for part in self.parts:
            with part.sync_context():  # type: ignore[operator]
                found.append(read(part))
        return [state for state in found if float(state.n) > 0]


class Metrics(nn.ModuleDict):
    """Metrics by name, which come out as what they are and not as bare modules."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)

    def values(self) -> ValuesView[Any]:
        return super().values()

    def items(self) -> ItemsView[str, Any]:
        return super().items()


class Largest(NamedTuple):
    """Which units are large, found once, on the main stream of a run, and used for all its conditions.

    Attributes:
        ratios: ``(D,)`` how often the median each one is (:func:`rsdyn.dynamics.moments.massive_ratios`); 0 for a unit
            that holds NaN.
        massive: ``(D,)`` boolean, those beyond :data:`MASSIVE`.
        order: ``(K,)`` the largest, largest first, as many as are ever left out.
        counts: ``C`` numbers of units to leave out, from 0 to ``K``.
    """

    ratios: Tensor
    massive: Tensor
    order: Tensor
    counts: tuple[int, ...]

    @property
    def by_size(self) -> Tensor:
        """``(D,)`` all units, largest first: :attr:`order` and the others, massive ones before the rest."""
        return self.ratios.argsort(descending=True, stable=True)

    def without(self, count: int, usable: Tensor) -> Tensor:
        """``(D,)`` mask of the ``usable`` units but for the ``count`` largest."""
        stays = usable.clone()
        stays[self.order[:count]] = False
        return stays


def largest_units(mean: Tensor, unusable: Tensor) -> Largest:
    """The largest units of a mean ``(S, D)``, without those marked ``unusable``; at most a quarter is ever left out."""
    ratios = mean.new_zeros(mean.shape[1])
    ratios[~unusable] = massive_ratios(mean[:, ~unusable])
    counts = tuple(count for count in LEFT_OUT if 4 * count <= int((~unusable).sum()))
    order = ratios.argsort(descending=True, stable=True)[: counts[-1]]
    return Largest(ratios, ratios > MASSIVE, order, counts)


class Collected(nn.Module):
    """What the measures need of a stream.

    The first pass takes means, correlations, covariances and, where a measure needs all samples of a unit, keeps them.
    It tells which units are massive and which hold NaN. The second takes what depends on that: curves of each sequence,
    with and without massive units, and what PCA leaves unexplained. Where the stream comes by once, as on the way of a
    training, curves are of all units, and what else takes a second pass is not collected.

    Args:
        n_sublayers, n_units: ``S`` and ``D``.
        measures: some of :data:`rsdyn.analysis.results.MEASURES`.
        keep: how many trajectories are kept for the measures that need samples; None keeps all.
        components: principal components; None for 100 or as many as there are.
        groups: which sequences an interval leaves out together; None takes each for itself, by its number.
        bar: a context manager that shows progress of what takes long once all is collected.
        name: what the stream is called there.
        largest: which units are large, as a run's main stream has it (its ``largest``); None finds it here.
        last_token: ``(N,)`` int64, which last token each sequence of the corpus has, numbered from 0; None asks for
            nothing by last token.
        sites_per_layer: 1 or 2.
        tokens: which tokens of each sequence the trajectories are of: ``all``, in order, for what is measured over
            tokens too, and any but ``last`` for curves by position.
        texts: ``(N,)`` int64, a digest of each sequence's text, where trajectories are of last tokens; None where it is
            not known.
        once: whether the stream comes by once.
        keeps: whether trajectories are kept even if no measure needs them.

    Give the batches of each pass to :meth:`first_pass`, call :meth:`between_passes`, give them to :meth:`second_pass`
    where :attr:`n_passes` is 2, and call :meth:`finish`; where it is 0 no measure needs the stream. Then the attributes
    hold, over all processes: ``groups`` (comoments of each group of sequences) and ``total``, ``all_pairs``
    (correlation ``(pairs, D)``), ``frozen`` ``(S - 1, D)``, ``share`` (this process' units), ``unusable`` and
    ``massive`` ``(D,)`` masks, ``pca``, ``half_pca``, ``curves`` and ``curves_without_massive`` (by name, moments of
    each group), ``curves_left_out`` (means ``(C, ...)`` without the largest units), ``latents``, ``latent_samples``,
    ``residual`` ``(S,)`` of each group; ``pca_without_massive`` and ``residual_without_massive`` where there are
    massive units; ``largest`` and ``residual_left_out`` ``(C - 1, S)``; ``by_last_token`` (counts and means of
    :class:`~rsdyn.metrics.GroupSums`); ``n_trajectories``, ``n_bos`` and ``n_sinks``.
    """

    def __init__(
        self,
        *,
        n_sublayers: int,
        n_units: int,
        measures: Sequence[str],
        keep: int | None = 1000,
        components: int | None = None,
        groups: SequenceGroups | None = None,
        bar: Callable[[str, int], AbstractContextManager[Callable[[int], object]]] = no_bar,
        name: str = "stream",
        largest: Largest | None = None,
        last_token: Tensor | None = None,
        sites_per_layer: int = 2,
        tokens: Literal["last", "some", "all"] = "last",
        texts: Tensor | None = None,
        once: bool = False,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        self.texts = texts
        self.largest, self.last_token, self.sites_per_layer, self.once = largest, last_token, sites_per_layer, once
        self.n_sublayers, self.n_units = n_sublayers, n_units
        self.measures, self.components, self.bar, self.name = tuple(measures), components, bar, name
        self.sequence_groups = groups
        self.n_groups = MOST_GROUPS if groups is None else groups.n_groups
        asked = [measure_of(m) for m in self.measures if m in OF_STREAM]
        self.per_sequence = {name: curve for measure in asked for name, curve in measure.per_sequence.items()}
        self.over_positions = tokens != "last" and bool(set(measures) & {"cosine", "velocity", "curvature"})
        self.over_tokens = tokens == "all" and "curvature" in measures
        at_positions = tokens != "last" and bool(set(measures) & {"dimension", "similarity"})
        ranges = range(len(POSITIONS)) if at_positions else ()
        self.kept_at = Metrics({str(k): UnitTrajectories(KEPT_AT_POSITIONS) for k in ranges})
        self.shares_at: list[UnitShare | None] = []
        second = bool(self.per_sequence) or "pca" in measures or self.over_positions
        self.n_passes = 0 if not asked else 2 if second and not once else 1
        self.comoments = Grouped(lambda: Correlation(n_sublayers, n_units), self.n_groups)
        self.pairs = Correlation(n_sublayers, n_units, "all") if "correlation" in measures else None
        self.frozen_steps = FrozenSteps(n_sublayers, n_units)
        self.kinds = KindCounts()
        self.extremes = LargestByKind(n_sublayers, n_units, self.n_groups) if "massive" in measures else None
        self.covariances = Grouped(lambda: StreamCovariance(n_units), 2) if "pca" in measures else None
        self.kept = UnitTrajectories(keep) if keeps or any(m.keeps_samples for m in asked) else None
        self.tokens: GroupSums | None = None
        if last_token is not None and "correlation" in measures:
            # the first transition, and the first of the second layer, where there is one
            ends = sorted({0, 1, sites_per_layer, sites_per_layer + 1})
            self.tokens = GroupSums(last_token, [s for s in ends if s < n_sublayers], n_units)
        self.by_last_token: tuple[Tensor, Tensor] | None = None
        self.by_position: Positional | None = None
        self.token_curvature: list[Moments] = []
        self.token_curvature_apart: list[Moments] = []
        self._triples: dict[str, Triples] = {}
        self.second = Metrics(self._of_each() if once else {})  # by curve; or, once, in the first pass
        self.second_without_massive, self.left_out, self.of_pca = Metrics(), Metrics(), Metrics()
        self.over_text = Metrics()  # by position, and over the tokens of a sequence
        self.curves: dict[str, list[Moments]] = {}
        self.curves_without_massive: dict[str, list[Moments]] = {}
        self.curves_left_out: dict[str, Tensor] = {}
        self.residual: list[Moments] = []
        self.residual_without_massive: list[Moments] = []
        self.residual_left_out: Tensor | None = None
        self.latents: Moments | None = None
        self._pca_left_out: list[PCA] = []
        self._pca: list[PCA] = []  # in a list, since Lightning takes submodules to the CPU when the test ends
        self.half_pca: list[PCA] = []
        self.all_pairs: Tensor | None = None
        self.share: UnitShare | None = None
        self.spectra: Spectra | None = None  # of a measure that took them, for the others

    def _of_each(self) -> dict[str, Grouped]:
        """What counts the curves of each sequence, by name."""

        def grouped(curve: PerSequence) -> Grouped:
            return Grouped(lambda: StreamMoments(self._length(curve)), self.n_groups)

        return {name: grouped(curve) for name, curve in self.per_sequence.items()}

    def _length(self, curve: PerSequence) -> int:
        """How many values a curve has: ``S``, or ``S - 1`` over transitions."""
        return curve(torch.ones(1, self.n_sublayers, 2), None).shape[-1]

    @property
    def known_largest(self) -> Largest:
        """Which units are large, once the first pass is over."""
        assert self.largest is not None
        return self.largest

    def group_of(self, sequence: Tensor) -> Tensor:
        """The group of each of the sequences numbered ``sequence`` ``(n,)``."""
        return sequence % self.n_groups if self.sequence_groups is None else self.sequence_groups.of(sequence)

    # -- the passes ----------------------------------------------------------------------------------------------------

    def first_pass(self, batch: TrajectoryBatch) -> None:
        """Count a batch in."""
        x, sequence = batch.activations, batch.sequence
        group = self.group_of(sequence)
        self.comoments.update(x, group)
        self.kinds.update(x, batch.kind)
        self.frozen_steps.update(x)
        if self.tokens is not None:
            self.tokens.update(x, sequence)
        if self.extremes is not None:
            self.extremes.update(x, batch.kind, batch.position, group)
        if self.pairs is not None:
            self.pairs.update(x)
        if self.covariances is not None:
            self.covariances.update(x, group % 2)  # two halves that share no document
        if self.kept is not None:
            self.kept.update(x, sequence if batch.number is None else batch.number)
        if self.kept_at and batch.position is not None:
            at, number = position_range(batch.position), sequence if batch.number is None else batch.number
            for k in at.unique().tolist():
                self.kept_at[str(k)].update(x[at == k], number[at == k])
        for name, each in self.second.items():  # where there is no other pass
            each.update(self.per_sequence[name](x, None), group)

    def between_passes(self) -> None:
        """Bring the processes together; find massive and unusable units, and the principal components."""
        self.groups: list[Comoments] = self.comoments.states(lambda m: m.state)
        self.total = reduce(merge_comoments, self.groups)
        self.n_trajectories, self.n_bos, self.n_sinks = (int(n) for n in self.kinds.compute())
        moments = Moments(self.total.n, self.total.mean, self.total.m2)
        finite = torch.isfinite(moments.mean) & torch.isfinite(moments.m2)
        self.unusable = ~finite.all(0)
        self.constant = moments.constant & finite
        if self.largest is None:
            self.largest = largest_units(moments.mean, self.unusable)
        ratios, massive, order = (x.to(self.unusable.device) for x in self.largest[:3])
        self.largest = Largest(ratios, massive, order, self.largest.counts)
        self.massive = self.largest.massive & ~self.unusable
        if self.tokens is not None:
            with self.tokens.sync_context():
                self.by_last_token = self.tokens.state
        self.frozen = self.frozen_steps.compute()
        if self.covariances is not None:
            self._fit_pca()
        if not self.once:
            self._make_second(self.frozen.device)

    def _make_second(self, device: torch.device) -> None:
        """What the second pass feeds."""
        usable = None if not self.unusable.any() else ~self.unusable
        largest, length = self.known_largest, self.n_sublayers
        self.second = Metrics(self._of_each())
        if self.massive.any():
            self.second_without_massive = Metrics(self._of_each())
        for name, curve in self.per_sequence.items():
            self.left_out[name] = StreamMoments(len(largest.counts), self._length(curve))
        if self.over_positions:
            self.over_text["by_position"] = ByPosition(length, usable)
        if self.over_tokens:
            few = ~(self.massive | self.unusable) if self.massive.any() else usable
            self._triples = {"token_curvature": Triples(usable), "token_curvature_apart": Triples(few, first=1)}
            for name in self._triples:
                self.over_text[name] = Grouped(lambda: TokenCurvature(length), self.n_groups)
        if self.pca is not None:
            self.of_pca["residual"] = Grouped(lambda: StreamMoments(length), self.n_groups)
            if self.pca_without_massive is not None:
                self.of_pca["residual_without_massive"] = Grouped(lambda: StreamMoments(length), self.n_groups)
            if self._pca_left_out:
                self.of_pca["residual_left_out"] = StreamMoments(len(self._pca_left_out), length)
            self.of_pca["latents"] = StreamMoments(length, min(3, len(self.pca.variance)))
            self.of_pca["samples"] = FirstSequences(1000)
        self.to(device)

    def _fit_pca(self) -> None:
        assert self.covariances is not None and self.largest is not None
        halves: list[Covariance] = self.covariances.states(lambda m: m.state)
        for half in halves:
            _blot_out(half, self.unusable)
        total = reduce(merge_covariance, halves)
        most = min(self.n_units - int(self.unusable.sum()), int(total.n) - 1)
        if self.components is not None and self.components > most:
            raise UserError(
                f"components={self.components}: {int(total.n)} vectors of {self.n_units} units have at most "
                f"{most}. Lower it, or leave it out."
            )
        n_components = self.components or min(100, most)
        n_massive, none = int(self.largest.massive.sum()), torch.zeros_like(self.massive)
        # in place, so each job leaves out what the one before it did, and more; massive units are put in their order
        wanted = [(total, n_components, none), *((half, 2, none) for half in halves if int(half.n) > 2)]
        n_first = len(wanted)
        sizes = sorted({*self.largest.counts[1:], n_massive} - {0})
        by_size = self.largest.by_size
        for size in sizes:
            units = none.clone()
            units[by_size[:size]] = True
            wanted.append((total, min(n_components, most - size), units))

        def fit(job: tuple[Covariance, int, Tensor]) -> tuple[Tensor, ...]:
            state, k, left_out = job
            if left_out.any():
                _blot_out(state, left_out)
            mean, *others = PCA.from_covariance(state, k).buffers()
            return mean.clone(), *others  # the mean may be a view of all of a D x D state, which would be kept and sent

        # one by one: each is a matrix of D x D, and its products take all threads
        fitted = [PCA(*found) for found in shared_out(fit, wanted, total.mean.device, one_by_one=True)]
        without = dict(zip(sizes, fitted[n_first:], strict=True))
        self._pca = [fitted[0], *([without[n_massive]] if n_massive else [])]
        self.half_pca = fitted[1:n_first]
        self._pca_left_out = [without[count] for count in self.largest.counts[1:]]
        self.covariances = None  # two float64 matrices of D x D

    def second_pass(self, batch: TrajectoryBatch) -> None:
        """Count a batch in once more."""
        x, group = batch.activations, self.group_of(batch.sequence)
        if self.per_sequence:
            self._count_curves(x, group)
        if batch.position is not None:
            if self.over_positions:
                self.over_text["by_position"].update(x, batch.position)
            for name, triples in self._triples.items():
                angles, of = triples(x, sequence=batch.sequence, position=batch.position)
                self.over_text[name].update(angles, self.group_of(of))
        if self.pca is not None:
            self._count_pca(x, group, batch.sequence if batch.number is None else batch.number)

    def _count_curves(self, x: Tensor, group: Tensor) -> None:
        """Count the curves of each sequence, of all usable units, without the massive ones and the largest ones."""
        largest = self.known_largest
        counts = (*largest.counts, 0, int(largest.massive.sum()))
        units = None if not self.unusable.any() else ~self.unusable
        curves = curves_without_largest(x, largest.by_size[: max(counts)], counts, units)._asdict()
        for name, each in self.second.items():
            *left_out, all_units, few = curves[name]
            each.update(all_units, group)
            if self.second_without_massive:
                self.second_without_massive[name].update(few, group)
            self.left_out[name].update(torch.stack(left_out, dim=1))

    def _count_pca(self, x: Tensor, group: Tensor, number: Tensor) -> None:
        assert self.pca is not None
        count = {name: metric.update for name, metric in self.of_pca.items()}
        largest = self.known_largest
        of_size = {0: self.pca} | dict(zip(largest.counts[1:], self._pca_left_out, strict=True))
        if self.pca_without_massive is not None:
            of_size[int(largest.massive.sum())] = self.pca_without_massive
        without = {size: largest.by_size[:size] for size in of_size}
        axes = [pca.components.to(torch.float32, copy=True) for pca in of_size.values()]
        for component, units in zip(axes, without.values(), strict=True):
            component[units] = 0  # as they are but for rounding
        mean, unusable = self.pca.mean.to(torch.float32), self.unusable.nonzero().flatten()
        parts = []
        for some in x.split(32):
            away = some.to(torch.float32) - mean  # from one mean, since a left-out unit moves no other's
            away[..., unusable] = 0
            latents = (away @ torch.cat(axes, dim=1)).split([a.shape[1] for a in axes], dim=-1)
            explained = torch.stack([z.square().sum(-1, dtype=torch.float64) for z in latents])
            parts.append((latents[0][..., :3].clone(), _squared_without(away, list(without.values())) - explained))
        latents3, missed = torch.cat([z for z, _ in parts]), torch.cat([m for _, m in parts], dim=1)
        residual = dict(zip(of_size, missed, strict=True))
        count["residual"](residual[0], group)
        count["latents"](latents3)
        count["samples"](latents3, number)
        if self.pca_without_massive is not None:
            count["residual_without_massive"](residual[int(largest.massive.sum())], group)
        if self._pca_left_out:
            count["residual_left_out"](torch.stack([residual[size] for size in largest.counts[1:]], dim=1))

    def finish(self) -> None:
        """Bring the processes together once more, after the last pass."""
        self.curves = {name: each.states(lambda m: m.state) for name, each in self.second.items()}
        self.curves_without_massive = {
            name: each.states(lambda m: m.state) for name, each in self.second_without_massive.items()
        }
        for name, metric in self.left_out.items():
            self.curves_left_out[name] = metric.compute().mean
        if self.over_positions and self.over_text:
            with self.over_text["by_position"].sync_context():
                self.by_position = self.over_text["by_position"].positional
        if self._triples:
            self.token_curvature = self.over_text["token_curvature"].states(lambda m: m.state)
            self.token_curvature_apart = self.over_text["token_curvature_apart"].states(lambda m: m.state)
        if self.of_pca:
            self.residual = self.of_pca["residual"].states(lambda m: m.state)
            if "residual_without_massive" in self.of_pca:
                self.residual_without_massive = self.of_pca["residual_without_massive"].states(lambda m: m.state)
            if "residual_left_out" in self.of_pca:
                self.residual_left_out = self.of_pca["residual_left_out"].compute().mean
            self.latents = self.of_pca["latents"].compute()
            self.latent_samples, _ = self.of_pca["samples"].compute()
        if self.pairs is not None:
            self.all_pairs = self.pairs.compute()
            self.pairs = None
        if self.kept is not None:
            with self.kept.sync_context():
                self.share = UnitTrajectories.compute(self.kept)
            self.kept.reset()
        for kept in self.kept_at.values():
            share = None
            if any(from_all(bool(kept.values), "cpu")):
                with kept.sync_context():
                    share = UnitTrajectories.compute(kept)
            self.shares_at.append(share)
            kept.reset()

    @property
    def pca(self) -> PCA | None:
        """The principal components, on the device of what was measured."""
        return self._pca[0] if self._pca else None

    @property
    def pca_without_massive(self) -> PCA | None:
        """The principal components of all units but the massive ones; None where there are none."""
        return self._pca[1] if len(self._pca) > 1 else None


def _blot_out(state: Covariance, units: Tensor) -> None:
    """Make units constant zeros in a covariance, in place."""
    state.mean[units] = 0
    state.scatter[units] = 0
    state.scatter[:, units] = 0


def _squared_without(away: Tensor, without: Sequence[Tensor]) -> Tensor:
    """Squared lengths ``(C, ...)`` of ``away`` ``(..., D)`` in float64, each without some units, the first ones of all.

    From sums over the units that always stay up, so that nothing is lost to cancellation.
    """
    order = max(without, key=len)
    squares = away.square()
    some = squares[..., order].to(torch.float64)
    rest = squares.index_fill_(-1, order, 0).sum(-1, dtype=torch.float64)
    return torch.stack([rest + some[..., len(units) :].sum(-1) for units in without])
