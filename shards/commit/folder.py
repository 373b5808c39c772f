"""The :class:`shards.commit.store.Store` of a folder that all extracting processes share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit.claims import LEASE, Claims, new_owner
from shards.commit.finalize import (
    commit_record,
    finalize,
    is_clean,
    lists_plan,
    provenances,
    read_info,
    remove_stray_files,
    temporary_files,
    write_plan,
)
from shards.files import file_sha256, make_folder, translate_os_errors
from shards.format.layout import Layout, Plan, read_plan
from shards.format.records import unseal
from shards.format.spec import FeatureSpec
from shards.labels.store import LabelEntry, LabelIndex, add_set, find, open_set, read_index
from shards.labels.table import LabelSet, identify, normalise

POLL_INTERVAL = 0.2  # seconds between two attempts to get the claim of the label sets


class FolderStore:
    """A cache in a folder that all extracting processes share. Implements the protocol of ``docs/format.md``."""

    def __init__(self, path: Path) -> None:
        self.location, self.layout, self.keeps_shards = str(path), Layout(path), True
        self._claims = Claims(new_owner())
        self._invalidated: dict[int, dict[str, Any]] = {}
        self._provenance: dict[str, dict[str, Any]] = {}  # of generations that were listed, by plan id

    def info(self) -> dict[str, Any] | None:
        try:
            info = unseal(self.layout.cache)
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._provenance |= provenances(info)
        return info

    def plan(self, generation: int) -> Plan | None:
        try:
            return read_plan(self.layout.plan(generation), self.location)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_plan(self, generation: int, tables: Iterable[pa.Table]) -> Plan:
        with translate_os_errors("writing the plan", self.layout.path):
            return write_plan(self.layout, generation, tables, self._claims.owner)

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

    def lists_plan(self, feature_id: str, plan_id: str) -> bool:
        return lists_plan(read_info(self.layout), feature_id, plan_id)

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

    def finalize(self, spec: FeatureSpec, generation: int, plan: Plan, provenance: dict[str, Any]) -> None:
        with translate_os_errors("finalizing the cache", self.layout.path):
            remove_stray_files(self.layout)
            kept = self._provenance.get(plan.id, provenance)  # of a generation that was reopened
            finalize(self.layout, spec, generation, plan, self._claims.owner, kept)

    def tables(self, generation: int) -> tuple[Path, Path]:
        return self.layout.manifest(generation), self.layout.failures(generation)

    def labels(self) -> LabelIndex:
        return read_index(self.layout.path)

    def open_labels(self, name: str) -> LabelSet:
        return open_set(self.layout.path, find(self.labels(), name, f"'{self.location}'"))

    def add_labels(self, table: pa.Table, name: str, origin: str) -> LabelEntry:
        return add_labels(self.layout, table, name, origin, reserved=True)

    def cleanup(self) -> None:
        with suppress(OSError):  # a read-only folder stays as it is
            info = read_info(self.layout)
            is_growing = info is None or self.layout.plan(len(info["generations"])).exists()  # in another process
            if not is_growing and not is_clean(self.layout) and self._claims.acquire(self.layout.finalize_claim):
                remove_stray_files(self.layout)
                self._claims.release(self.layout.finalize_claim)
            claim, left = self.layout.labels_claim, temporary_files(self.layout.labels)
            if (left or claim.exists()) and self._claims.acquire(claim):
                _remove(temporary_files(self.layout.labels))
                self._claims.release(claim)

    def _claim(self, shard: int | None) -> Path:
        return self.layout.finalize_claim if shard is None else self.layout.claim(shard)


def add_labels(layout: Layout, table: pa.Table, name: str, origin: str, *, reserved: bool = False) -> LabelEntry:
    """Add a label set to the cache of ``layout``, one process at a time; see :func:`shards.labels.store.add_set`."""
    current = read_index(layout.path).current(name)
    if current is not None and _is_stored(layout, current, table):
        return current  # without a claim: the folder may be read-only
    owner = new_owner()
    with translate_os_errors("writing labels", layout.path), Claims(owner) as claims:
        make_folder(layout.labels)
        while not claims.acquire(layout.labels_claim):
            time.sleep(POLL_INTERVAL)
        _remove(temporary_files(layout.labels))  # of killed processes: this one holds the claim
        return add_set(layout.path, table, name, origin, owner, reserved=reserved)


def _is_stored(layout: Layout, entry: LabelEntry, table: pa.Table) -> bool:
    """Return whether a set of the cache consists of the rows of ``table``, and its file is intact."""
    path = layout.labels / entry.file.name
    if len(table) != entry.rows or not path.is_file() or file_sha256(path) != entry.file.sha256:
        return False
    where = f"label set '{entry.name}'"
    return identify(normalise(table, where), where) == entry.id


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
