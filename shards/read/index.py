"""Locates the bytes and the key of a row in the manifests of a cache without loading all of them.

Reads the frames and shards of all rows at once (:func:`read_frames`) and the other columns one row group at a time
(:class:`ManifestIndex`), so that a manifest of many million rows opens in a second. A row is counted through the
manifests of all generations.

Every number in the file is checked against the size of the file before it is used.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.codec import SCALED, STORED_DTYPE, Array
from shards.format.layout import Layout
from shards.format.records import FileInfo, RecordError
from shards.format.schemas import MANIFEST_SCHEMA, MAX_ROWS_PER_BYTE, read_batches
from shards.format.spec import FeatureSpec
from shards.read.strings import StringColumn

MAX_ROW_GROUP_BYTES = 512 << 20  # of row groups kept in memory: texts and offsets of a few million utterances
HASHED_AT_OPEN = 64 << 20  # larger manifests are hashed only by `verify`, so that opening stays fast
OFFSET_COLUMNS = ["offset", "length", "scale_offset", "scale_length", "crc32"]
MAX_OFFSET = 1 << 48  # bytes: larger than any file, and far below the overflow of an int64 sum


def corrupt_cache(path: Path, what: str) -> UserError:
    """Return the error to raise for a cache whose files are corrupt or inconsistent."""
    return UserError(f"the cache '{path}' is corrupt: {what}; run `python -m shards verify {path}`")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group: value i belongs to row ``first + i``. Offsets are bytes in the row's tar, int64 [rows].

    The payload starts at ``payload_start``, the scale at ``scale_start`` (unused if the codec has no scale). ``end`` is
    the end of the row's bytes. The checksum ``crc32`` covers the [begin, end) pairs in ``checksum_ranges``.
    """

    first: int
    key: StringColumn
    payload_start: NDArray[np.int64]
    scale_start: NDArray[np.int64]
    end: NDArray[np.int64]
    checksum_ranges: tuple[tuple[Array, Array], ...]
    crc32: NDArray[np.uint32]
    nbytes: int


class ManifestIndex:
    """Row groups of the manifests of a cache, read on demand. The least recently used are evicted.

    Args:
        layout: the cache folder.
        frames: int32 [rows].
        sizes: size in bytes of each generation's manifest, which limits what it may decompress to.
    """

    def __init__(self, layout: Layout, spec: FeatureSpec, frames: Array, sizes: Sequence[int]) -> None:
        self._layout, self._spec, self._frames, self._sizes = layout, spec, frames, sizes
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, RowGroup] = OrderedDict()
        self._places: list[tuple[int, pq.ParquetFile, int]] = []  # generation, file, row group
        self._starts: NDArray[np.int64] = np.zeros(1, dtype=np.int64)

    def locate(self, rows: NDArray[np.int64]) -> list[tuple[RowGroup, int]]:
        """Return the row group of each row, and the row's index in it.

        Raises:
            UserError: a manifest cannot be read, or declares invalid values.
        """
        with self._lock:
            if not self._places:
                self._open()
            numbers = np.searchsorted(self._starts, rows, side="right") - 1
            found: dict[int, RowGroup] = {}
            for number in dict.fromkeys(numbers.tolist()):
                found[number] = self._group(number)
        places = (rows - self._starts[numbers]).tolist()
        return [(found[number], at) for number, at in zip(numbers.tolist(), places, strict=True)]

    def _open(self) -> None:
        sizes, places = [], []
        for generation in range(len(self._sizes)):
            with translate_manifest_errors(self._layout.path):
                file = pq.ParquetFile(self._layout.manifest(generation), memory_map=True)
            for group in range(file.num_row_groups):
                if rows := file.metadata.row_group(group).num_rows:
                    places.append((generation, file, group))
                    sizes.append(rows)
        self._starts, self._places = np.array([0, *accumulate(sizes)], dtype=np.int64), places

    def _group(self, number: int) -> RowGroup:
        if number not in self._groups:
            self._groups[number] = self._read(number)
            held = sum(group.nbytes for group in self._groups.values())
            while held > MAX_ROW_GROUP_BYTES and len(self._groups) > 1:
                held -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end(number)
        return self._groups[number]

    def _read(self, number: int) -> RowGroup:
        generation, file, group = self._places[number]
        name = self._layout.manifest(generation).name
        with translate_manifest_errors(self._layout.path):
            # Single-threaded: pyarrow's thread pool does not survive the fork of a DataLoader worker.
            options = {"row_groups": [group], "columns": ["key", *OFFSET_COLUMNS], "use_threads": False}
            batches = list(read_batches(f"manifests/{name}", file, self._sizes[generation], **options))
        table = pa.Table.from_batches(batches).combine_chunks()
        first = int(self._starts[number])
        places = {name: table[name].to_numpy() for name in OFFSET_COLUMNS}
        frames = self._frames[first : first + len(table)].astype(np.int64)
        wrong = _out_of_bounds(self._spec, frames, places)
        if wrong is not None:
            raise corrupt_cache(self._layout.path, f"manifests/{name}: row {first + wrong} is out of bounds")
        scaled, channels = self._spec.codec in SCALED, self._spec.channels
        ends = places["offset"] + places["length"], places["scale_offset"] + places["scale_length"]
        return RowGroup(
            first=first,
            key=StringColumn(table["key"].chunk(0)),
            payload_start=ends[0] - frames * (channels * STORED_DTYPE[self._spec.codec].itemsize),
            scale_start=ends[1] - 4 * channels,
            end=np.maximum(*ends),
            checksum_ranges=((places["offset"], ends[0]), (places["scale_offset"], ends[1]))[: 1 + scaled],
            crc32=places["crc32"],
            nbytes=table.nbytes,
        )


