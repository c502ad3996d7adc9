"""Direction and pace of trajectories: what each sequence's stream vector does from one sublayer to the next.

Chunks of sequences are taken to float32 one at a time, so no float32 copy of a bf16 stream is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rsdyn.threads import side_by_side

_CHUNK_ELEMENTS = 1 << 19  # 2 MB in float32: with the products, about a core's cache


def cosine(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Cosine of successive stream vectors ``h_s, h_{s+1}`` of each sequence (paper 2.3, Fig. 1E, METHOD section 5).

    Args:
        trajectories: ``(N, S, D)``, any floating dtype.
        units: boolean mask ``(D,)`` of the units to count, for a cosine without massive units; default all. What the
            others hold, NaN too, has no influence.

    Returns:
        ``(N, S - 1)``, within [-1, 1]; float64 for float64 input, else float32. NaN where either vector is zero or not
        finite, or longer than the root of the largest number, 1.8e19 in float32.

    Raises:
        ValueError: for another shape, fewer than two sublayers, or a mask of another shape or of no unit.
    """
    return _over_chunks(_cosine, trajectories, units, lost=1)


def speed(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Length of the step ``h_{s+1} - h_s`` of each sequence, ``(N, S - 1)`` (paper 2.4, Fig. 1F, METHOD section 5).

    Subtracted first, then the norm: the expanded square loses 2.7 % in float32. Arguments, dtype and errors are those
    of :func:`cosine`.
    """
    return _over_chunks(lambda x: torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1), trajectories, units, lost=1)


def norm(trajectories: Tensor, units: Tensor | None = None) -> Tensor:
    """Length of the stream vector at each sublayer of each sequence, ``(N, S)`` (METHOD section 5).

    Arguments, dtype and errors are those of :func:`cosine`, but one sublayer is enough.
    """
    return _over_chunks(lambda x: torch.linalg.vector_norm(x, dim=-1), trajectories, units, lost=0)


def _cosine(x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=-1)
    dot = (x[:, 1:] * x[:, :-1]).sum(-1)
    return (dot / size[:, 1:] / size[:, :-1]).clamp_(-1, 1)  # 0 / 0 is NaN, and stays so


def _over_chunks(measure: Callable[[Tensor], Tensor], x: Tensor, units: Tensor | None, lost: int) -> Tensor:
    """``measure`` of chunks of sequences side by side, ``(N, S - lost)``; ``x`` and ``units`` are checked first."""
    if x.ndim != 3:
        raise ValueError(f"trajectories of shape {tuple(x.shape)}: give (N, S, D), sequences by sublayers by units.")
    n, s, d = x.shape
    if s <= lost:
        raise ValueError(f"trajectories of {s} sublayers: at least {lost + 1} are needed; record more sublayers.")
    excluded = None
    if units is not None:
        if units.dtype != torch.bool or units.shape != (d,):
            raise ValueError(
                f"units of {units.dtype} and shape {tuple(units.shape)}: give a boolean mask of shape ({d},), "
                "or None for all units."
            )
        excluded = (~units).nonzero().flatten().to(x.device)
    if d == (0 if excluded is None else len(excluded)):
        raise ValueError(f"units: none of {d} is left to measure; mark at least one.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = max(1, _CHUNK_ELEMENTS // (s * d))

    def work(part: Tensor) -> Tensor:
        if excluded is None or len(excluded) == 0:
            return measure(part.to(dtype))
        # Zeros count for nothing in a sum, and to write a few costs less than to gather all the rest
        return measure(part.to(dtype, copy=True).index_fill_(-1, excluded, 0))

    out = torch.empty(n, s - lost, dtype=dtype, device=x.device)
    for found, part in zip(out.split(rows), side_by_side(work, x.split(rows), x.device), strict=True):
        found.copy_(part)
    return out
