"""Local mirrors of remote caches: prefetches whole shards into a local folder and verifies them before use.

:class:`Mirror` takes the URL of a complete cache (``shards/remote/client.py``) and fills a local folder of the same
layout. A shard appears in the folder once it is complete and is removed when its space is needed.

```
CACHE.json -> manifests/*.parquet -> shards/000042.json (the sha256) -> 000042.part --hash, rename--> 000042.tar
LABELS.json -> labels/*.parquet
```

A cache that grows keeps its folder: what it had does not change, and a reader keeps the generation that it opened. A
cache whose content was replaced at the same URL gets another folder, so that readers of both are undisturbed.

Ranks, workers and runs on one machine share the folder. The process that locks ``.lock`` fetches the shard, the others
wait. A reader holds a shared lock on the shards that it has mapped; freeing space removes the least recently used
shards and skips locked ones. All locks are kernel locks, so a killed process leaves none.

    EARSHARD_CACHE=/scratch/earshard   the folder (default ~/.cache/earshard)
    EARSHARD_CACHE_GB=200              maximum size of its shards in GB, over all caches (default 50)
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shards.errors import UserError
from shards.files import atomic_write, file_lock, file_sha256, make_folder, open_file, translate_os_errors
from shards.format.layout import Layout
from shards.format.records import (
    MAX_JSON,
    CacheInfo,
    FileInfo,
    RecordError,
    ShardRecord,
    is_claim,
    unseal,
    unseal_bytes,
)
from shards.format.spec import FeatureSpec
from shards.remote.client import Remote, TransientError

CLOCK_SKEW = 60_000_000_000  # nanoseconds between the clocks of this machine and of a file server
BUDGET_GB = 50.0
FETCHERS = 4  # concurrent background fetches per process
POLL = 0.02  # seconds between checks for space


class Mirror:
    """A remote cache and the local folder that holds a part of it. Create it with :meth:`open`.

    Attributes:
        url: URL of the cache folder, without a trailing slash.
        remote: reads the files below it.
        folder: the local folder.
        budget: maximum bytes of all shards in the folder's parent.
        shard_bytes: mean size in bytes of a shard of this cache.
    """

    def __init__(self, url: str, folder: Path, budget: int) -> None:
        self.url, self.folder, self.budget = url, folder, budget
        self.layout = Layout(folder)
        self._info = CacheInfo.model_validate(unseal(self.layout.cache))
        self.shard_bytes = self._info.counts["bytes"] / max(self._info.counts["shards"], 1)
        self.detach()

    @classmethod
    def open(cls, url: str, root: str | Path | None = None, budget: int | None = None) -> Mirror:
        """Fetch ``CACHE.json`` of the cache at ``url``. Tables and shards are fetched on demand.

        Args:
            root: the folder of all mirrors; ``None`` uses ``EARSHARD_CACHE``.
            budget: bytes; ``None`` uses ``EARSHARD_CACHE_GB``.

        Raises:
            UserError: the cache does not exist or cannot be reached, or the local folder is not writable.
        """
        root = Path(root or os.environ.get("EARSHARD_CACHE") or "~/.cache/earshard").expanduser()
        remote = Remote(url)
        data, info = fetch_info(remote)
        with translate_os_errors("mirroring a remote cache", root):
            make_folder(root)
            folder = _prepare_folder(root, data, info)
        return cls(remote.url, folder, _budget() if budget is None else budget)

    def fetch_tables(self, generation: int) -> None:
        """Fetch the manifests and failures of the generations up to ``generation`` unless they are in the folder.

        Raises:
            UserError: a table cannot be fetched.
        """
        if generation >= len(self._info.generations):  # another process has seen the cache grow
            self._info = CacheInfo.model_validate(unseal(self.layout.cache))
        for number, entry in enumerate(self._info.generations[: generation + 1]):
            self.fetch_file(self.layout.manifest(number), entry.files.manifest)
            self.fetch_file(self.layout.failures(number), entry.files.failures)

    def fetch_file(self, path: Path, file: FileInfo) -> None:
        """Fetch a file of the cache unless the folder has it with this size and sha256.

        Raises:
            UserError: it cannot be fetched.
        """
        if not _is_intact(path, file):
            self._fetch(path, lambda: file, is_there=lambda: _is_intact(path, file))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.url, self.folder, self.budget)

    def detach(self) -> None:
        """Drop connections, threads and requests. Call it in a forked process."""
        self._lock = threading.Lock()
        self.remote = Remote(self.url)
        self._requested: deque[int] = deque()
        self._running = 0

    def open_shard(self, shard: int) -> io.FileIO:
        """Open the tar of a shard for reading, fetching it if necessary.

        The shard stays in the folder as long as the file is open or a mapping of it exists.

        Raises:
            UserError: the shard cannot be fetched.
        """
        path = self.layout.tar(shard)
        while True:
            self.fetch(shard)
            with suppress(FileNotFoundError):  # removed meanwhile to free space
                return open_file(path, lock=True)  # a mapping duplicates the descriptor, and so holds the lock

    def fetch(self, shard: int, needed: bool = True) -> bool:
        """Fetch a shard's tar into the folder unless it is there.

        Args:
            needed: False fetches it only if there is space and no other process is fetching it.

        Returns:
            Whether the tar is in the folder.

        Raises:
            UserError: the shard cannot be fetched.
        """
        path = self.layout.tar(shard)
        return _touch(path) or self._fetch(path, lambda: self._tar_info(shard), path.exists, needed, reserve=True)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order, after those requested before."""
        with self._lock:
            self._requested = deque(dict.fromkeys([*self._requested, *shards]))
            more = max(min(FETCHERS, len(self._requested)) - self._running, 0)
            self._running += more
        for _ in range(more):
            # Daemon threads, so that a program can exit without waiting for shards that it will not read.
            threading.Thread(target=self._fetch_requested, name="earshard-fetch", daemon=True).start()

    def cancel_prefetch(self) -> None:
        """Start no further background fetches."""
        with self._lock:
            self._requested.clear()

    def _fetch_requested(self) -> None:
        while True:
            with self._lock:
                if not self._requested:
                    self._running -= 1
                    return
                shard = self._requested.popleft()
            with suppress(Exception):  # the reader that needs the shard retries and reports
                self.fetch(shard, needed=False)

    def _tar_info(self, shard: int) -> FileInfo:
        """Return size and sha256 of a shard's tar from its commit record."""
        path = self.layout.record(shard)
        with suppress(FileNotFoundError, RecordError, ValidationError):
            record = ShardRecord.model_validate(unseal(path))
            if _belongs(record, shard, self._info):
                return record.tar
        data, record = fetch_record(self.remote, shard, self._info)
        _save(path, data)
        return record.tar

    def _fetch(
        self,
        path: Path,
        file_info: Callable[[], FileInfo],
        is_there: Callable[[], bool],
        needed: bool = True,
        reserve: bool = False,
    ) -> bool:
        """Fetch one file, or wait for the process that is fetching it. ``reserve`` counts it towards the budget."""
        part, lock = path.with_suffix(".part"), path.with_suffix(".lock")
        # A separate lock file: waiting for a lock on the data file would also wait for its readers.
        with translate_os_errors("storing a part of a remote cache", self.folder), file_lock(lock, wait=needed) as held:
            if not held:
                return False
            try:
                if is_there():
                    return True
                file, name = file_info(), str(path.relative_to(self.folder))
                part.unlink(missing_ok=True)  # left by a killed process
                if reserve and file.bytes > self.budget:  # before other shards are removed for it
                    raise UserError(
                        f"'{self.url}/{name}' takes {file.bytes / 1e9:.3g} GB, but the local folder is limited to "
                        f"{self.budget / 1e9:.3g} GB: set EARSHARD_CACHE_GB to {1.5 * file.bytes / 1e9:.2g} or more"
                    )
                # Created at its full size while space is reserved, so that a running fetch counts in full.
                space = self.reserve_space(file.bytes, needed) if reserve else None
                return self.remote.download(name, path, part, file.bytes, file.sha256, space)
            finally:
                lock.unlink(missing_ok=True)

    @contextmanager
    def reserve_space(self, size: int, needed: bool) -> Iterator[bool]:
        """Remove the least recently used shards until ``size`` more bytes fit. Yields False if there is no space.

        A needed shard waits for running fetches to complete, because complete shards can be removed. The folder exceeds
        its budget only if readers have mapped all remaining shards.
        """
        root = self.folder.parent
        while True:
            with file_lock(root / "room.lock"):
                stored, under_way = _mirrored_shards(root), False
                excess = sum(taken for _, taken, _ in stored) + size - self.budget
                for _, taken, path in stored:
                    if excess > 0 and _remove_unused(path):
                        excess -= taken
                    elif path.suffix == ".part":
                        under_way = True
                if excess <= 0 or not (needed and under_way):
                    yield needed or excess <= 0
                    return
            time.sleep(POLL)


