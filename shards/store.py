"""Where a cache is being made: what an extraction asks of a folder, and of a bucket in the same words.

In: the path of a folder, or a URL (``shards/bucket.py``). Out: a :class:`Store`. Shards are always written into a local
folder (:attr:`Store.layout`) by ``shards/writer.py``; the store says which of them are committed, who makes which, and
makes what was written count. In a folder, the writer's rename is all of that; to a bucket, files are put.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from shards.claims import LEASE, Claims, new_owner
from shards.disk import file_sha256, told, write_new
from shards.manifest import (
    Layout,
    Plan,
    committed,
    finalise,
    is_complete,
    is_tidy,
    read_plan,
    sweep,
    unseal,
    write_plan,
)
from shards.records import seal
from shards.spec import FeatureSpec
from shards.storage import is_url


class Store(Protocol):
    """One cache that is being made.

    Attributes:
        location: the folder or URL.
        layout: the local folder that shards are written into before :meth:`publish`.
        stays: whether they stay there when they are committed.
    """

    location: str
    layout: Layout
    stays: bool

    def info(self) -> dict[str, Any] | None:
        """``CACHE.json``, None where there is none yet; RecordError when it is damaged."""

    def plan(self) -> Plan | None:
        """The plan, None where there is none yet; UserError when it is damaged."""

    def write_plan(self, table: pa.Table) -> Plan:
        """Make ``table`` the plan unless one stands by now; returns the one that counts."""

    def write_job(self, tree: dict[str, Any]) -> None:
        """Put ``job.json`` there unless one stands."""

    def job(self) -> dict[str, Any]:
        """``job.json``; FileNotFoundError, or RecordError when it is damaged."""

    def committed(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        """The commit record of a shard, if it is of these ids and its files stand; else None."""

    def damaged(self, shard: int, record: dict[str, Any]) -> bool:
        """Whether a committed shard's files have another sha256 than its record says; reads them whole."""

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        """Take ``CACHE.json`` away, and let these shards' records, as they stand, count no more."""

    def is_complete(self, feature_id: str, plan_id: str) -> bool:
        """Whether ``CACHE.json`` stands, whole and of these ids."""

    def at_work(self, owner: str, lease: float = LEASE) -> AbstractContextManager[None]:
        """Within it this process may take shards; at its end it gives back what it holds."""

    def take(self, shard: int | None) -> bool:
        """Claim a shard, or with None the finishing; False while somebody else has it."""

    def release(self, shard: int | None) -> None:
        """Give a claim back; harmless when it was taken over or has served its purpose."""

    def publish(self, shard: int) -> None:
        """Make the shard that :attr:`layout` holds count, if it is still this process's to make."""

    def finish(self, spec: FeatureSpec, plan: Plan, about: dict[str, Any]) -> None:
        """Merge all shards and write ``CACHE.json`` last. Only for the holder of the finishing."""

    def tidy(self) -> None:
        """Remove what killed processes left in a complete cache, where that is allowed."""


def open_store(location: str, scratch: str | None = None) -> Store:
    """The cache at a path or URL, whether or not there is anything yet.

    Args:
        scratch: for a URL, the folder in which shards are made before they are put; None is the system's for
            temporary files.

    Raises:
        UserError: of a URL, the store cannot be reached or knows no conditional writes.
    """
    if is_url(location):
        from shards.bucket import Bucket

        return Bucket(location, Path(scratch) if scratch is not None else None)
    return Folder(Path(location))


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

    def write_job(self, tree: dict[str, Any]) -> None:
        if not self.layout.job.exists():
            with told("writing the job's file", self.layout.path):
                write_new(self.layout.job, seal(tree), self._claims.owner)

    def job(self) -> dict[str, Any]:
        return unseal(self.layout.job)

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
