"""torchmetrics over the stream: state and reduction only, the maths is in ``rsdyn.dynamics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from rsdyn.dynamics.moments import Moments, merge, merge_all, moments


def _merge_packed(stacked: Tensor) -> Tensor:
    """Merge the packed moments of several processes, ``(W, 3, ...)`` to ``(3, ...)``."""
    return _pack(merge_all([_unpack(packed) for packed in stacked]))


def _pack(m: Moments) -> Tensor:
    return torch.stack([m.n.expand_as(m.mean), m.mean, m.m2])


def _unpack(packed: Tensor) -> Moments:
    return Moments(packed[0].flatten()[0], packed[1], packed[2])


class _Float64State(Metric):
    """A metric whose state follows the module to another device, never to another precision.

    torchmetrics guards ``half()`` and ``float()``, but ``to(torch.float32)`` of a parent module rounds float64 states.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda x: x.to(device), exclude_state)


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

    def compute(self) -> Moments:
        return _unpack(self.packed)


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


class FirstSequences(Metric):
    """The values of the first few sequences by number, for a figure; memory does not grow with the corpus.

    ``compute`` gives ``(values (m, ...), sequence numbers (m,))``, ``m`` at most ``limit``, whatever the processes.
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
        """Offer ``values`` ``(n, ...)`` of the sequences ``numbers`` ``(n,)``, which come in rising order."""
        room = self.limit - sum(len(n) for n in self.numbers)
        if room > 0:
            self.values.append(values[:room])
            self.numbers.append(numbers[:room])

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
        order = numbers.argsort()[: self.limit]
        return values[order], numbers[order]