def fetch_info(remote: Remote) -> tuple[bytes, CacheInfo]:
    """Fetch ``CACHE.json`` of a complete remote cache; returns its bytes and its parsed content.

    Raises:
        UserError: the cache does not exist, is not complete, has another format, or cannot be reached.
    """

    def parse_info(data: bytes) -> tuple[bytes, CacheInfo]:
        if is_claim(data):
            raise UserError(f"the cache '{remote.url}' is not complete: finish its extraction first")
        try:
            tree = unseal_bytes(data, "CACHE.json")
        except RecordError as error:
            raise TransientError(str(error)) from None
        spec = FeatureSpec.parse(tree.get("spec"), f"'{remote.url}/CACHE.json'")
        try:
            info = CacheInfo.model_validate(tree)
            valid = spec.feature_id == info.feature_id and 0 <= info.counts["bytes"] < 1 << 62
        except (ValidationError, KeyError):
            valid = False
        if not valid:
            raise UserError(
                f"'{remote.url}' has a CACHE.json with missing or invalid fields: run `python -m shards verify "
                f"{remote.url}`"
            )
        return data, info

    return remote.read("CACHE.json", MAX_JSON + 1, parse_info)


def fetch_record(remote: Remote, shard: int, info: CacheInfo) -> tuple[bytes, ShardRecord]:
    """Fetch the commit record of a shard of the remote cache that ``info`` describes; returns its bytes and content.

    Raises:
        UserError: the record does not exist, is corrupt, belongs to another cache, or cannot be reached.
    """
    name = f"shards/{shard:06d}.json"

    def parse_record(data: bytes) -> tuple[bytes, ShardRecord]:
        try:
            record = ShardRecord.model_validate(unseal_bytes(data, name))
        except (RecordError, ValidationError) as error:
            raise TransientError(
                str(error) if isinstance(error, RecordError) else "it is not a commit record"
            ) from None
        if not _belongs(record, shard, info):
            raise TransientError("it belongs to another cache")
        return data, record

    return remote.read(name, MAX_JSON + 1, parse_record)


