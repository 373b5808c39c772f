"""A local copy of a remote cache without the content of its tars: what ``info`` and ``verify`` read from a URL.

Copies a cache, complete or not, into a temporary folder of the same layout. Tars are sparse files of their remote size;
:func:`fetch_tar` downloads one temporarily. Nothing is listed, so a plain web server is sufficient.

No number in a stranger's ``CACHE.json`` is believed: a generation has as many shards as its plan says. Only if the plan
cannot be read are the shards counted in ``CACHE.json`` tried, and no more of them after many that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from shards.errors import UserError
from shards.files import make_folder, scratch_folder, translate_os_errors
from shards.format.layout import Layout, read_plan
from shards.format.records import MAX_JSON, CacheInfo, FileInfo, Generation, RecordError, ShardRecord, is_claim, unseal
from shards.labels.store import INDEX, read_index
from shards.remote.client import Remote

READERS = 16  # files fetched at once
MAX_ABSENT = 4 * READERS  # shards without a record, after which no further ones are tried if there is no plan


@contextmanager
def snapshot(url: str, tables: bool = True) -> Iterator[Path]:
    """Copy the remote cache into a temporary folder, removed at the end of the block. Tars are sparse files.

    Args:
        tables: also fetch the tables and shards of the generations that ``CACHE.json`` lists, and all labels. False
            fetches ``CACHE.json``, ``LABELS.json``, and plan and records of unfinished generations.

    Raises:
        UserError: there is no cache at ``url``, or it cannot be reached.
    """
    with (
        scratch_folder("earshard-remote-") as folder,
        translate_os_errors("reading a remote cache", folder),
    ):
        copy = _Copy(Remote(url), Layout(folder))
        for each in copy.layout.folders:
            make_folder(each)
        copy.fetch_all(tables)
        yield copy.layout.path


@contextmanager
def fetch_tar(url: str, path: Path) -> Iterator[Path]:
    """Download the tar that ``path`` in a :func:`snapshot` represents; removed at the end of the block."""
    whole = path.with_suffix(".whole")
    try:
        with open(whole, "wb") as file:
            Remote(url).fetch(f"shards/{path.name}", file, path.stat().st_size)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


class _Copy:
    def __init__(self, remote: Remote, layout: Layout) -> None:
        self.remote, self.layout = remote, layout

    def fetch_all(self, tables: bool) -> None:
        layout = self.layout
        complete = self.fetch(layout.cache)
        listed = self._listed_generations()
        number = 0 if tables else len(listed)
        first = 0 if not number else listed[-1].first_shard + listed[-1].shards
        with ThreadPoolExecutor(READERS) as pool:
            while True:
                entry = listed[number] if number < len(listed) else None
                found = self.fetch(layout.plan(number), entry.files.plan if entry else None)
                if number == 0 and not found and not complete:
                    raise UserError(
                        f"'{self.remote.url}' is not a cache: it has neither CACHE.json nor plans/000.parquet"
                    )
                if entry is None and not found:
                    break
                if entry is not None:
                    self.fetch(layout.manifest(number), entry.files.manifest)
                    self.fetch(layout.failures(number), entry.files.failures)
                after = self._fetch_shards(pool, number, entry, first, tables)
                if after is None:
                    break
                number, first = number + 1, after
            self._fetch_labels(pool, tables)

    def _listed_generations(self) -> Sequence[Generation]:
        try:
            return CacheInfo.model_validate(unseal(self.layout.cache)).generations
        except (OSError, RecordError, ValidationError):
            return ()

    def _fetch_shards(
        self, pool: ThreadPoolExecutor, number: int, entry: Generation | None, first: int, tables: bool
    ) -> int | None:
        """Fetch the shards of a generation; return the shard after them, None if unknown."""
        end = None if entry is None else first + entry.shards
        try:
            shards = read_plan(self.layout.plan(number), self.remote.url).shards
            limit = len(shards)
            if shards.start != first:
                raise UserError("the plan belongs to another generation")
        except (UserError, OSError):
            if end is None:
                return None
            shards, limit = range(first, end), MAX_ABSENT
        absent, fetch = 0, self._fetch_shard if tables else self._fetch_record
        for start in range(0, len(shards), READERS):
            found = list(pool.map(fetch, shards[start : start + READERS]))
            absent = 0 if any(found) else absent + len(found)
            if absent > limit:
                break
        return shards.stop if end is None else end

    def _fetch_record(self, shard: int) -> bool:
        return self.fetch(self.layout.record(shard))

    def _fetch_shard(self, shard: int) -> bool:
        layout = self.layout
        if not self._fetch_record(shard):
            return False
        try:
            record = ShardRecord.model_validate(unseal(layout.record(shard)))
        except (RecordError, ValidationError):  # its files will not be read
            return True
        self.fetch(layout.rows(shard), record.parquet)
        size = self.remote.size(f"shards/{layout.tar(shard).name}")
        if size is not None:
            _make_sparse(layout.tar(shard), size, record.tar)
        return True

    def _fetch_labels(self, pool: ThreadPoolExecutor, tables: bool) -> None:
        if self.fetch(self.layout.labels / INDEX) and tables:
            try:
                sets = read_index(self.layout.path).sets
            except UserError:  # reported by the reader of the copy
                return
            list(pool.map(lambda entry: self.fetch(self.layout.labels / entry.file.name, entry.file), sets))

    def fetch(self, path: Path, wanted: FileInfo | None = None) -> bool:
        """Fetch one file. Returns False if it does not exist or is a claim.

        A file of another size than ``wanted`` is represented by a sparse file: its content does not matter.
        """
        name = str(path.relative_to(self.layout.path))
        size = self.remote.size(name)
        if size is None:
            return False
        if wanted is not None and size != wanted.bytes:
            _make_sparse(path, size, wanted)
            return True
        with open(path, "wb") as file:
            self.remote.fetch(name, file, min(size, MAX_JSON + 1) if path.suffix == ".json" else size)
        if path.suffix == ".json" and is_claim(path.read_bytes()):
            path.unlink()
            return False
        return True


def _make_sparse(path: Path, size: int, wanted: FileInfo) -> None:
    """Create a file of ``size`` bytes without content. A size that no disk has is reduced: it stays another one."""
    with open(path, "wb") as file:
        file.truncate(min(size, max(wanted.bytes + 1, 1 << 40)))
