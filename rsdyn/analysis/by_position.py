"""States by range of positions, for measures that need several states at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.metrics.processes import from_all

LEAST = 20  # tokens of a range from which its states are looked at


def states_by_range(collected: Collected) -> list[Tensor | None]:
    """The tokens kept of each range of positions, ``(n, S', D)`` each, at the sublayers that this process has.

    As many of each range, those whose turn comes first, since dimensions depend on how many there are; None for a range
    of fewer than ``LEAST``. Empty where positions are not known. Every process must call this.
    """
    known = [None if share is None or len(share.number) < LEAST else share for share in collected.shares_at]
    n = min((len(share.number) for share in known if share is not None), default=0)
    usable = ~collected.unusable
    found: list[Tensor | None] = []
    for share in known:
        x = None if share is None else share.by_sublayer()[:n]
        found.append(x if x is None or usable.all() else x[..., usable])
    return found


def over_sublayers(
    states: Sequence[Tensor | None], of: Callable[[Tensor], Sequence[float]], n_sublayers: int
) -> Tensor:
    """Numbers ``of`` the states ``(n, D)`` of each range and sublayer: ``(P, S, K)`` float64, on every process.

    ``states`` are those of :func:`states_by_range`, of one range at least; NaN where there are none.
    """
    mine = [None if x is None else [list(of(x[:, s])) for s in range(x.shape[1])] for x in states]
    parts = from_all(mine, "cpu")
    whole = [None if here[0] is None else list(chain.from_iterable(here)) for here in zip(*parts, strict=True)]
    width = max(len(values[0]) for values in whole if values)
    nothing = [[torch.nan] * width] * n_sublayers
    return torch.tensor([values or nothing for values in whole], dtype=torch.float64)
