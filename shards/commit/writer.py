"""Writes and commits one shard.

Takes utterances with their float32 features in row order; writes ``000042.tar``, ``000042.parquet`` and, last,
``000042.json``. Before the commit, all data is in a temporary file. Leaving the ``with`` block without
:meth:`ShardWriter.commit`, with or without an exception, removes it.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from shards.commit.finalize import commit_record
from shards.errors import WorkFailed
from shards.files import (
    TEMPORARY_INFIX,
    atomic_write,
    create_file,
    rename_durably,
    temporary_path,
    write_all,
)
from shards.format import tar
from shards.format.codec import SCALE_DTYPE, SCALED, STORED_DTYPE, Array, CodecError, Encoded, check_codes, encode
from shards.format.layout import Layout
from shards.format.npy import NpyError, parse_npy_header
from shards.format.records import seal, utterance_json
from shards.format.schemas import MANIFEST_SCHEMA, parquet_bytes
from shards.format.spec import SCHEMA_VERSION, FeatureSpec

Buffer = bytes | memoryview
NO_LABELS: Mapping[str, Any] = MappingProxyType({})
MAX_QUEUED_UPDATES = 8  # queued updates of a BackgroundHash, whose bytes stay in memory


@dataclass(frozen=True, slots=True)
class StoredMembers:
    """The features of an utterance as a cache stores them, to be copied into another cache of the same spec.

    Attributes:
        payload: bytes of the member ``<key>.npy``.
        scale: bytes of ``<key>.scale.npy``; None if the codec has no scale.
        crc32: the checksum over both.
        frames, samples, error, audio_id: as in the manifest row.
    """

    payload: memoryview
    scale: memoryview | None
    crc32: int
    frames: int
    samples: int
    error: float
    audio_id: bytes

    def check(self, spec: FeatureSpec) -> None:
        """Raise CodecError if the bytes do not match their checksum, or are not features of ``spec``."""
        if crc32([self.scale] if self.scale is not None else [], crc32([self.payload])) != self.crc32:
            raise CodecError("the copied features do not match their checksum")
        wanted: list[tuple[Any, ...]] = [(STORED_DTYPE[spec.codec], (self.frames, spec.channels))]
        wanted += [(SCALE_DTYPE, (spec.channels,))] if spec.codec in SCALED else []
        try:
            found = [parse_npy_header(part)[:2] for part in (self.payload, self.scale) if part is not None]
        except NpyError as error:
            raise CodecError(f"a copied member {error}") from None
        if found != wanted:
            raise CodecError(f"the copied features are {found}, not {wanted}")
        if spec.codebook_size:
            start = len(self.payload) - self.frames * spec.channels * STORED_DTYPE[spec.codec].itemsize
            check_codes(np.frombuffer(self.payload[start:], STORED_DTYPE[spec.codec]), spec.codebook_size)


class CommitError(RuntimeError):
    """The bytes read back from the disk differ from those written."""


class ShardWriter:
    """Writes shard ``shard`` of the cache at ``layout``. Not thread-safe; hashes in a background thread."""

    def __init__(self, layout: Layout, shard: int, spec: FeatureSpec, plan_id: str, owner: str) -> None:
        self.layout, self.shard, self.spec, self.plan_id, self.owner = layout, shard, spec, plan_id, owner
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.path = temporary_path(layout.tar(shard), owner)
        self._fd = create_file(self.path)
        self._size = 0
        self._rest = 0  # crc32 of every byte that the rows' crc32 do not cover
        self._hash = BackgroundHash()
        self._open = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def add(
        self,
        utterance: dict[str, Any],
        features: Array,
        *,
        samples: int,
        audio_id: bytes,
        labels: Mapping[str, Any] = NO_LABELS,
    ) -> None:
        """Append one utterance.

        Args:
            utterance: its row in the plan (``PLAN_SCHEMA``).
            features: float32 [frames, channels], or codes of any integer dtype [frames, codebooks]; frames ≥ 1.
            samples: length of the decoded audio at the spec's sampling rate.
            audio_id: 32 bytes, as in the manifest row (``docs/format.md``).
            labels: ``text``, ``speaker`` and ``split`` for the ``.json`` member.

        Raises:
            ValueError: ``features`` has another shape.
            CodecError: the features cannot be stored; nothing was written for this utterance.
            OSError: writing failed, for example because the disk is full.
        """
        if features.ndim != 2 or features.shape[1] != self.spec.channels or not len(features):
            raise ValueError(f"features of shape {features.shape}, expected [frames ≥ 1, {self.spec.channels}]")
        encoded = encode(self.spec.codec, features)
        self.add_encoded(utterance, encoded, samples=samples, audio_id=audio_id, labels=labels)

    def add_encoded(
        self,
        utterance: dict[str, Any],
        encoded: Encoded,
        *,
        samples: int,
        audio_id: bytes,
        labels: Mapping[str, Any] = NO_LABELS,
    ) -> None:
        """Like :meth:`add`, for features that are already encoded with the spec's codec."""
        if self.spec.codebook_size:
            check_codes(encoded.payload, self.spec.codebook_size)
        payload = npy_parts(encoded.payload)
        scale = None if encoded.scale is None else npy_parts(encoded.scale)
        row = {**utterance, "samples": samples, "audio_id": audio_id, "frames": len(encoded.payload)}
        row |= {"crc32": crc32(scale or [], crc32(payload)), "error": encoded.error}
        self._append(row, payload, scale, labels)

    def add_stored(
        self,
        utterance: dict[str, Any],
        stored: StoredMembers,
        labels: Mapping[str, Any] = NO_LABELS,
        *,
        checked: bool = False,
    ) -> None:
        """Append an utterance whose members another cache of the same spec holds; the bytes stay the same.

        Args:
            checked: the caller has called :meth:`StoredMembers.check`.

        Raises:
            CodecError: as :meth:`StoredMembers.check`; nothing was written for this utterance.
        """
        if not checked:
            stored.check(self.spec)
        scale = None if stored.scale is None else [stored.scale]
        row = {**utterance, "samples": stored.samples, "audio_id": stored.audio_id, "frames": stored.frames}
        row |= {"crc32": stored.crc32, "error": stored.error}
        self._append(row, [stored.payload], scale, labels)

    def _append(
        self,
        row: dict[str, Any],
        payload: Sequence[Buffer],
        scale: Sequence[Buffer] | None,
        labels: Mapping[str, Any],
    ) -> None:
        key = row["key"]
        metadata = utterance_json(row, labels, self.spec)  # first: an error here must not leave half a sample
        row["offset"], row["length"] = self._member(f"{key}.npy", payload)
        row["scale_offset"], row["scale_length"] = -1, 0
        if scale is not None:
            row["scale_offset"], row["scale_length"] = self._member(f"{key}.scale.npy", scale)
        self._member(f"{key}.json", [metadata])
        self.rows.append(row)

    def add_failure(self, key: str, stage: str, error: str, attempt: int = 1) -> None:
        """Record an utterance that has no features."""
        self.failures.append({"key": key, "stage": stage, "error": error, "attempt": attempt})

    def commit(self, timings: dict[str, float]) -> dict[str, Any]:
        """Sync the shard, read it back, compare, and rename it; write the commit record last. Returns the record.

        Raises:
            CommitError: the disk returned other bytes than were written.
            WorkFailed: another process took over the shard and has not committed it yet.
        """
        write_all(self._fd, end := tar.end_of_archive(self._size))
        self._hash.update([end])
        self._rest = zlib.crc32(end, self._rest)
        self._size += len(end)
        os.fsync(self._fd)
        digest = self._hash.hexdigest()
        self._read_back()
        os.close(self._fd)
        self._open = False
        rows = parquet_bytes(pa.Table.from_pylist(self.rows, schema=MANIFEST_SCHEMA))
        record = {
            "schema_version": SCHEMA_VERSION,
            "shard": self.shard,
            "feature_id": self.spec.feature_id,
            "plan_id": self.plan_id,
            "tar": {"bytes": self._size, "sha256": digest},
            "parquet": {"bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()},
            "rows": len(self.rows),
            "frames": sum(row["frames"] for row in self.rows),
            "failures": self.failures,
            "timings": timings,
        }
        try:
            rename_durably(self.path, self.layout.tar(self.shard))
            atomic_write(self.layout.rows(self.shard), rows, self.owner)
            atomic_write(self.layout.record(self.shard), seal(record), self.owner)
        except FileNotFoundError:  # this process was suspended, lost its claim, and its files were removed
            theirs = commit_record(self.layout, self.shard, self.spec.feature_id, self.plan_id)
            if theirs is None:
                raise WorkFailed(
                    f"shard {self.shard:06d} of '{self.layout.path}' was taken over by another extraction while this "
                    "one was suspended: rerun the same command"
                ) from None
            return theirs
        return record

    def abort(self) -> None:
        """Remove uncommitted data. Does nothing after a commit."""
        self._hash.close()
        if self._open:
            self._open = False
            os.close(self._fd)
        self.path.unlink(missing_ok=True)

    def _member(self, name: str, parts: Sequence[Buffer]) -> tuple[int, int]:
        """Append a tar member; returns offset and length of its data in bytes."""
        offset, length = self._size + tar.BLOCK_SIZE, sum(map(len, parts))
        around = tar.pack_header(name, length), tar.padding(length)
        whole = [around[0], *parts, around[1]]
        written = os.writev(self._fd, whole)
        total = tar.BLOCK_SIZE + length + len(around[1])
        while written < total:  # a nearly full disk or a signal can cut a write short
            written += os.pwrite(self._fd, b"".join(whole)[written:], self._size + written)
            os.lseek(self._fd, self._size + written, os.SEEK_SET)
        self._hash.update(whole)
        self._rest = crc32(around if name.endswith(".npy") else whole, self._rest)
        self._size += total
        return offset, length

    def _read_back(self) -> None:
        """Compare the bytes on disk with the crc32 of each row's arrays and of everything between them.

        The crc32 of the written bytes are known, and checking them is three times as fast as another sha256.
        """
        size = os.fstat(self._fd).st_size
        rest, at, found = 0, 0, dict[str, int]()
        with mmap.mmap(self._fd, size, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            for member in tar.iter_members(view):
                key, _, kind = member.name.partition(".")
                if kind == "json":
                    continue
                end = member.offset + member.length
                found[key] = zlib.crc32(view[member.offset : end], found.get(key, 0))
                rest, at = zlib.crc32(view[at : member.offset], rest), end
            rest = zlib.crc32(view[at:], rest)
        if (size, found, rest) != (self._size, {row["key"]: row["crc32"] for row in self.rows}, self._rest):
            raise CommitError(f"{self.path.name}: the disk returned other bytes than were written (crc32)")


class BackgroundHash:
    """Like ``hashlib.sha256()``, but hashes in another thread, from the first update until :meth:`close`.

    Hashing is the slowest part of writing a shard. hashlib releases the GIL, so that the writer can pack and write the
    next member in the meantime.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pieces: SimpleQueue[Sequence[Buffer] | None] = SimpleQueue()
        self._room = threading.Semaphore(MAX_QUEUED_UPDATES)
        self._thread: threading.Thread | None = None

    def update(self, pieces: Sequence[Buffer]) -> None:
        """Queue ``pieces`` for hashing; blocks while ``MAX_QUEUED_UPDATES`` calls are queued."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
            self._thread.start()
        self._room.acquire()
        self._pieces.put(pieces)

    def hexdigest(self) -> str:
        """Return the sha256 of everything so far (64 hex digits) and end the thread."""
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Hash the queued pieces, then end the thread."""
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (pieces := self._pieces.get()) is not None:
            for piece in pieces:
                self._hash.update(piece)
            self._room.release()


def npy_parts(array: Array) -> list[Buffer]:
    """Return ``array`` as a version 1.0 ``.npy`` file: the header, and a view of the array's bytes."""
    values = np.ascontiguousarray(array)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(values))
    return [buffer.getvalue(), values.reshape(-1).view(np.uint8).data]


def crc32(parts: Iterable[Buffer], before: int = 0) -> int:
    """Return zlib's crc32 over ``parts``, continuing from ``before``."""
    for part in parts:
        before = zlib.crc32(part, before)
    return before


def remove_stray_shard_files(layout: Layout, shard: int) -> None:
    """Remove the temporary files that dead owners left of a shard. Call it only while holding the shard's claim."""
    prefix = f"{shard:06d}."
    for path in list(layout.shards.iterdir()):
        if path.name.startswith(prefix) and TEMPORARY_INFIX in path.name:
            path.unlink(missing_ok=True)
