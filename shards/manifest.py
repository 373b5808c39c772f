"""The cache folder: plan, commit records, manifest, and the file that says "complete".

In: utterances with their shards (the plan) and the rows of committed shards. Out: the files of ``docs/format.md``.
A record is trusted only whole: its JSON is canonical, carries its own sha256, and names the feature id and the plan that
it was made for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.disk import atomic_write, file_sha256
from shards.errors import UserError
from shards.spec import SCHEMA_VERSION, FeatureSpec, canonical_json

UTTERANCE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("audio", pa.string()),
        ("samples", pa.int64()),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        *UTTERANCE_SCHEMA,
        ("frames", pa.int32()),
        ("codec", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("scale_offset", pa.int64()),
        ("scale_length", pa.int64()),
        ("crc32", pa.uint32()),
        ("error", pa.float32()),
        ("audio_sha256", pa.string()),
    ]
)
FAILURE_SCHEMA = pa.schema(
    [("key", pa.string()), ("stage", pa.string()), ("error", pa.string()), ("attempt", pa.int32())]
)

MAX_JSON = 64 << 20  # a record or CACHE.json larger than this is no file of ours


class RecordError(ValueError):
    """A JSON or parquet file of a cache is not as it was written: one phrase."""


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


def seal(tree: dict[str, Any]) -> bytes:
    """Canonical JSON of ``tree`` with a ``sha256`` of itself, one line."""
    digest = hashlib.sha256(canonical_json(tree).encode()).hexdigest()
    return (canonical_json({**tree, "sha256": digest}) + "\n").encode()


def unseal(path: Path) -> dict[str, Any]:
    """Read what :func:`seal` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: it is too large, not JSON, not canonical, or its sha256 does not match.
    """
    if path.stat().st_size > MAX_JSON:
        raise RecordError(f"{path.name} is larger than {MAX_JSON >> 20} MiB")
    data = path.read_bytes()
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise RecordError(f"{path.name} is not JSON") from None
    if not isinstance(tree, dict):
        raise RecordError(f"{path.name} holds no JSON object")
    tree.pop("sha256", None)
    try:
        whole = seal(tree) == data
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise RecordError(f"{path.name} does not match its own sha256")
    return tree


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as parquet: one file for one table on one pyarrow version."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """A parquet file that must have exactly ``schema`` and no nulls; RecordError otherwise."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            found = file.schema_arrow.remove_metadata()
            if not found.equals(schema):
                raise RecordError(f"{path.name} has other columns than this format: {_first_difference(found, schema)}")
            table = file.read()
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path.name} is not a readable parquet file ({type(error).__name__})") from None
    for name in schema.names:
        if table[name].null_count:
            raise RecordError(f"{path.name} has empty values in column '{name}'")
    return table.replace_schema_metadata(None)


def _first_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    for field in wanted:
        index = found.get_field_index(field.name)
        if index < 0:
            return f"'{field.name}' is missing"
        if found.field(index).type != field.type:
            return f"'{field.name}' is {found.field(index).type}, not {field.type}"
    return f"{found.names} instead of {wanted.names}"


@dataclass(frozen=True)
class Plan:
    """The fixed assignment of utterances to shards: ``table`` (UTTERANCE_SCHEMA, by shard and row) and its id."""

    table: pa.Table
    id: str

    @property
    def shards(self) -> int:
        return (pc.max(self.table["shard"]).as_py() + 1) if len(self.table) else 0

    def shard(self, index: int) -> list[dict[str, Any]]:
        """The planned utterances of one shard, in row order."""
        rows: list[dict[str, Any]] = self.table.filter(pc.field("shard") == index).to_pylist()
        return rows


def write_plan(layout: Layout, table: pa.Table, owner: str) -> Plan:
    """Write the plan if there is none; a plan that stands is never replaced. Returns the plan that counts."""
    if not layout.plan.exists():
        layout.shards.mkdir(parents=True, exist_ok=True)
        partial = layout.plan.with_name(f"{layout.plan.name}.new-{owner}")
        atomic_write(partial, parquet_bytes(table.cast(UTTERANCE_SCHEMA)), owner)
        try:
            os.link(
                partial, layout.plan
            )  # unlike a rename, a link cannot replace a plan that another process just wrote
        except FileExistsError:
            pass
        finally:
            partial.unlink(missing_ok=True)
    return read_plan(layout)


