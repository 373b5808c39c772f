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
Result = TypeVar("Result")

READ_AHEAD_STEPS = 4  # steps beyond those being read whose pages the kernel is asked for
RESIDENT_STEPS = 8  # such steps found in memory: from then on, each eighth is looked at


def prefetch_batches(
    steps: Iterator[Step],
    read: Callable[[Step], Result],
    request_pages: Callable[[Step], None],
    prefetch: int,
    threads: int,
) -> Iterator[tuple[Result, Step]]:
    """``(read(step), step)`` of each step, ``prefetch`` of them being read by ``threads`` while the caller works.

    ``need`` asks for the pages of a step, without waiting for them. With ``prefetch`` 0 the caller's thread reads.
    """
    if not prefetch:
        for step in steps:
            yield read(step), step
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="earshard-read")
    # One thread of its own asks the kernel for pages: asking waits for a busy disk's queue.
    page_executor = ThreadPoolExecutor(1, thread_name_prefix="earshard-need")
    read_ahead = ReadAhead(request_pages)
    waiting: deque[tuple[Future[Result], Step]] = deque()
    coming: deque[Step] = deque()
    finalizing = sys.is_finalizing  # a loop that is left standing ends with the interpreter, after this module

    def look_ahead(count: int) -> None:
        for step in islice(steps, count):
            coming.append(step)
            if read_ahead.should_request:
                page_executor.submit(read_ahead.request, step)

    try:
        look_ahead(prefetch + READ_AHEAD_STEPS)
        while coming and len(waiting) < prefetch:
            step = coming.popleft()
            waiting.append((executor.submit(read, step), step))
        while waiting:
            future, step = waiting.popleft()
            made = future.result()
            look_ahead(1)
            if coming:
                after = coming.popleft()
                waiting.append((executor.submit(read, after), after))
            yield made, step
            del made, future  # the caller may be done with it: its buffer is free again
    finally:
        if not finalizing():  # then the threads are gone already, and so is half of what a shutdown needs
            page_executor.shutdown(wait=True, cancel_futures=True)
            executor.shutdown(wait=True, cancel_futures=True)


class ReadAhead:
    """Asks for pages; while asking turns out to read nothing, only now and then."""

    def __init__(self, request_pages: Callable[..., None]) -> None:
        self._request_pages, self._resident, self._seen = request_pages, 0, 0

    @property
    def should_request(self) -> bool:
        """Whether the next step should be asked for."""
        self._seen += 1
        return self._resident < RESIDENT_STEPS or self._seen % RESIDENT_STEPS == 0

    def request(self, step: object) -> None:
        """Ask for the pages of ``step``, and see whether anything was read from a disk."""
        before = getrusage(RUSAGE_THREAD).ru_inblock
        self._request_pages(step)
        self._resident = self._resident + 1 if getrusage(RUSAGE_THREAD).ru_inblock == before else 0


class BufferPool:
    """Buffers that are reused once nothing refers to their memory any more.

    A new buffer of a few megabytes costs more in page faults than the copy into it, a page-locked one far more.
    An array handed out is a view of a buffer; a torch tensor made of it, and every view of that tensor, keeps the array
    alive. So the array's end is the end of all use, and a weak reference tells it. A copy to a GPU that was begun and
    not waited for is no reference: :meth:`shards.stream.batch.Batch.to` waits.

    Args:
        keep: free buffers kept.
        pinned: page-locked ones, for batches that go to a GPU.
    """

    def __init__(self, max_free: int, pinned: bool = False) -> None:
        self._max_free, self._pinned = max_free, pinned
        self._free: deque[Array] = deque()  # append and pop are atomic: a finaliser may run in any thread, anywhere

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._max_free, self._pinned)

    def acquire(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
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
        weakref.finalize(array, self._release, buffer).atexit = False
        return array

    def _release(self, buffer: Array) -> None:
        if len(self._free) < self._max_free:
            self._free.append(buffer)


def page_locked(size: int) -> Array:
    """uint8 [size] in memory that a GPU reads by itself, about twice as fast. Needs a GPU."""
    import torch

    array: Array = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return array
