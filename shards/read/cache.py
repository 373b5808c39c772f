"""Read committed features: rows found from the manifest, bytes from memory-mapped shards, no copy before yours.

In: a complete cache folder (``CACHE.json`` stands), or its URL (``shards/remote/mirror.py``). Out: :class:`Cache`,
which gives any utterance's features as a read-only view or copies them once into a buffer of yours.

```
CACHE.json -> spec, ids, counts     manifest.parquet -> frames and shards at once, the rest a row group at a time
shards/000042.tar -> mmap (bounded, least recently used leaves) -> payload view --decode--> out
```

Nothing that a file declares is believed before it is bounded by that file's size. The checksum of a row is compared the
first time that a process reads it. Methods may be called from several threads at once.
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
    """One utterance as it is stored: views of the shard, read-only, and what the manifest calls it."""

    payload: Array  # [frames, channels] of the codec's dtype
    scale: Array | None  # float32 [channels] where the codec is scaled
    key: str
    text: str


class Cache:
    """One committed cache. Make it with :meth:`open`.

    Attributes:
        path: the cache folder; of a far cache, the local folder that mirrors it.
        location: the cache folder, or the URL of a far cache.
        mirror: what fetches the shards of a far cache; ``None`` of a local one.
        spec: what the features are; ``feature_id`` is its hash.
        info: ``CACHE.json``.
        manifest_id: 64 hex digits that stand for the content of the cache.
        frames: int32 [rows], frames of each utterance.
        bounds: int64 [shards that hold rows + 1]: the shard at place s holds the rows ``bounds[s]:bounds[s + 1]``.
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
        """The cache at ``path``, a folder or a URL; ``verify=False`` skips the checksum of rows.

        A :class:`~shards.remote.mirror.Mirror` in place of a URL sets the local folder and its size.

        Raises:
            UserError: there is no complete cache, it is of another format, its files do not fit each other, or a far
                one cannot be reached.
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
                raise corrupt_cache(layout.path, f"the feature id in {layout.cache.name} is not that of its spec")
            frames, shards = read_frames(layout, declared[1], declared[2], str(written["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt_cache(layout.path, f"{layout.cache.name} lacks or garbles {error}") from None
        return cls(layout.path, info, spec, frames, shards, verify, mirror)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache.open, (self.mirror or self.path, self._verify)  # a worker process maps for itself

    def __len__(self) -> int:
        return len(self.frames)

    def detach(self) -> None:
        """Forget mappings, cached strings and locks: for a process that was forked while threads were reading."""
        self._index = ManifestIndex(
            self.path, self.spec, self.frames, int(self.info["files"]["manifest.parquet"]["bytes"])
        )
        most = MAX_MAPPED_SHARDS
        if self.mirror is not None:
            self.mirror.detach()
            # What is mapped cannot make room: at most half of the local folder.
            most = max(1, min(most, int(self.mirror.budget / 2 / max(self.mirror.shard_bytes, 1))))
        self._mmap_pool = MmapPool(self.path, self.mirror, most)

    @cached_property
    def manifest(self) -> pa.Table:
        """All rows and columns (``MANIFEST_SCHEMA``), read when first asked for; row i is utterance i."""
        try:
            return read_parquet(Layout(self.path).manifest, MANIFEST_SCHEMA)
        except (OSError, RecordError) as error:
            raise corrupt_cache(self.path, str(error)) from None

    def row(self, index: int) -> dict[str, Any]:
        """The manifest row of utterance ``index``."""
        row: dict[str, Any] = self.manifest.slice(self._place(index), 1).to_pylist()[0]
        return row

    def strings(self, column: Literal["key", "text"], rows: ArrayLike) -> list[str]:
        """``key`` or ``text`` of ``rows``, without reading the strings of the whole manifest."""
        return self._index.strings(column, np.asarray(rows, dtype=np.int64))

    def features(self, index: int) -> Array:
        """Utterance ``index`` [frames, channels]: the stored float16 as a read-only view, other codecs as float32.

        Raises:
            UserError: the shard is missing or short, or the row's checksum is wrong.
        """
        stored = self._stored(index)
        return stored.payload if self.spec.codec == "f16" else decode(self.spec.codec, stored.payload, stored.scale)

    def read_into(self, index: int, out: Array) -> None:
        """Copy, or decode, utterance ``index`` into ``out`` [frames, channels], float16 or float32.

        Raises:
            ValueError: ``out`` has another shape.
            UserError: as :meth:`features`.
        """
        stored = self._stored(index)
        if out.shape != stored.payload.shape:
            raise ValueError(f"out has the shape {out.shape}, utterance {index} has {stored.payload.shape}")
        decode(self.spec.codec, stored.payload, stored.scale, out)

    def read_stored(self, rows: NDArray[np.int64]) -> list[StoredUtterance]:
        """The utterances at ``rows`` (int64, 0 … len - 1) as they are stored. What a row costs here, a batch waits for.

        Raises:
            UserError: as :meth:`features`.
        """
        dtype, channels, scaled = self._dtype, self.spec.channels, self.spec.codec in SCALED
        places = self._index.locate(rows)
        shards = self._shards[rows].tolist()
        maps = self._mmap_pool.get(shards)
        checked = not self._verify or bool(self._verified[rows].all())
        found = []
        about = zip(rows.tolist(), shards, self.frames[rows].tolist(), places, strict=True)
        for row, shard, frames, (group, at) in about:
            data = maps[shard].data
            if group.end.item(at) > len(data):
                raise self._corrupt_row(row, f"ends at byte {group.end.item(at)} of a file of {len(data)}")
            if not checked and not self._verified[row]:
                self._verify_checksum(data, row, group, at)
            payload: Array = np.ndarray((frames, channels), dtype, data, group.payload_start.item(at))
            scale = np.ndarray((channels,), SCALE_DTYPE, data, group.scale_start.item(at)) if scaled else None
            found.append(StoredUtterance(payload, scale, group.key[at], group.text[at]))
        return found

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds utterance ``index``."""
        return int(self._shards[index])

    def will_need(self, rows: NDArray[np.int64]) -> None:
        """Ask the kernel to read the pages of ``rows`` from the disk while the caller does other things."""
        shards = self._shards[rows].tolist()
        maps = self._mmap_pool.get(shards)
        for shard, (group, at) in zip(shards, self._index.locate(rows), strict=True):
            maps[shard].will_need(group.payload_start.item(at), group.end.item(at))

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
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
        raise UserError(f"there is no cache at '{layout.path}': make one with `make extract`, or correct the path")
    try:
        return unseal(layout.cache)
    except FileNotFoundError:
        if layout.plan.exists():
            raise UserError(
                f"the cache '{layout.path}' is not complete (no CACHE.json): run the same extraction again to finish it"
            ) from None
        raise UserError(f"'{layout.path}' is no cache: it has no CACHE.json; make one with `make extract`") from None
    except (OSError, RecordError) as error:
        raise corrupt_cache(layout.path, str(error)) from None
