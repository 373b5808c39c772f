"""Read ahead of a loop: threads that fill the next batches, and one that asks the disk for those after them.

In: the steps to come, and what reads one. Out: what was read, in the order of the steps.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from resource import RUSAGE_THREAD, getrusage
from typing import TypeVar

Step = TypeVar("Step")
Made = TypeVar("Made")

NEEDED = 4  # steps beyond those being read whose pages the kernel is asked for
RESIDENT = 8  # such steps found in memory: from then on, each eighth is looked at


def ahead(
    steps: Iterator[Step],
    read: Callable[[Step], Made],
    need: Callable[[Step], None],
    prefetch: int,
    threads: int,
) -> Iterator[tuple[Made, Step]]:
    """``(read(step), step)`` of each step, ``prefetch`` of them being read by ``threads`` while the caller works.

    ``need`` asks for the pages of a step, without waiting for them. With ``prefetch`` 0 the caller's thread reads.
    """
    if not prefetch:
        for step in steps:
            yield read(step), step
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="earshard-read")
    # One thread of its own asks the kernel for pages: asking waits for a busy disk's queue.
    needer = ThreadPoolExecutor(1, thread_name_prefix="earshard-need")
    asked = Asked(need)
    waiting: deque[tuple[Future[Made], Step]] = deque()
    coming: deque[Step] = deque()
    finalizing = sys.is_finalizing  # a loop that is left standing ends with the interpreter, after this module

    def look(count: int) -> None:
        for step in islice(steps, count):
            coming.append(step)
            if asked.worth:
                needer.submit(asked.ask, step)

    try:
        look(prefetch + NEEDED)
        while coming and len(waiting) < prefetch:
            step = coming.popleft()
            waiting.append((executor.submit(read, step), step))
        while waiting:
            future, step = waiting.popleft()
            made = future.result()
            look(1)
            if coming:
                after = coming.popleft()
                waiting.append((executor.submit(read, after), after))
            yield made, step
            del made, future  # the caller may be done with it: its buffer is free again
    finally:
        if not finalizing():  # then the threads are gone already, and so is half of what a shutdown needs
            needer.shutdown(wait=True, cancel_futures=True)
            executor.shutdown(wait=True, cancel_futures=True)


class Asked:
    """Asks for pages; while asking turns out to read nothing, only now and then."""

    def __init__(self, need: Callable[..., None]) -> None:
        self._need, self._resident, self._seen = need, 0, 0

    @property
    def worth(self) -> bool:
        """Whether the next step should be asked for."""
        self._seen += 1
        return self._resident < RESIDENT or self._seen % RESIDENT == 0

    def ask(self, step: object) -> None:
        """Ask for the pages of ``step``, and see whether anything was read from a disk."""
        before = getrusage(RUSAGE_THREAD).ru_inblock
        self._need(step)
        self._resident = self._resident + 1 if getrusage(RUSAGE_THREAD).ru_inblock == before else 0
