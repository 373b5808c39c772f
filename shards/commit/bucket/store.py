"""The :class:`shards.commit.store.Store` of an object store, for workers that share nothing else.

:class:`BucketStore` takes a URL such as ``s3://bucket/caches/corpus/encoder``.

```
scratch folder: ShardWriter -> 000042.tar, .parquet, .json
bucket: claim under shards/000042.json -> put .tar -> put .parquet -> the claim becomes the record
        ... all shards: claim under finish.claim -> put manifest, failures -> put CACHE.json -> release
        label set: put labels/<name>-<id>.parquet -> put labels/LABELS.json if it is as it was read, else again
```

The bucket contains only the objects of ``docs/format.md``. A killed worker leaves a claim, which does not count as a
record, and files that the next owner of the shard overwrites. Records do not change, so each is read once.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit.bucket.claims import ClaimLost, RemoteClaims
from shards.commit.bucket.objects import Objects
from shards.commit.claims import LEASE, new_owner
from shards.commit.finalize import Merger, file_info, lists_plan, provenances, read_shard_rows, record_matches
from shards.errors import UserError
from shards.files import make_folder, scratch_folder, translate_os_errors
from shards.format.layout import Layout, Plan, read_plan, shard_number
from shards.format.records import RELEASED, CacheInfo, FileInfo, RecordError, is_claim, is_released, seal, unseal_bytes
from shards.format.schemas import PLAN_SCHEMA, write_parquet
from shards.format.spec import FeatureSpec
from shards.labels.store import INDEX as LABELS_JSON
from shards.labels.store import (
    LabelEntry,
    LabelFile,
    LabelIndex,
    check_set_name,
    find,
    new_entry,
    open_set,
    parse_index,
    with_set,
)
from shards.labels.table import LabelSet, normalise, write_sorted
from shards.remote import object_store

SCRATCH = "earshard-scratch-"
READERS = 16  # small objects read concurrently
LISTING_MAX_AGE = 5.0  # seconds for which a shard missing in a listing counts as absent; acquiring it checks again


class BucketStore:
    """A cache below a URL. Its layout is a scratch folder of this process, removed when the process ends."""

    def __init__(self, url: str, scratch: Path | None = None) -> None:
        self.location, self.keeps_shards = url.rstrip("/"), False
        self._objects = connect_objects(self.location)
        held = ExitStack()
        with translate_os_errors("creating a scratch folder", scratch or Path()):
            if scratch is not None:
                make_folder(scratch)
            self.layout = Layout(held.enter_context(scratch_folder(SCRATCH, scratch)))
        weakref.finalize(self, held.close)
        for folder in self.layout.folders:
            make_folder(folder)
        self._claims = RemoteClaims(self._objects, new_owner())
        self._records: dict[int, dict[str, Any]] = {}
        self._provenance: dict[str, dict[str, Any]] = {}  # of generations that were listed, by plan id
        self._invalidated: dict[str, bytes] = {}  # content of objects that were found to be invalid
        self._listed_at: float | None = None

    def info(self) -> dict[str, Any] | None:
        found = self._objects.read("CACHE.json")
        if found is None or is_claim(found.data):
            return None
        info = unseal_bytes(found.data, "CACHE.json")
        self._provenance |= provenances(info)
        return info

    def plan(self, generation: int) -> Plan | None:
        path = self.layout.plan(generation)
        found = self._objects.read(f"plans/{path.name}")
        if found is None:
            return None
        if not path.exists() or path.read_bytes() != found.data:
            path.write_bytes(found.data)
        return read_plan(path, self.location)

    def write_plan(self, generation: int, tables: Iterable[pa.Table]) -> Plan:
        path = self.layout.plan(generation)
        write_parquet(path, PLAN_SCHEMA, tables)
        self._objects.put(f"plans/{path.name}", path.read_bytes(), None)
        plan = self.plan(generation)
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

    def lists_plan(self, feature_id: str, plan_id: str) -> bool:
        return lists_plan(self._read_info()[0], feature_id, plan_id)

    def _read_info(self) -> tuple[dict[str, Any] | None, Any]:
        """Return ``CACHE.json`` if it is valid, and the version of the object, None if there is no object."""
        found = self._objects.read("CACHE.json")
        if found is None:
            return None, None
        with suppress(RecordError, ValueError):
            info = unseal_bytes(found.data, "CACHE.json")
            CacheInfo.model_validate(info)
            return info, found.version
        return None, found.version

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

    def finalize(self, spec: FeatureSpec, generation: int, plan: Plan, provenance: dict[str, Any]) -> None:
        claim = self._name(None)
        info, version = self._read_info()
        if lists_plan(info, spec.feature_id, plan.id):
            return
        listed = info["generations"] if info is not None else []
        if len(listed) < generation:
            raise UserError(f"generation {len(listed)} of '{self.location}' is not complete: rerun the same extraction")
        for earlier in range(generation):  # for the keys that this generation supersedes
            self.tables(earlier)
        merger = Merger(self.layout, spec, plan, listed[:generation])
        paths = self.layout.manifest(generation), self.layout.failures(generation)
        kept = self._provenance.get(plan.id, provenance)  # of a generation that was reopened
        content = merger.merge(self._committed(spec, plan), paths, kept)
        with suppress(ClaimLost):  # the process that took it over finalizes
            for path in paths:
                self._claims.put(str(path.relative_to(self.layout.path)), path, claim=claim)
            self._objects.put("CACHE.json", seal(content), version)

    def tables(self, generation: int) -> tuple[Path, Path]:
        paths = self.layout.manifest(generation), self.layout.failures(generation)
        for path in paths:
            if not path.exists():
                name = str(path.relative_to(self.layout.path))
                found = self._objects.read(name)
                if found is None:
                    raise UserError(f"'{self.location}/{name}' does not exist: rerun the same extraction with --verify")
                path.write_bytes(found.data)
        return paths

    def _committed(self, spec: FeatureSpec, plan: Plan) -> Iterator[tuple[dict[str, Any], pa.Table]]:
        """Yield record and rows of each shard, fetched a few at a time."""
        records = []
        for shard in plan.shards:
            record = self.commit_record(shard, spec.feature_id, plan.id)
            if record is None:
                raise UserError(f"shard {shard:06d} of '{self.location}' is not committed: rerun the same extraction")
            records.append(record)
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(records), READERS):
                part = records[start : start + READERS]
                tables = list(pool.map(self._read_rows, plan.shards[start : start + READERS], part))
                yield from zip(part, tables, strict=True)

    def labels(self) -> LabelIndex:
        return self._read_labels()[0]

    def open_labels(self, name: str) -> LabelSet:
        entry = find(self.labels(), name, f"'{self.location}'")
        path = self.layout.labels / entry.file.name
        found = None if path.exists() else self._objects.read(f"labels/{path.name}")
        if found is not None:
            path.write_bytes(found.data)
        return open_set(self.layout.path, entry)

    def add_labels(self, table: pa.Table, name: str, origin: str) -> LabelEntry:
        check_set_name(name, reserved=True)
        table = normalise(table, f"label set '{name}'")
        partial = self.layout.labels / "new.parquet"
        try:
            written = write_sorted(table, partial, f"label set '{name}'")
            return self._put_labels(table, name, origin, partial, written)
        finally:
            partial.unlink(missing_ok=True)

    def _put_labels(
        self, table: pa.Table, name: str, origin: str, partial: Path, written: tuple[str, int, FileInfo]
    ) -> LabelEntry:
        """Upload a written label set and list it; repeated until no other process has listed one in between."""
        while True:
            index, version = self._read_labels()
            current = index.current(name)
            if current is not None and current.id == written[0]:
                return current
            entry = new_entry(index, name, table, origin, written)
            known = next((each for each in index.sets if (each.name, each.id) == (name, entry.id)), None)
            if known is not None:  # an older set becomes the current one again
                entry = entry.model_copy(update={"file": known.file})
            elif self._objects.put(f"labels/{entry.file.name}", partial, None) is None:
                entry = self._adopt(entry, partial)
            if self._objects.put(f"labels/{LABELS_JSON}", with_set(index, entry), version) is not None:
                return entry

    def _adopt(self, entry: LabelEntry, partial: Path) -> LabelEntry:
        """Return ``entry`` with the file that another process has put under its name, or replace that file.

        The same labels can have other bytes, written by another version of pyarrow.
        """
        name = f"labels/{entry.file.name}"
        found = self._objects.read(name)
        if found is not None:
            path = self.layout.labels / entry.file.name
            path.write_bytes(found.data)
            theirs = entry.model_copy(update={"file": LabelFile(name=path.name, **file_info(path).model_dump())})
            with suppress(UserError):
                open_set(self.layout.path, theirs)
                return theirs
            path.unlink()
        self._objects.put(name, partial, found.version if found is not None else None)
        return entry

    def _read_labels(self) -> tuple[LabelIndex, Any]:
        found = self._objects.read(f"labels/{LABELS_JSON}")
        if found is None:
            return LabelIndex(), None
        return parse_index(found.data, f"'{self.location}/labels/{LABELS_JSON}'"), found.version

    def cleanup(self) -> None:
        """Do nothing: a complete cache in a bucket has no stray objects."""

    def _name(self, shard: int | None) -> str:
        return "finish.claim" if shard is None else f"shards/{self.layout.record(shard).name}"

    def _list(self) -> None:
        """Read all records. Invalidates those whose files do not have the recorded sizes."""
        sizes = self._objects.sizes("shards")
        self._listed_at = time.monotonic()
        stems = [shard_number(name.removesuffix(".json")) for name in sizes if name.endswith(".json")]
        shards = [shard for shard in stems if shard is not None]
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
