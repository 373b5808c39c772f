"""Copies a grown cache into a new folder without the rows that nobody reads any more.

    python -m shards compact CACHE FOLDER

Superseded rows are left out, and utterances that no current label set names. Features are copied as they are stored and
compared with their checksums; the current label set of each name is copied, too. The new cache has one generation,
whose shards are about as large as the largest one before.

```
plans, manifests, label sets -> plan of one generation -> shards -> label sets -> CACHE.json
```

The plan depends on the old cache alone, so that a repetition continues what was interrupted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.commit.claims import Claims, new_owner
from shards.commit.finalize import commit_record, finalize, remove_stray_files, write_plan
from shards.commit.writer import ShardWriter, StoredMembers
from shards.errors import UserError
from shards.files import (
    TEMPORARY_INFIX,
    atomic_write,
    file_sha256,
    make_folder,
    open_file,
    publish_file,
    temporary_path,
    translate_os_errors,
)
from shards.format.codec import CodecError
from shards.format.layout import Layout, Plan, current_rows, read_plan
from shards.format.records import CacheInfo, FileInfo, RecordError, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, read_parquet
from shards.format.spec import FeatureSpec
from shards.format.tar import BLOCK_SIZE
from shards.format.variants import base_keys
from shards.labels.store import INDEX, SOURCE, LabelEntry, LabelIndex, open_set, read_index, with_set

OTHER_BYTES = 3 * BLOCK_SIZE  # of a row, about: headers and padding of its members, and its JSON


@dataclass(frozen=True)
class Compacted:
    """What :func:`compact` has done.

    Attributes:
        utterances: number of utterances with features in the new cache.
        superseded: number of rows that were left out because their key was planned again.
        unlabeled: number of other utterances that were left out because no current label set names them.
        freed: bytes of the old tars minus those of the new ones.
    """

    utterances: int
    superseded: int
    unlabeled: int
    freed: int


def compact(path: Path, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Compacted:
    """Copy the cache at ``path`` into ``folder``, which is new, empty or an interrupted copy of the same cache.

    Args:
        progress: called with (utterances copied, all).

    Raises:
        UserError: there is no complete cache at ``path``, it is corrupt, or ``folder`` holds something else.
    """
    old, new, owner = _Old(Layout(path)), Layout(folder), new_owner()
    if folder.resolve().is_relative_to(path.resolve()):
        raise UserError(f"'{folder}' lies in the cache that is copied: choose another folder")
    plan_table, rows = old.plan()
    _check_folder(new, plan_table)
    with translate_os_errors("copying the cache", folder):
        make_folder(folder)
        with Claims(owner) as claims:
            if not claims.acquire(new.finalize_claim):
                raise UserError(f"'{folder}' is being written by another process: wait until it has ended")
            remove_stray_files(new)
            plan, done = write_plan(new, 0, [plan_table], owner), 0
            for shard, size in plan.sizes.items():
                if commit_record(new, shard, old.spec.feature_id, plan.id) is None:
                    old.copy_shard(new, plan, shard, rows[done : done + size], owner)
                done += size
                progress(done, len(plan))
            if not new.cache.exists():
                _copy_labels(old.layout, new, old.sets, owner)
            provenance = old.info.generations[-1].provenance | {"compacted_from": old.info.manifest_id}
            counts = finalize(new, old.spec, 0, plan, owner, provenance)["counts"]
    return Compacted(
        utterances=counts["utterances"],
        superseded=old.superseded,
        unlabeled=old.utterances - old.superseded - counts["utterances"],
        freed=old.bytes - counts["bytes"],
    )


class _Old:
    """The cache that is copied: its tables and its current label sets.

    Attributes:
        sets: the current label set of each name, oldest first.
        utterances: number of rows of all manifests.
        superseded: number of superseded rows.
        bytes: size of all tars.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        try:
            self.info = CacheInfo.model_validate(unseal(layout.cache))
        except FileNotFoundError:
            raise UserError(f"'{layout.path}' is not a complete cache: it has no CACHE.json") from None
        except (RecordError, ValueError) as error:
            raise self._corrupt(str(error).split("\n")[0]) from None
        self.spec = FeatureSpec.parse(self.info.spec, f"'{layout.cache}'")
        numbers, files = range(len(self.info.generations)), [each.files for each in self.info.generations]
        self._plans = [self._table(layout.plan(n), PLAN_SCHEMA, files[n].plan) for n in numbers]
        self._failures = [self._table(layout.failures(n), FAILURE_SCHEMA, files[n].failures) for n in numbers]
        manifests = [self._table(layout.manifest(n), MANIFEST_SCHEMA, files[n].manifest) for n in numbers]
        current = np.concatenate(current_rows([each["key"] for each in manifests], [t["key"] for t in self._failures]))
        self.utterances, self.superseded, self.bytes = len(current), int((~current).sum()), 0
        self._manifest = pa.concat_tables(manifests).filter(pa.array(current)).combine_chunks()
        index = read_index(layout.path)
        self.sets: list[LabelEntry] = [entry for entry in index.sets if index.current(entry.name) is entry]
        self._labels: pa.Table | None = None  # the texts of the new shards' JSON members

    def plan(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """Return the plan of the new cache, and the manifest row of each planned utterance; -1 for a failure."""
        nothing = [pa.chunked_array([], pa.string())] * len(self._plans)
        current = current_rows([each["key"] for each in self._plans], nothing)
        pairs = zip(self._plans, current, strict=True)
        planned = pa.concat_tables([table.filter(pa.array(mask)) for table, mask in pairs]).combine_chunks()
        if self.sets:
            planned = planned.filter(self._named(planned["key"])).combine_chunks()
        found = pc.index_in(planned["key"], value_set=self._manifest["key"]).combine_chunks()
        rows: NDArray[np.int64] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        stored, at = pa.array(rows >= 0), pa.array(rows[rows >= 0])
        for name in ("samples", "audio_id"):  # the plan may not have known them
            column, known = planned[name].combine_chunks(), self._manifest[name].take(at).combine_chunks()
            planned = _set(planned, name, pc.replace_with_mask(column, stored, known))
        shard = self._shards(rows)
        planned = _set(planned, "shard", pa.array(shard, pa.int32()))
        row = np.arange(len(shard)) - np.searchsorted(shard, shard)
        return _set(planned, "row", pa.array(row, pa.int32())), rows

    def copy_shard(self, new: Layout, plan: Plan, shard: int, rows: NDArray[np.int64], owner: str) -> None:
        """Write and commit a shard of the new cache from the manifest ``rows`` of its utterances.

        Raises:
            UserError: the features do not match their checksum.
        """
        stored = iter(self._manifest.take(pa.array(rows[rows >= 0])).to_pylist())
        utterances = plan.shard_rows(shard)
        texts = self._texts(plan.shard_table(shard)["key"])
        with ShardWriter(new, shard, self.spec, plan.id, owner) as writer, _Tars(self.layout) as tars:
            for utterance, row, labels in zip(utterances, rows.tolist(), texts, strict=True):
                if row < 0:
                    writer.add_failure(**self._failure(utterance["key"]))
                    continue
                about = next(stored)
                try:
                    payload = tars.read(about["shard"], about["offset"], about["length"])
                    scale = tars.read(about["shard"], about["scale_offset"], about["scale_length"])
                    same = {name: about[name] for name in ("crc32", "frames", "samples", "error", "audio_id")}
                    members = StoredMembers(payload=payload, scale=scale if len(scale) else None, **same)
                    writer.add_stored(utterance, members, labels)
                except (CodecError, OSError) as error:
                    raise self._corrupt(
                        f"utterance '{about['key']}' in shards/{about['shard']:06d}.tar: {error}"
                    ) from None
            writer.commit({"seconds": 0.0})

    def _shards(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Divide the utterances, in order, into shards about as large as the largest one before; int64 [planned]."""
        sizes = np.full(len(rows), OTHER_BYTES)
        stored = rows >= 0
        sizes[stored] += self._manifest["length"].to_numpy()[rows[stored]]
        sizes[stored] += self._manifest["scale_length"].to_numpy()[rows[stored]]
        tars = map(self.layout.tar, range(self.info.counts["shards"]))
        try:
            tar_sizes = [tar.stat().st_size for tar in tars]
        except OSError as error:
            raise self._corrupt(str(error)) from None
        self.bytes, largest = sum(tar_sizes), max(tar_sizes, default=1)
        total = int(sizes.sum())
        starts = np.cumsum(sizes) - sizes
        places = starts * max(round(total / largest), 1) // max(total, 1)
        shards: NDArray[np.int64] = np.unique(places, return_inverse=True)[1].reshape(-1)  # numbered without gaps
        return shards

    def _named(self, keys: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return which ``keys`` a current label set names."""
        named = np.zeros(len(keys), dtype=bool)
        for entry in self.sets:
            labels = open_set(self.layout.path, entry).table
            named |= pc.is_in(base_keys(keys), value_set=labels["key"]).to_numpy()
            if self._labels is None or entry.name == SOURCE:
                self._labels = labels
        return pa.chunked_array([named])

    def _texts(self, keys: pa.ChunkedArray) -> list[dict[str, Any]]:
        """Return for each key the labels for its JSON member: a row of the set of the source, or of the oldest set."""
        if self._labels is None:
            return [{}] * len(keys)
        keys = base_keys(keys)
        table = self._labels.filter(pc.is_in(self._labels["key"], value_set=keys))
        found: dict[str, dict[str, Any]] = {}
        for row in table.to_pylist():
            found.setdefault(row["key"], row)
        return [found.get(key, {}) for key in keys.to_pylist()]

    def _failure(self, key: str) -> dict[str, Any]:
        for table in reversed(self._failures):
            at = pc.index(table["key"], key).as_py()
            if at >= 0:
                failure: dict[str, Any] = table.slice(at, 1).to_pylist()[0]
                return failure
        raise self._corrupt(f"utterance '{key}' of a plan is neither stored nor failed")

    def _table(self, path: Path, schema: pa.Schema, file: FileInfo) -> pa.Table:
        name = path.relative_to(self.layout.path)
        try:
            if file_sha256(path) != file.sha256:
                raise self._corrupt(f"{name} does not match its sha256")
            return read_parquet(path, schema)
        except (OSError, RecordError) as error:
            raise self._corrupt(f"{name}: {error}") from None

    def _corrupt(self, what: str) -> UserError:
        path = self.layout.path
        return UserError(f"the cache '{path}' is corrupt: {what}; run `python -m shards verify {path}`")


class _Tars:
    """Reads bytes of tars; keeps the last one open, because rows come in order."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._shard = layout, -1
        self._file: FileIO | None = None

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, shard: int, offset: int, length: int) -> memoryview:
        """Return ``length`` bytes at ``offset``; OSError if the tar has fewer."""
        if length == 0:
            return memoryview(b"")
        if self._file is None or shard != self._shard:
            self.__exit__()
            self._file, self._shard = open_file(self._layout.tar(shard)), shard
        fd = self._file.fileno()
        if not 0 <= offset <= offset + length <= os.fstat(fd).st_size:
            raise OSError("the tar is shorter than its rows say")
        return memoryview(os.pread(fd, length, offset))


def _set(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _check_folder(new: Layout, plan: pa.Table) -> None:
    """Refuse a folder that holds anything but a copy, interrupted or complete, of this plan."""
    try:
        if read_plan(new.plan(0)).columns(*PLAN_SCHEMA.names).equals(plan) and new.num_plans() == 1:
            return
        ours = False
    except FileNotFoundError:
        ours = all(TEMPORARY_INFIX in path.name or path == new.finalize_claim for path in _files(new.path))
    except UserError:
        ours = False
    if not ours:
        raise UserError(
            f"'{new.path}' is not empty, and it is not an interrupted copy of this cache as it is now: choose another "
            "folder"
        )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _copy_labels(old: Layout, new: Layout, sets: list[LabelEntry], owner: str) -> None:
    for entry in sets:
        path = new.labels / entry.file.name
        partial = temporary_path(path, owner)
        shutil.copyfile(old.labels / entry.file.name, partial)
        publish_file(partial, path, replace=True)
        open_set(new.path, entry)
    if sets:
        atomic_write(new.labels / INDEX, with_set(LabelIndex(sets=tuple(sets[:-1])), sets[-1]), owner)
