"""Reads committed features from memory-mapped shards without intermediate copies.

:class:`Cache` takes a complete cache folder (one with ``CACHE.json``) or its URL (``shards/remote/mirror.py``). It
returns the features of any utterance as a read-only view, or copies them once into the caller's buffer.

```
CACHE.json -> spec, ids, counts     manifest.parquet -> frames and shards at once, the rest a row group at a time
shards/000042.tar -> mmap (bounded, least recently used evicted) -> payload view --decode--> out
```

Every number in a file is checked against the size of that file before it is used. The checksum of a row is verified the
first time a process reads it. Methods are thread-safe.
"""

from __future__ import annotations

import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.format.codec import SCALED, STORED_DTYPE, Array, decode
from shards.format.layout import MANIFEST_SCHEMA, Layout, read_parquet
from shards.format.records import RecordError, unseal
from shards.format.spec import FeatureSpec
from shards.read.index import ManifestIndex, RowGroup, corrupt_cache, read_frames
from shards.read.mmap import MmapPool
from shards.remote.client import is_url
from shards.remote.mirror import Mirror

MAX_MAPPED_SHARDS = 64  # shards mapped at once: each keeps two file descriptors
SCALE_DTYPE = np.dtype("<f4")


class StoredUtterance(NamedTuple):
    """One utterance as stored: read-only views of the shard, and the key and text from the manifest."""

    payload: Array  # [frames, channels] of the codec's dtype
    scale: Array | None  # float32 [channels] if the codec is scaled
    key: str
    text: str