def read_frames(layout: Layout, generation: int, rows: int, file: FileInfo) -> tuple[Array, Array]:
    """Read frames and shard of every row of a generation, int32 [rows], ordered by shard.

    Args:
        rows: expected number of rows.
        file: expected size and hash of the manifest; the hash is checked up to ``HASHED_AT_OPEN`` bytes.

    Raises:
        UserError: the manifest does not match these values, or is invalid.
    """
    path, size = layout.manifest(generation), file.bytes
    name = f"manifests/{path.name}"
    check_file(layout, path, file, hashed=size <= HASHED_AT_OPEN)
    with translate_manifest_errors(layout.path), pq.ParquetFile(path, memory_map=True) as parquet:
        if not parquet.schema_arrow.remove_metadata().equals(MANIFEST_SCHEMA):
            raise corrupt_cache(layout.path, f"{name} has other columns than the cache format")
        if parquet.metadata.num_rows != rows or rows > MAX_ROWS_PER_BYTE * size:
            raise corrupt_cache(layout.path, f"{name} has {parquet.metadata.num_rows} rows in {size} bytes, not {rows}")
        table = parquet.read(columns=["frames", "shard"])
    if table["frames"].null_count or table["shard"].null_count:
        raise corrupt_cache(layout.path, f"{name} has null values")
    frames, shards = table["frames"].to_numpy(), table["shard"].to_numpy()
    if len(frames) and (frames.min() < 1 or shards[0] < 0 or np.any(shards[1:] < shards[:-1])):
        raise corrupt_cache(layout.path, f"{name} has rows without frames or out of order")
    return frames, shards


def check_file(layout: Layout, path: Path, file: FileInfo, *, hashed: bool = True) -> None:
    """Check the size and the sha256 of a file that ``CACHE.json`` lists; UserError if they differ."""
    name = path.relative_to(layout.path)
    with translate_manifest_errors(layout.path):
        found = path.stat().st_size
        if found != file.bytes:
            raise corrupt_cache(layout.path, f"{name} has {found} bytes, not {file.bytes}")
        if hashed and file_sha256(path) != file.sha256:
            raise corrupt_cache(layout.path, f"{name} does not match its sha256")


def _out_of_bounds(spec: FeatureSpec, frames: NDArray[np.int64], places: dict[str, Any]) -> int | None:
    """Return the first row whose byte ranges cannot hold its frames, or None."""
    width = spec.channels * STORED_DTYPE[spec.codec].itemsize
    valid = (places["offset"] >= 0) & (places["offset"] < MAX_OFFSET) & (places["length"] < MAX_OFFSET)
    valid &= frames * width <= places["length"]
    if spec.codec in SCALED:
        valid &= (places["scale_offset"] >= 0) & (places["scale_offset"] < MAX_OFFSET)
        valid &= (places["scale_length"] >= 4 * spec.channels) & (places["scale_length"] < MAX_OFFSET)
    else:
        valid &= (places["scale_offset"] == -1) & (places["scale_length"] == 0)
    return None if valid.all() else int(valid.argmin())


@contextmanager
def translate_manifest_errors(path: Path) -> Iterator[None]:
    """Raise errors from reading a table of the cache at ``path`` as a UserError of one sentence."""
    try:
        yield
    except RecordError as error:
        raise corrupt_cache(path, str(error)) from None
    except (OSError, pa.ArrowException) as error:
        raise corrupt_cache(path, f"a table cannot be read ({error})") from None
