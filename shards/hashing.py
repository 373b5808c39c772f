"""sha256 of what one thread writes, computed in another.

In: pieces of bytes, in order. Out: their digest. Hashing is the slowest part of writing a shard, and hashlib works
without the interpreter's lock, so that the next member can be packed and written meanwhile.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from queue import SimpleQueue

MAX_WAITING = 8  # calls of update whose bytes wait in memory at most


class BackgroundHash:
    """Like ``hashlib.sha256()``, with a thread of its own from the first update to :meth:`close`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pieces: SimpleQueue[Sequence[bytes | memoryview] | None] = SimpleQueue()
        self._room = threading.Semaphore(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def update(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Hash ``pieces`` soon; waits while too many wait already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
            self._thread.start()
        self._room.acquire()
        self._pieces.put(pieces)

    def hexdigest(self) -> str:
        """64 hex digits over everything so far."""
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread when what waits is hashed."""
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (pieces := self._pieces.get()) is not None:
            for piece in pieces:
                self._hash.update(piece)
            self._room.release()
