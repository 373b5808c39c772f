"""Prefetching: threads read the next batches, and one thread asks the kernel to read the pages of later ones.

:func:`prefetch_batches` takes an iterator of steps and a function that reads a step; it yields the results in order.
:class:`BufferPool` provides the buffers to read into.
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

READ_AHEAD_STEPS = 4  # steps beyond those being read whose pages are requested
RESIDENT_STEPS = 8  # after this many consecutive steps in memory, only every eighth step is requested


def prefetch_batches(
    steps: Iterator[Step],
    read: Callable[[Step], Result],
    request_pages: Callable[[Step], None],
    prefetch: int,
    threads: int,
) -> Iterator[tuple[Result, Step]]:
    """Yield ``(read(step), step)`` for each step.

    Args:
        request_pages: asks the kernel for the pages of a step without waiting for them.
        prefetch: number of steps read ahead of the caller; 0 reads in the caller's thread.
        threads: number of reader threads.
    """
    if not prefetch:
        for step in steps:
            yield read(step), step
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="earshard-read")
    # A separate thread requests pages, because a request blocks while the disk queue is full.
    page_executor = ThreadPoolExecutor(1, thread_name_prefix="earshard-need")
    read_ahead = ReadAhead(request_pages)
    waiting: deque[tuple[Future[Result], Step]] = deque()
    coming: deque[Step] = deque()
    finalizing = sys.is_finalizing  # an unfinished loop is closed at interpreter exit, after this module

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
            result = future.result()
            look_ahead(1)
            if coming:
                after = coming.popleft()
                waiting.append((executor.submit(read, after), after))
            yield result, step
            del result, future  # lets the buffer be reused once the caller drops the batch
    finally:
        if not finalizing():  # at interpreter exit the threads, and parts of what shutdown needs, are gone
            page_executor.shutdown(wait=True, cancel_futures=True)
            executor.shutdown(wait=True, cancel_futures=True)


class ReadAhead:
    """Requests pages; only occasionally while requests find everything in memory."""

    def __init__(self, request_pages: Callable[..., None]) -> None:
        self._request_pages, self._resident, self._seen = request_pages, 0, 0

    @property
    def should_request(self) -> bool:
        """Whether to request the next step."""
        self._seen += 1
        return self._resident < RESIDENT_STEPS or self._seen % RESIDENT_STEPS == 0

    def request(self, step: object) -> None:
        """Request the pages of ``step`` and record whether anything was read from disk."""
        before = getrusage(RUSAGE_THREAD).ru_inblock
        self._request_pages(step)
        self._resident = self._resident + 1 if getrusage(RUSAGE_THREAD).ru_inblock == before else 0


class BufferPool:
    """Buffers that are reused once nothing refers to their memory any more.

    The page faults of a new buffer of a few megabytes cost more than the copy into it; a page-locked buffer costs much
    more. An array returned by :meth:`acquire` is a view of a buffer. A torch tensor created from it, and every view of
    that tensor, keeps the array alive, so a weak reference to the array shows when the buffer is free. An asynchronous
    copy to a GPU is not a reference, so :meth:`shards.stream.batch.Batch.to` waits for it.

    Args:
        max_free: maximum number of free buffers kept.
        pinned: use page-locked buffers, for batches that are copied to a GPU.
    """

    def __init__(self, max_free: int, pinned: bool = False) -> None:
        self._max_free, self._pinned = max_free, pinned
        self._free: deque[Array] = deque()  # append and pop are atomic: a finalizer may run in any thread at any time

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._max_free, self._pinned)

    def acquire(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an uninitialized array."""
        size = prod(shape) * dtype.itemsize
        try:
            buffer = self._free.pop()  # the last one released: it may still be in the CPU cache
        except IndexError:
            buffer = np.empty(0, dtype=np.uint8)
        if len(buffer) < size:
            # Allocate a quarter more: batch sizes vary slightly, and buffers should be reusable.
            buffer = page_locked(size + size // 4) if self._pinned else np.empty(size + size // 4, dtype=np.uint8)
        array: Array = buffer[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._release, buffer).atexit = False
        return array

    def _release(self, buffer: Array) -> None:
        if len(self._free) < self._max_free:
            self._free.append(buffer)


def page_locked(size: int) -> Array:
    """Return uint8 [size] in page-locked memory, from which copies to a GPU are about twice as fast. Needs a GPU."""
    import torch

    array: Array = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return array
