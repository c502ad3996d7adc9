"""Independent pieces of work side by side on a CPU's cores, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    work: Callable[[T], R], items: Sequence[T], device: torch.device | str, *, one_by_one: bool = False
) -> Generator[R, None, None]:
    """Yield ``work`` of each item, in order; on a CPU as many items run at a time as torch has threads, one each.

    What one thread computes has the same bits whatever the number of threads, and one operation split over threads
    does not: where a thread's part ends, the last few elements are computed by other instructions (1e-8 off in SiLU,
    seen on AVX-512). Splitting items instead of operations also has no barrier to wait at. On another device, or with
    ``one_by_one``, the items run one after another, each operation on all threads. Close the generator to leave early:
    what has not begun is dropped.
    """
    n_threads = torch.get_num_threads()
    if one_by_one or torch.device(device).type != "cpu" or n_threads == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
