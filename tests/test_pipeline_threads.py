from __future__ import annotations

import threading

import pytest
import torch

from pipeline.threads import Threads


@pytest.mark.parametrize("n", [1, 3])
def test_every_call_is_made_with_torch_on_one_thread_and_the_callers_setting_comes_back(n):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[tuple[int, int]] = []
        Threads(n).run(lambda i: seen.append((i, torch.get_num_threads())), [(i,) for i in range(10)])
        assert sorted(seen) == [(i, 1) for i in range(10)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_calls_run_at_the_same_time():
    meet = threading.Barrier(3, timeout=20)
    Threads(3).run(meet.wait, [()] * 3)


@pytest.mark.parametrize("n", [1, 3])
def test_a_failed_call_is_raised(n):
    def divide(i: int) -> None:
        1 // i

    with pytest.raises(ZeroDivisionError):
        Threads(n).run(divide, [(1,), (0,), (2,)])
