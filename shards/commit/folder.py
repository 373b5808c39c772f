"""The answer of a folder to what an extraction asks of its cache: commits by rename, claims by link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit.claims import LEASE, Claims, new_owner
from shards.commit.finalize import committed, finalise, is_complete, is_tidy, sweep, write_plan
from shards.files import file_sha256, told
from shards.format.layout import Layout, Plan, read_plan
from shards.format.records import unseal
from shards.format.spec import FeatureSpec


class Folder:
    """A cache in a folder that all its makers share; the protocol of ``docs/format.md``, by rename and link."""

    def __init__(self, path: Path) -> None:
        self.location, self.layout, self.stays = str(path), Layout(path), True
        self._claims = Claims(new_owner())
        self._void: dict[int, dict[str, Any]] = {}

    def info(self) -> dict[str, Any] | None:
        try:
            return unseal(self.layout.cache)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def plan(self) -> Plan | None:
        return read_plan(self.layout) if self.layout.plan.exists() else None

    def write_plan(self, table: pa.Table) -> Plan:
        with told("writing the plan", self.layout.path):
            return write_plan(self.layout, table, self._claims.owner)

    def committed(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        record = committed(self.layout, shard, feature_id, plan_id)
        return None if record is not None and record == self._void.get(shard) else record

    def damaged(self, shard: int, record: dict[str, Any]) -> bool:
        files = (("tar", self.layout.tar(shard)), ("parquet", self.layout.rows(shard)))
        return any(file_sha256(path) != record[kind]["sha256"] for kind, path in files)

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        self._void.update(shards)
        with told("reopening the cache", self.layout.path):
            self.layout.cache.unlink(missing_ok=True)

    def is_complete(self, feature_id: str, plan_id: str) -> bool:
        return is_complete(self.layout, feature_id, plan_id)

    @contextmanager
    def at_work(self, owner: str, lease: float = LEASE) -> Iterator[None]:
        with Claims(owner, lease) as self._claims:
            yield

    def take(self, shard: int | None) -> bool:
        with told("claiming a shard", self.layout.path):
            return self._claims.take(self._claim(shard))

    def release(self, shard: int | None) -> None:
        self._claims.release(self._claim(shard))

    def publish(self, shard: int) -> None:
        self._void.pop(shard, None)

    def finish(self, spec: FeatureSpec, plan: Plan, about: dict[str, Any]) -> None:
        with told("finishing the cache", self.layout.path):
            sweep(self.layout)
            finalise(self.layout, spec, plan, self._claims.owner, about)

    def tidy(self) -> None:
        with suppress(OSError):  # a read-only folder stays as it is
            if not is_tidy(self.layout) and self._claims.take(self.layout.finishing):
                sweep(self.layout)
                self._claims.release(self.layout.finishing)

    def _claim(self, shard: int | None) -> Path:
        return self.layout.finishing if shard is None else self.layout.claim(shard)
