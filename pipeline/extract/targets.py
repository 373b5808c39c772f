"""The caches that an extraction fills, and what they hold: keys, audio ids, failed attempts, texts of the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import ExtractConfig
from pipeline.extract.listing import Listing
from pipeline.sources import Source
from shards.commit.store import Store
from shards.errors import UserError
from shards.format.layout import Layout, current_rows
from shards.format.records import RecordError
from shards.format.schemas import PLAN_SCHEMA
from shards.format.spec import FeatureSpec
from shards.labels.store import SOURCE

LABEL_COLUMNS = ("text", "speaker", "split")  # of the source


@dataclass(frozen=True)
class Target:
    """One cache to fill: its layer, its location and its spec."""

    layer: int
    store: Store
    spec: FeatureSpec

    @property
    def layout(self) -> Layout:
        """The local folder into which shards are written."""
        return self.store.layout


def held_keys(target: Target, config: ExtractConfig, source: Source, listing: Listing) -> pa.Array | None:
    """Return the keys that a cache holds or has tried, None if there is no complete cache.

    Raises:
        UserError: the cache is corrupt, has another spec, or was made from another source.
    """
    where = target.store.location
    try:
        info = target.store.info()
    except RecordError as error:
        raise UserError(
            f"'{where}/CACHE.json' is corrupt ({error}): delete that file and rerun the extraction; shards are kept"
        ) from None
    if info is None:
        return None
    found = FeatureSpec.parse(info.get("spec"), f"'{where}/CACHE.json'")
    if found.feature_id != target.spec.feature_id:
        raise UserError(
            f"'{where}' holds features with another spec ({'; '.join(found.differences(target.spec))}): choose another "
            "root or move the folder away"
        )
    planned = planned_audio(target, len(info["generations"]))
    recorded = info["generations"][-1]["provenance"].get("source") or {}
    kind, root = recorded.get("kind"), recorded.get("root")
    keys: pa.Array = planned["key"].combine_chunks()
    other_root = root is not None and source.root is not None and root != str(source.root.resolve())
    strange = other_root and not (pc.any(pc.is_in(listing.table["key"], value_set=keys)).as_py() or False)
    if (kind is not None and kind != config.source.kind) or strange:
        whose = f"a source of kind {kind}" if not strange else f"another source, '{root}'"
        raise UserError(f"'{where}' was made from {whose}: set source.name to a name of its own for this corpus")
    return keys


def planned_audio(target: Target, generations: int) -> pa.Table:
    """Return ``key`` and ``audio_id`` of everything that the first generations hold or have tried, one row per key."""
    tables, keys, failed = [], [], []
    for generation in range(generations):
        table, lost = (_read_columns(target, path, names) for path, names in zip(
            target.store.tables(generation), (["key", "audio_id"], ["key"]), strict=True
        ))  # fmt: skip
        lost = lost["key"]
        if len(lost):
            plan = target.store.plan(generation)
            assert plan is not None
            planned = plan.columns("key", "audio_id")
            table = pa.concat_tables([table, planned.filter(pc.is_in(planned["key"], value_set=lost.combine_chunks()))])
        tables.append(table)
        keys.append(table["key"])
        failed.append(pa.chunked_array([], pa.string()))
    if not tables:
        return PLAN_SCHEMA.empty_table().select(["key", "audio_id"])
    current = [table.filter(pa.array(rows)) for table, rows in zip(tables, current_rows(keys, failed), strict=True)]
    return pa.concat_tables(current) if generations > 1 else tables[0]


def _read_columns(target: Target, path: Path, names: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        where = target.store.location
        raise UserError(
            f"'{path.parent.name}/{path.name}' of '{where}' cannot be read ({type(error).__name__}): run "
            f"`python -m pipeline repair {where}`"
        ) from None


def failed_attempts(target: Target, generations: int) -> dict[str, int]:
    """Return the number of failed attempts of each utterance that has no features, by key."""
    found: dict[str, int] = {}
    for generation in range(generations):
        manifest, failures = target.store.tables(generation)
        for row in _read_columns(target, failures, ["key", "attempt"]).to_pylist():
            found[row["key"]] = row["attempt"]
        if found:
            keys = _read_columns(target, manifest, ["key"])["key"]
            failed = pa.array(list(found), pa.string())
            for key in failed.filter(pc.is_in(failed, value_set=keys.combine_chunks())).to_pylist():
                del found[key]
    return found


class LabelLookup:
    """Texts of the source's newest label set by key; opened at the first use, and sorted by key as it is stored."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._table: pa.Table | None = None

    def find(self, keys: list[str]) -> list[dict[str, Any]]:
        """Return text, speaker and split of each key; {} for a key without labels."""
        if self._table is None:
            self._table = self._store.open_labels(SOURCE).table.select(["key", *LABEL_COLUMNS]).combine_chunks()
        column = self._table["key"]
        found = []
        for key in keys:
            low, high = 0, len(column)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if column[middle].as_py() < key else (low, middle)
            row = self._table.slice(low, 1).to_pylist()
            found.append(row[0] if row and row[0]["key"] == key else {})
        return found