class Cache:
    """A committed cache. Create it with :meth:`open`.

    Attributes:
        path: the cache folder; for a remote cache, the local folder that mirrors it.
        location: the cache folder, or the URL of a remote cache.
        mirror: fetches the shards of a remote cache; ``None`` for a local cache.
        spec: the feature spec; ``feature_id`` is its hash.
        info: content of ``CACHE.json``.
        manifest_id: 64 hex digits that identify the content of the cache.
        frames: int32 [rows], number of frames of each utterance.
        bounds: int64 [non-empty shards + 1]; non-empty shard s holds the rows ``bounds[s]:bounds[s + 1]``.
    """

    def __init__(
        self,
        path: Path,
        info: dict[str, Any],
        spec: FeatureSpec,
        frames: Array,
        shards: Array,
        verify: bool,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.info, self.spec, self.mirror = path, info, spec, mirror
        self.location = str(path) if mirror is None else mirror.url
        self.feature_id: str = spec.feature_id
        self.manifest_id: str = info["manifest_id"]
        self._dtype = STORED_DTYPE[spec.codec]
        self.frames: NDArray[np.int32] = frames
        self._shards, self._verify = shards, verify
        edges = np.flatnonzero(np.diff(shards)) + 1
        self.bounds: NDArray[np.int64] = np.concatenate([[0], edges, [len(shards)]] if len(shards) else [[0]]).astype(
            np.int64
        )
        self._verified = np.zeros(len(shards), dtype=bool)
        self.detach()

    @classmethod
    def open(cls, path: str | Path | Mirror, verify: bool = True) -> Cache:
        """Open the cache at ``path``, a folder or a URL. ``verify=False`` skips the checksums of rows.

        Pass a :class:`~shards.remote.mirror.Mirror` instead of a URL to set the local folder and its size.

        Raises:
            UserError: there is no complete cache, it has another format, it is corrupt, or a remote cache cannot be
                reached.
        """
        if not isinstance(path, Mirror) and is_url(path):
            path = Mirror.open(str(path))
        mirror, layout = (path, path.layout) if isinstance(path, Mirror) else (None, Layout(Path(path)))
        info = _read_info(layout)
        where = f"'{layout.cache}'"
        try:
            spec = FeatureSpec.parse(info["spec"], where)
            written = info["files"][layout.manifest.name]
            declared = (info["feature_id"], int(info["counts"]["utterances"]), int(written["bytes"]))
            if not isinstance(info["manifest_id"], str) or spec.feature_id != declared[0]:
                raise corrupt_cache(layout.path, f"the feature id in {layout.cache.name} does not match its spec")
            frames, shards = read_frames(layout, declared[1], declared[2], str(written["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt_cache(layout.path, f"{layout.cache.name} has missing or invalid fields ({error})") from None
        return cls(layout.path, info, spec, frames, shards, verify, mirror)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache.open, (self.mirror or self.path, self._verify)  # a worker process creates its own mappings

    def __len__(self) -> int:
        return len(self.frames)

    def detach(self) -> None:
        """Drop mappings, cached strings and locks. Call it in a process that was forked while threads were reading."""
        self._index = ManifestIndex(
            self.path, self.spec, self.frames, int(self.info["files"]["manifest.parquet"]["bytes"])
        )
        max_mapped = MAX_MAPPED_SHARDS
        if self.mirror is not None:
            self.mirror.detach()
            # Mapped shards cannot be evicted from the local folder, so map at most half of it.
            max_mapped = max(1, min(max_mapped, int(self.mirror.budget / 2 / max(self.mirror.shard_bytes, 1))))
        self._mmap_pool = MmapPool(self.path, self.mirror, max_mapped)

    @cached_property
    def manifest(self) -> pa.Table:
        """All rows and columns (``MANIFEST_SCHEMA``), read on first use. Row i is utterance i."""
        try:
            return read_parquet(Layout(self.path).manifest, MANIFEST_SCHEMA)
        except (OSError, RecordError) as error:
            raise corrupt_cache(self.path, str(error)) from None

    def row(self, index: int) -> dict[str, Any]:
        """Return the manifest row of utterance ``index``."""
        row: dict[str, Any] = self.manifest.slice(self._place(index), 1).to_pylist()[0]
        return row

    def strings(self, column: Literal["key", "text"], rows: ArrayLike) -> list[str]:
        """Return ``key`` or ``text`` of ``rows`` without reading the strings of the whole manifest."""
        return self._index.strings(column, np.asarray(rows, dtype=np.int64))

    def features(self, index: int) -> Array:
        """Return utterance ``index`` [frames, channels]: codec f16 as a read-only float16 view, others as float32.

        Raises:
            UserError: the shard is missing or truncated, or the checksum of the row does not match.
        """
        stored = self._stored(index)
        return stored.payload if self.spec.codec == "f16" else decode(self.spec.codec, stored.payload, stored.scale)

    def read_into(self, index: int, out: Array) -> None:
        """Copy or decode utterance ``index`` into ``out`` [frames, channels], float16 or float32.

        Raises:
            ValueError: ``out`` has another shape.
            UserError: as :meth:`features`.
        """
        stored = self._stored(index)
        if out.shape != stored.payload.shape:
            raise ValueError(f"out has shape {out.shape}, but utterance {index} has shape {stored.payload.shape}")
        decode(self.spec.codec, stored.payload, stored.scale, out)

    def read_stored(self, rows: NDArray[np.int64]) -> list[StoredUtterance]:
        """Return the utterances at ``rows`` (int64, 0 … len - 1) as stored. Performance-critical: batches wait for it.

        Raises:
            UserError: as :meth:`features`.
        """
        dtype, channels, scaled = self._dtype, self.spec.channels, self.spec.codec in SCALED
        places = self._index.locate(rows)
        shards = self._shards[rows].tolist()
        maps = self._mmap_pool.get(shards)
        checked = not self._verify or bool(self._verified[rows].all())
        found = []
        columns = zip(rows.tolist(), shards, self.frames[rows].tolist(), places, strict=True)
        for row, shard, frames, (group, at) in columns:
            data = maps[shard].data
            if group.end.item(at) > len(data):
                raise self._corrupt_row(row, f"ends at byte {group.end.item(at)} of a file of {len(data)} bytes")
            if not checked and not self._verified[row]:
                self._verify_checksum(data, row, group, at)
            payload: Array = np.ndarray((frames, channels), dtype, data, group.payload_start.item(at))
            scale = np.ndarray((channels,), SCALE_DTYPE, data, group.scale_start.item(at)) if scaled else None
            found.append(StoredUtterance(payload, scale, group.key[at], group.text[at]))
        return found

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds utterance ``index``."""
        return int(self._shards[index])

    def will_need(self, rows: NDArray[np.int64]) -> None:
        """Ask the kernel to read the pages of ``rows`` from disk in the background."""
        shards = self._shards[rows].tolist()
        maps = self._mmap_pool.get(shards)
        for shard, (group, at) in zip(shards, self._index.locate(rows), strict=True):
            maps[shard].will_need(group.payload_start.item(at), group.end.item(at))

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"utterance {index} is out of range for a cache of {len(self)} utterances")
        return place

    def _stored(self, index: int) -> StoredUtterance:
        return self.read_stored(np.array([self._place(index)]))[0]

    def _verify_checksum(self, data: NDArray[np.uint8], row: int, group: RowGroup, at: int) -> None:
        crc, view = 0, data.data
        for begin, end in group.checksum_ranges:
            crc = zlib.crc32(view[begin.item(at) : end.item(at)], crc)
        if crc != group.crc32.item(at):
            raise self._corrupt_row(row, "does not match its checksum")
        self._verified[row] = True

    def _corrupt_row(self, row: int, what: str) -> UserError:
        (key,) = self.strings("key", [row])
        return corrupt_cache(self.path, f"utterance '{key}' in shards/{self.shard_of(row):06d}.tar {what}")


def _read_info(layout: Layout) -> dict[str, Any]:
    if not layout.path.is_dir():
        raise UserError(f"cache '{layout.path}' does not exist: run `make extract`, or correct the path")
    try:
        return unseal(layout.cache)
    except FileNotFoundError:
        if layout.plan.exists():
            raise UserError(
                f"the cache '{layout.path}' is not complete (no CACHE.json): rerun the same extraction to finish it"
            ) from None
        raise UserError(f"'{layout.path}' is not a cache: it has no CACHE.json; run `make extract`") from None
    except (OSError, RecordError) as error:
        raise corrupt_cache(layout.path, str(error)) from None