def _belongs(record: ShardRecord, shard: int, info: CacheInfo) -> bool:
    """Return whether a commit record is that of a shard of this cache."""
    plans = [each.plan_id for each in info.generations if each.first_shard <= shard < each.first_shard + each.shards]
    return (record.feature_id, [record.plan_id], record.shard) == (info.feature_id, plans, shard)


def _prepare_folder(root: Path, data: bytes, info: CacheInfo) -> Path:
    """Return the folder of the cache with this ``CACHE.json``; write the file there if the cache is new or has grown.

    The folder is named by generation 0 or, if a cache with other later generations is there, by what comes next.
    """
    names = [*(generation.manifest_id for generation in info.generations), hashlib.sha256(data).hexdigest()]
    for name in names:
        layout = Layout(root / name[:32])
        for each in layout.folders:
            make_folder(each)
        with file_lock(layout.path / "CACHE.lock"):
            before = _mirrored_info(layout)
            if before is None or extends(info, before):
                _save(layout.cache, data)
                return layout.path
            if extends(before, info):  # an outdated answer, or a reader of an earlier state: readers need the newer one
                return layout.path
    raise UserError(f"'{layout.path}' holds another cache than its name says: remove that folder")


def _mirrored_info(layout: Layout) -> CacheInfo | None:
    try:
        return CacheInfo.model_validate(unseal(layout.cache))
    except (FileNotFoundError, RecordError, ValidationError):
        return None


