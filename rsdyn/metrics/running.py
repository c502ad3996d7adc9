"""torchmetrics over the stream: state and reduction only, the maths is in ``rsdyn.dynamics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce, wraps
from typing import Any, Literal, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from rsdyn.dynamics import geometry
from rsdyn.dynamics.information import consecutive_information
from rsdyn.dynamics.moments import (
    Comoments,
    Covariance,
    Moments,
    comoments,
    correlation_of,
    covariance,
    merge,
    merge_all,
    merge_comoments,
    merge_covariance,
    moments,
)
from rsdyn.metrics.processes import hand_out
from rsdyn.stream.text.positions import BOS, SINK, sequence_of


def _merge_packed(stacked: Tensor) -> Tensor:
    """Merge the packed moments of several processes, ``(W, 3, ...)`` to ``(3, ...)``."""
    return _pack(merge_all([_unpack(packed) for packed in stacked]))


def _pack(m: Moments) -> Tensor:
    return torch.stack([m.n.expand_as(m.mean), m.mean, m.m2])


def _unpack(packed: Tensor) -> Moments:
    return Moments(packed[0].flatten()[0], packed[1], packed[2])


class ShapedMetric(Metric):
    """A metric whose values keep their axes.

    torchmetrics squeezes every tensor of one number that ``compute`` gives: one sequence, one layer, one unit would
    come out as scalars where lists are meant.
    """

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any, **kwargs: Any) -> Any:
            value = apply_to_collection(compute(*args, **kwargs), Tensor, Tensor.clone)  # states go on changing
            return lambda: value  # what is callable, it leaves alone

        wrapped = super()._wrap_compute(wraps(compute)(whole))
        return wraps(compute)(lambda *args, **kwargs: wrapped(*args, **kwargs)())


class _Float64State(ShapedMetric):
    """A metric whose state follows the module to another device, never to another precision.

    torchmetrics guards ``half()`` and ``float()``, but ``to(torch.float32)`` of a parent module rounds float64 states.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda x: x.to(device), exclude_state)


class MeanLoss(_Float64State):
    """The mean of batches' losses, each counted with its vectors, in float64; exact over processes.

    torchmetrics' ``MeanMetric`` leaves the weights out where it is told not to look for NaN (1.9 does), and looking for
    it, which is done elsewhere, waits for the GPU in each step.
    """

    total: Tensor
    n: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, n: int) -> None:
        """Count ``loss``, the mean of ``n`` vectors."""
        self.total.add_(loss.detach(), alpha=n)  # in float64, where the product is exact
        self.n.add_(n)

    def compute(self) -> Tensor:
        return self.total / self.n


class StreamMoments(_Float64State):
    """Mean and variance over sequences of anything of a fixed shape, such as ``(S, D)``; exact over processes.

    One packed float64 state (count, mean, sum of squared deviations), since Chan's merge needs the three together.
    """

    packed: Tensor

    def __init__(self, *shape: int):
        super().__init__()
        empty = torch.zeros(3, *shape, dtype=torch.float64)
        self.add_state("packed", default=empty, dist_reduce_fx=_merge_packed)

    def update(self, x: Tensor) -> None:
        """Count ``x`` ``(n, *shape)`` in."""
        self.packed = _pack(merge(_unpack(self.packed), moments(x)))

    @property
    def state(self) -> Moments:
        """What this process, or after ``sync`` all of them, have seen; ``compute`` would squeeze a shape of one."""
        return _unpack(self.packed)

    def compute(self) -> Moments:
        return self.state


class CosineSimilarity(StreamMoments):
    """Cosine of successive stream vectors, per sequence; mean and spread over sequences (paper 2.3, Fig. 1E).

    Args:
        n_sublayers: ``S``.
        units: boolean mask ``(D,)`` of the units to count, for a cosine without massive units; default all.

    ``update`` takes trajectories ``(n, S, D)``, ``compute`` gives moments ``(S - 1,)``; NaN where a vector is zero.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None):
        super().__init__(n_sublayers - 1)
        self.units = units

    def update(self, trajectories: Tensor) -> None:
        super().update(geometry.cosine(trajectories, self.units))


class Speed(StreamMoments):
    """Length of the step from each sublayer to the next, per sequence; mean and spread (paper 2.4, Fig. 1F).

    Arguments, ``update`` and ``compute`` are those of :class:`CosineSimilarity`.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None):
        super().__init__(n_sublayers - 1)
        self.units = units

    def update(self, trajectories: Tensor) -> None:
        super().update(geometry.speed(trajectories, self.units))


