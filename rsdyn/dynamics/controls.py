"""Trajectories that no layer moved: what a measure of recovery says of points that cannot recover (METHOD section 10).

A reference that travels may travel *towards* a point that lies ahead of it, so a point ends nearer to the reference
than it was put without a step of its own. What a model's layers do with a point is what they do beyond these two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stays_put(states: Tensor, n_sublayers: int) -> Tensor:
    """Points that never move: ``states`` ``(P, D)`` at each of ``n_sublayers`` sublayers, ``(P, n_sublayers, D)``.

    Raises ``ValueError`` for states of another rank, and for less than one sublayer.
    """
    if states.ndim != 2:
        raise ValueError(f"states: shape {tuple(states.shape)}; give (P, D), one row per point.")
    if n_sublayers < 1:
        raise ValueError(f"n_sublayers={n_sublayers}: give at least 1, that of the injection.")
    return states[:, None].expand(-1, n_sublayers, -1)


def random_writes(states: Tensor, reference: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Points that take steps as long as the reference's, each in a direction of its own: ``(P, S', D)``.

    Args:
        states: ``(P, D)``, the points as they are put at the first sublayer.
        reference: ``(S', D)``, the unperturbed trajectory from there on. Step s of every point is as long as
            ``reference[s + 1] - reference[s]``; its direction is uniform on the sphere, independent of all others.
        generator: on the CPU, so that it draws the same on every device.

    Raises ``ValueError`` for other shapes.
    """
    if states.ndim != 2 or reference.ndim != 2 or reference.shape[1:] != states.shape[1:] or len(reference) == 0:
        raise ValueError(
            f"states of shape {tuple(states.shape)} and reference of shape {tuple(reference.shape)}: give (P, D) and "
            "(S', D), of the same units, with at least one sublayer."
        )
    lengths = (reference[1:] - reference[:-1]).norm(dim=-1, keepdim=True)
    directions = torch.randn(len(states), len(lengths), states.shape[1], generator=generator)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).to(states)
    return torch.cat([states[:, None], states[:, None] + (lengths.to(states) * directions).cumsum(1)], 1)
