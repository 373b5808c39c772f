"""Prefetching: threads that read the next batches, one that asks the disk for those after them, buffers to read into.

In: the steps to come, and a function that reads one. Out: what was read, in the order of the steps.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import prod
from resource import RUSAGE_THREAD, getrusage
from typing import Any, TypeVar

import numpy as np

from shards.format.codec import Array

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


class Pool:
    """Buffers that are reused once nothing refers to their memory any more.

    A new buffer of a few megabytes costs more in page faults than the copy into it, a page-locked one far more.
    An array handed out is a view of a buffer; a torch tensor made of it, and every view of that tensor, keeps the array
    alive. So the array's end is the end of all use, and a weak reference tells it. A copy to a GPU that was begun and
    not waited for is no reference: :meth:`shards.stream.batch.Batch.to` waits.

    Args:
        keep: free buffers kept.
        pinned: page-locked ones, for batches that go to a GPU.
    """

    def __init__(self, keep: int, pinned: bool = False) -> None:
        self._keep, self._pinned = keep, pinned
        self._free: deque[Array] = deque()  # append and pop are atomic: a finaliser may run in any thread, anywhere

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, (self._keep, self._pinned)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of arbitrary content."""
        size = prod(shape) * dtype.itemsize
        try:
            buffer = self._free.pop()  # the last one back: the processor's cache may still hold it
        except IndexError:
            buffer = np.empty(0, dtype=np.uint8)
        if len(buffer) < size:
            # A quarter more than asked: batches differ a little, and the pool should settle soon.
            buffer = page_locked(size + size // 4) if self._pinned else np.empty(size + size // 4, dtype=np.uint8)
        array: Array = buffer[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return array

    def _give_back(self, buffer: Array) -> None:
        if len(self._free) < self._keep:
            self._free.append(buffer)


def page_locked(size: int) -> Array:
    """uint8 [size] in memory that a GPU reads by itself, about twice as fast. Needs a GPU."""
    import torch

    array: Array = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return array
