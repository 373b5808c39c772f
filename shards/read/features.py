"""Reads the features of a cache from memory-mapped shards without intermediate copies.

:class:`FeatureRows` numbers the rows of all generations of a cache in one sequence, those of generation 0 first. It
knows frames and shards of all rows, and reads the rest when it is needed.

```
CACHE.json -> spec, ids, counts     manifests/000.parquet -> frames and shards at once, the rest a row group at a time
shards/000042.tar -> mmap (bounded, least recently used evicted) -> payload view
```

Every number in a file is checked against the size of that file before it is used. The checksum of a row is verified the
first time a process reads it. Methods are thread-safe.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format.codec import SCALE_DTYPE, SCALED, STORED_DTYPE, Array, CodecError, check_codes
from shards.format.layout import Layout, current_rows
from shards.format.records import CacheInfo, Generation, RecordError
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, read_batches, read_parquet
from shards.format.spec import FeatureSpec
from shards.format.variants import are_variants, base_keys, variant_numbers
from shards.read.index import ManifestIndex, RowGroup, check_file, corrupt_cache, read_frames, translate_manifest_errors
from shards.read.mmap import MappedShard, MmapPool
from shards.remote.mirror import Mirror

MAX_MAPPED_SHARDS = 64  # shards mapped at once: each keeps two file descriptors


class StoredFeatures(NamedTuple):
    """One utterance as stored: read-only views of the shard, and its key."""

    payload: Array  # [frames, channels] of the codec's dtype
    scale: Array | None  # float32 [channels] if the codec is scaled
    key: str


class Variants(NamedTuple):
    """The variants of utterances: those of utterance i are ``starts[i]:starts[i + 1]`` of the other arrays.

    Attributes:
        starts: int64 [utterances + 1].
        rows: int64 [variants], their rows in the features.
        numbers: int64 [variants], ascending from 1 for each utterance; failed ones are absent.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]


