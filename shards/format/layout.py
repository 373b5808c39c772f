"""The cache folder: paths of the plan, shards, commit records and manifest, and of ``CACHE.json``, written last.

The files are documented in ``docs/format.md``. A record is trusted only if its JSON is canonical, its sha256 matches,
and it names the expected feature id and plan id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError
from shards.files import file_sha256
from shards.format.records import RecordError
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, UTTERANCE_SCHEMA, parquet_bytes, read_parquet
from shards.format.spec import canonical_json

__all__ = [
    "FAILURE_SCHEMA",
    "MANIFEST_SCHEMA",
    "UTTERANCE_SCHEMA",
    "Layout",
    "Plan",
    "manifest_id",
    "parquet_bytes",
    "read_parquet",
    "read_plan",
    "shard_number",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of the files in a cache folder."""

    path: Path

    @property
    def cache(self) -> Path:
        return self.path / "CACHE.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.parquet"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.parquet"

    @property
    def failures(self) -> Path:
        return self.path / "failures.parquet"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

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
        """The claim of the process that merges the shards."""
        return self.path / "finish.claim"


def shard_number(stem: str) -> int | None:
    """Return 42 for ``000042``, the stem of a shard's files; None for any other name."""
    return int(stem) if stem.isascii() and stem.isdigit() and stem == f"{int(stem):06d}" else None


@dataclass(frozen=True)
class Plan:
    """The fixed assignment of utterances to shards: ``table`` (UTTERANCE_SCHEMA, by shard and row) and its id."""

    table: pa.Table
    id: str

    @property
    def num_shards(self) -> int:
        return (pc.max(self.table["shard"]).as_py() + 1) if len(self.table) else 0

    def shard_rows(self, index: int) -> list[dict[str, Any]]:
        """Return the planned utterances of one shard, in row order."""
        rows: list[dict[str, Any]] = self.table.filter(pc.field("shard") == index).to_pylist()
        return rows


def read_plan(layout: Layout, name: str | None = None) -> Plan:
    """Read the plan of a cache folder.

    Args:
        name: name of the cache in messages; ``None`` uses its path.

    Raises:
        UserError: the plan does not exist or is corrupt.
    """
    name = name or str(layout.path)
    try:
        return Plan(read_parquet(layout.plan, UTTERANCE_SCHEMA), file_sha256(layout.plan))
    except FileNotFoundError:
        raise UserError(f"'{name}' is not a cache: it has no plan.parquet; run `make extract`") from None
    except RecordError as error:
        raise UserError(f"the plan of '{name}' is corrupt: {error}; delete the folder and extract again") from None


def manifest_id(feature_id: str, plan_id: str, tars: list[str]) -> str:
    """Return the id of a cache's content (64 hex digits): a hash of the ids and of each tar's sha256, in order."""
    return hashlib.sha256(canonical_json([feature_id, plan_id, tars]).encode()).hexdigest()


def transfer_order(layout: Layout) -> Iterator[list[Path]]:
    """Yield groups of files of a complete cache, in an order that never exposes a record without its files."""
    yield [layout.plan]
    for shard in range(read_plan(layout).num_shards):
        yield [layout.tar(shard), layout.rows(shard), layout.record(shard)]
    yield [layout.manifest, layout.failures, layout.cache]
