from __future__ import annotations

import threading

import pytest
import torch

from pipeline.threads import BackgroundThread, ThreadPool


@pytest.mark.parametrize("n", [1, 3])
def test_every_call_is_made_with_torch_on_one_thread_and_the_callers_setting_comes_back(n):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[tuple[int, int]] = []
        ThreadPool(n).run(lambda i: seen.append((i, torch.get_num_threads())), [(i,) for i in range(10)])
        assert sorted(seen) == [(i, 1) for i in range(10)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_calls_run_at_the_same_time():
    meet = threading.Barrier(3, timeout=20)
    ThreadPool(3).run(meet.wait, [()] * 3)


@pytest.mark.parametrize("n", [1, 3])
def test_a_failed_call_is_raised(n):
    def divide(i: int) -> None:
        1 // i

    with pytest.raises(ZeroDivisionError):
        ThreadPool(n).run(divide, [(1,), (0,), (2,)])


def test_background_work_is_done_completely_and_in_order():
    done: list[int] = []
    with BackgroundThread(done.append, 2) as background:
        for i in range(50):
            background.put(i)
        background.finish()
        assert done == list(range(50))
    assert not background._thread.is_alive()


def test_no_more_than_maxsize_items_are_queued():
    go, done = threading.Event(), []
    with BackgroundThread(lambda i: (go.wait(20), done.append(i)), 3) as background:
        for i in range(4):  # one is under way, three wait
            background.put(i)
        late = threading.Thread(target=background.put, args=(4,))
        late.start()
        late.join(0.05)
        assert late.is_alive()
        go.set()
        late.join(20)
        background.finish()
    assert done == [0, 1, 2, 3, 4]


def test_an_error_of_background_work_reaches_the_caller_and_ends_the_work():
    done: list[int] = []

    def work(i: int) -> None:
        done.append(1 // (3 - i))

    def give(background: BackgroundThread[int]) -> None:
        with background:
            for i in range(50):
                background.put(i)
            background.finish()

    background = BackgroundThread(work, 1)
    with pytest.raises(ZeroDivisionError):
        give(background)
    assert done == [0, 0, 1]
    assert not background._thread.is_alive()


def test_leaving_with_an_exception_discards_the_queued_items():
    go, done = threading.Event(), []

    def give(background: BackgroundThread[int]) -> None:
        with background:
            for i in range(5):
                background.put(i)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give(BackgroundThread(lambda i: (go.wait(20), done.append(i)), 9))
    assert len(done) <= 1
