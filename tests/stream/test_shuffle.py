"""Memory that is given again, and pools of vectors, beside the same in one tensor."""

import mmap
from itertools import pairwise

import pytest
import torch

from rsdyn.stream.shuffle import Memory, Pool, Vectors, first_needed, plan


def test_memory_is_given_again_once_nobody_holds_it():
    memory = Memory()
    first = memory.empty(4, 8, dtype=torch.bfloat16)
    address = first.data_ptr()
    assert first.shape == (4, 8) and first.dtype == torch.bfloat16 and first.is_contiguous()
    second = memory.empty(4, 8, dtype=torch.bfloat16)
    assert second.data_ptr() != address
    del first
    again = memory.empty(2, 8, dtype=torch.float32)
    assert again.data_ptr() == address
    assert memory.empty(0, 8, dtype=torch.float32).shape == (0, 8)


@pytest.mark.parametrize("hold", [lambda t: t[1:2], lambda t: t.view(-1), lambda t: t.numpy(), lambda t: t.detach()])
def test_whatever_shares_it_holds_it(hold):
    memory = Memory()
    tensor = memory.empty(4, 8, dtype=torch.float32)
    address = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    others = [memory.empty(4, 8, dtype=torch.float32) for _ in range(3)]
    assert address not in {t.data_ptr() for t in others}
    del held
    assert memory.empty(4, 8, dtype=torch.float32).data_ptr() == address


def test_what_is_kept_is_not_written_to():
    memory = Memory()
    kept = []
    for i in range(20):
        tensor = memory.empty(3 + i % 2, 5, dtype=torch.float32).fill_(i)
        if i % 3 == 0:
            kept.append((i, tensor[1]))
    assert all(bool((t == i).all()) for i, t in kept)
    assert len(memory._lent) <= len(kept) + 2


def test_much_memory_lies_at_huge_pages_and_is_given_again_too():
    memory = Memory()
    large = memory.empty(5 << 20, dtype=torch.uint8)
    address = large.data_ptr()
    large.fill_(7)
    other = memory.empty(5 << 20, dtype=torch.uint8).fill_(1)
    assert bool((large == 7).all()) and bool((other == 1).all())
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert address % (2 << 20) == other.data_ptr() % (2 << 20) == 0
    rows = large[3:]
    del large
    third = memory.empty(5 << 20, dtype=torch.uint8)
    assert third.data_ptr() != address
    del rows
    assert memory.empty(5 << 20, dtype=torch.uint8).data_ptr() == address


def test_memory_that_is_not_there_is_torchs_error(monkeypatch):
    """Which says how many bytes were wanted, where the system's names none."""

    def fail(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fail)
    memory = Memory()
    assert bool((memory.empty(5 << 20, dtype=torch.uint8).fill_(7) == 7).all())
    with pytest.raises(RuntimeError, match=str(1 << 60)):
        memory.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("n_left", [0, 6])
def test_a_pool_is_what_was_left_and_then_a_permutation(whole, n_left):
    n, s, d = 7, 3, 5
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(n, s, d, generator=generator).bfloat16(), torch.arange(n) * 10
    order = torch.randperm(n if whole else n * s, generator=generator)
    left = None
    if n_left:
        left = (torch.randn(n_left, d).bfloat16(), torch.arange(n_left) % s, torch.full((n_left,), 99))
    vectors = Vectors(torch.empty(n + 2, s, d).bfloat16())
    for k, rows in ((2, [0, 1]), (9, [0, 1]), (4, [2, 3, 4, 5, 6])):  # another shard is there too, and first
        vectors.put(k, x if k != 2 else x + 1, index, torch.tensor(rows))
    pool = Pool(vectors, [4, 9], order, left, whole=whole, memory=Memory())
    x, index = x[[2, 3, 4, 5, 6, 0, 1]], index[[2, 3, 4, 5, 6, 0, 1]]
    rows = (order[:, None] * s + torch.arange(s)).flatten() if whole else order
    everything = [x.flatten(0, 1)[rows], torch.arange(s).repeat(n)[rows], index.repeat_interleave(s)[rows]]
    if left is not None:
        everything = [torch.cat(pair) for pair in zip(left, everything, strict=True)]
    assert len(pool) == len(everything[0]) == n * s + n_left
    for start in range(0, len(pool), s):
        for stop in range(start, len(pool) + s, s):  # past the end too
            taken = pool.take(start, stop)
            assert all(torch.equal(a, b[start:stop]) for a, b in zip(taken, everything, strict=True))


def test_a_plan_gives_every_vector_once():
    for sizes in ([10, 10, 10], [1, 1, 20], [5], [3, 0, 3], [2, 2, 2, 2]):
        for step in (1, 4, 7, 100):
            planned = plan(sizes, step)
            assert planned[-1].batches_after == -(-sum(sizes) // step) and planned[-1].left_after == 0
            for before, after in pairwise(planned):
                assert (before.batches_after, before.left_after) == (after.batches_before, after.left_before)
            assert first_needed(planned, 0, 0) == 0