def read_plan(layout: Layout) -> Plan:
    """The plan of a cache folder; UserError when it is absent or not a plan."""
    try:
        return Plan(read_parquet(layout.plan, UTTERANCE_SCHEMA), file_sha256(layout.plan))
    except FileNotFoundError:
        raise UserError(f"'{layout.path}' is no cache: it has no plan.parquet; make one with `make extract`") from None
    except RecordError as error:
        raise UserError(
            f"the plan of '{layout.path}' is damaged: {error}; delete the folder and extract again"
        ) from None


def committed(layout: Layout, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
    """The commit record of a shard, if its ids are these and its files have the recorded sizes; else None."""
    try:
        record = unseal(layout.record(shard))
        if record["feature_id"] != feature_id or record["plan_id"] != plan_id or record["shard"] != shard:
            return None
        for kind, path in (("tar", layout.tar(shard)), ("parquet", layout.rows(shard))):
            if path.stat().st_size != record[kind]["bytes"]:
                return None
    except (FileNotFoundError, RecordError, KeyError, TypeError):
        return None
    return record


def finalise(layout: Layout, spec: FeatureSpec, plan: Plan, owner: str, about: dict[str, Any]) -> dict[str, Any]:
    """Merge the rows of all shards and write ``CACHE.json`` last. Idempotent; any process may do it.

    ``about`` is provenance (source, encoder, timings): kept in ``CACHE.json``, never part of an identity.

    Raises:
        UserError: a shard has no valid commit record.
    """
    records = []
    for shard in range(plan.shards):
        record = committed(layout, shard, spec.feature_id, plan.id)
        if record is None:
            raise UserError(f"shard {shard:06d} of '{layout.path}' is not committed: run the same extraction again")
        records.append(record)
    tables = [read_parquet(layout.rows(shard), MANIFEST_SCHEMA) for shard in range(plan.shards)]
    manifest = pa.concat_tables(tables) if tables else MANIFEST_SCHEMA.empty_table()
    failures = [failure for record in records for failure in record["failures"]]
    files = {
        layout.manifest: parquet_bytes(manifest),
        layout.failures: parquet_bytes(pa.Table.from_pylist(failures, schema=FAILURE_SCHEMA)),
    }
    for path, data in files.items():
        atomic_write(path, data, owner)
    error = manifest["error"]
    info = {
        "schema_version": SCHEMA_VERSION,
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "plan_id": plan.id,
        "manifest_id": manifest_id(spec.feature_id, plan.id, [record["tar"]["sha256"] for record in records]),
        "files": {
            path.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
        },
        "counts": {
            "planned": len(plan.table),
            "utterances": len(manifest),
            "failures": len(failures),
            "shards": plan.shards,
            "frames": pc.sum(manifest["frames"]).as_py() or 0,
            "samples": pc.sum(manifest["samples"]).as_py() or 0,
            "bytes": sum(record["tar"]["bytes"] for record in records),
        },
        "codec_error": {"mean": pc.mean(error).as_py() or 0.0, "max": pc.max(error).as_py() or 0.0},
        "seconds": sum(record["timings"]["seconds"] for record in records),
        "provenance": about,
    }
    atomic_write(layout.cache, seal(info), owner)
    return info


def manifest_id(feature_id: str, plan_id: str, tars: list[str]) -> str:
    """64 hex digits that stand for the content of a cache: the ids and every tar's sha256, in shard order."""
    return hashlib.sha256(canonical_json([feature_id, plan_id, tars]).encode()).hexdigest()


def is_complete(layout: Layout, feature_id: str, plan_id: str | None = None) -> bool:
    """True when ``CACHE.json`` stands, is whole, and is of this feature id (and plan)."""
    try:
        info = unseal(layout.cache)
        return info["feature_id"] == feature_id and plan_id in (None, info["plan_id"])
    except (FileNotFoundError, RecordError, KeyError):
        return False


def stray_files(layout: Layout) -> Iterator[Path]:
    """Temporary files in the cache folder: none stand in a complete cache that nobody is writing."""
    from shards.disk import TEMPORARY

    for folder in (layout.path, layout.shards):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if TEMPORARY in path.name or ".new-" in path.name)
