"""The interface between extraction and the place where a cache is created: a folder or a bucket.

:func:`open_store` takes the path of a folder or a URL (``shards/commit/bucket/store.py``) and returns a :class:`Store`.
``shards/commit/writer.py`` always writes shards to a local folder (:attr:`Store.layout`). The store records which
shards are committed, assigns shards to processes, and publishes what was written. In a folder, the writer's rename
already publishes a shard; to a bucket, its files are uploaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from shards.commit.claims import LEASE
from shards.commit.folder import FolderStore
from shards.format.layout import Layout, Plan
from shards.format.spec import FeatureSpec
from shards.labels.store import LabelEntry, LabelIndex
from shards.labels.table import LabelSet
from shards.remote.client import is_url


class Store(Protocol):
    """A cache that is being extracted.

    Attributes:
        location: the folder or URL.
        layout: the local folder that shards are written to before :meth:`publish`.
        keeps_shards: whether shards stay in ``layout`` once they are committed.
    """

    location: str
    layout: Layout
    keeps_shards: bool

    def info(self) -> dict[str, Any] | None:
        """Return ``CACHE.json``, or None if there is none yet; RecordError if it is corrupt."""

    def plan(self, generation: int) -> Plan | None:
        """Return the plan of a generation, or None if there is none yet; UserError if it is corrupt."""

    def write_plan(self, generation: int, tables: Iterable[pa.Table]) -> Plan:
        """Make ``tables`` the plan of a generation unless one exists already; returns the plan in effect."""

    def commit_record(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        """Return the commit record of a shard if its ids match and its files exist; otherwise None."""

    def is_corrupt(self, shard: int, record: dict[str, Any]) -> bool:
        """Return whether a file of a committed shard does not match the sha256 in its record. Reads whole files."""

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        """Remove ``CACHE.json`` and invalidate the given records of these shards."""

    def lists_plan(self, feature_id: str, plan_id: str) -> bool:
        """Return whether ``CACHE.json`` is valid, has this feature id and lists a generation of this plan."""

    def hold_leases(self, owner: str, lease: float = LEASE) -> AbstractContextManager[None]:
        """Context manager in which this process may acquire claims; on exit, it releases those it holds."""

    def acquire(self, shard: int | None) -> bool:
        """Claim a shard, or the finalization if ``shard`` is None; returns False while another process holds it."""

    def release(self, shard: int | None) -> None:
        """Release a claim. Does nothing if it was taken over or its shard is committed."""

    def publish(self, shard: int) -> None:
        """Publish the shard written to :attr:`layout`, unless its claim was lost."""

    def finalize(self, spec: FeatureSpec, generation: int, plan: Plan, provenance: dict[str, Any]) -> None:
        """Merge the shards of a generation and list it in ``CACHE.json``; call it only with the finalize claim.

        ``CACHE.json`` lists the earlier generations already.
        """

    def tables(self, generation: int) -> tuple[Path, Path]:
        """Return local paths of the manifest and the failures of a complete generation; UserError if one is absent."""

    def labels(self) -> LabelIndex:
        """Return the label sets; UserError if their list is corrupt."""

    def open_labels(self, name: str) -> LabelSet:
        """Return a label set by its name or id; UserError if there is none."""

    def add_labels(self, table: pa.Table, name: str, origin: str) -> LabelEntry:
        """Add a label set, which becomes the current one of its name; return its entry."""

    def cleanup(self) -> None:
        """Remove files that killed processes left in a complete cache, if permissions allow it."""


def open_store(location: str, scratch: str | None = None) -> Store:
    """Open the cache at a path or URL, which need not exist yet.

    Args:
        scratch: for a URL, the folder in which shards are written before the upload; ``None`` uses the system's folder
            for temporary files.

    Raises:
        UserError: the object store cannot be reached or does not support conditional writes.
    """
    if is_url(location):
        from shards.commit.bucket.store import BucketStore

        return BucketStore(location, Path(scratch) if scratch is not None else None)
    return FolderStore(Path(location))
