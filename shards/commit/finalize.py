"""Plans, commit records and finalization: merges the rows of all shards and writes ``CACHE.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError
from shards.files import TEMPORARY_INFIX, atomic_write, file_sha256, make_folder, write_if_absent
from shards.format.layout import Layout, Plan, manifest_id, read_plan
from shards.format.records import RecordError, seal, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, UTTERANCE_SCHEMA, parquet_bytes, read_parquet
from shards.format.spec import SCHEMA_VERSION, FeatureSpec


def write_plan(layout: Layout, table: pa.Table, owner: str) -> Plan:
    """Write the plan if there is none. Never replaces an existing plan. Returns the plan in effect."""
    make_folder(layout.shards)
    if not layout.plan.exists():
        write_if_absent(layout.plan, parquet_bytes(table.cast(UTTERANCE_SCHEMA)), owner)
    return read_plan(layout)


def commit_record(layout: Layout, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
    """Return the commit record of a shard if its ids match and its files have the recorded sizes; otherwise None."""
    try:
        record = unseal(layout.record(shard))
        if not record_matches(record, shard, feature_id, plan_id):
            return None
        for kind, path in (("tar", layout.tar(shard)), ("parquet", layout.rows(shard))):
            if path.stat().st_size != record[kind]["bytes"]:
                return None
    except (FileNotFoundError, RecordError, KeyError, TypeError):
        return None
    return record


def record_matches(record: dict[str, Any], shard: int, feature_id: str, plan_id: str) -> bool:
    """Return whether a commit record belongs to this shard, this plan and these features."""
    wanted = (feature_id, plan_id, shard)
    return (record.get("feature_id"), record.get("plan_id"), record.get("shard")) == wanted


def finalize(layout: Layout, spec: FeatureSpec, plan: Plan, owner: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """Merge the rows of all shards and write ``CACHE.json`` last. Idempotent; any process may call it.

    Args:
        provenance: source, encoder and timings. Stored in ``CACHE.json``, never part of an id.

    Raises:
        UserError: a shard has no valid commit record.
    """
    records = []
    tables = []
    for shard in range(plan.num_shards):
        record = commit_record(layout, shard, spec.feature_id, plan.id)
        if record is None:
            raise UserError(f"shard {shard:06d} of '{layout.path}' is not committed: rerun the same extraction")
        records.append(record)
        tables.append(_committed_rows(layout, shard, record))
    files, info = merge_shards(spec, plan, records, tables, provenance)
    for name, data in files.items():
        atomic_write(layout.path / name, data, owner)
    atomic_write(layout.cache, seal(info), owner)
    return info


def merge_shards(
    spec: FeatureSpec,
    plan: Plan,
    records: Sequence[dict[str, Any]],
    tables: Sequence[pa.Table],
    provenance: dict[str, Any],
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files that complete a cache: manifest and failures by file name, and ``CACHE.json``, to be sealed.

    Args:
        records: commit records of all shards, in order.
        tables: their rows (MANIFEST_SCHEMA), in the same order.
        provenance: see :func:`finalize`.
    """
    manifest = pa.concat_tables(tables) if tables else MANIFEST_SCHEMA.empty_table()
    failures = [failure for record in records for failure in record["failures"]]
    files = {
        "manifest.parquet": parquet_bytes(manifest),
        "failures.parquet": parquet_bytes(pa.Table.from_pylist(failures, schema=FAILURE_SCHEMA)),
    }
    error = manifest["error"]
    return files, {
        "schema_version": SCHEMA_VERSION,
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "plan_id": plan.id,
        "manifest_id": manifest_id(spec.feature_id, plan.id, [record["tar"]["sha256"] for record in records]),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
        "counts": {
            "planned": len(plan.table),
            "utterances": len(manifest),
            "failures": len(failures),
            "shards": plan.num_shards,
            "frames": pc.sum(manifest["frames"]).as_py() or 0,
            "samples": pc.sum(manifest["samples"]).as_py() or 0,
            "bytes": sum(record["tar"]["bytes"] for record in records),
        },
        "codec_error": {"mean": pc.mean(error).as_py() or 0.0, "max": pc.max(error).as_py() or 0.0},
        "seconds": sum(record["timings"]["seconds"] for record in records),
        "encode_seconds": sum(record["timings"].get("encode_seconds", 0.0) for record in records),
        "provenance": provenance,
    }


def read_shard_rows(path: Path, record: dict[str, Any]) -> pa.Table:
    """Read a shard's rows from the parquet file that its record describes; RecordError if the file differs."""
    if file_sha256(path) != record["parquet"]["sha256"]:
        raise RecordError(f"{path.name} does not match its sha256")
    return read_parquet(path, MANIFEST_SCHEMA)


def _committed_rows(layout: Layout, shard: int, record: dict[str, Any]) -> pa.Table:
    """Read the rows of a committed shard. Verifies their hash, because rows in the manifest are not checked again."""
    try:
        return read_shard_rows(layout.rows(shard), record)
    except RecordError as error:
        raise UserError(
            f"shard {shard:06d} of '{layout.path}' is corrupt: {error}; delete '{layout.record(shard)}' and rerun the "
            "same extraction"
        ) from None


def is_complete(layout: Layout, feature_id: str, plan_id: str | None = None) -> bool:
    """Return whether ``CACHE.json`` exists, is valid, and has this feature id (and plan id)."""
    try:
        info = unseal(layout.cache)
        return info["feature_id"] == feature_id and plan_id in (None, info["plan_id"])
    except (FileNotFoundError, RecordError, KeyError):
        return False


def stray_files(layout: Layout) -> Iterator[Path]:
    """Yield the files left by killed processes: temporary files and claims moved aside. A complete cache has none."""
    for folder in (layout.path, layout.shards):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if TEMPORARY_INFIX in path.name)


def remove_stray_files(layout: Layout) -> None:
    """Remove stray files and shard claims. Call it only while holding the finalize claim, with all shards committed.

    This may remove the claim of a live process. That is harmless: its shard is committed, and releasing a missing claim
    does nothing.
    """
    for path in (*stray_files(layout), *layout.shards.glob("*.claim*")):
        path.unlink(missing_ok=True)


def is_clean(layout: Layout) -> bool:
    """Return False if the finalize claim, or a file that :func:`remove_stray_files` removes, exists."""
    return not (any(stray_files(layout)) or any(layout.shards.glob("*.claim*")) or layout.finalize_claim.exists())
