"""torchmetrics that keep samples: the first few trajectories, or every sample of a unit, shared out over processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsdyn.dynamics.information import consecutive_information
from rsdyn.metrics.processes import hand_out
from rsdyn.metrics.running import ShapedMetric
from rsdyn.stream.text.positions import sequence_of


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

    def __init__(self, limit: int = 1000) -> None:
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


class UnitTrajectories(ShapedMetric):
    """Trajectories kept for what needs every sample of a unit; over processes, the units are shared out among them.

    Each process gives away the units of the others and receives the other sequences of its own, so that together they
    hold the samples once. ``update`` takes trajectories and their numbers, ``compute`` gives a :class:`UnitShare`.

    Args:
        limit: keep at most this many trajectories, those of lowest number; None keeps all.
    """

    full_state_update = False
    values: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, limit: int | None = 1000) -> None:
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
        limit: use at most this many sequences.
    """

    def __init__(self, estimator: str = "kde", limit: int | None = 1000) -> None:
        super().__init__(limit)
        self.estimator = estimator

    def compute(self) -> Tensor:  # type: ignore[override]
        share = super().compute()
        return share.gather(consecutive_information(share.x, self.estimator))
