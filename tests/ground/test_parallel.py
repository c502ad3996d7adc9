import threading

import pytest
import torch

from rsdyn.threads import side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_items_run_side_by_side_in_order_with_one_thread_each():
    meet = threading.Barrier(2, timeout=20)  # broken unless two items run at once

    def work(i: int) -> tuple[int, int]:
        meet.wait()
        return i, torch.get_num_threads()

    assert list(side_by_side(work, range(6), "cpu")) == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_and_the_threads_are_given_back():
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    found = []
    with pytest.raises(ValueError, match="three"):
        found.extend(side_by_side(work, range(1000), "cpu"))
    assert torch.get_num_threads() == 2


def test_another_device_runs_one_after_another():
    assert list(side_by_side(lambda i: threading.get_ident(), range(3), "meta")) == [threading.get_ident()] * 3
