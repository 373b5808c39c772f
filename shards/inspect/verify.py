"""Verifies a cache: compares every file with what the other files record about it.

    python -m shards verify CACHE --deep

Takes an untrusted cache folder or its URL; returns a list of problems (``shards/inspect/findings.py``), empty if the
cache is valid and complete. The fast check reads everything except the tars, whose sizes it compares. The deep check
also rehashes every tar (of a remote cache, downloaded whole, one at a time) and compares each of its members with its
manifest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from shards.errors import UserError, first_validation_error
from shards.format.layout import Layout, manifest_id, shard_number
from shards.format.records import CacheInfo, RecordError, ShardRecord
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, UTTERANCE_SCHEMA, read_parquet
from shards.format.spec import FeatureSpec
from shards.inspect.findings import Findings, Problem, ProgressCallback
from shards.inspect.tar_check import TarFile, first_bad_row, first_bad_utterance
from shards.remote.client import is_url
from shards.remote.snapshot import fetch_tar, snapshot

PLANNED_COLUMNS = [
    name for name in UTTERANCE_SCHEMA.names if name != "samples"
]  # columns that a manifest row copies from its plan row


def verify(path: str | Path, deep: bool = False, progress: ProgressCallback | None = None) -> list[Problem]:
    """Return every problem of the cache at a path or URL. An incomplete cache has at least one.

    Args:
        deep: also rehash every tar and compare every member with its row.
        progress: called with (bytes read, total bytes to read).

    Raises:
        UserError: the folder does not exist, is not a cache, or has a newer format.
    """
    if is_url(path):
        with snapshot(str(path)) as copy:
            return _Audit(Layout(copy), deep, progress, partial(fetch_tar, str(path))).run()
    layout = Layout(Path(path))
    if not layout.path.is_dir():
        raise UserError(
            f"cache folder '{layout.path}' does not exist: pass a cache folder, such as caches/CORPUS/ENCODER"
        )
    if not (layout.cache.exists() or layout.plan.exists() or any(layout.shards.glob("*.json"))):
        raise UserError(
            f"'{layout.path}' is not a cache: it has neither CACHE.json nor plan.parquet; run `make extract`"
        )
    return _Audit(layout, deep, progress).run()


class _Audit:
    def __init__(
        self,
        layout: Layout,
        deep: bool,
        progress: ProgressCallback | None,
        open_tar: Callable[[Path], AbstractContextManager[Path]] = nullcontext,
    ) -> None:
        self.layout, self.deep, self.open_tar = layout, deep, open_tar
        self.findings = Findings(layout.path, progress)
        self.spec: FeatureSpec | None = None

    def run(self) -> list[Problem]:
        info = self._info()
        records = self._records()
        plan_ids = Counter(record.plan_id for record in records.values())
        plan_id = info.plan_id if info else max(plan_ids, key=lambda found: plan_ids[found], default=None)
        plan = self._plan(plan_id)
        shards: Sequence[int] = sorted(records)
        if plan is not None:
            shards = range(plan["shard"][-1].as_py() + 1 if len(plan) else 0)
        tables = [self.layout.manifest, self.layout.failures, *map(self.layout.rows, shards)]
        self.findings.expect([*tables, *map(self.layout.tar, shards)] if self.deep else tables)
        feature_id = self._feature_id(info, records)
        manifest = self._table(info, self.layout.manifest, MANIFEST_SCHEMA)
        merged: dict[int, int] = {}
        if manifest is not None:
            found, counts = np.unique(manifest["shard"].to_numpy(), return_counts=True)
            merged = dict(zip(found.tolist(), counts.tolist(), strict=True))
        at = 0  # first row of the shard in the manifest
        for shard in shards:
            size = merged.get(shard, 0)
            record = records.get(shard)
            rows = None
            if record is None:
                self._absent(shard)
            else:
                rows = self._check_shard(shard, record, feature_id, plan_id, plan)
            if rows is not None and manifest is not None and not manifest.slice(at, size).equals(rows):
                self.findings.report(None, self.layout.manifest, f"does not contain the rows of shard {shard:06d}")
                manifest = None  # report it only once
            at += size
        if manifest is not None and at != len(manifest):
            self.findings.report(None, self.layout.manifest, "has rows of shards that are not in the plan")
        self._check_unexpected_files(shards)
        if info:
            self._check_summary(info, {shard: records[shard] for shard in shards if shard in records}, shards, plan)
        return self.findings.problems

    def _info(self) -> CacheInfo | None:
        path = self.layout.cache
        tree = self.findings.read_sealed(path, None)
        if tree is None:
            if not path.exists():
                self.findings.report(None, path, "is missing: the extraction is not complete")
            return None
        try:
            info = CacheInfo.model_validate(tree)
            self.spec = FeatureSpec.parse(info.spec, f"'{path}'")
        except ValidationError as error:
            self.findings.report(None, path, f"has missing or invalid fields: {first_validation_error(error)}")
            return None
        except UserError as error:
            self.findings.report(None, path, f"has missing or invalid fields: {error}")
            return None
        if info.schema_version != self.spec.schema_version or self.spec.feature_id != info.feature_id:
            self.findings.report(None, path, "has a feature id that does not match its spec")
        return info

    def _records(self) -> dict[int, ShardRecord]:
        records: dict[int, ShardRecord] = {}
        for path in sorted(self.layout.shards.glob("*.json")):
            shard = shard_number(path.stem)
            if shard is None or not path.is_file():
                continue
            tree = self.findings.read_sealed(path, shard)
            if tree is None:
                continue
            try:
                records[shard] = ShardRecord.model_validate(tree)
            except ValidationError as error:
                self.findings.report(shard, path, f"has missing or invalid fields: {first_validation_error(error)}")
        return records

    def _plan(self, plan_id: str | None) -> pa.Table | None:
        """Return the plan, sorted by shard and row as written, or None."""
        path = self.layout.plan
        try:
            found = self.findings.hash_file(path, count=False)
        except OSError as error:
            self.findings.report_error(None, path, error)
            return None
        if plan_id is not None and found != plan_id:
            self.findings.report(None, path, "is not the plan that the cache was extracted with (its sha256 differs)")
            return None
        try:
            plan = read_parquet(path, UTTERANCE_SCHEMA)
        except (RecordError, OSError) as error:
            self.findings.report_error(None, path, error)
            return None
        if bad := first_bad_utterance(plan):
            self.findings.report(None, path, bad)
            return None
        return plan

    def _feature_id(self, info: CacheInfo | None, records: dict[int, ShardRecord]) -> str | None:
        if info:
            return info.feature_id
        found = Counter(record.feature_id for record in records.values())
        return max(found, key=lambda name: found[name], default=None)

    def _absent(self, shard: int) -> None:
        path = self.layout.record(shard)
        if not path.exists():
            self.findings.report(shard, path, "is missing: the shard is not committed")
        elif not path.is_file():
            self.findings.report(shard, path, "is not a regular file")

    def _check_shard(
        self, shard: int, record: ShardRecord, feature_id: str | None, plan_id: str | None, plan: pa.Table | None
    ) -> pa.Table | None:
        """Check one shard; returns its rows if they can be trusted."""
        layout, path = self.layout, self.layout.record(shard)
        if record.shard != shard:
            self.findings.report(shard, path, f"is the record of shard {record.shard:06d}")
        if record.feature_id != feature_id:
            self.findings.report(
                shard, path, f"belongs to other features ({record.feature_id[:8]}, not {str(feature_id)[:8]})"
            )
        if record.plan_id != plan_id:
            self.findings.report(shard, path, f"belongs to another plan ({record.plan_id[:8]}, not {str(plan_id)[:8]})")
        rows = self.findings.read_table(layout.rows(shard), record.parquet, MANIFEST_SCHEMA, shard)
        tar = layout.tar(shard)
        try:
            size = tar.stat().st_size
        except OSError as error:
            self.findings.report_error(shard, tar, error)
            return rows
        size_matches = size == record.tar.bytes
        if not size_matches:
            self.findings.report(shard, tar, f"has {size} bytes, not {record.tar.bytes}")
        if rows is not None:
            if rows.num_rows != record.rows or (pc.sum(rows["frames"]).as_py() or 0) != record.frames:
                self.findings.report(shard, path, "disagrees with its parquet file on the number of rows or frames")
            if bad := first_bad_row(rows, shard, self.spec, record.tar.bytes):
                self.findings.report(shard, layout.rows(shard), bad[1], bad[0])
                rows = None
            elif plan is not None and not self._matches_plan(shard, record, rows, plan):
                self.findings.report(
                    shard, layout.rows(shard), "and the failures in its record do not add up to the planned rows"
                )
        if self.deep:
            try:
                with self.open_tar(tar) as local:
                    found = self.findings.hash_file(local)
                    if size_matches and found != record.tar.sha256:
                        self.findings.report(shard, tar, "does not match its sha256")
                    with TarFile(local) as file:
                        for key, what in file.problems(rows, self.spec):
                            self.findings.report(shard, tar, what, key)
            except OSError as error:
                self.findings.report_error(shard, tar, error)
        return rows

    def _matches_plan(self, shard: int, record: ShardRecord, rows: pa.Table, plan: pa.Table) -> bool:
        """Return whether every planned utterance is either a row or a failure, and none is both."""
        failed = pa.array([failure.key for failure in record.failures], pa.string())
        planned = plan.filter(pc.equal(plan["shard"], shard)).select(PLANNED_COLUMNS)
        lost = pc.is_in(planned["key"], value_set=failed)
        same: bool = planned.filter(pc.invert(lost)).equals(rows.select(PLANNED_COLUMNS))
        return same and (pc.sum(lost).as_py() or 0) == len(failed)

    def _table(self, info: CacheInfo | None, path: Path, schema: pa.Schema) -> pa.Table | None:
        if info is None:
            return None
        if path.name not in info.files:
            self.findings.report(None, self.layout.cache, f"does not list {path.name}")
            return None
        return self.findings.read_table(path, info.files[path.name], schema, None)

    def _check_unexpected_files(self, shards: Sequence[int]) -> None:
        """Report tars and records outside the plan: a plain WebDataset reader of ``shards/*.tar`` would read them."""
        for path in sorted([*self.layout.shards.glob("*.tar"), *self.layout.shards.glob("*.json")]):
            if shard_number(path.stem) not in shards:
                self.findings.report(None, path, "is not a shard of this cache")

    def _check_summary(
        self, info: CacheInfo, records: dict[int, ShardRecord], shards: Sequence[int], plan: pa.Table | None
    ) -> None:
        """Compare CACHE.json with the totals of the records."""
        path = self.layout.cache
        failures = self._table(info, self.layout.failures, FAILURE_SCHEMA)
        if len(records) < len(shards):
            return
        failure_rows = [failure.model_dump() for shard in shards for failure in records[shard].failures]
        if failures is not None and failures.to_pylist() != failure_rows:
            self.findings.report(None, self.layout.failures, "does not contain the failures of the records")
        found = {
            "shards": len(shards),
            "utterances": sum(record.rows for record in records.values()),
            "failures": len(failure_rows),
            "frames": sum(record.frames for record in records.values()),
            "bytes": sum(record.tar.bytes for record in records.values()),
        }
        if plan is not None:
            found["planned"] = len(plan)
        for name, value in found.items():
            if info.counts.get(name) != value:
                self.findings.report(None, path, f"counts {info.counts.get(name)} {name}, the shards have {value}")
        tars = [records[shard].tar.sha256 for shard in shards]
        if manifest_id(info.feature_id, info.plan_id, tars) != info.manifest_id:
            self.findings.report(None, path, "has a manifest id that does not match its shards")