class RelativeSpeed(StreamMoments):
    """Length of the step over that of the state it starts from, per sequence; mean and spread (METHOD section 0.12).

    Arguments, ``update`` and ``compute`` are those of :class:`CosineSimilarity`.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None):
        super().__init__(n_sublayers - 1)
        self.units = units

    def update(self, trajectories: Tensor) -> None:
        super().update(geometry.relative_speed(trajectories, self.units))


class PaceWithoutLargest(StreamMoments):
    """Cosine, speed and relative speed without the largest units, for some numbers of them (METHOD section 0.10).

    Args:
        n_sublayers: ``S``.
        order: ``(K,)`` units, the largest first.
        counts: ``C`` numbers of units to leave out.
        units: boolean mask ``(D,)`` of the units that count at all; default all.

    ``update`` takes trajectories ``(n, S, D)``; ``compute`` gives moments ``(3, C, S - 1)``, in the order of
    :class:`rsdyn.dynamics.geometry.Pace`.
    """

    def __init__(self, n_sublayers: int, order: Tensor, counts: Sequence[int], units: Tensor | None = None):
        super().__init__(3, len(counts), n_sublayers - 1)
        self.order, self.counts, self.units = order, counts, units

    def update(self, trajectories: Tensor) -> None:
        pace = geometry.pace_without_largest(trajectories, self.order, self.counts, self.units)
        super().update(torch.stack(pace, dim=1).permute(2, 1, 0, 3))


class GroupSums(_Float64State):
    """Count of sequences and sum of their states at some sublayers, for each group of sequences; exact over processes.

    Args:
        group: ``(N,)`` int64, the group of each sequence of the corpus, from 0.
        sublayers: at which; the sums are ``(G, len(sublayers), D)``.
        n_units: ``D``.
    """

    total: Tensor
    n: Tensor

    def __init__(self, group: Tensor, sublayers: Sequence[int], n_units: int):
        super().__init__()
        n_groups = int(group.max()) + 1
        self.group, self.sublayers = group, list(sublayers)
        empty = torch.zeros(n_groups, len(self.sublayers), n_units, dtype=torch.float64)
        self.add_state("total", default=empty, dist_reduce_fx="sum")
        self.add_state("n", default=torch.zeros(n_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, trajectories: Tensor, sequence: Tensor) -> None:
        """Count trajectories ``(n, S, D)`` of the sequences numbered ``sequence`` ``(n,)`` in."""
        group = self.group.to(sequence.device)[sequence].to(self.n.device)
        self.total.index_add_(0, group, trajectories[:, self.sublayers].to(self.total.device, torch.float64))
        self.n.index_add_(0, group, torch.ones_like(group, dtype=torch.float64))

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """``(G,)`` counts and ``(G, sublayers, D)`` means, NaN for an empty one; ``compute`` squeezes a single one."""
        return self.n.clone(), self.total / self.n[:, None, None]

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.state


class Correlation(_Float64State):
    """Pearson correlation over sequences of each unit between sublayers (paper 2.3, Fig. 1C, D); exact over processes.

    Args:
        n_sublayers, n_units: ``S`` and ``D``.
        pairs: ``consecutive`` sublayers, or ``all`` pairs ``s < m`` in the order of ``torch.triu_indices(S, S, 1)``.

    ``update`` takes trajectories ``(n, S, D)``; ``compute`` gives ``(pairs, D)``, NaN where a unit is constant, and
    ``state`` the sums behind it, with the mean activations.
    """

    packed: Tensor

    def __init__(self, n_sublayers: int, n_units: int, pairs: Literal["consecutive", "all"] = "consecutive"):
        super().__init__()
        self.n_sublayers, self.pairs = n_sublayers, pairs
        n_pairs = n_sublayers - 1 if pairs == "consecutive" else n_sublayers * (n_sublayers - 1) // 2
        empty = torch.zeros(1 + 2 * n_sublayers + n_pairs, n_units, dtype=torch.float64)
        self.add_state("packed", default=empty, dist_reduce_fx=self._merge)

    def update(self, trajectories: Tensor) -> None:
        """Count trajectories ``(n, S, D)`` in."""
        self.packed = self._pack(merge_comoments(self._unpack(self.packed), comoments(trajectories, self.pairs)))

    @property
    def state(self) -> Comoments:
        """Count, means, variances and products of what this process, or after ``sync`` all of them, have seen."""
        return self._unpack(self.packed)

    def compute(self) -> Tensor:
        return correlation_of(self.state)

    def _merge(self, stacked: Tensor) -> Tensor:
        return self._pack(reduce(merge_comoments, [self._unpack(packed) for packed in stacked]))

    @staticmethod
    def _pack(m: Comoments) -> Tensor:
        return torch.cat([m.n.expand(1, m.mean.shape[1]), m.mean, m.m2, m.cross])

    def _unpack(self, packed: Tensor) -> Comoments:
        s = self.n_sublayers
        return Comoments(packed[0, 0], packed[1 : s + 1], packed[s + 1 : 2 * s + 1], packed[2 * s + 1 :])


class StreamCovariance(_Float64State):
    """Covariance of stream vectors over sequences and sublayers, for PCA (paper 2.8); exact over processes.

    ``update`` takes vectors ``(..., D)``; ``compute`` gives what :meth:`PCA.from_covariance` takes.
    """

    packed: Tensor

    def __init__(self, n_units: int):
        super().__init__()
        empty = torch.zeros(n_units + 2, n_units, dtype=torch.float64)
        self.add_state("packed", default=empty, dist_reduce_fx=self._merge)

    def update(self, x: Tensor) -> None:
        """Count vectors ``(..., D)`` in."""
        new = covariance(x.reshape(-1, x.shape[-1]))
        self.packed = self._pack(merge_covariance(self._unpack(self.packed), new))

    @property
    def state(self) -> Covariance:
        """What this process, or after ``sync`` all of them, have seen."""
        return self._unpack(self.packed)

    def compute(self) -> Covariance:
        return self.state

    @classmethod
    def _merge(cls, stacked: Tensor) -> Tensor:
        return cls._pack(reduce(merge_covariance, [cls._unpack(packed) for packed in stacked]))

    @staticmethod
    def _pack(c: Covariance) -> Tensor:
        return torch.cat([c.n.expand(1, len(c.mean)), c.mean[None], c.scatter])

    @staticmethod
    def _unpack(packed: Tensor) -> Covariance:
        return Covariance(packed[0, 0], packed[1], packed[2:])


class FrozenSteps(_Float64State):
    """Share of sequences in which a unit does not move at all from one sublayer to the next, ``(S - 1, D)``.

    A step smaller than the spacing of bf16 numbers at the unit's value is stored as no step.
    """

    total: Tensor
    n: Tensor

    def __init__(self, n_sublayers: int, n_units: int):
        super().__init__()
        empty = torch.zeros(n_sublayers - 1, n_units, dtype=torch.float64)
        self.add_state("total", default=empty, dist_reduce_fx="sum")
        self.add_state("n", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, trajectories: Tensor) -> None:
        """Count trajectories ``(n, S, D)`` in."""
        self.total += (trajectories[:, 1:] == trajectories[:, :-1]).sum(0)
        self.n += len(trajectories)

    def compute(self) -> Tensor:
        return self.total / self.n


class SquaredError(_Float64State):
    """Squared errors summed over sequences, ``(S, D)`` in float64; exact over processes."""

    total: Tensor

    def __init__(self, *shape: int):
        super().__init__()
        self.add_state("total", default=torch.zeros(*shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, target: Tensor) -> None:
        """Count the errors of ``(n, *shape)`` in."""
        self.total += (reconstruction - target).to(torch.float64).square().sum(0)

    def compute(self) -> Tensor:
        return self.total


def _lowest(values: list[Tensor], numbers: list[Tensor], limit: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """What has the ``limit`` lowest numbers, in the order it came; of equal numbers the first."""
    if limit is None or sum(len(n) for n in numbers) <= limit:
        return values, numbers
    all_numbers = torch.cat(numbers)
    rows = all_numbers.argsort(stable=True)[:limit].sort().values
    return [torch.cat(values)[rows]], [all_numbers[rows]]


class FirstSequences(ShapedMetric):
    """The values of the first few trajectories by number, for a figure; memory does not grow with the corpus.

    ``compute`` gives ``(values (m, ...), numbers (m,))``, ``m`` at most ``limit``, whatever the processes. Trajectories
    of one number (a sequence's, when it has several) stay in their order.
    """

    full_state_update = False
    values: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, limit: int = 1000):
        super().__init__()
        self.limit = limit
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("numbers", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Offer ``values`` ``(n, ...)`` of the trajectories ``numbers`` ``(n,)``, in any order."""
        self.values, self.numbers = _lowest([*self.values, values], [*self.numbers, numbers], self.limit)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # a process without a sequence knows neither shape nor dtype; gather_all_tensors then reads garbage sizes
        group = process_group or self.process_group
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        mine = [(v.cpu(), n.cpu()) for v, n in zip(self.values, self.numbers, strict=True)]
        torch.distributed.all_gather_object(parts, mine, group=group)
        self.values = [v.to(self.device) for part in parts for v, _ in part]
        self.numbers = [n.to(self.device) for part in parts for _, n in part]

    def compute(self) -> tuple[Tensor, Tensor]:
        values, numbers = torch.cat(self.values), torch.cat(self.numbers)
        order = numbers.argsort(stable=True)[: self.limit]
        return values[order], numbers[order]


class UnitShare(NamedTuple):
    """All samples of some units.

    Attributes:
        x: ``(N, S, U)``, trajectories in rising order of their numbers, in the dtype that was given.
        number: ``(N,)`` those numbers (:func:`rsdyn.stream.text.positions.numbers`).
        first_unit: which unit ``x[..., 0]`` is.
        n_units: how many units there are over all processes, ``D``.
        n_processes: how many processes they are shared out over; 1 where this one has its own sequences of all units,
            as in a metric's ``forward``.
    """

    x: Tensor
    number: Tensor
    first_unit: int
    n_units: int
    n_processes: int = 1

    @property
    def sequence(self) -> Tensor:
        """``(N,)`` the sequence of each trajectory."""
        return sequence_of(self.number)

    def gather(self, values: Tensor) -> Tensor:
        """Put together what each process found for its units: ``(..., U)`` to ``(..., D)``, on every process."""
        world = self.n_processes
        if world == 1:
            return values
        width = -(-self.n_units // world)
        mine = values.new_zeros(*values.shape[:-1], width)
        mine[..., : values.shape[-1]] = values
        parts = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(parts, mine)
        return torch.cat(parts, dim=-1)[..., : self.n_units]

    def by_sublayer(self) -> Tensor:
        """All samples of all units at some sublayers, ``(N, S', D)``: the sublayers shared out instead of the units.

        Process after process has the next ``ceil(S / W)`` of the ``S`` sublayers, the last ones fewer or none. For what
        needs all units of a sublayer: it moves each sample once, and no process holds more than some copies of a share.
        """
        world = self.n_processes
        if world == 1:
            return self.x
        rank, (n, n_sublayers, own) = torch.distributed.get_rank(), self.x.shape
        height, width = -(-n_sublayers // world), -(-self.n_units // world)
        room = (0, width - own, 0, height * world - n_sublayers)
        received = hand_out(
            lambda: torch.nn.functional.pad(self.x, room).split(height, dim=1),
            [(n, height, width)] * world,
            self.x.dtype,
            self.x.device,
        )
        there = max(0, min(height, n_sublayers - rank * height))
        return torch.cat(received, dim=-1)[:, :there, : self.n_units]


class KindCounts(_Float64State):
    """How many trajectories there are, and how many of them are BOS and sinks.

    ``update`` takes trajectories ``(n, S, D)`` and their kinds ``(n,)``, None where nothing is known of them;
    ``compute`` gives ``(3,)``.
    """

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, trajectories: Tensor, kind: Tensor | None) -> None:
        """Count trajectories ``(n, S, D)`` of kinds ``(n,)`` in."""
        self.total[0] += len(trajectories)
        if kind is not None:
            self.total[1] += (kind & BOS != 0).sum()
            self.total[2] += (kind & SINK != 0).sum()

    def compute(self) -> Tensor:
        return self.total.clone()


class UnitTrajectories(ShapedMetric):
    """Trajectories kept for what needs every sample of a unit; over processes, the units are shared out among them.

    Each process gives away the units of the others and receives the other sequences of its own, so that together they
    hold the samples once. ``update`` takes trajectories and their numbers, ``compute`` gives a :class:`UnitShare`.

    Args:
        limit: keep at most so many trajectories, those of lowest number; None keeps all.
    """

    full_state_update = False
    values: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, limit: int | None = 1000):
        super().__init__()
        self.limit = limit
        self._first_unit = 0
        self._n_units: int | None = None
        self._n_processes = 1
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("numbers", default=[], dist_reduce_fx="cat")

    def update(self, trajectories: Tensor, numbers: Tensor) -> None:
        """Keep ``trajectories`` ``(n, S, D)``, numbered ``numbers`` ``(n,)``, given in any order."""
        some, known = _lowest([trajectories], [numbers], self.limit)  # before they are put beside what is kept
        self.values, self.numbers = _lowest([*self.values, *some], [*self.numbers, *known], self.limit)

    def compute(self) -> UnitShare:
        values, numbers = torch.cat(self.values), torch.cat(self.numbers)
        order = numbers.argsort(stable=True)[: self.limit]
        if len(order) < len(numbers) or not torch.equal(order, torch.arange(len(numbers), device=order.device)):
            values, numbers = values[order], numbers[order]
        return UnitShare(values, numbers, self._first_unit, self._n_units or values.shape[-1], self._n_processes)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        group = process_group or self.process_group
        world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        # a process without a sequence knows neither shape nor dtype
        shape = tuple(self.values[0].shape[1:]) if self.values else None
        mine = (sum(len(v) for v in self.values), shape, self.values[0].dtype if self.values else None)
        known: list[Any] = [None] * world
        torch.distributed.all_gather_object(known, mine, group=group)
        n_sublayers, n_units = next(shape for _, shape, _ in known if shape is not None)
        dtype = next(dtype for _, _, dtype in known if dtype is not None)
        width = -(-n_units // world)  # the last share is shorter: padded for the wire, cut behind it
        received = hand_out(
            lambda: torch.nn.functional.pad(torch.cat(self.values), (0, width * world - n_units)).split(width, dim=-1),
            [(n, n_sublayers, width) for n, _, _ in known],
            dtype,
            self.device,
            group,
        )
        numbers: list[Any] = [None] * world
        torch.distributed.all_gather_object(numbers, [n.cpu() for n in self.numbers], group=group)
        self._first_unit, self._n_units, self._n_processes = rank * width, n_units, world
        own = max(0, min(width, n_units - rank * width))
        self.values = [part[..., :own] for part in received]
        self.numbers = [n.to(self.device) for part in numbers for n in part]

    def unsync(self, should_unsync: bool = True) -> None:
        super().unsync(should_unsync)
        self._first_unit, self._n_units, self._n_processes = 0, None, 1


class MutualInformation(UnitTrajectories):
    """Mutual information of each unit between successive sublayers, nats (paper 2.5, Fig. 1G and H).

    ``update`` takes trajectories ``(n, S, D)`` and sequence numbers, ``compute`` gives ``(S - 1, D)``: NaN for a
    constant unit, inf where one sublayer is a linear function of the other. Over processes the units are shared out.

    Args:
        estimator: one of ``rsdyn.dynamics.information.ESTIMATORS``.
        limit: use at most so many sequences.
    """

    def __init__(self, estimator: str = "kde", limit: int | None = 1000):
        super().__init__(limit)
        self.estimator = estimator

    def compute(self) -> Tensor:  # type: ignore[override]
        share = super().compute()
        return share.gather(consecutive_information(share.x, self.estimator))
