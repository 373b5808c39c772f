"""The cache folder: paths of its files, plans, and ``CACHE.json``, which is replaced last.

The files are documented in ``docs/format.md``. A record is trusted only if its JSON is canonical, its sha256 matches,
and it names the expected feature id and plan id.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.records import RecordError
from shards.format.schemas import PLAN_SCHEMA, check_parquet, read_batches
from shards.format.spec import canonical_json
from shards.format.variants import base_keys

__all__ = ["Layout", "Plan", "manifest_id", "read_plan", "shard_number"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of the files in a cache folder."""

    path: Path

    @property
    def cache(self) -> Path:
        return self.path / "CACHE.json"

    def plan(self, generation: int) -> Path:
        return self.path / "plans" / f"{generation:03d}.parquet"

    def manifest(self, generation: int) -> Path:
        return self.path / "manifests" / f"{generation:03d}.parquet"

    def failures(self, generation: int) -> Path:
        return self.path / "failures" / f"{generation:03d}.parquet"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def labels(self) -> Path:
        return self.path / "labels"

    def tar(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.tar"

    def rows(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.parquet"

    def record(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.json"

    def claim(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.claim"

    @property
    def finalize_claim(self) -> Path:
        """The claim of the process that merges the shards of a generation."""
        return self.path / "finish.claim"

    @property
    def labels_claim(self) -> Path:
        """The claim of the process that adds a label set."""
        return self.path / "labels.claim"

    @property
    def folders(self) -> list[Path]:
        """The folders of a cache, in which killed processes may leave temporary files."""
        tables = [self.path / name for name in ("plans", "manifests", "failures")]
        return [self.path, *tables, self.shards, self.labels]

    def num_plans(self) -> int:
        """Return the number of consecutive plans, complete generations and unfinished ones."""
        generation = 0
        while self.plan(generation).exists():
            generation += 1
        return generation


def shard_number(stem: str) -> int | None:
    """Return 42 for ``000042``, the stem of a shard's files; None for any other name."""
    return int(stem) if stem.isascii() and stem.isdigit() and stem == f"{int(stem):06d}" else None


@dataclass(frozen=True)
class Plan:
    """The fixed assignment of a generation's utterances to shards: a parquet file (PLAN_SCHEMA, by shard and row).

    Rows are read when they are needed, a row group at a time.

    Attributes:
        id: sha256 of the file, 64 hex digits.
        shard: int32 [rows], shard of each row, ascending; shards are numbered through all generations.
        samples: int64 [rows], as planned.
        first_shard: the first shard of the generation.
    """

    path: Path
    id: str
    shard: NDArray[np.int32] = field(repr=False, compare=False)
    samples: NDArray[np.int64] = field(repr=False, compare=False)
    first_shard: int = 0

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def num_shards(self) -> int:
        return int(self.shard[-1]) - self.first_shard + 1 if len(self.shard) else 0

    @property
    def shards(self) -> range:
        """The numbers of the generation's shards."""
        return range(self.first_shard, self.first_shard + self.num_shards)

    @property
    def sizes(self) -> dict[int, int]:
        """Number of planned utterances by shard."""
        numbers, counts = np.unique(self.shard, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def shard_table(self, shard: int) -> pa.Table:
        """Return the planned utterances of one shard, in row order."""
        begin, end = np.searchsorted(self.shard, [shard, shard + 1]).tolist()
        with pq.ParquetFile(self.path) as file:
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            starts = [0, *accumulate(groups)]
            first, last = bisect_right(starts, begin) - 1, max(bisect_right(starts, max(end - 1, begin)), 1)
            table = file.read_row_groups(list(range(first, last)), use_threads=False) if begin < end else None
        if table is None:
            return PLAN_SCHEMA.empty_table()
        return table.slice(begin - starts[first], end - begin).replace_schema_metadata(None)

    def shard_rows(self, shard: int) -> list[dict[str, Any]]:
        """Return the planned utterances of one shard, in row order."""
        rows: list[dict[str, Any]] = self.shard_table(shard).to_pylist()
        return rows

    def columns(self, *names: str) -> pa.Table:
        """Return columns of all rows."""
        table = pq.read_table(self.path, columns=list(names), use_threads=False, memory_map=True, pre_buffer=False)
        return table.replace_schema_metadata(None)


def read_plan(path: Path, name: str | None = None) -> Plan:
    """Read and validate a plan.

    Args:
        name: name of the cache in messages; ``None`` uses its path.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the plan is corrupt.
    """
    name = name or str(path.parent.parent)
    shards: list[NDArray[np.int32]] = []
    samples: list[NDArray[np.int64]] = []
    try:
        size = check_parquet(path, PLAN_SCHEMA)
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in read_batches(path.name, file, size):
                shards.append(batch["shard"].to_numpy().copy())
                samples.append(batch["samples"].to_numpy().copy())
        plan_id = file_sha256(path)
    except (RecordError, OSError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(
            f"the plan '{path.name}' of '{name}' is corrupt ({error}): run `python -m pipeline repair {name}`"
        ) from None
    shard = np.concatenate([np.zeros(0, np.int32), *shards])
    if len(shard) and (shard[0] < 0 or np.any((np.diff(shard) < 0) | (np.diff(shard) > 1))):
        raise UserError(f"the plan '{path.name}' of '{name}' is corrupt: its shards are not in order")
    planned = np.concatenate([np.zeros(0, np.int64), *samples])
    return Plan(path, plan_id, shard, planned, int(shard[0]) if len(shard) else 0)


def manifest_id(feature_id: str, before: str, plan_id: str, tars: Sequence[str]) -> str:
    """Return the id of the content of a cache up to a generation (64 hex digits).

    Args:
        before: the id of the generation before; "" for the first.
        tars: the sha256 of each tar of the generation, in order.
    """
    return hashlib.sha256(canonical_json([feature_id, before, plan_id, *tars]).encode()).hexdigest()


def current_rows(manifests: Sequence[pa.ChunkedArray], failed: Sequence[pa.ChunkedArray]) -> list[NDArray[np.bool_]]:
    """Return for each generation which of its manifest rows are current: a key planned again later supersedes them.

    An utterance that is planned again supersedes its variants, too: they were made from other audio.

    Args:
        manifests: the column ``key`` of the manifest of each generation.
        failed: the column ``key`` of the failures of each generation: they were planned again, too.
    """
    current = [np.ones(len(keys), dtype=bool) for keys in manifests]
    utterances = [base_keys(keys) for keys in manifests[:-1]]
    for later in range(1, len(manifests)):
        planned = pa.chunked_array([*manifests[later].chunks, *failed[later].chunks], pa.string())
        if not len(planned):
            continue
        for earlier in range(later):
            keys, value_set = manifests[earlier], planned.combine_chunks()
            current[earlier] &= ~pc.is_in(keys, value_set=value_set).to_numpy()
            if utterances[earlier] is not keys:
                current[earlier] &= ~pc.is_in(utterances[earlier], value_set=value_set).to_numpy()
    return current