class FeatureRows:
    """The feature rows of a cache up to a generation.

    Args:
        layout: the cache folder, or the local mirror of a remote cache.
        generations: the generations to read, from the first.
        verify: whether the checksum of a row is verified when it is read first.

    Attributes:
        frames: int32 [rows].
        shards: int32 [rows], ascending.

    Raises:
        UserError: a manifest does not match ``CACHE.json``, or is invalid.
    """

    def __init__(
        self,
        layout: Layout,
        spec: FeatureSpec,
        generations: Sequence[Generation],
        verify: bool = True,
        mirror: Mirror | None = None,
    ) -> None:
        self.layout, self.spec, self.generations, self.mirror = layout, spec, generations, mirror
        found = [
            read_frames(layout, number, each.counts["utterances"], each.files.manifest)
            for number, each in enumerate(generations)
        ]
        self.frames: NDArray[np.int32] = _joined([frames for frames, _ in found])
        self.shards: NDArray[np.int32] = _joined([shards for _, shards in found])
        for number, (each, (_, shards)) in enumerate(zip(generations, found, strict=True)):
            first, end = each.first_shard, each.first_shard + each.shards
            if len(shards) and not first <= shards[0] <= shards[-1] < end:  # they are ascending
                raise corrupt_cache(layout.path, f"manifests/{number:03d}.parquet names shards of another generation")
        self._dtype = STORED_DTYPE[spec.codec]
        self.verify = verify
        self._verified = np.zeros(len(self.frames), dtype=bool)
        self.detach()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def location(self) -> str:
        """The cache folder, or the URL of a remote cache."""
        return str(self.layout.path) if self.mirror is None else self.mirror.url

    def detach(self) -> None:
        """Drop mappings, cached strings and locks. Call it in a process that was forked while threads were reading."""
        sizes = [each.files.manifest.bytes for each in self.generations]
        self._index = ManifestIndex(self.layout, self.spec, self.frames, sizes)
        max_mapped = MAX_MAPPED_SHARDS
        if self.mirror is not None:
            self.mirror.detach()
            # Mapped shards cannot be evicted from the local folder, so map at most half of it.
            max_mapped = max(1, min(max_mapped, int(self.mirror.budget / 2 / max(self.mirror.shard_bytes, 1))))
        self._mmap_pool = MmapPool(self.layout.path, self.mirror, max_mapped)

    def table(self) -> pa.Table:
        """Return all rows and columns (``MANIFEST_SCHEMA``)."""
        numbers = range(len(self.generations))
        try:
            return pa.concat_tables(read_parquet(self.layout.manifest(each), MANIFEST_SCHEMA) for each in numbers)
        except (OSError, RecordError) as error:
            raise corrupt_cache(self.layout.path, str(error)) from None

    def current_ids(self) -> pa.ChunkedArray:
        """Return the source's own ids of the rows that no later generation supersedes."""
        rows, _ = self.current()
        ids = self.column("id")
        return ids if rows is None else ids.take(pa.array(rows))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of all rows (``MANIFEST_SCHEMA``)."""
        columns = [self._column(number, name) for number in range(len(self.generations))]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)

    def current(self) -> tuple[NDArray[np.int64] | None, pa.ChunkedArray]:
        """Return the rows of utterances that no later generation supersedes (None: all), and their keys.

        Variants are not among them (:meth:`variants`).
        """
        rows, keys = self._current()
        if not self.has_variants:
            return rows, keys
        kept = ~are_variants(keys)
        return np.flatnonzero(kept) if rows is None else rows[kept], keys.filter(pa.array(kept))

    def variants(self, keys: pa.ChunkedArray) -> Variants | None:
        """Return the current variants of the utterances with these ``keys``; None if the cache has none.

        Args:
            keys: what :meth:`current` returned.

        Raises:
            UserError: a key is neither that of an utterance nor that of a variant.
        """
        if not self.has_variants:
            return None
        rows, all_keys = self._current()
        varied = are_variants(all_keys)
        rows, own = np.flatnonzero(varied) if rows is None else rows[varied], all_keys.filter(pa.array(varied))
        utterances = pc.index_in(base_keys(own), value_set=keys.combine_chunks()).fill_null(-1).to_numpy()
        numbers = variant_numbers(own)
        if (numbers == 0).any():
            key = own[int((numbers == 0).argmax())].as_py()
            raise corrupt_cache(self.layout.path, f"a manifest has the key {key!r:.100}")
        order = np.lexsort((numbers, utterances))
        order = order[utterances[order] >= 0]
        starts = np.searchsorted(utterances[order], np.arange(len(keys) + 1))
        return Variants(starts.astype(np.int64), rows[order].astype(np.int64), numbers[order])

    @property
    def has_variants(self) -> bool:
        """Whether there are rows of variants."""
        return any(each.counts.get("variants", 0) for each in self.generations)

    def _current(self) -> tuple[NDArray[np.int64] | None, pa.ChunkedArray]:
        """Return the rows that no later generation supersedes (None: all), and the keys of these rows."""
        keys = [self._column(number, "key") for number in range(len(self.generations))]
        joined = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.string())
        if len(keys) == 1:
            return None, joined
        failed = []
        for number, generation in enumerate(self.generations):
            check_file(self.layout, self.layout.failures(number), generation.files.failures)
            failed.append(_read_failed(self.layout, number))
        rows = np.flatnonzero(np.concatenate(current_rows(keys, failed)))
        return (None, joined) if len(rows) == len(self) else (rows, joined.take(pa.array(rows)))

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of ``rows``."""
        return [group.key[at] for group, at in self._index.locate(rows)]

    def read(self, rows: NDArray[np.int64]) -> list[StoredFeatures]:
        """Return ``rows`` (int64, 0 … len - 1) as stored. Performance-critical: batches wait for it.

        Raises:
            UserError: the shard is missing or truncated, the checksum of a row does not match, or a code is not in its
                codebook.
        """
        dtype, channels, scaled = self._dtype, self.spec.channels, self.spec.codec in SCALED
        size = self.spec.codebook_size
        places = self._index.locate(rows)
        shards = self.shards[rows].tolist()
        maps = self._maps(shards)
        checked = not self.verify or bool(self._verified[rows].all())
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
            if size:  # also without checksums: a lookup by a code that does not exist ends a process on a GPU
                try:
                    check_codes(payload, size)
                except CodecError as error:
                    raise self._corrupt_row(row, f"is no codes: {error}") from None
            found.append(StoredFeatures(payload, scale, group.key[at]))
        return found

    def members(self, row: int) -> tuple[memoryview, memoryview | None, int]:
        """Return the bytes of the members ``<key>.npy`` and ``<key>.scale.npy`` of a row, and the checksum over both.

        The bytes are not verified.
        """
        ((group, at),) = self._index.locate(np.array([row]))
        shard = int(self.shards[row])
        data = self._maps([shard])[shard].data
        if group.end.item(at) > len(data):
            raise self._corrupt_row(row, f"ends at byte {group.end.item(at)} of a file of {len(data)} bytes")
        parts = [data.data[begin.item(at) : end.item(at)] for begin, end in group.checksum_ranges]
        return parts[0], parts[1] if len(parts) > 1 else None, group.crc32.item(at)

    def will_need(self, rows: NDArray[np.int64]) -> None:
        """Ask the kernel to read the pages of ``rows`` from disk in the background."""
        shards = self.shards[rows].tolist()
        maps = self._mmap_pool.get(shards)
        for shard, (group, at) in zip(shards, self._index.locate(rows), strict=True):
            maps[shard].will_need(group.payload_start.item(at), group.end.item(at))

    def _maps(self, shards: Sequence[int]) -> dict[int, MappedShard]:
        """Return the mappings of ``shards``; UserError if one is shorter than when it was mapped.

        A file that is cut between this and the use of its bytes still ends the process by SIGBUS. Only copies made by
        ``pread`` would not, which read at half the speed.
        """
        maps = self._mmap_pool.get(shards)
        for shard, mapped in maps.items():
            if mapped.is_cut():
                raise corrupt_cache(self.layout.path, f"shards/{shard:06d}.tar was truncated while it was read")
        return maps

    def _column(self, generation: int, name: str) -> pa.ChunkedArray:
        path, size = self.layout.manifest(generation), self.generations[generation].files.manifest.bytes
        table = f"manifests/{path.name}"
        with translate_manifest_errors(self.layout.path), pq.ParquetFile(path, memory_map=True) as file:
            batches = list(read_batches(table, file, size, columns=[name], use_threads=False))
        return pa.chunked_array([batch[name] for batch in batches], MANIFEST_SCHEMA.field(name).type)

    def _verify_checksum(self, data: NDArray[np.uint8], row: int, group: RowGroup, at: int) -> None:
        crc, view = 0, data.data
        for begin, end in group.checksum_ranges:
            crc = zlib.crc32(view[begin.item(at) : end.item(at)], crc)
        if crc != group.crc32.item(at):
            raise self._corrupt_row(row, "does not match its checksum")
        self._verified[row] = True

    def _corrupt_row(self, row: int, what: str) -> UserError:
        (key,) = self.keys(np.array([row]))
        return corrupt_cache(self.layout.path, f"utterance '{key}' in shards/{self.shards[row]:06d}.tar {what}")


def parse_info(tree: object, path: Path) -> CacheInfo:
    """Validate the content of the ``CACHE.json`` at ``path``; UserError if it is corrupt or has another format."""
    where = f"'{path}'"
    try:
        spec = FeatureSpec.parse(tree.get("spec") if isinstance(tree, dict) else None, where)
        info = CacheInfo.model_validate(tree)
        wanted = (info.counts["utterances"], *(each.counts["utterances"] for each in info.generations))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise corrupt_cache(path.parent, f"{path.name} has missing or invalid fields ({what})") from None
    if info.schema_version != spec.schema_version or spec.feature_id != info.feature_id:
        raise corrupt_cache(path.parent, f"the feature id in {path.name} does not match its spec")
    if wanted[0] != sum(wanted[1:]) or min(wanted) < 0:
        raise corrupt_cache(path.parent, f"the counts in {path.name} do not add up")
    return info


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _read_failed(layout: Layout, generation: int) -> pa.ChunkedArray:
    with translate_manifest_errors(layout.path):
        return read_parquet(layout.failures(generation), FAILURE_SCHEMA)["key"]
