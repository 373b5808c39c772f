"""Threads of an extraction: a pool that encodes one clip per thread on a CPU, and a background thread.

:class:`ThreadPool` runs a function once per clip and returns when all calls are done. By default torch uses all threads
inside each operation and waits at a barrier after every one, about a thousand times per clip. On cores shared with
other programs, a call then takes many times as long.

:class:`BackgroundThread` processes items in order in one thread.
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
    """A pool of ``num_threads`` threads in which torch itself uses one thread. Created at the first use."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._executor: ThreadPoolExecutor | None = None

    def run(self, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
        """Run ``function(*call)`` for each of ``calls``, in any order; raise the first exception when all are done."""
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
                for future in futures:  # after an interrupt, only the clips already started are finished
                    future.cancel()
        for error in errors:
            if error is not None:
                raise error


@contextmanager
def _torch_single_threaded() -> Iterator[None]:
    """Limit the calling thread, and torch's global setting, to one thread inside the ``with`` block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)  # OpenMP keeps the number of threads per calling thread


class BackgroundThread(Generic[T]):
    """Calls ``function`` with each item in a background thread, in order; at most ``maxsize`` items are queued.

    An exception of ``function`` stops the processing and is raised by the next :meth:`put` or :meth:`finish`. Leaving
    the ``with`` block with an exception discards the queued items.
    """

    def __init__(self, function: Callable[[T], None], maxsize: int) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._discarding = False
        self._items: Queue[tuple[T] | None] = Queue(maxsize)
        self._thread = Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def __enter__(self) -> BackgroundThread[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discarding = self._discarding or kind is not None
        self._end()

    def put(self, item: T) -> None:
        """Queue ``item``; blocks while the queue is full."""
        self.check()
        self._items.put((item,))

    def check(self) -> None:
        """Raise the exception of ``function``, if any."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all items are processed; raises the exception of ``function``, if any."""
        self._end()
        self.check()

    def stop(self) -> None:
        """Discard the queued items and wait for the one under way."""
        self._discarding = True
        self._end()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._items.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if not self._discarding:
                try:
                    self._function(*item)
                except BaseException as error:
                    self._error, self._discarding = error, True
