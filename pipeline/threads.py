"""Threads of an extraction: many clips at once on a CPU, each on one thread; work behind the main thread's back.

:class:`Threads` — in: a function and its arguments, one call a clip. Out: when all calls are done. Torch's own way, all
threads inside each operation, waits at a barrier after every one of them, a thousand times a clip: on cores that are
shared with anything else a call then takes many times as long.

:class:`BackgroundThread` — in: items, in order. Out: when one thread has taken them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThreadPool:
    """A pool of ``n`` threads in which torch itself uses one thread; made at the first use."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._executor: ThreadPoolExecutor | None = None

    def run(self, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
        """``function(*call)`` for each of ``calls``, in any order; the first exception is raised when all are done."""
        with _torch_single_threaded():
            if self.num_threads == 1 or len(calls) == 1:
                for call in calls:
                    function(*call)
                return
            if self._executor is None:
                self._executor = ThreadPoolExecutor(
                    self.num_threads, thread_name_prefix="encode", initializer=_set_one_torch_thread
                )
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
def _torch_single_threaded() -> Iterator[None]:
    """The calling thread, and what is global in torch's settings, at one thread for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)  # OpenMP keeps the number of threads for each thread that calls it


class BackgroundThread(Generic[T]):
    """Calls ``function`` with each item in a thread of its own, in order; at most ``room`` items wait.

    An exception of ``function`` ends the work and is raised by the next :meth:`put` or :meth:`finish`. Leaving the
    ``with`` block by an exception drops what waits.
    """

    def __init__(self, function: Callable[[T], None], maxsize: int) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._dropping = False
        self._items: Queue[tuple[T] | None] = Queue(maxsize)
        self._thread = Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def __enter__(self) -> BackgroundThread[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropping = self._dropping or kind is not None
        self._end()

    def put(self, item: T) -> None:
        """Hand over; waits while there is no room."""
        if self._error is not None:
            raise self._error
        self._items.put((item,))

    def finish(self) -> None:
        """Wait until everything is done."""
        self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        if self._thread.is_alive():
            self._items.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if not self._dropping:
                try:
                    self._function(*item)
                except BaseException as error:
                    self._error, self._dropping = error, True
