"""The :class:`shards.commit.store.Store` of a folder: commits by rename, claims by exclusive creation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit.claims import LEASE, Claims, new_owner
from shards.commit.finalize import commit_record, finalize, is_clean, is_complete, remove_stray_files, write_plan
from shards.files import file_sha256, translate_os_errors
from shards.format.layout import Layout, Plan, read_plan
from shards.format.records import unseal
from shards.format.spec import FeatureSpec


class FolderStore:
    """A cache in a folder that all extracting processes share. Implements the protocol of ``docs/format.md``."""

    def __init__(self, path: Path) -> None:
        self.location, self.layout, self.keeps_shards = str(path), Layout(path), True
        self._claims = Claims(new_owner())
        self._invalidated: dict[int, dict[str, Any]] = {}

    def info(self) -> dict[str, Any] | None:
        try:
            return unseal(self.layout.cache)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def plan(self) -> Plan | None:
        return read_plan(self.layout) if self.layout.plan.exists() else None

    def write_plan(self, table: pa.Table) -> Plan:
        with translate_os_errors("writing the plan", self.layout.path):
            return write_plan(self.layout, table, self._claims.owner)

    def commit_record(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        record = commit_record(self.layout, shard, feature_id, plan_id)
        return None if record is not None and record == self._invalidated.get(shard) else record

    def is_corrupt(self, shard: int, record: dict[str, Any]) -> bool:
        files = (("tar", self.layout.tar(shard)), ("parquet", self.layout.rows(shard)))
        return any(file_sha256(path) != record[kind]["sha256"] for kind, path in files)

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        self._invalidated.update(shards)
        with translate_os_errors("reopening the cache", self.layout.path):
            self.layout.cache.unlink(missing_ok=True)

    def is_complete(self, feature_id: str, plan_id: str) -> bool:
        return is_complete(self.layout, feature_id, plan_id)

    @contextmanager
    def hold_leases(self, owner: str, lease: float = LEASE) -> Iterator[None]:
        with Claims(owner, lease) as self._claims:
            yield

    def acquire(self, shard: int | None) -> bool:
        with translate_os_errors("claiming a shard", self.layout.path):
            return self._claims.acquire(self._claim(shard))

    def release(self, shard: int | None) -> None:
        self._claims.release(self._claim(shard))

    def publish(self, shard: int) -> None:
        self._invalidated.pop(shard, None)

    def finalize(self, spec: FeatureSpec, plan: Plan, provenance: dict[str, Any]) -> None:
        with translate_os_errors("finalizing the cache", self.layout.path):
            remove_stray_files(self.layout)
            finalize(self.layout, spec, plan, self._claims.owner, provenance)

    def cleanup(self) -> None:
        with suppress(OSError):  # a read-only folder stays as it is
            if not is_clean(self.layout) and self._claims.acquire(self.layout.finalize_claim):
                remove_stray_files(self.layout)
                self._claims.release(self.layout.finalize_claim)

    def _claim(self, shard: int | None) -> Path:
        return self.layout.finalize_claim if shard is None else self.layout.claim(shard)
