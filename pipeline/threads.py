"""Many clips at once on a CPU, each on one thread.

In: a function and its arguments, one call a clip. Out: when all calls are done. Torch's own way, all threads inside
each operation, waits at a barrier after every one of them, a thousand times a clip: on cores that are shared with
anything else a call then takes many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


class Threads:
    """A pool of ``n`` threads in which torch itself uses one thread; made at the first use."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._executor: ThreadPoolExecutor | None = None

    def run(self, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
        """``function(*call)`` for each of ``calls``, in any order; the first exception is raised when all are done."""
        with _one_thread():
            if self.n == 1 or len(calls) == 1:
                for call in calls:
                    function(*call)
                return
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.n, thread_name_prefix="encode", initializer=_use_one_thread)
            futures = [self._executor.submit(function, *call) for call in calls]
            try:
                errors = [future.exception() for future in futures]
            finally:
                for future in futures:  # an interrupt ends after the clips that are under way
                    future.cancel()
        for error in errors:
            if error is not None:
                raise error


@contextmanager
def _one_thread() -> Iterator[None]:
    """The calling thread, and what is global in torch's settings, at one thread for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # OpenMP keeps the number of threads for each thread that calls it
