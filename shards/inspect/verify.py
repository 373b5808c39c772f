"""Verifies a cache: compares every file with what the other files record about it.

    python -m shards verify CACHE --deep

Takes an untrusted cache folder or its URL; returns a list of problems (``shards/inspect/findings.py``), empty if the
cache is valid and complete. The fast check reads everything except the tars, whose sizes it compares. The deep check
also rehashes every tar (of a remote cache, downloaded whole, one at a time) and compares each of its members with its
manifest row.

A generation that ``CACHE.json`` does not list is unfinished. Its plan and its committed shards are checked; that shards
are missing is a problem only if there is no ``CACHE.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from shards.commit.finalize import COUNTS, count_current
from shards.errors import UserError, first_validation_error
from shards.files import is_full
from shards.format.layout import Layout, manifest_id, shard_number
from shards.format.records import CacheInfo, Generation, RecordError, ShardRecord
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, UNKNOWN_AUDIO, read_parquet
from shards.format.spec import SCHEMA_VERSION, FeatureSpec
from shards.format.variants import are_variants, base_keys
from shards.inspect.findings import Findings, Problem, ProgressCallback
from shards.inspect.label_check import check_label_sets
from shards.inspect.snapshot import fetch_tar, snapshot
from shards.inspect.tar_check import TarFile, first_bad_row, first_bad_utterance
from shards.remote.client import is_url

COPIED_COLUMNS = ["key", "id", "audio", "shard", "row"]  # columns that a manifest row copies from its plan row


def verify(path: str | Path, deep: bool = False, progress: ProgressCallback | None = None) -> list[Problem]:
    """Return every problem of the cache at a path or URL. An incomplete cache has at least one.

    Args:
        deep: also rehash every tar and compare every member with its row.
        progress: called with (bytes read, total bytes to read).

    Raises:
        UserError: the folder does not exist, is not a cache, or has another format.
    """
    if is_url(path):
        with snapshot(str(path)) as copy:
            return _Audit(Layout(copy), str(path), deep, progress, partial(fetch_tar, str(path))).run()
    layout = Layout(Path(path))
    if not layout.path.is_dir():
        raise UserError(
            f"cache folder '{layout.path}' does not exist: pass a cache folder, such as caches/CORPUS/ENCODER"
        )
    if not (layout.cache.exists() or layout.plan(0).exists() or any(layout.shards.glob("*.json"))):
        raise UserError(
            f"'{layout.path}' is not a cache: it has neither CACHE.json nor plans/000.parquet; run `make extract`"
        )
    return _Audit(layout, str(path), deep, progress).run()


@dataclass
class _Part:
    """One generation, as far as its files can be trusted.

    Attributes:
        entry: its entry in ``CACHE.json``; None if it is unfinished.
        plan: rows of its plan; None if the plan cannot be trusted.
        shards: the shards to check: those of the plan or, without a plan, those that have a record.
        keys: keys of its manifest and of its failures; None where these cannot be trusted.
    """

    number: int
    entry: Generation | None
    plan_id: str | None = None
    plan: pa.Table | None = None
    shards: Sequence[int] = ()
    keys: list[pa.ChunkedArray | None] = field(default_factory=lambda: [None, None])


class _Audit:
    def __init__(
        self,
        layout: Layout,
        name: str,
        deep: bool,
        progress: ProgressCallback | None,
        open_tar: Callable[[Path], AbstractContextManager[Path]] = nullcontext,
    ) -> None:
        self.layout, self.name, self.deep, self.open_tar = layout, name, deep, open_tar
        self.findings = Findings(layout.path, progress)
        self.spec: FeatureSpec | None = None
        self.feature_id: str | None = None
        self.records: dict[int, ShardRecord] = {}

    def run(self) -> list[Problem]:
        info = self._info()
        self._read_records()
        self.feature_id = info.feature_id if info else _most_common(r.feature_id for r in self.records.values())
        tables = [path(0).parent for path in (self.layout.plan, self.layout.manifest, self.layout.failures)]
        read = [*tables, self.layout.shards, self.layout.labels]
        self.findings.expect(path for folder in read for path in folder.glob("*.parquet"))
        if self.deep:
            self.findings.expect(self.layout.shards.glob("*.tar"))
        listed = info.generations if info else []
        parts: list[_Part] = []
        expected: list[range] = []
        first: int | None = 0
        for number in range(max(len(listed), self.layout.num_plans(), 1)):
            part = _Part(number, listed[number] if number < len(listed) else None)
            if first is None:
                break
            after = self._read_plan(part, first)
            self._check_generation(part, info)
            part.plan = None  # the plans of all generations need not fit into memory together
            expected.append(range(first, after if after is not None else 1 << 62))
            parts.append(part)
            first = after
        self._check_unexpected_files(expected, tables, len(parts))
        check_label_sets(self.findings, self.layout.labels, self.deep, info is not None)
        if info:
            self._check_totals(info, parts[: len(listed)])
        return self.findings.problems

    def _info(self) -> CacheInfo | None:
        path = self.layout.cache
        tree = self.findings.read_sealed(path, None)
        if tree is None:
            if not path.exists():
                self.findings.report(None, path, "is missing: the extraction is not complete")
            return None
        spec = tree.get("spec")
        for version in (tree.get("schema_version"), spec.get("schema_version") if isinstance(spec, dict) else None):
            if isinstance(version, int) and version != SCHEMA_VERSION:
                FeatureSpec.parse({"schema_version": version}, f"'{self.name}/{path.name}'")  # raises UserError
        try:
            info = CacheInfo.model_validate(tree)
            self.spec = FeatureSpec.parse(info.spec, f"'{path.name}'")
        except ValidationError as error:
            self.findings.report(None, path, f"has missing or invalid fields: {first_validation_error(error)}")
            return None
        except UserError as error:
            self.findings.report(None, path, f"has missing or invalid fields: {error}")
            return None
        if self.spec.feature_id != info.feature_id:
            self.findings.report(None, path, "has a feature id that does not match its spec")
        return info

    def _read_records(self) -> None:
        for path in sorted(self.layout.shards.glob("*.json")):
            shard = shard_number(path.stem)
            if shard is None or not path.is_file():
                continue
            tree = self.findings.read_sealed(path, shard)
            if tree is None:
                continue
            try:
                record = ShardRecord.model_validate(tree)
            except ValidationError as error:
                self.findings.report(shard, path, f"has missing or invalid fields: {first_validation_error(error)}")
                continue
            if record.schema_version != SCHEMA_VERSION:
                self.findings.report(shard, path, f"has cache format {record.schema_version}, not {SCHEMA_VERSION}")
                continue
            self.records[shard] = record

    def _read_plan(self, part: _Part, first: int) -> int | None:
        """Read the plan of a generation into ``part``; return the first shard after the generation, None if unknown."""
        path, entry = self.layout.plan(part.number), part.entry
        end = None if entry is None else first + entry.shards
        part.plan_id = entry.plan_id if entry else None
        part.shards = sorted(s for s in self.records if first <= s and (end is None or s < end))
        if entry is not None:
            if not self.findings.check_file(path, entry.files.plan):
                return end
            if entry.files.plan.sha256 != entry.plan_id:
                self.findings.report(
                    None, self.layout.cache, f"has two hashes for the plan of generation {part.number}"
                )
        try:
            found = entry.plan_id if entry else self.findings.hash_file(path)
            plan = read_parquet(path, PLAN_SCHEMA)
        except (RecordError, OSError) as error:
            self.findings.report_error(None, path, error)
            return end
        if bad := first_bad_utterance(plan, first):
            self.findings.report(None, path, bad)
            return end
        shards = range(first, plan["shard"][-1].as_py() + 1 if len(plan) else first)
        if entry is None:
            part.plan_id = _most_common(self.records[s].plan_id for s in part.shards if s in shards) or found
            if part.plan_id != found:
                self.findings.report(
                    None, path, "is not the plan that the shards were extracted with (its sha256 differs)"
                )
                return None
        elif len(shards) != entry.shards:
            what = f"says that generation {part.number} has {entry.shards} shards, its plan has {len(shards)}"
            self.findings.report(None, self.layout.cache, what)
        part.plan, part.shards = plan, shards
        return shards.stop if entry is None else end

    def _check_generation(self, part: _Part, info: CacheInfo | None) -> None:
        entry, path = part.entry, self.layout.manifest(part.number)
        manifest = self.findings.read_table(path, entry.files.manifest, MANIFEST_SCHEMA, None) if entry else None
        part.keys[0] = manifest["key"] if manifest is not None else None
        samples = pc.sum(manifest["samples"]).as_py() or 0 if manifest is not None else None
        bounds = _bounds(manifest["shard"] if manifest is not None else None, part.shards)
        planned = _bounds(part.plan["shard"] if part.plan is not None else None, part.shards)
        for index, shard in enumerate(part.shards):
            record, rows = self.records.get(shard), None
            if record is not None:
                plan = None if part.plan is None else part.plan.slice(*planned[index])
                rows = self._check_shard(shard, record, part.plan_id, plan)
            elif entry is not None or info is None:
                self._report_absent(shard)
            if rows is not None and manifest is not None and not manifest.slice(*bounds[index]).equals(rows):
                self.findings.report(None, path, f"does not contain the rows of shard {shard:06d}")
                manifest = None  # report it only once
        if manifest is not None and sum(size for _, size in bounds) != len(manifest):
            self.findings.report(None, path, "has rows of shards that are not in the plan")
        if entry is not None and info is not None:
            self._check_entry(part, entry, info, samples)

    def _report_absent(self, shard: int) -> None:
        path = self.layout.record(shard)
        if not path.exists():
            self.findings.report(shard, path, "is missing: the shard is not committed")
        elif not path.is_file():
            self.findings.report(shard, path, "is not a regular file")

    def _check_shard(
        self, shard: int, record: ShardRecord, plan_id: str | None, planned: pa.Table | None
    ) -> pa.Table | None:
        """Check one shard; returns its rows if they can be trusted."""
        layout, path = self.layout, self.layout.record(shard)
        if record.shard != shard:
            self.findings.report(shard, path, f"is the record of shard {record.shard:06d}")
        if record.feature_id != self.feature_id:
            what = f"belongs to other features ({record.feature_id[:8]}, not {str(self.feature_id)[:8]})"
            self.findings.report(shard, path, what)
        if record.plan_id != plan_id:
            self.findings.report(shard, path, f"belongs to another plan ({record.plan_id[:8]}, not {str(plan_id)[:8]})")
        rows = self.findings.read_table(layout.rows(shard), record.parquet, MANIFEST_SCHEMA, shard)
        tar = layout.tar(shard)
        try:
            size = tar.stat().st_size
        except OSError as error:
            self.findings.report_error(shard, tar, error)
            return rows
        size_matches = size == record.tar.bytes
        if not size_matches:
            self.findings.report(shard, tar, f"has {size} bytes, not {record.tar.bytes}")
        if rows is not None:
            if rows.num_rows != record.rows or (pc.sum(rows["frames"]).as_py() or 0) != record.frames:
                self.findings.report(shard, path, "disagrees with its parquet file on the number of rows or frames")
            if bad := first_bad_row(rows, shard, self.spec, record.tar.bytes):
                self.findings.report(shard, layout.rows(shard), bad[1], bad[0])
                rows = None
            elif planned is not None and not _follows_plan(record, rows, planned):
                self.findings.report(
                    shard, layout.rows(shard), "and the failures in its record do not add up to the planned rows"
                )
        if self.deep:
            try:
                with self.open_tar(tar) as local:
                    found = self.findings.hash_file(local)
                    if size_matches and found != record.tar.sha256:
                        self.findings.report(shard, tar, "does not match its sha256")
                    with TarFile(local) as file:
                        for key, what in file.problems(rows, self.spec):
                            self.findings.report(shard, tar, what, key)
            except OSError as error:
                if is_full(error):  # the disk of this machine, to which a remote tar is copied
                    raise
                self.findings.report_error(shard, tar, error)
        return rows

    def _check_entry(self, part: _Part, entry: Generation, info: CacheInfo, samples: int | None) -> None:
        """Compare an entry of CACHE.json and the failures of the generation with the records of its shards."""
        path, failures = self.layout.cache, self.layout.failures(part.number)
        table = self.findings.read_table(failures, entry.files.failures, FAILURE_SCHEMA, None)
        part.keys[1] = table["key"] if table is not None else None
        records = [self.records[shard] for shard in part.shards if shard in self.records]
        if len(records) < len(part.shards) or len(records) != entry.shards:
            return
        failed = [failure.model_dump() for record in records for failure in record.failures]
        if table is not None and table.to_pylist() != failed:
            self.findings.report(None, failures, "does not contain the failures of the records")
        found = {
            "shards": len(records),
            "utterances": sum(record.rows for record in records),
            "failures": len(failed),
            "frames": sum(record.frames for record in records),
            "samples": samples,
            "bytes": sum(record.tar.bytes for record in records),
            "planned": None if part.plan is None else len(part.plan),
        }
        if (keys := part.keys[0]) is not None:
            found["variants"] = int(are_variants(keys).sum()) or (0 if "variants" in entry.counts else None)
        for name, value in found.items():
            if value is not None and entry.counts.get(name) != value:
                counted = f"counts {entry.counts.get(name)} {name} in generation {part.number}"
                self.findings.report(None, path, f"{counted}, the shards have {value}")
        before = info.generations[part.number - 1].manifest_id if part.number else ""
        tars = [record.tar.sha256 for record in records]
        if manifest_id(info.feature_id, before, entry.plan_id, tars) != entry.manifest_id:
            what = f"has a manifest id of generation {part.number} that does not match its shards"
            self.findings.report(None, path, what)

    def _check_totals(self, info: CacheInfo, parts: Sequence[_Part]) -> None:
        path = self.layout.cache
        found = {name: sum(entry.counts.get(name, 0) for entry in info.generations) for name in COUNTS}
        manifests, failed = ([part.keys[kind] for part in parts if part.keys[kind] is not None] for kind in (0, 1))
        if len(manifests) == len(failed) == len(info.generations):
            found |= {"variants": 0, **count_current(manifests, failed)}
            self._check_variants(manifests, failed)
        for name, value in found.items():
            counted = info.counts.get(name, 0 if name == "variants" else None)
            if counted != value:
                self.findings.report(None, path, f"counts {counted} {name}, the generations have {value}")

    def _check_variants(self, manifests: Sequence[pa.ChunkedArray], failed: Sequence[pa.ChunkedArray]) -> None:
        """Report variants of utterances that neither their generation nor an earlier one planned."""
        known: list[pa.Array] = []
        for number, keys in enumerate(manifests):
            known += [*keys.chunks, *failed[number].chunks]
            if (variants := are_variants(keys)).any():
                varied = keys.filter(pa.array(variants))
                planned = pa.chunked_array(known, pa.string()).combine_chunks()
                found = pc.is_in(base_keys(varied), value_set=planned)
                if not pc.all(found).as_py():
                    key = varied[pc.index(found, False).as_py()].as_py()
                    what = "is a variant of an utterance that the cache does not have"
                    self.findings.report(None, self.layout.manifest(number), what, key)

    def _check_unexpected_files(self, shards: Sequence[range], tables: Sequence[Path], generations: int) -> None:
        """Report tars and records outside of the plans: a plain WebDataset reader of ``shards/*.tar`` would read them.

        Also report tables of generations that have no plan.
        """
        for path in sorted([*self.layout.shards.glob("*.tar"), *self.layout.shards.glob("*.json")]):
            shard = shard_number(path.stem)
            if shard is None or not any(shard in numbers for numbers in shards):
                self.findings.report(None, path, "is not a shard of this cache")
        known = {f"{number:03d}.parquet" for number in range(generations)}
        for path in sorted(path for folder in tables for path in folder.glob("*.parquet")):
            if path.name not in known:
                self.findings.report(None, path, "is not a table of a generation of this cache")


def _follows_plan(record: ShardRecord, rows: pa.Table, planned: pa.Table) -> bool:
    """Return whether every planned utterance is either a row or a failure, none is both, and their audio is equal."""
    failed = pa.array([failure.key for failure in record.failures], pa.string())
    lost = pc.is_in(planned["key"], value_set=failed)
    kept = planned.filter(pc.invert(lost))
    copied = kept.select(COPIED_COLUMNS).equals(rows.select(COPIED_COLUMNS))
    if not copied or (pc.sum(lost).as_py() or 0) != len(failed):
        return False
    unknown = pc.equal(kept["audio_id"], pa.scalar(UNKNOWN_AUDIO, pa.binary(32)))
    same = pc.or_(unknown, pc.equal(kept["audio_id"], rows["audio_id"]))
    return bool(pc.all(same, min_count=0).as_py())


def _bounds(column: pa.ChunkedArray | None, shards: Sequence[int]) -> list[tuple[int, int]]:
    """Return first row and number of rows of each shard in an ascending column of shard numbers."""
    if column is None:
        return []
    numbers = np.asarray(shards, dtype=np.int64)
    begin, end = (np.searchsorted(column.to_numpy(), numbers, side) for side in ("left", "right"))
    return [(int(a), max(int(b - a), 0)) for a, b in zip(begin, end, strict=True)]  # negative: not ascending


def _most_common(values: Iterable[str]) -> str | None:
    counted = Counter(values)
    return max(counted, key=lambda value: counted[value], default=None)
