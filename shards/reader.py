"""Read committed features: rows found from the manifest, bytes from memory-mapped shards, no copy before yours.

In: a complete cache folder (``CACHE.json`` stands), or its URL (``shards/mirror.py``). Out: :class:`Cache`, which gives
any utterance's features as a read-only view or copies them once into a buffer of yours.

```
CACHE.json -> spec, ids, counts     manifest.parquet -> frames and shards at once, the rest a row group at a time
shards/000042.tar -> mmap (bounded, least recently used leaves) -> payload view --decode--> out
```

Nothing that a file declares is believed before it is bounded by that file's size. The checksum of a row is compared the
first time that a process reads it. Methods may be called from several threads at once.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from shards.codec import SCALED, STORED_DTYPE, Array, decode
from shards.disk import file_sha256, open_file
from shards.errors import UserError
from shards.manifest import MANIFEST_SCHEMA, Layout, RecordError, read_parquet, unseal
from shards.mirror import Mirror
from shards.spec import FeatureSpec
from shards.storage import is_url
from shards.tables import BATCH, ROWS_PER_BYTE, TEXT_GROWTH, TEXT_ROOM

MAPPINGS = 64  # shards mapped at once: each keeps two file descriptors
GROUP_BYTES = 512 << 20  # of row groups kept in memory: the texts and places of a few million utterances
HASHED_AT_OPEN = 64 << 20  # a larger manifest is hashed by `verify` alone: opening must stay quick
ADVICE = 1 << 20  # bytes the kernel is asked to read at once: some kernels cut off a longer request
PLACES = ["offset", "length", "scale_offset", "scale_length", "crc32"]

Group = dict[str, Any]  # of a row group: "key" and "text" as pyarrow arrays, PLACES as NumPy arrays


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
        self._manifest_bytes = int(info["files"]["manifest.parquet"]["bytes"])
        self.frames: NDArray[np.int32] = frames
        self._shards, self._verify = shards, verify
        edges = np.flatnonzero(np.diff(shards)) + 1
        self.bounds: NDArray[np.int64] = np.concatenate([[0], edges, [len(shards)]] if len(shards) else [[0]]).astype(
            np.int64
        )
        self._checked = np.zeros(len(shards), dtype=bool)
        self.detach()

    @classmethod
    def open(cls, path: str | Path | Mirror, verify: bool = True) -> Cache:
        """The cache at ``path``, a folder or a URL; ``verify=False`` skips the checksum of rows.

        A :class:`~shards.storage.Mirror` in place of a URL sets the local folder and its size.

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
                raise _broken(layout.path, f"the feature id in {layout.cache.name} is not that of its spec")
            frames, shards = _read_index(layout, declared[1], declared[2], str(written["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(layout.path, f"{layout.cache.name} lacks or garbles {error}") from None
        return cls(layout.path, info, spec, frames, shards, verify, mirror)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache.open, (self.mirror or self.path, self._verify)  # a worker process maps for itself

    def __len__(self) -> int:
        return len(self.frames)

    def detach(self) -> None:
        """Forget mappings, cached strings and locks: for a process that was forked while threads were reading."""
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, tuple[mmap.mmap, int]] = OrderedDict()
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._parquet: tuple[pq.ParquetFile, list[int]] | None = None
        self._most_maps = MAPPINGS
        if self.mirror is not None:
            self.mirror.detach()
            # What is mapped cannot make room: at most half of the local folder.
            fit = int(self.mirror.budget / 2 / max(self.mirror.shard_bytes, 1))
            self._most_maps = max(1, min(MAPPINGS, fit))

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
        found: list[str] = []
        for row in np.asarray(rows, dtype=np.int64).tolist():
            group, at = self._find(row)
            found.append(group[column][at].as_py())
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
        group, at = self._find(index)
        data = self._map(self._shards.item(index))
        for start, size in (("offset", "length"), ("scale_offset", "scale_length")):
            end = group[start].item(at) + group[size].item(at)
            if end > len(data):
                raise self._unsound(index, f"ends at byte {end} of a file of {len(data)}")
        if self._verify and not self._checked[index]:
            self._check(data, index)
        shape = (self.frames.item(index), self.spec.channels)
        payload = _array(data, group["offset"].item(at) + group["length"].item(at), shape, self._dtype)
        if self.spec.codec not in SCALED:
            return payload, None
        end = group["scale_offset"].item(at) + group["scale_length"].item(at)
        return payload, _array(data, end, shape[1:], np.dtype("<f4"))

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds utterance ``index``."""
        return int(self._shards[index])

    def will_need(self, index: int) -> None:
        """Ask the kernel to read an utterance's pages from the disk while the caller does other things."""
        data, fd = self._opened(self._shards.item(index))
        group, at = self._find(index)
        start, size = group["offset"].item(at), group["length"].item(at)
        for place in range(start, min(start + size, len(data)), ADVICE):
            # Not the mapping's own madvise: it keeps Python's lock while it waits for the disk's queue.
            os.posix_fadvise(fd, place, min(ADVICE, start + size - place), os.POSIX_FADV_WILLNEED)

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        return place

    def _check(self, data: mmap.mmap, index: int) -> None:
        group, at = self._find(index)
        crc = 0
        with memoryview(data) as view:
            for start, size in (("offset", "length"), ("scale_offset", "scale_length")):
                begin = group[start].item(at)
                crc = zlib.crc32(view[begin : begin + group[size].item(at)] if begin >= 0 else b"", crc)
        if crc != group["crc32"].item(at):
            raise self._unsound(index, "does not match its checksum")
        self._checked[index] = True

    def _unsound(self, index: int, what: str) -> UserError:
        (key,) = self.strings("key", [index])
        shard = self._shards.item(index)
        return _broken(self.path, f"utterance '{key}' in shards/{shard:06d}.tar {what}")

    def _map(self, shard: int) -> mmap.mmap:
        return self._opened(shard)[0]

    def _opened(self, shard: int) -> tuple[mmap.mmap, int]:
        """The mapping of a shard, and a descriptor of it that lives as long."""
        with self._lock:
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
        path = Layout(self.path).tar(shard)
        try:  # without the lock: a far shard may take a while, and others wait for other shards
            with open_file(path) if self.mirror is None else self.mirror.open_shard(shard) as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                fd = os.dup(file.fileno())
                weakref.finalize(data, os.close, fd).atexit = False
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise _broken(self.path, f"shards/{path.name} cannot be read ({error})") from None
        with self._lock:
            opened = self._maps.setdefault(shard, (data, fd))
            if len(self._maps) > self._most_maps:
                # Not closed: views that are still in use keep it alive, the last of them frees it.
                self._maps.popitem(last=False)
            return opened

    def _find(self, row: int) -> tuple[Group, int]:
        """The row group of a row of the manifest, and its place there."""
        with self._lock:
            if self._parquet is None:
                with _readable(self.path):
                    file = pq.ParquetFile(Layout(self.path).manifest, memory_map=True)
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                self._parquet = file, [0, *accumulate(sizes)]
            file, starts = self._parquet
            number = bisect_right(starts, row) - 1
            if number not in self._groups:
                self._groups[number] = self._read_group(file, number, starts[number])
                held = sum(group["bytes"] for group in self._groups.values())
                while held > GROUP_BYTES and len(self._groups) > 1:
                    held -= self._groups.popitem(last=False)[1]["bytes"]
            self._groups.move_to_end(number)
            return self._groups[number], row - starts[number]

    def _read_group(self, file: pq.ParquetFile, number: int, start: int) -> Group:
        with _readable(self.path):
            batches, room = [], TEXT_ROOM + TEXT_GROWTH * self._manifest_bytes
            # One thread: pyarrow's own pool is no company for a forked DataLoader worker.
            for batch in file.iter_batches(
                BATCH, row_groups=[number], columns=["key", "text", *PLACES], use_threads=False
            ):
                room -= batch.nbytes
                if room < 0:
                    raise _broken(self.path, "manifest.parquet unpacks to more than its size can hold")
                batches.append(batch)
            table = pa.Table.from_batches(batches).combine_chunks()
        group: Group = {name: table[name].chunk(0) for name in ("key", "text")}
        if any(table[name].null_count for name in table.column_names):
            raise _broken(self.path, "manifest.parquet has empty values")
        group.update((name, table[name].to_numpy()) for name in PLACES)
        width, most = self.spec.channels * self._dtype.itemsize, 1 << 48
        frames = self.frames[start : start + len(table)].astype(np.int64)
        sound = (group["offset"] >= 0) & (group["offset"] < most) & (group["length"] < most)
        sound &= frames * width <= group["length"]
        if self.spec.codec in SCALED:
            sound &= (group["scale_offset"] >= 0) & (group["scale_offset"] < most)
            sound &= (group["scale_length"] >= 4 * self.spec.channels) & (group["scale_length"] < most)
        else:
            sound &= (group["scale_offset"] == -1) & (group["scale_length"] == 0)
        if not sound.all():
            raise _broken(self.path, f"manifest.parquet: row {start + int(sound.argmin())} is out of bounds")
        group["bytes"] = table.nbytes
        return group


def _array(data: mmap.mmap, end: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A view of the array at the end of a ``.npy`` member: the check has hashed the header before it."""
    count = prod(shape)
    view: Array = np.frombuffer(data, dtype=dtype, count=count, offset=end - count * dtype.itemsize)
    return view.reshape(shape)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, f"manifest.parquet cannot be read ({error})") from None


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


def _read_index(layout: Layout, rows: int, size: int, sha256: str) -> tuple[Array, Array]:
    """Frames and shard of every row, int32 [rows]: as many as declared, in order of shards."""
    path = layout.manifest
    with _readable(layout.path):
        found = path.stat().st_size
        if found != size:
            raise _broken(layout.path, f"{path.name} has {found} bytes, not {size}")
        if size <= HASHED_AT_OPEN and file_sha256(path) != sha256:
            raise _broken(layout.path, f"{path.name} does not match its sha256")
        with pq.ParquetFile(path, memory_map=True) as file:
            if not file.schema_arrow.remove_metadata().equals(MANIFEST_SCHEMA):
                raise _broken(layout.path, f"{path.name} has other columns than this format")
            if file.metadata.num_rows != rows or rows > ROWS_PER_BYTE * size:
                raise _broken(layout.path, f"{path.name} has {file.metadata.num_rows} rows in {size} bytes, not {rows}")
            table = file.read(columns=["frames", "shard"])
    if table["frames"].null_count or table["shard"].null_count:
        raise _broken(layout.path, f"{path.name} has empty values")
    frames, shards = table["frames"].to_numpy(), table["shard"].to_numpy()
    if len(frames) and (frames.min() < 1 or shards[0] < 0 or np.any(shards[1:] < shards[:-1])):
        raise _broken(layout.path, f"{path.name} has rows without frames or out of order")
    return frames, shards
