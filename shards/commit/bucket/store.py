"""The :class:`shards.commit.store.Store` of an object store, for workers that share nothing else.

:class:`BucketStore` takes a URL such as ``s3://bucket/caches/corpus/encoder``.

```
scratch folder: ShardWriter -> 000042.tar, .parquet, .json
bucket: claim under shards/000042.json -> put .tar -> put .parquet -> the claim becomes the record
        ... all shards: claim under CACHE.json -> put manifest, failures -> the claim becomes CACHE.json
```

The bucket contains only the objects of ``docs/format.md``. A killed worker leaves a claim, which does not count as a
record, and files that the next owner of the shard overwrites. Records do not change, so each is read once.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit.bucket.claims import ClaimLost, RemoteClaims
from shards.commit.bucket.objects import Objects
from shards.commit.claims import LEASE, new_owner
from shards.commit.finalize import merge_shards, read_shard_rows, record_matches
from shards.errors import UserError
from shards.files import file_lock, make_folder, translate_os_errors
from shards.format.layout import UTTERANCE_SCHEMA, Layout, Plan, parquet_bytes, read_plan
from shards.format.records import RELEASED, RecordError, is_claim, is_released, seal, unseal_bytes
from shards.format.spec import FeatureSpec
from shards.remote import object_store

SCRATCH = "earshard-scratch-"
READERS = 16  # small objects read concurrently
LISTING_MAX_AGE = 5.0  # seconds for which a shard missing in a listing counts as absent; acquiring it checks again


class BucketStore:
    """A cache below a URL. Its layout is a scratch folder of this process, removed when the process ends."""

    def __init__(self, url: str, scratch: Path | None = None) -> None:
        self.location, self.keeps_shards = url.rstrip("/"), False
        self._objects = connect_objects(self.location)
        parent = scratch or Path(tempfile.gettempdir())
        with translate_os_errors("creating a scratch folder", parent):
            self._scratch = _Scratch(parent)
        self.layout = Layout(self._scratch.path)
        make_folder(self.layout.shards)
        self._claims = RemoteClaims(self._objects, new_owner())
        self._records: dict[int, dict[str, Any]] = {}
        self._invalidated: dict[str, bytes] = {}  # content of objects that were found to be invalid
        self._listed_at: float | None = None

    def info(self) -> dict[str, Any] | None:
        found = self._objects.read("CACHE.json")
        return None if found is None or is_claim(found.data) else unseal_bytes(found.data, "CACHE.json")

    def plan(self) -> Plan | None:
        found = self._objects.read("plan.parquet")
        if found is None:
            return None
        self.layout.plan.write_bytes(found.data)
        return read_plan(self.layout, self.location)

    def write_plan(self, table: pa.Table) -> Plan:
        self._objects.put("plan.parquet", parquet_bytes(table.cast(UTTERANCE_SCHEMA)), None)
        plan = self.plan()
        if plan is None:
            raise UserError(f"the plan of '{self.location}' disappeared while it was written: rerun the extraction")
        return plan

    def commit_record(self, shard: int, feature_id: str, plan_id: str) -> dict[str, Any] | None:
        if self._listed_at is None:
            self._list()
        if shard not in self._records and time.monotonic() - (self._listed_at or 0.0) > LISTING_MAX_AGE:
            self._read_record(shard)
        record = self._records.get(shard)
        if record is None:
            return None
        if not record_matches(record, shard, feature_id, plan_id):
            self._invalidate(shard, seal(record))
            return None
        return record

    def is_corrupt(self, shard: int, record: dict[str, Any]) -> bool:
        files = (("tar", self.layout.tar(shard)), ("parquet", self.layout.rows(shard)))
        return any(
            self._objects.sha256(f"shards/{path.name}", record[kind]["bytes"] + 1) != record[kind]["sha256"]
            for kind, path in files
        )

    def reopen(self, shards: dict[int, dict[str, Any]]) -> None:
        for shard, record in shards.items():
            self._invalidate(shard, seal(record))
        found = self._objects.read("CACHE.json")
        if found is not None and not is_released(found.data):
            self._objects.put("CACHE.json", RELEASED, found.version)

    def is_complete(self, feature_id: str, plan_id: str) -> bool:
        found = self._objects.read("CACHE.json")
        if found is None or is_claim(found.data):
            return False
        with suppress(RecordError):
            info = unseal_bytes(found.data, "CACHE.json")
            if (info.get("feature_id"), info.get("plan_id")) == (feature_id, plan_id):
                return True
        self._invalidated["CACHE.json"] = found.data
        return False

    @contextmanager
    def hold_leases(self, owner: str, lease: float = LEASE) -> Iterator[None]:
        with RemoteClaims(self._objects, owner, lease) as self._claims:
            yield

    def acquire(self, shard: int | None) -> bool:
        name = self._name(shard)
        return self._claims.acquire(name, lambda data: data == self._invalidated.get(name))

    def release(self, shard: int | None) -> None:
        self._claims.release(self._name(shard))

    def publish(self, shard: int) -> None:
        """Upload the shard's files, its record last. Does nothing if another process has taken over the shard."""
        layout, name = self.layout, self._name(shard)
        record = layout.record(shard).read_bytes()
        try:
            for path in (layout.tar(shard), layout.rows(shard)):
                self._claims.put(f"shards/{path.name}", path, claim=name)
            self._claims.commit(name, record)
            self._records[shard] = unseal_bytes(record, name)
        except ClaimLost:
            pass
        finally:
            for path in (layout.tar(shard), layout.rows(shard), layout.record(shard)):
                path.unlink(missing_ok=True)

    def finalize(self, spec: FeatureSpec, plan: Plan, provenance: dict[str, Any]) -> None:
        records = []
        for shard in range(plan.num_shards):
            record = self.commit_record(shard, spec.feature_id, plan.id)
            if record is None:
                raise UserError(f"shard {shard:06d} of '{self.location}' is not committed: rerun the same extraction")
            records.append(record)
        with ThreadPoolExecutor(READERS) as pool:
            tables = list(pool.map(self._read_rows, range(plan.num_shards), records))
        files, info = merge_shards(spec, plan, records, tables, provenance)
        with suppress(ClaimLost):  # the process that took it over finalizes
            for name, data in files.items():
                self._claims.put(name, data, claim="CACHE.json")
            self._claims.commit("CACHE.json", seal(info))

    def cleanup(self) -> None:
        """Do nothing: a complete cache in a bucket has no stray objects."""

    def _name(self, shard: int | None) -> str:
        return "CACHE.json" if shard is None else f"shards/{self.layout.record(shard).name}"

    def _list(self) -> None:
        """Read all records. Invalidates those whose files do not have the recorded sizes."""
        sizes = self._objects.sizes("shards")
        self._listed_at = time.monotonic()
        shards = [int(name[:-5]) for name in sizes if name.endswith(".json") and name[:-5].isdigit()]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self._read_record, shards))
        for shard, record in list(self._records.items()):
            for kind, path in (("tar", self.layout.tar(shard)), ("parquet", self.layout.rows(shard))):
                if sizes.get(path.name) != record[kind]["bytes"]:
                    self._invalidate(shard, seal(record))

    def _read_record(self, shard: int) -> None:
        """Read a shard's record if the shard is committed."""
        name = self._name(shard)
        found = self._objects.read(name)
        if found is None or is_claim(found.data) or found.data == self._invalidated.get(name):
            return
        try:
            record = unseal_bytes(found.data, name)
            if any(not isinstance(record[kind]["bytes"], int) for kind in ("tar", "parquet")):
                raise TypeError
            self._records[shard] = record
        except (RecordError, KeyError, TypeError):
            self._invalidated[name] = found.data

    def _invalidate(self, shard: int, data: bytes) -> None:
        self._records.pop(shard, None)
        self._invalidated[self._name(shard)] = data

    def _read_rows(self, shard: int, record: dict[str, Any]) -> pa.Table:
        path = self.layout.rows(shard)
        found = self._objects.read(f"shards/{path.name}")
        try:
            path.write_bytes(found.data if found else b"")
            return read_shard_rows(path, record)
        except RecordError as error:
            raise UserError(
                f"shard {shard:06d} of '{self.location}' is corrupt: {error}; rerun the same extraction with --verify"
            ) from None
        finally:
            path.unlink(missing_ok=True)


