"""Concatenates caches of one feature spec. :class:`ConcatCache` reads utterances, keys and texts by joined row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.read.cache import Cache, StoredUtterance

Rows = NDArray[np.int64]
T = TypeVar("T")


class ConcatCache:
    """Caches joined end to end. Joined row r is row ``r - offsets[c]`` of the last cache c with ``offsets[c] <= r``.

    Attributes:
        offsets: int64 [caches + 1].
        frames: int32 [rows].
        bounds: int64 [shards + 1]: shard s of all caches holds the rows ``bounds[s]:bounds[s + 1]``.

    Raises:
        UserError: ``caches`` is empty, or the caches have different feature specs.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = list(caches)
        _require_one_spec(self.caches)
        self.spec = self.caches[0].spec
        self.offsets: Rows = np.cumsum([0, *map(len, self.caches)], dtype=np.int64)
        frames = [cache.frames for cache in self.caches]
        self.frames: NDArray[np.int32] = frames[0] if len(frames) == 1 else np.concatenate(frames)
        bounds = [cache.bounds[1:] + at for cache, at in zip(self.caches, self.offsets, strict=False)]
        self.bounds: Rows = np.concatenate([np.zeros(1, dtype=np.int64), *bounds])

    def locate(self, row: int) -> tuple[Cache, int]:
        """Return the cache of a joined row, and its row in that cache."""
        if not 0 <= row < self.offsets[-1]:
            raise IndexError(f"row {row} is out of range for {self.offsets[-1]} rows")
        place = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.caches[place], row - int(self.offsets[place])

    @property
    def has_variants(self) -> bool:
        """Whether utterances of any cache have variants."""
        return any(cache.variants is not None for cache in self.caches)

    def num_versions(self, most: int | None) -> Rows:
        """Return the versions of each row, int64 [rows]; see :meth:`shards.read.cache.Cache.num_versions`."""
        return np.concatenate([cache.num_versions(most) for cache in self.caches])

    def max_frames(self, most: int | None) -> NDArray[np.int32]:
        """Return the frames of the longest version of each row, int32 [rows]."""
        return np.concatenate([cache.max_frames(most) for cache in self.caches])

    def version_frames(self, rows: Rows, versions: Rows) -> NDArray[np.int32]:
        """Return the frames of versions of ``rows``, int32; see :meth:`shards.read.cache.Cache.version_rows`."""
        frames = self.frames[rows]
        for cache, places, own in self._split_by_cache(rows):
            if cache.variants is not None:
                frames[places] = cache.features_table.frames[cache.version_rows(own, versions[places])]
        return frames

    def read_stored(self, rows: Rows, versions: Rows | None = None) -> list[StoredUtterance]:
        """Return the stored utterances of ``rows``, in order; see :meth:`shards.read.cache.Cache.read_stored`."""
        found: dict[int, StoredUtterance] = {}
        for cache, places, own in self._split_by_cache(rows):
            stored = cache.read_stored(own, None if versions is None else versions[places])
            if len(self.caches) == 1:
                return stored
            found.update(zip(places.tolist(), stored, strict=True))
        return [found[place] for place in range(len(rows))]

    def strings(self, column: str, rows: ArrayLike) -> list[str]:
        """Return a string column of ``rows``, in order."""
        return self._gather(np.asarray(rows, dtype=np.int64), lambda cache, own: cache.strings(column, own))

    def has_column(self, name: str) -> bool:
        """Return whether the labels of any cache have the column ``name``."""
        return any(cache.has_column(name) for cache in self.caches)

    def column(self, name: str, default: str | float) -> pa.ChunkedArray:
        """Return the label column ``name`` [rows] of the type of ``default``, which fills caches without it."""
        filled = pa.scalar(default)
        columns = [
            cache.column(name) if cache.has_column(name) else pa.chunked_array([pa.repeat(filled, len(cache))])
            for cache in self.caches
        ]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], filled.type)

    def _gather(self, rows: Rows, read: Callable[[Cache, Rows], list[T]]) -> list[T]:
        """Call ``read`` for the rows of each cache; returns the results in the order of ``rows``."""
        found: dict[int, T] = {}
        for cache, places, own in self._split_by_cache(rows):
            found.update(zip(places.tolist(), read(cache, own), strict=True))
        return [found[place] for place in range(len(rows))]

    def will_need(self, rows: Rows, versions: Rows | None = None) -> None:
        """Ask the kernel for the pages of ``rows``. Skips remote caches, whose pages were just written to memory."""
        for cache, places, own in self._split_by_cache(rows):
            if cache.mirror is None:
                cache.will_need(own, None if versions is None else versions[places])

    def shards(self, rows: Rows, versions: Rows) -> Iterator[tuple[Cache, list[int]]]:
        """Yield each cache that holds some of ``rows``, and the shards of these versions of them, ascending."""
        for cache, places, own in self._split_by_cache(rows):
            yield cache, np.unique(cache.features_table.shards[cache.version_rows(own, versions[places])]).tolist()

    def _split_by_cache(self, rows: Rows) -> Iterator[tuple[Cache, Rows, Rows]]:
        """Yield each cache that holds some of ``rows``, their positions in ``rows`` and their rows in that cache."""
        if len(self.caches) == 1:
            yield self.caches[0], np.arange(len(rows)), rows
            return
        caches = np.searchsorted(self.offsets, rows, side="right") - 1
        for number in np.unique(caches).tolist():
            places = np.flatnonzero(caches == number)
            yield self.caches[number], places, rows[places] - self.offsets[number]


def _require_one_spec(caches: Sequence[Cache]) -> None:
    if not caches:
        raise UserError("no caches: set caches to one or more cache folders")
    first = caches[0]
    for other in caches[1:]:
        if other.feature_id != first.feature_id:
            found = "; ".join(first.spec.differences(other.spec))
            raise UserError(
                f"the caches '{first.path}' and '{other.path}' hold different features ({found}): "
                "extract both with the same encoder, layer, window and codec"
            )
