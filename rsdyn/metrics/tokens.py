"""Curves by the place of a token in its sequence, and the way of a sequence's states over its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.dynamics import geometry, massive
from rsdyn.metrics.running import StreamMoments, _Float64State


class Positional(NamedTuple):
    """Curves by range of positions (:data:`rsdyn.dynamics.massive.POSITIONS`), NaN where a range is empty.

    Attributes:
        cosine, speed, relative_speed: ``(P, S - 1)``.
        curvature: ``(P, S - 2)`` radians; ``(P, 0)`` of two sublayers.
        counts: ``(P,)`` tokens.
    """

    cosine: Tensor
    speed: Tensor
    relative_speed: Tensor
    curvature: Tensor
    counts: Tensor


class ByPosition(_Float64State):
    """Cosine, speeds and curvature over depth by range of positions; exact over processes.

    Args:
        n_sublayers: ``S``.
        units: boolean mask ``(D,)`` of the units that count; default all.

    ``update`` takes trajectories ``(n, S, D)`` and the tokens' positions ``(n,)``; ``compute`` gives a
    :class:`Positional`. A token of which something is undefined, as a cosine with a zero, does not count there.
    """

    total: Tensor
    n: Tensor
    counts: Tensor

    def __init__(self, n_sublayers: int, units: Tensor | None = None) -> None:
        super().__init__()
        self.units, self.n_sublayers = units, n_sublayers
        shape = (len(massive.POSITIONS), 4, n_sublayers - 1)
        for name in ("total", "n"):
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(shape[0], dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, trajectories: Tensor, position: Tensor) -> None:
        """Count trajectories ``(n, S, D)`` at positions ``(n,)`` in."""
        curves = [of(trajectories, self.units) for of in (geometry.cosine, geometry.speed, geometry.relative_speed)]
        bends = torch.full_like(curves[0], torch.nan)
        if self.n_sublayers > 2:
            bends[:, : self.n_sublayers - 2] = geometry.curvature(trajectories, self.units)
        values = torch.stack([*curves, bends], dim=1).to(torch.float64)
        known, where = values.isfinite(), massive.position_range(position)
        self.total.index_add_(0, where, torch.where(known, values, 0.0))
        self.n.index_add_(0, where, known.to(torch.float64))
        self.counts.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))

    @property
    def positional(self) -> Positional:
        """What this process, or after ``sync`` all of them, have seen."""
        cosine, speed, relative, bends = (self.total / self.n).unbind(1)
        return Positional(cosine, speed, relative, bends[:, : self.n_sublayers - 2], self.counts.clone())

    def compute(self) -> Positional:
        return self.positional


class TokenCurvature(StreamMoments):
    """Angle between successive differences of neighbouring tokens' states at each sublayer (Hosseini & Fedorenko 2023).

    Mean and spread over triples of tokens that follow each other; ``compute`` gives moments ``(S,)``.

    Args:
        n_sublayers: ``S``.
    """

    def __init__(self, n_sublayers: int) -> None:
        super().__init__(n_sublayers)


class Triples:
    """Angles over tokens of a stream that comes in pieces, so that none is lost where a piece ends.

    Args:
        units: boolean mask ``(D,)`` of the units that count; default all.
        first: the first position that counts; 1 leaves BOS out.
    """

    def __init__(self, units: Tensor | None = None, first: int = 0) -> None:
        self.units, self.first = units, first
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, trajectories: Tensor, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Angles ``(m, S)`` in radians of the triples that end in this piece, and the sequence of each, ``(m,)``.

        ``trajectories`` ``(n, S, D)`` of all tokens of their sequences, in order.
        """
        piece = trajectories, sequence, position
        if self._last is not None:
            piece = tuple(torch.cat(pair) for pair in zip(self._last, piece, strict=True))  # type: ignore[assignment]
        x, of, at = piece
        self._last = x[-2:].clone(), of[-2:].clone(), at[-2:].clone()
        if len(x) < 3:
            return x.new_zeros(0, x.shape[1], dtype=torch.float32), of[:0]
        follows = (of[1:] == of[:-1]) & (at[1:] == at[:-1] + 1)
        triple = follows[1:] & follows[:-1] & (at[:-2] >= self.first)
        found = [geometry.curvature(x[:, s][None], self.units)[0] for s in range(x.shape[1])]
        angles = torch.stack(found, dim=1)[triple]
        known = angles.isfinite().all(1)  # two equal tokens in a row have no direction
        return angles[known], of[2:][triple][known]
