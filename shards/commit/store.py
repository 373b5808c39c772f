"""Where a cache is being made: what an extraction asks of a folder, and of a bucket in the same words.

In: the path of a folder, or a URL (``shards/commit/bucket/store.py``). Out: a :class:`Store`. Shards are always written
into a local folder (:attr:`Store.layout`) by ``shards/commit/writer.py``; the store says which of them are committed,
who makes which, and makes what was written count. In a folder, the writer's rename is all of that; to a bucket, files
are put.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from shards.commit.claims import LEASE
from shards.commit.folder import FolderStore
from shards.format.layout import Layout, Plan
from shards.format.spec import FeatureSpec
from shards.remote.client import is_url


class Store(Protocol):
    """One cache that is being made.

    Attributes:
        location: the folder or URL.
        layout: the local folder that shards are written into before :meth:`publish`.
        stays: whether they stay there when they are committed.
    """

    location: str
    layout: Layout
    keeps_shards: bool

    def info(self) -> dict[str, Any] | None:
        """``CACHE.json``, None where there is none yet; RecordError when it is damaged."""

    def plan(self) -> Plan | None:
        """The plan, None where there is none yet; UserError when it is damaged."""

    def write_plan(self, table: pa.Table) -> Plan:
        """Make ``table`` the plan unless one stands by now; returns the one that counts."""

    def commit_record(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        """The commit record of a shard, if it is of these ids and its files stand; else None."""

    def is_corrupt(self, shard: int, record: dict[str, Any]) -> bool:
        """Whether a committed shard's files have another sha256 than its record says; reads them whole."""

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        """Take ``CACHE.json`` away, and let these shards' records, as they stand, count no more."""

    def is_complete(self, feature_id: str, plan_id: str) -> bool:
        """Whether ``CACHE.json`` stands, whole and of these ids."""

    def hold_leases(self, owner: str, lease: float = LEASE) -> AbstractContextManager[None]:
        """Within it this process may take shards; at its end it gives back what it holds."""

    def acquire(self, shard: int | None) -> bool:
        """Claim a shard, or with None the finishing; False while somebody else has it."""

    def release(self, shard: int | None) -> None:
        """Give a claim back; harmless when it was taken over or has served its purpose."""

    def publish(self, shard: int) -> None:
        """Make the shard that :attr:`layout` holds count, if it is still this process's to make."""

    def finalize(self, spec: FeatureSpec, plan: Plan, provenance: dict[str, Any]) -> None:
        """Merge all shards and write ``CACHE.json`` last. Only for the holder of the finishing."""

    def cleanup(self) -> None:
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
        from shards.commit.bucket.store import BucketStore

        return BucketStore(location, Path(scratch) if scratch is not None else None)
    return FolderStore(Path(location))
