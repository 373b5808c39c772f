"""The cache folder: plan, commit records, manifest, and the file that says "complete".

In: utterances with their shards (the plan) and the rows of committed shards. Out: the files of ``docs/format.md``.
A record is trusted only whole: its JSON is canonical, carries its own sha256, and names the feature id and the plan
that it was made for.
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
    """Where everything stands in a cache folder."""

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
    """42 of ``000042``, the stem of a shard's files; None for what is no such name."""
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
        """The planned utterances of one shard, in row order."""
        rows: list[dict[str, Any]] = self.table.filter(pc.field("shard") == index).to_pylist()
        return rows


def read_plan(layout: Layout, name: str | None = None) -> Plan:
    """The plan of a cache folder; UserError, which calls the cache ``name``, when it is absent or not a plan."""
    name = name or str(layout.path)
    try:
        return Plan(read_parquet(layout.plan, UTTERANCE_SCHEMA), file_sha256(layout.plan))
    except FileNotFoundError:
        raise UserError(f"'{name}' is no cache: it has no plan.parquet; make one with `make extract`") from None
    except RecordError as error:
        raise UserError(f"the plan of '{name}' is damaged: {error}; delete the folder and extract again") from None


def manifest_id(feature_id: str, plan_id: str, tars: list[str]) -> str:
    """64 hex digits that stand for the content of a cache: the ids and every tar's sha256, in shard order."""
    return hashlib.sha256(canonical_json([feature_id, plan_id, tars]).encode()).hexdigest()


def transfer_order(layout: Layout) -> Iterator[list[Path]]:
    """The files of a complete cache in an order that never shows a record without its files; groups go together."""
    yield [layout.plan]
    for shard in range(read_plan(layout).num_shards):
        yield [layout.tar(shard), layout.rows(shard), layout.record(shard)]
    yield [layout.manifest, layout.failures, layout.cache]
