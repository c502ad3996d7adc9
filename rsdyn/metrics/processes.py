"""Work shared out over the processes of a run, and what all of them found, brought together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from rsdyn.threads import side_by_side

T = TypeVar("T")
R = TypeVar("R")


def n_processes() -> int:
    """How many processes the run has by now; 1 before they have met."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_all(found: R, device: torch.device | str) -> list[R]:
    """What each process found, in the order of the processes, on every one of them; tensors in it are on ``device``.

    It travels pickled, from CPU to CPU, so shapes may differ and no backend has to know a dtype: for results, not for
    streams. Every process must call this. One that fails before it does ends, and the run with it (``run/signals.py``).
    """
    if n_processes() == 1:
        return [found]
    parts: list[R | None] = [None] * n_processes()
    # from the CPU, else each part would arrive on its sender's device
    torch.distributed.all_gather_object(parts, move_data_to_device(found, torch.device("cpu")))
    return move_data_to_device(parts, torch.device(device))


def shared_out(
    work: Callable[[T], R], items: Sequence[T], device: torch.device | str, *, one_by_one: bool = False
) -> list[R]:
    """``work`` of each item, in order, on every process; of W processes each does every W-th item.

    An item is done whole, by one process, in the way of :func:`rsdyn.threads.side_by_side`, so its bits don't
    depend on how many processes there are. They may outnumber the items. All must come here with the same ones.

    Args:
        work: makes a tensor or a tuple of tensors.
        device: where the work is done, and where what other processes found goes.
        one_by_one: run a process' own items one after another, each on all threads.
    """
    world = n_processes()
    first = 0 if world == 1 else torch.distributed.get_rank()
    mine = list(side_by_side(work, items[first::world], device, one_by_one=one_by_one))
    parts = from_all(mine, device)
    return [parts[i % world][i // world] for i in range(len(items))]


def hand_out(
    parts: Callable[[], Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
    group: Any = None,
) -> list[Tensor]:
    """Give each process its part of what this one has, and receive one's own part from each, in their order.

    Args:
        parts: what goes to each process, all of one shape; called once, in this process' turn, if it has anything.
        shapes: of what comes from each process, by which all know who has nothing.
        dtype: of all of them; they travel as bytes, since not every backend carries bf16.
    """
    rank = torch.distributed.get_rank(group)
    received = []
    for source, shape in enumerate(shapes):
        room = torch.empty(shape, dtype=dtype, device=device)
        received.append(room)
        if room.numel() > 0:
            given = [part.contiguous().view(torch.uint8) for part in parts()] if rank == source else None
            torch.distributed.scatter(room.view(torch.uint8), given, src=source, group=group)
    return received
