"""A bounded pool of memory-mapped shards that evicts the least recently used.

Takes a cache folder, the mirror that fills it if the cache is remote, and a shard number; returns the bytes of the
shard. An evicted mapping is not closed: views that are still in use keep it alive, and the last of them frees the
mapping and its two file descriptors.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.files import open_file
from shards.format.layout import Layout
from shards.read.index import corrupt_cache
from shards.remote.mirror import Mirror

MAX_READ_AHEAD_BYTES = 1 << 20  # bytes per read-ahead request: some kernels truncate longer requests


@dataclass(frozen=True, slots=True)
class MappedShard:
    """The bytes of a shard, read-only uint8, and a descriptor that stays open as long as they exist."""

    data: NDArray[np.uint8]
    fd: int

    def is_cut(self) -> bool:
        """Return whether the file is shorter now than when it was mapped: reading the rest would end the process."""
        return os.fstat(self.fd).st_size < len(self.data)

    def will_need(self, start: int, end: int) -> None:
        """Ask the kernel to read these bytes from disk in the background."""
        for place in range(start, min(end, len(self.data)), MAX_READ_AHEAD_BYTES):
            # Not mmap.madvise: it holds the GIL while it waits for the disk queue.
            os.posix_fadvise(self.fd, place, min(MAX_READ_AHEAD_BYTES, end - place), os.POSIX_FADV_WILLNEED)


class MmapPool:
    """Maps shards on demand. Thread-safe.

    Args:
        path: the cache folder.
        mirror: fetches the shards of a remote cache; ``None`` for a local cache.
        max_mapped: maximum number of shards mapped at once.
    """

    def __init__(self, path: Path, mirror: Mirror | None, max_mapped: int) -> None:
        self._path, self._mirror, self._max_mapped = path, mirror, max_mapped
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, shards: Iterable[int]) -> dict[int, MappedShard]:
        """Return the mappings of ``shards``, which may be more than ``max_mapped``.

        Raises:
            UserError: a shard cannot be fetched or mapped.
        """
        wanted = dict.fromkeys(shards)
        found: dict[int, MappedShard] = {}
        with self._lock:
            for shard in wanted:
                if shard in self._maps:
                    self._maps.move_to_end(shard)
                    found[shard] = self._maps[shard]
        for shard in [shard for shard in wanted if shard not in found]:
            mapped = self._map(shard)  # without the lock: fetching a remote shard must not block other threads
            with self._lock:
                found[shard] = self._maps.setdefault(shard, mapped)
                while len(self._maps) > self._max_mapped:
                    self._maps.popitem(last=False)
        return found

    def _map(self, shard: int) -> MappedShard:
        path = Layout(self._path).tar(shard)
        try:
            with open_file(path) if self._mirror is None else self._mirror.open_shard(shard) as file:
                data, fd = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.dup(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise corrupt_cache(self._path, f"shards/{path.name} cannot be read ({error})") from None
        weakref.finalize(data, os.close, fd).atexit = False
        return MappedShard(np.frombuffer(data, dtype=np.uint8), fd)
