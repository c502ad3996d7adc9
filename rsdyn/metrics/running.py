"""torchmetrics over the stream: state and reduction only, the maths is in ``rsdyn.dynamics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce, wraps
from typing import Any, Literal, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from rsdyn.dynamics import geometry, massive
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
from rsdyn.stream.text.positions import BOS, SINK


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

    def __init__(self, **kwargs: Any) -> None:
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

    def __init__(self, *shape: int) -> None:
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


class SequenceCurve(StreamMoments):
    """A curve over depth of each trajectory; mean and spread over trajectories.

    Args:
        of: of trajectories ``(n, S, D)`` and a mask ``(D,)`` of the units to count, or None for all, the curves
            ``(n, length)``.
        length: of a curve, ``S`` or ``S - 1``.
        units: boolean mask ``(D,)`` of the units to count, for a curve without massive units; default all.

    ``update`` takes trajectories ``(n, S, D)``, ``compute`` gives moments ``(length,)``.
    """

    def __init__(self, of: Callable[[Tensor, Tensor | None], Tensor], length: int, units: Tensor | None = None) -> None:
        super().__init__(length)
        self.of, self.units = of, units

    def update(self, trajectories: Tensor) -> None:
        super().update(self.of(trajectories, self.units))


class CosineSimilarity(SequenceCurve):
    """Cosine of successive stream vectors, per sequence; mean and spread over sequences (paper 2.3, Fig. 1E).

    Args:
        n_sublayers: ``S``.
        units: boolean mask ``(D,)`` of the units to count, for a cosine without massive units; default all.

    ``update`` takes trajectories ``(n, S, D)``, ``compute`` gives moments ``(S - 1,)``; NaN where a vector is zero.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None) -> None:
        super().__init__(geometry.cosine, n_sublayers - 1, units)