class _Scratch:
    """A temporary folder of this process. A kernel lock marks it as in use; folders of dead processes are removed."""

    def __init__(self, parent: Path) -> None:
        make_folder(parent)
        for folder in parent.glob(f"{SCRATCH}*"):
            _remove_unused(folder)
        self.path = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        lock = ExitStack()
        lock.enter_context(file_lock(self.path / "lock"))
        weakref.finalize(self, _remove_scratch, self.path, lock)


def _remove_scratch(folder: Path, lock: ExitStack) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _remove_unused(folder: Path) -> None:
    with suppress(OSError), file_lock(folder / "lock", wait=False, create=False) as held:
        if held:
            shutil.rmtree(folder, ignore_errors=True)


def connect_objects(url: str) -> Objects:
    """Connect to the objects below ``url`` and check that the store supports conditional writes.

    Raises:
        UserError: the bucket does not exist, access is denied, or the store does not support conditional writes.
    """
    if (scheme := url.partition("://")[0]) not in object_store.SCHEMES:
        raise UserError(
            f"cannot extract to '{url}': earshard does not support conditional writes for {scheme}://, so workers "
            "could overwrite each other's shards; extract to a local root, then run `python -m shards push`"
        )
    objects = Objects(url)
    objects.check_conditions()
    return objects
