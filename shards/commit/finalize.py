"""Plans, commit records and finalization: merges the rows of a generation's shards and replaces ``CACHE.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.files import TEMPORARY_INFIX, atomic_write, file_sha256, make_folder, publish_file, temporary_path
from shards.format.layout import Layout, Plan, current_rows, manifest_id, read_plan
from shards.format.records import CacheInfo, FileInfo, RecordError, seal, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, read_parquet, write_parquet
from shards.format.spec import SCHEMA_VERSION, FeatureSpec
from shards.format.variants import are_variants

COUNTS = ("planned", "utterances", "failures", "shards", "frames", "samples", "bytes")


def write_plan(layout: Layout, generation: int, tables: Iterable[pa.Table], owner: str) -> Plan:
    """Write the plan of a generation if there is none. Never replaces an existing plan. Returns the plan in effect."""
    for folder in layout.folders:
        make_folder(folder)
    path = layout.plan(generation)
    if not path.exists():
        partial = temporary_path(path, owner)
        try:
            write_parquet(partial, PLAN_SCHEMA, tables)
            with suppress(FileNotFoundError):  # removed by a process that has finished the same generation meanwhile
                publish_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return read_plan(path)


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


class Merger:
    """Merges the shards of one generation into its manifest, its failures and its entry in ``CACHE.json``.

    Rows are streamed: memory does not grow with the generation.

    Args:
        before: the generations before this one, as ``CACHE.json`` lists them.
        plan: the plan of the generation.
    """

    def __init__(self, layout: Layout, spec: FeatureSpec, plan: Plan, before: Sequence[dict[str, Any]]) -> None:
        self.layout, self.spec, self.plan, self.before = layout, spec, plan, list(before)
        self.generation = len(before)
        first = sum(entry["shards"] for entry in before)
        if plan.num_shards and plan.first_shard != first:
            raise UserError(
                f"the plan of generation {self.generation} of '{layout.path}' begins at shard {plan.first_shard}, not "
                f"at {first}: delete that plan and rerun the extraction"
            )
        self.first_shard = first

    def merge(
        self, records: Iterable[tuple[dict[str, Any], pa.Table]], paths: tuple[Path, Path], provenance: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the manifest and the failures to ``paths``; return the content of ``CACHE.json``, to be sealed.

        Args:
            records: commit record and rows (MANIFEST_SCHEMA) of each shard, in order.
            provenance: source, encoder and timings. Stored in ``CACHE.json``, never part of an id.
        """
        counts = dict.fromkeys(COUNTS, 0) | {"planned": len(self.plan)}
        failures: list[dict[str, Any]] = []
        tars: list[str] = []
        seconds, encode_seconds, error_sum, error_max = 0.0, 0.0, 0.0, 0.0

        def rows() -> Iterator[pa.Table]:
            nonlocal seconds, encode_seconds, error_sum, error_max
            for record, table in records:
                failures.extend(record["failures"])
                tars.append(record["tar"]["sha256"])
                found = {
                    "utterances": len(table),
                    "failures": len(record["failures"]),
                    "shards": 1,
                    "frames": pc.sum(table["frames"]).as_py() or 0,
                    "samples": pc.sum(table["samples"]).as_py() or 0,
                    "bytes": record["tar"]["bytes"],
                }
                for name, value in found.items():
                    counts[name] += value
                if variants := int(are_variants(table["key"]).sum()):  # without any, there is no count of them
                    counts["variants"] = counts.get("variants", 0) + variants
                seconds += record["timings"]["seconds"]
                encode_seconds += record["timings"].get("encode_seconds", 0.0)
                error_sum += pc.sum(table["error"]).as_py() or 0.0
                error_max = max(error_max, pc.max(table["error"]).as_py() or 0.0)
                yield table

        write_parquet(paths[0], MANIFEST_SCHEMA, rows())
        write_parquet(paths[1], FAILURE_SCHEMA, [pa.Table.from_pylist(failures, schema=FAILURE_SCHEMA)])
        before = self.before[-1]["manifest_id"] if self.before else ""
        files = {"plan": self.plan.path, "manifest": paths[0], "failures": paths[1]}
        entry = {
            "plan_id": self.plan.id,
            "manifest_id": manifest_id(self.spec.feature_id, before, self.plan.id, tars),
            "first_shard": self.first_shard,
            "shards": self.plan.num_shards,
            "files": {kind: file_info(path).model_dump() for kind, path in files.items()},
            "counts": counts,
            "codec_error": {"mean": error_sum / max(counts["utterances"], 1), "max": error_max},
            "seconds": seconds,
            "encode_seconds": encode_seconds,
            "provenance": provenance,
        }
        generations = [*self.before, entry]
        return {
            "schema_version": SCHEMA_VERSION,
            "feature_id": self.spec.feature_id,
            "spec": self.spec.model_dump(),
            "generations": generations,
            "counts": {
                **{name: sum(each["counts"][name] for each in generations) for name in COUNTS},
                **self._count_current(paths, counts),
            },
        }

    def _count_current(self, paths: tuple[Path, Path], counts: dict[str, int]) -> dict[str, int]:
        """Return :func:`count_current` of all generations; ``counts`` are those of this one."""
        if not self.before:
            return {**({"variants": counts["variants"]} if "variants" in counts else {}), "superseded": 0}
        numbers = range(self.generation)
        manifests = [*map(self.layout.manifest, numbers), paths[0]]
        failures = [*map(self.layout.failures, numbers), paths[1]]
        keys = [[_keys(path) for path in kind] for kind in (manifests, failures)]
        return count_current(*keys)