class Speed(SequenceCurve):
    """Length of the step from each sublayer to the next, per sequence; mean and spread (paper 2.4, Fig. 1F).

    Arguments, ``update`` and ``compute`` are those of :class:`CosineSimilarity`.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None) -> None:
        super().__init__(geometry.speed, n_sublayers - 1, units)


class RelativeSpeed(SequenceCurve):
    """Length of the step over that of the state it starts from, per sequence; mean and spread (METHOD section 0.12).

    Arguments, ``update`` and ``compute`` are those of :class:`CosineSimilarity`.
    """

    def __init__(self, n_sublayers: int, units: Tensor | None = None) -> None:
        super().__init__(geometry.relative_speed, n_sublayers - 1, units)


class GroupSums(_Float64State):
    """Count of sequences and sum of their states at some sublayers, for each group of sequences; exact over processes.

    Args:
        group: ``(N,)`` int64, the group of each sequence of the corpus, from 0.
        sublayers: at which; the sums are ``(G, len(sublayers), D)``.
        n_units: ``D``.
    """

    total: Tensor
    n: Tensor

    def __init__(self, group: Tensor, sublayers: Sequence[int], n_units: int) -> None:
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

    def __init__(self, n_sublayers: int, n_units: int, pairs: Literal["consecutive", "all"] = "consecutive") -> None:
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

    def __init__(self, n_units: int) -> None:
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

    def __init__(self, n_sublayers: int, n_units: int) -> None:
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

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(*shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, target: Tensor) -> None:
        """Count the errors of ``(n, *shape)`` in."""
        self.total += (reconstruction - target).to(torch.float64).square().sum(0)

    def compute(self) -> Tensor:
        return self.total


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


TOKEN_CLASSES = ("first token", "sinks", "others")


class LargestByKind(ShapedMetric):
    """The largest absolute value of every unit at every sublayer by class of token, and norms by position.

    The classes are the first token, sinks, and the others, which all are where nothing is known of a token. ``update``
    takes trajectories ``(n, S, D)``, their kinds and positions ``(n,)`` or None, and the group ``(n,)`` of each, by
    default the first; ``compute`` gives a :class:`Extremes`.
    """

    full_state_update = False
    largest: Tensor
    sizes: Tensor
    counts: Tensor
    norms: Tensor
    norm_counts: Tensor
    log_ratios: Tensor
    n_massive: Tensor
    group_counts: Tensor

    def __init__(self, n_sublayers: int, n_units: int, n_groups: int = 1) -> None:
        super().__init__()
        n_classes, n_ranges = len(TOKEN_CLASSES), len(massive.POSITIONS)
        shape, wide = (n_classes, n_sublayers, n_units), torch.float64
        self.add_state("largest", default=torch.full(shape, -1.0), dist_reduce_fx="max")
        self.add_state("sizes", default=torch.zeros(shape, dtype=wide), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(n_classes, dtype=wide), dist_reduce_fx="sum")
        self.add_state("norms", default=torch.zeros(n_ranges, n_sublayers, dtype=wide), dist_reduce_fx="sum")
        self.add_state("norm_counts", default=torch.zeros(n_ranges, dtype=wide), dist_reduce_fx="sum")
        by_group = torch.zeros(n_classes, n_groups, n_sublayers, dtype=wide)
        self.add_state("log_ratios", default=by_group, dist_reduce_fx="sum")
        self.add_state("n_massive", default=torch.zeros(n_classes, n_sublayers, dtype=wide), dist_reduce_fx="sum")
        self.add_state("group_counts", default=torch.zeros(n_classes, n_groups, dtype=wide), dist_reduce_fx="sum")

    def update(
        self, trajectories: Tensor, kind: Tensor | None, position: Tensor | None, group: Tensor | None = None
    ) -> None:
        """Count trajectories ``(n, S, D)`` of kinds, positions and groups ``(n,)`` in."""
        size = trajectories.to(torch.float32).abs()
        if kind is None:
            kind = torch.zeros(len(size), dtype=torch.uint8, device=size.device)
        of = torch.where(kind & BOS != 0, 0, torch.where(kind & SINK != 0, 1, 2))
        group = torch.zeros_like(of) if group is None else group
        out = massive.stands_out(size)
        once = torch.ones(len(size), dtype=torch.float64, device=size.device)
        for number in of.unique().tolist():
            rows = size if bool((of == number).all()) else size[of == number]
            self.largest[number] = torch.maximum(self.largest[number], rows.amax(0))
            for some in rows.split(32):  # whose sum is good to 1e-6; in float64 at once it takes seven times as long
                self.sizes[number] += some.sum(0)
            self.counts[number] += len(rows)
            self.log_ratios[number].index_add_(0, group[of == number], out.log_ratio[of == number])
            self.group_counts[number].index_add_(0, group[of == number], once[of == number])
            self.n_massive[number] += out.is_massive[of == number].sum(0)
        if position is not None:
            ranges, norm = massive.position_range(position), torch.linalg.vector_norm(size, dim=-1).double()
            self.norms.index_add_(0, ranges, norm)
            self.norm_counts.index_add_(0, ranges, torch.ones_like(ranges, dtype=torch.float64))

    def compute(self) -> Extremes:
        empty = self.counts == 0
        largest = self.largest.double().masked_fill(empty[:, None, None], torch.nan)
        typical = (self.sizes / self.counts[:, None, None]).median(-1).values
        norms, share = self.norms / self.norm_counts[:, None], self.n_massive / self.counts[:, None]
        return Extremes(largest, typical, self.counts.clone(), norms, self.log_ratios, self.group_counts, share)


class Extremes(NamedTuple):
    """The largest activations of a stream.

    Attributes:
        largest: ``(C, S, D)`` of each unit, by class of token; NaN where a class is empty.
        typical: ``(C, S)`` the median over units of the mean absolute value.
        counts: ``(C,)`` tokens of each class.
        norms: ``(P, S)`` the mean norm by range of positions; NaN where there is none.
        log_ratios: ``(C, G, S)`` by class and group, the sum of :attr:`rsdyn.dynamics.massive.StandsOut.log_ratio`.
        group_counts: ``(C, G)`` tokens of each.
        massive: ``(C, S)`` the share of tokens with a massive activation.
    """

    largest: Tensor
    typical: Tensor
    counts: Tensor
    norms: Tensor
    log_ratios: Tensor
    group_counts: Tensor
    massive: Tensor