def extends(new: CacheInfo, old: CacheInfo) -> bool:
    """Return whether ``new`` is the cache ``old``, unchanged or with further generations."""
    ids = [[(entry.plan_id, entry.manifest_id, entry.files) for entry in info.generations] for info in (new, old)]
    return new.feature_id == old.feature_id and ids[0][: len(ids[1])] == ids[1]


def require_space(wanted: Sequence[tuple[Mirror, int]], setting: str) -> None:
    """Check that the given number of shards of each mirror fits into the budget together.

    Raises:
        UserError: they do not fit. The message names ``setting``, which should be lowered.
    """
    total = sum(mirror.shard_bytes * count for mirror, count in wanted)
    budget = min((mirror.budget for mirror, _ in wanted), default=0)
    if total > budget:
        raise UserError(
            f"the {sum(count for _, count in wanted)} shards of a window take {total / 1e9:.3g} GB, but the local "
            f"folder is limited to {budget / 1e9:.3g} GB: set EARSHARD_CACHE_GB to {1.5 * total / 1e9:.2g} or more, or "
            f"lower {setting}"
        )


def _save(path: Path, data: bytes) -> None:
    """Write a small file atomically. Safe for concurrent processes and threads."""
    atomic_write(path, data, f"{os.getpid()}-{threading.get_ident()}")


def _touch(path: Path) -> bool:
    """Set the time of last use; returns False if the file does not exist."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _is_intact(path: Path, file: FileInfo) -> bool:
    """Return whether a file exists with this size and sha256."""
    with suppress(OSError):
        return path.stat().st_size == file.bytes and file_sha256(path) == file.sha256
    return False


def _budget() -> int:
    text = os.environ.get("EARSHARD_CACHE_GB") or str(BUDGET_GB)
    try:
        budget = float(text)
        if not 0 < budget < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(f"EARSHARD_CACHE_GB is '{text}': expected a positive number of gigabytes") from None
    return int(budget * 1e9)


def _mirrored_shards(root: Path) -> list[tuple[int, int, Path]]:
    """Return (time of last use in ns, bytes, path) of all shards, complete or not, least recently used first.

    A time in the future is of a clock that was set back since, and counts as long ago: else what is in use would make
    room for it.
    """
    found, latest = [], time.time_ns() + CLOCK_SKEW
    for path in root.glob("*/shards/*"):
        # A .part file that disappeared since the listing has probably become the tar.
        for name in {".tar": [path], ".part": [path, path.with_suffix(".tar")]}.get(path.suffix, []):
            with suppress(FileNotFoundError):
                stat = name.stat()
                used = stat.st_mtime_ns
                found.append((used if used <= latest else 0, stat.st_size, name))
                break
    return sorted(found)


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no reader has mapped, or a .part file that no process is fetching."""
    part = path.suffix == ".part"
    guard = path.with_suffix(".lock") if part else path
    with suppress(FileNotFoundError), file_lock(guard, wait=False, create=part) as held:
        if not held:
            return False
        path.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)
    return True