def count_current(manifests: Sequence[pa.ChunkedArray], failed: Sequence[pa.ChunkedArray]) -> dict[str, int]:
    """Return the counts of a cache that are not sums: ``superseded`` rows and, if there are any, current ``variants``.

    Args:
        manifests, failed: see :func:`shards.format.layout.current_rows`.
    """
    current = current_rows(manifests, failed)
    pairs = zip(manifests, current, strict=True)
    variants = sum(int((are_variants(keys) & rows).sum()) for keys, rows in pairs)
    return {
        **({"variants": variants} if variants else {}),
        "superseded": sum(int((~rows).sum()) for rows in current),
    }


def file_info(path: Path) -> FileInfo:
    """Return the size and sha256 of a file."""
    return FileInfo(bytes=path.stat().st_size, sha256=file_sha256(path))


def _keys(path: Path) -> pa.ChunkedArray:
    return pq.read_table(path, columns=["key"], use_threads=False)["key"]


def finalize(
    layout: Layout, spec: FeatureSpec, generation: int, plan: Plan, owner: str, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Merge the shards of a generation and list it in ``CACHE.json``. Idempotent; any process may call it.

    Args:
        provenance: source, encoder and timings of the generation.

    Raises:
        UserError: a shard has no valid commit record, or an earlier generation is not complete.
    """
    before = read_info(layout)
    if before is not None and lists_plan(before, spec.feature_id, plan.id):
        return before
    listed = before["generations"] if before is not None else []
    if len(listed) < generation:
        raise UserError(f"generation {len(listed)} of '{layout.path}' is not complete: rerun the same extraction")
    merger = Merger(layout, spec, plan, listed[:generation])
    final = layout.manifest(generation), layout.failures(generation)
    partial = temporary_path(final[0], owner), temporary_path(final[1], owner)
    try:
        info = merger.merge(_committed(layout, spec, plan), partial, provenance)
        for path, target in zip(partial, final, strict=True):
            publish_file(path, target, replace=True)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    if read_info(layout) != before:  # this process was suspended, and others have finalized meanwhile
        return finalize(layout, spec, generation, plan, owner, provenance)
    atomic_write(layout.cache, seal(info), owner)
    return info


def _committed(layout: Layout, spec: FeatureSpec, plan: Plan) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """Yield record and rows of each shard. Verifies their hash, because rows in the manifest are not checked again."""
    for shard in plan.shards:
        record = commit_record(layout, shard, spec.feature_id, plan.id)
        if record is None:
            raise UserError(f"shard {shard:06d} of '{layout.path}' is not committed: rerun the same extraction")
        try:
            yield record, read_shard_rows(layout.rows(shard), record)
        except RecordError as error:
            raise UserError(
                f"shard {shard:06d} of '{layout.path}' is corrupt: {error}; delete '{layout.record(shard)}' and rerun "
                "the same extraction"
            ) from None


def read_shard_rows(path: Path, record: dict[str, Any]) -> pa.Table:
    """Read a shard's rows from the parquet file that its record describes; RecordError if the file differs."""
    if file_sha256(path) != record["parquet"]["sha256"]:
        raise RecordError(f"{path.name} does not match its sha256")
    return read_parquet(path, MANIFEST_SCHEMA)


def read_info(layout: Layout) -> dict[str, Any] | None:
    """Return ``CACHE.json``, or None if it does not exist or is not valid."""
    try:
        info = unseal(layout.cache)
        CacheInfo.model_validate(info)
    except (FileNotFoundError, NotADirectoryError, RecordError, ValueError):
        return None
    return info


def provenances(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the provenance of each generation in ``CACHE.json`` by plan id; {} if it is not valid."""
    try:
        return {each.plan_id: each.provenance for each in CacheInfo.model_validate(info).generations}
    except ValueError:
        return {}


def lists_plan(info: dict[str, Any] | None, feature_id: str, plan_id: str) -> bool:
    """Return whether ``CACHE.json`` has this feature id and a generation of this plan."""
    if info is None or info.get("feature_id") != feature_id:
        return False
    return any(entry["plan_id"] == plan_id for entry in info["generations"])


def stray_files(layout: Layout) -> Iterator[Path]:
    """Yield the files left by killed processes: temporary files and claims moved aside. A complete cache has none.

    Those of label sets are not among them: a set may be added at any time, by a process that holds another claim.
    """
    for folder in layout.folders:
        if folder != layout.labels:
            yield from temporary_files(folder)


def temporary_files(folder: Path) -> list[Path]:
    """Return the temporary files in a folder; none if it does not exist."""
    return sorted(path for path in folder.iterdir() if TEMPORARY_INFIX in path.name) if folder.is_dir() else []


def remove_stray_files(layout: Layout) -> None:
    """Remove stray files and shard claims. Call it only while holding the finalize claim, with all shards committed.

    This may remove the claim of a live process. That is harmless: its shard is committed, and releasing a missing claim
    does nothing.
    """
    for path in (*stray_files(layout), *layout.shards.glob("*.claim*")):
        path.unlink(missing_ok=True)


def is_clean(layout: Layout) -> bool:
    """Return False if a claim, or a file that :func:`remove_stray_files` removes, exists."""
    return not (any(stray_files(layout)) or any(layout.shards.glob("*.claim*")) or layout.finalize_claim.exists())
