"""Buffers that are reused, and never while somebody still looks at them.

In: a shape. Out: an array over a buffer that comes back to the pool by itself once nothing refers to its memory. A
fresh buffer of a few megabytes costs more in page faults than the copy into it, and a page-locked one far more.
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod
from typing import Any

import numpy as np

from shards.codec import Array


class Pool:
    """Buffers that come back by themselves when nothing refers to their memory any more.

    An array handed out is a view of a buffer; a torch tensor made of it, and every view of that tensor, keeps the array
    alive. So the array's end is the end of all use, and a weak reference tells it. A copy to a GPU that was begun and
    not waited for is no reference: :meth:`shards.batch.Batch.to` waits.

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
