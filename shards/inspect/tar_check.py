"""Checks of one plan, the rows of one shard and one tar: the byte-level part of ``shards/inspect/verify.py``.

Takes tables of the right schema and tars, both with untrusted content; returns the first row that is out of bounds and
every member that does not match its row. An offset or size declared by a row is used only after it has been bounded by
the size of the tar.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.files import open_file
from shards.format import tar
from shards.format.codec import SCALED, STORED_DTYPE, CodecError, check_codes
from shards.format.npy import NpyError, parse_npy_header
from shards.format.records import utterance_json
from shards.format.schemas import UNKNOWN_AUDIO
from shards.format.spec import MAX_CHANNELS, FeatureSpec
from shards.format.variants import SUFFIX

LABELS_IN_TAR = ("text", "speaker", "split")  # as the source had them when the shard was extracted
KEY_PATTERN = rf"\A[A-Za-z0-9_-]{{1,90}}{SUFFIX}\z"


def first_bad_utterance(plan: pa.Table, first_shard: int) -> str | None:
    """Return what is wrong with the plan of a generation, or None.

    Keys must be unique and legal; shards count from ``first_shard``, rows from 0.
    """
    if not len(plan):
        return None
    legal = pc.match_substring_regex(plan["key"], KEY_PATTERN)
    if not pc.all(legal).as_py():
        return f"has the key {plan['key'][pc.index(legal, False).as_py()].as_py()!r:.100}, which no shard can hold"
    if pc.count_distinct(plan["key"]).as_py() != len(plan):
        return "contains a key twice"
    shard, row = plan["shard"].to_numpy().astype(np.int64), plan["row"].to_numpy().astype(np.int64)
    first = np.concatenate([[True], np.diff(shard) != 0])
    starts = np.flatnonzero(first)[np.cumsum(first) - 1]
    if (
        shard[0] != first_shard
        or np.any(~np.isin(np.diff(shard), (0, 1)))
        or np.any(row != np.arange(len(row)) - starts)
    ):
        return f"does not number shards from {first_shard} and rows from 0 without gaps"
    return None


def first_bad_row(rows: pa.Table, shard: int, spec: FeatureSpec | None, size: int) -> tuple[str, str] | None:
    """Return (key, problem) of the first row that is invalid in a tar of ``size`` bytes; None if all are valid."""
    column = {name: rows[name].to_numpy().astype(np.int64) for name in _NUMBERS}
    scaled = column["scale_offset"] >= 0
    width = STORED_DTYPE[spec.codec].itemsize if spec else 1
    error, row = rows["error"].to_numpy(), column["row"]
    known = pc.not_equal(rows["audio_id"], pa.scalar(UNKNOWN_AUDIO, pa.binary(32))).to_numpy()
    checks: list[tuple[Any, str]] = [
        (column["shard"] == shard, "is a row of another shard"),
        (np.diff(row, prepend=-1) > 0, "is out of order"),
        ((column["frames"] >= 1) & (column["samples"] >= 0), "has no frames, or a negative number of samples"),
        (known, "has no audio id"),
        (_inside(column["offset"], column["length"], size), "lies outside its tar"),
        (column["length"] // width >= column["frames"] * (spec.channels if spec else 1), "has more frames than bytes"),
        (
            scaled == (spec.codec in SCALED) if spec else np.ones(len(rows), dtype=bool),
            "has a scale that its codec does not use, or lacks one that it needs",
        ),
        (~scaled | _inside(column["scale_offset"], column["scale_length"], size), "has a scale outside its tar"),
        (
            scaled | ((column["scale_offset"] == -1) & (column["scale_length"] == 0)),
            "has the position of a scale but no scale",
        ),
        (np.isfinite(error) & (error >= 0), "has a codec error that is not a non-negative number"),
    ]
    for good, what in checks:
        if not np.all(good):
            return rows["key"][int(np.argmin(good))].as_py(), what
    return None


_NUMBERS = ["samples", "shard", "row", "frames", "offset", "length", "scale_offset", "scale_length"]


def _inside(offset: Any, length: Any, size: int) -> Any:
    # Bound each value before adding them: the sum of two large int64 values would wrap around.
    return (offset >= tar.BLOCK_SIZE) & (offset <= size) & (length >= 1) & (length <= size) & (offset + length <= size)


class TarFile:
    """A memory-mapped tar on disk."""

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:  # a mapping outlives its file descriptor
            size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else None
        self.data = memoryview(self._map if self._map is not None else b"")

    def __enter__(self) -> TarFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.data.release()
        if self._map is not None:
            self._map.close()

    def problems(self, rows: pa.Table | None, spec: FeatureSpec | None) -> Iterator[tuple[str | None, str]]:
        """Yield (key or None, problem) for everything in the tar that does not match its manifest rows."""
        members: dict[str, tar.TarMember] = {}
        try:
            members.update((member.name, member) for member in tar.iter_members(self.data))
            whole = True
        except tar.TarError as error:
            whole = False
            yield None, str(error)
        if rows is None:
            return
        expected = []
        for batch in rows.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                expected += [f"{row['key']}.npy", *([f"{row['key']}.scale.npy"] * (row["scale_offset"] >= 0))]
                expected.append(f"{row['key']}.json")
                if what := self._mismatch(row, spec, members):
                    yield row["key"], what
        if whole and list(members) != expected:
            yield None, "contains other members than its parquet file lists, or in another order"

    def _mismatch(self, row: dict[str, Any], spec: FeatureSpec | None, members: dict[str, tar.TarMember]) -> str | None:
        """Return how an utterance differs from its row, or None."""
        parts = [(f"{row['key']}.npy", row["offset"], row["length"])]
        if row["scale_offset"] >= 0:
            parts.append((f"{row['key']}.scale.npy", row["scale_offset"], row["scale_length"]))
        crc = 0
        for name, offset, length in parts:
            if offset + length > len(self.data):
                return "runs past the end of the tar"
            if (found := members.get(name)) and (found.offset, found.length) != (offset, length):
                return f"starts at byte {found.offset}, not {offset}"
            crc = zlib.crc32(self.data[offset : offset + length], crc)
        if crc != row["crc32"]:
            return "does not match its crc32"
        try:
            shapes = [parse_npy_header(self.data[offset : offset + length])[:2] for _, offset, length in parts]
        except NpyError as error:
            return str(error)
        (dtype, shape), *scale = shapes
        channels = spec.channels if spec else shape[-1]
        known = dtype == STORED_DTYPE[spec.codec] if spec else dtype in STORED_DTYPE.values()
        if not known or shape != (row["frames"], channels) or channels > MAX_CHANNELS:
            return f"contains {dtype} {shape}, not {row['frames']} frames of {spec.codec if spec else 'a codec'}"
        if spec is not None and spec.codebook_size:
            end = row["offset"] + row["length"]
            try:
                check_codes(
                    np.frombuffer(self.data[end - 2 * row["frames"] * channels : end], dtype), spec.codebook_size
                )
            except CodecError as error:
                return f"is no codes: {error}"
        if scale and scale != [(np.dtype("<f4"), (channels,))]:
            return "has a scale whose shape does not match its channels"
        found = members.get(f"{row['key']}.json")
        if found is not None and spec is not None:
            return self._json_mismatch(bytes(self.data[found.offset :][: min(found.length, 1 << 20)]), row, spec)
        return None

    def _json_mismatch(self, text: bytes, row: dict[str, Any], spec: FeatureSpec) -> str | None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return "has a JSON member that is not JSON"
        if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in LABELS_IN_TAR):
            return "has a JSON member without a text, speaker or split"
        for name, value in json.loads(utterance_json(row, found, spec)).items():  # any labels: they may differ by now
            if found.get(name) != value:
                return f"has a JSON member whose {name} differs from its row"
        return None  # additional fields are allowed
