"""Read committed features: rows found from the manifest, bytes from memory-mapped shards, no copy before yours.

In: a complete cache folder (``CACHE.json`` stands). Out: :class:`Cache`, which gives any utterance's features as a
read-only view or copies them once into a buffer of yours.

```
CACHE.json -> spec, ids, counts     manifest.parquet -> numeric columns as NumPy, at once; strings a row group at a time
shards/000042.tar -> mmap (bounded, least recently used leaves) -> payload view --decode--> out
```

Nothing that a file declares is believed before it is bounded by that file's size. The checksum of a row is compared the
first time that a process reads it. Methods may be called from several threads at once.
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from shards.codec import SCALED, STORED_DTYPE, Array, decode
from shards.disk import file_sha256
from shards.errors import UserError
from shards.manifest import MANIFEST_SCHEMA, Layout, RecordError, read_parquet, unseal
from shards.spec import FeatureSpec

MAPPINGS = 64  # shards mapped at once: each keeps one file descriptor
STRING_GROUPS = 16  # row groups whose keys and texts are kept: about as many as two windows of shards touch
HASHED_AT_OPEN = 64 << 20  # a larger manifest is hashed by `verify` alone: opening must stay quick
NUMBERS = ["frames", "shard", "offset", "length", "scale_offset", "scale_length", "crc32"]


class Cache:
    """One committed cache. Make it with :meth:`open`.

    Attributes:
        path: the cache folder.
        spec: what the features are; ``feature_id`` is its hash.
        info: ``CACHE.json``.
        manifest_id: 64 hex digits that stand for the content of the cache.
        frames: int32 [rows], frames of each utterance.
        bounds: int64 [shards that hold rows + 1]: the shard at place s holds the rows ``bounds[s]:bounds[s + 1]``.
    """

    def __init__(self, path: Path, info: dict[str, Any], spec: FeatureSpec, columns: dict[str, Array], verify: bool):
        self.path, self.info, self.spec = path, info, spec
        self.feature_id: str = spec.feature_id
        self.manifest_id: str = info["manifest_id"]
        self.frames: NDArray[np.int32] = columns["frames"]
        self._columns, self._verify = columns, verify
        shard = columns["shard"]
        edges = np.flatnonzero(np.diff(shard)) + 1
        self.bounds: NDArray[np.int64] = np.concatenate([[0], edges, [len(shard)]] if len(shard) else [[0]]).astype(
            np.int64
        )
        self._checked = np.zeros(len(shard), dtype=bool)
        self.detach()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Cache:
        """The cache at ``path``; ``verify=False`` skips the checksum of rows.

        Raises:
            UserError: there is no complete cache, it is of another format, or its files do not fit each other.
        """
        layout = Layout(Path(path))
        info = _read_info(layout)
        where = f"'{layout.cache}'"
        try:
            spec = FeatureSpec.parse(info["spec"], where)
            written = info["files"][layout.manifest.name]
            declared = (info["feature_id"], int(info["counts"]["utterances"]), int(written["bytes"]))
            if not isinstance(info["manifest_id"], str) or spec.feature_id != declared[0]:
                raise _broken(layout.path, f"the feature id in {layout.cache.name} is not that of its spec")
            columns = _read_numbers(layout, spec, declared[1], declared[2], str(written["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(layout.path, f"{layout.cache.name} lacks or garbles {error}") from None
        return cls(layout.path, info, spec, columns, verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache.open, (self.path, self._verify)  # a worker process maps for itself

    def __len__(self) -> int:
        return len(self.frames)

    def detach(self) -> None:
        """Forget mappings, cached strings and locks: for a process that was forked while threads were reading."""
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._strings: OrderedDict[int, dict[str, pa.Array]] = OrderedDict()
        self._parquet: tuple[pq.ParquetFile, NDArray[np.int64]] | None = None

    @cached_property
    def manifest(self) -> pa.Table:
        """All rows and columns (``MANIFEST_SCHEMA``), read when first asked for; row i is utterance i."""
        try:
            return read_parquet(Layout(self.path).manifest, MANIFEST_SCHEMA)
        except (OSError, RecordError) as error:
            raise _broken(self.path, str(error)) from None

    def row(self, index: int) -> dict[str, Any]:
        """The manifest row of utterance ``index``."""
        row: dict[str, Any] = self.manifest.slice(self._place(index), 1).to_pylist()[0]
        return row

    def strings(self, column: str, rows: ArrayLike) -> list[str]:
        """``key`` or ``text`` of ``rows``, without reading the strings of the whole manifest."""
        places = np.asarray(rows, dtype=np.int64)
        with self._lock:
            file, starts = self._open_parquet()
            groups = np.searchsorted(starts, places, side="right") - 1
            found: list[str] = []
            for place, group in zip(places.tolist(), groups.tolist(), strict=True):
                found.append(self._group(file, group)[column][place - starts.item(group)].as_py())
            return found

    def features(self, index: int) -> Array:
        """Utterance ``index`` [frames, channels]: the stored float16 as a read-only view, other codecs as float32.

        Raises:
            UserError: the shard is missing or short, or the row's checksum is wrong.
        """
        payload, scale = self.stored(index)
        return payload if self.spec.codec == "f16" else decode(self.spec.codec, payload, scale)

    def read_into(self, index: int, out: Array) -> None:
        """Copy, or decode, utterance ``index`` into ``out`` [frames, channels], float16 or float32.

        Raises:
            ValueError: ``out`` has another shape.
            UserError: as :meth:`features`.
        """
        payload, scale = self.stored(index)
        if out.shape != payload.shape:
            raise ValueError(f"out has the shape {out.shape}, utterance {index} has {payload.shape}")
        decode(self.spec.codec, payload, scale, out)

    def stored(self, index: int) -> tuple[Array, Array | None]:
        """The bytes as stored: [frames, channels] of the codec's dtype, and float32 [channels] scales or None."""
        index = self._place(index)
        data = self._map(self._columns["shard"].item(index))
        shape = (self.frames.item(index), self.spec.channels)
        payload = self._member(data, index, "offset", "length", STORED_DTYPE[self.spec.codec], shape)
        scale = None
        if self.spec.codec in SCALED:
            scale = self._member(data, index, "scale_offset", "scale_length", np.dtype("<f4"), shape[1:])
        if self._verify and not self._checked[index]:
            self._check(data, index)
        return payload, scale

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        return place

    def _member(
        self, data: mmap.mmap, index: int, start: str, size: str, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> Array:
        """A view of the array at the end of a ``.npy`` member: its header is bounded here and hashed in the check."""
        end = self._columns[start].item(index) + self._columns[size].item(index)
        if end > len(data):
            raise self._unsound(index, f"ends at byte {end} of a file of {len(data)}")
        count = int(np.prod(shape))
        view: Array = np.frombuffer(data, dtype=dtype, count=count, offset=end - count * dtype.itemsize)
        return view.reshape(shape)

    def _check(self, data: mmap.mmap, index: int) -> None:
        crc = 0
        with memoryview(data) as view:
            for start, size in (("offset", "length"), ("scale_offset", "scale_length")):
                at = self._columns[start].item(index)
                crc = zlib.crc32(view[at : at + self._columns[size].item(index)] if at >= 0 else b"", crc)
        if crc != self._columns["crc32"].item(index):
            raise self._unsound(index, "does not match its checksum")
        self._checked[index] = True

    def _unsound(self, index: int, what: str) -> UserError:
        (key,) = self.strings("key", [index])
        shard = self._columns["shard"].item(index)
        return _broken(self.path, f"utterance '{key}' in shards/{shard:06d}.tar {what}")

    def _map(self, shard: int) -> mmap.mmap:
        with self._lock:
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
            path = Layout(self.path).tar(shard)
            try:
                with open(path, "rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise _broken(self.path, f"shards/{path.name} cannot be read ({error})") from None
            self._maps[shard] = data
            if len(self._maps) > MAPPINGS:
                # Not closed: views that are still in use keep it alive, the last of them frees it.
                self._maps.popitem(last=False)
            return data

    def _open_parquet(self) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        if self._parquet is None:
            try:
                file = pq.ParquetFile(Layout(self.path).manifest, memory_map=True)
            except (OSError, pa.ArrowException) as error:
                raise _broken(self.path, f"manifest.parquet cannot be read ({error})") from None
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._parquet = file, np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        return self._parquet

    def _group(self, file: pq.ParquetFile, group: int) -> dict[str, pa.Array]:
        if group not in self._strings:
            # One thread: pyarrow's own pool is no company for a forked DataLoader worker.
            try:
                table = file.read_row_group(group, columns=["key", "text"], use_threads=False).combine_chunks()
            except (OSError, pa.ArrowException) as error:
                raise _broken(self.path, f"manifest.parquet cannot be read ({error})") from None
            self._strings[group] = {name: table[name].chunk(0) for name in table.column_names}
            if len(self._strings) > STRING_GROUPS:
                self._strings.popitem(last=False)
        self._strings.move_to_end(group)
        return self._strings[group]


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"the cache '{path}' is not sound: {what}; run `python -m shards verify {path}`")


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
        raise _broken(layout.path, str(error)) from None


def _read_numbers(layout: Layout, spec: FeatureSpec, rows: int, size: int, sha256: str) -> dict[str, Array]:
    """The numeric columns, checked: as many rows as declared, shards ascending, each array inside its member."""
    path = layout.manifest
    try:
        found = path.stat().st_size
        if found != size:
            raise _broken(layout.path, f"{path.name} has {found} bytes, not {size}")
        if size <= HASHED_AT_OPEN and file_sha256(path) != sha256:
            raise _broken(layout.path, f"{path.name} does not match its sha256")
        with pq.ParquetFile(path, memory_map=True) as file:
            if not file.schema_arrow.remove_metadata().equals(MANIFEST_SCHEMA):
                raise _broken(layout.path, f"{path.name} has other columns than this format")
            if file.metadata.num_rows != rows:
                raise _broken(layout.path, f"{path.name} has {file.metadata.num_rows} rows, not {rows}")
            table = file.read(columns=NUMBERS)
        columns: dict[str, Array] = {name: table[name].to_numpy() for name in NUMBERS if not table[name].null_count}
    except (OSError, pa.ArrowException) as error:
        raise _broken(layout.path, f"{path.name} cannot be read ({error})") from None
    if len(columns) != len(NUMBERS):
        raise _broken(layout.path, f"{path.name} has empty values")
    width = spec.channels * STORED_DTYPE[spec.codec].itemsize
    sound = (
        (columns["frames"] >= 1)
        & (columns["shard"] >= 0)
        & (columns["offset"] >= 0)
        & (columns["frames"].astype(np.int64) * width <= columns["length"])
        & (columns["length"] < 1 << 48)
        & (columns["offset"] < 1 << 48)
    )
    if spec.codec in SCALED:
        scale = columns["scale_length"]
        sound &= (columns["scale_offset"] >= 0) & (scale >= 4 * spec.channels) & (scale < 1 << 48)
        sound &= columns["scale_offset"] < 1 << 48
    if not sound.all() or np.any(np.diff(columns["shard"]) < 0):
        raise _broken(layout.path, f"{path.name} has rows out of order or out of bounds")
    return columns
