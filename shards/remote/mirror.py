"""Local mirrors of remote caches: prefetches whole shards into a local folder and verifies them before use.

:class:`Mirror` takes the URL of a complete cache (``shards/remote/client.py``) and fills a local folder of the same
layout. A shard appears in the folder once it is complete and is removed when its space is needed.

```
CACHE.json -> manifest.parquet -> shards/000042.json (the sha256) -> 000042.part --hash, rename--> 000042.tar
```

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
from shards.remote.client import Remote, TransientError

BUDGET_GB = 50.0
FETCHERS = 4  # concurrent background fetches per process
POLL = 0.02  # seconds between checks for space


class Mirror:
    """A remote cache and the local folder that holds a part of it. Create it with :meth:`open`.

    Attributes:
        url: URL of the cache folder, without a trailing slash.
        folder: the local folder, named by the sha256 of ``CACHE.json``: a replaced cache gets a new folder.
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
        """Fetch ``CACHE.json`` and the manifest of the cache at ``url``. Shards are fetched on demand.

        Args:
            root: the folder of all mirrors; ``None`` uses ``EARSHARD_CACHE``.
            budget: bytes; ``None`` uses ``EARSHARD_CACHE_GB``.

        Raises:
            UserError: the cache does not exist or cannot be reached, or the local folder is not writable.
        """
        root = Path(root or os.environ.get("EARSHARD_CACHE") or "~/.cache/earshard").expanduser()
        remote = Remote(url)
        data, info = fetch_info(remote)
        folder = root / hashlib.sha256(data).hexdigest()[:32]
        with translate_os_errors("mirroring a remote cache", root):
            make_folder(folder / "shards")
            _save(folder / "CACHE.json", data)
        mirror = cls(remote.url, folder, _budget() if budget is None else budget)
        manifest, path = info.files["manifest.parquet"], mirror.layout.manifest
        if not (path.is_file() and path.stat().st_size == manifest.bytes and file_sha256(path) == manifest.sha256):
            path.unlink(missing_ok=True)
            mirror._fetch(path, lambda: manifest, needed=True)
        return mirror

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.url, self.folder, self.budget)

    def detach(self) -> None:
        """Drop connections, threads and requests. Call it in a forked process."""
        self._lock = threading.Lock()
        self._remote = Remote(self.url)
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
        return self._fetch(self.layout.tar(shard), lambda: self._tar_info(shard), needed, reserve=True)

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
        try:
            record = ShardRecord.model_validate(unseal(path))
        except (FileNotFoundError, RecordError, ValidationError):
            data, record = fetch_record(self._remote, shard, self._info)
            _save(path, data)
        return record.tar

    def _fetch(self, path: Path, file_info: Callable[[], FileInfo], needed: bool, reserve: bool = False) -> bool:
        """Fetch one file, or wait for the process that is fetching it. ``reserve`` counts it towards the budget."""
        part, lock = path.with_suffix(".part"), path.with_suffix(".lock")
        with suppress(FileNotFoundError):
            os.utime(path)  # the time of last use
            return True
        # A separate lock file: waiting for a lock on the data file would also wait for its readers.
        with translate_os_errors("storing a part of a remote cache", self.folder), file_lock(lock, wait=needed) as held:
            if not held:
                return False
            try:
                if path.exists():
                    return True
                file, name = file_info(), str(path.relative_to(self.folder))
                part.unlink(missing_ok=True)  # left by a killed process
                # Created at its full size while space is reserved, so that a running fetch counts in full.
                space = self.reserve_space(file.bytes, needed) if reserve else None
                return self._remote.download(name, path, part, file.bytes, file.sha256, space)
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
            info = CacheInfo.model_validate(unseal_bytes(data, "CACHE.json"))
            info.files["manifest.parquet"], info.files["failures.parquet"], info.counts["shards"], info.counts["bytes"]
            return data, info
        except RecordError as error:
            raise TransientError(str(error)) from None
        except (ValidationError, KeyError):
            raise UserError(
                f"'{remote.url}' has a CACHE.json of another format: use a cache that earshard extracted"
            ) from None

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
        if (record.feature_id, record.plan_id, record.shard) != (info.feature_id, info.plan_id, shard):
            raise TransientError("it belongs to another cache")
        return data, record

    return remote.read(name, MAX_JSON + 1, parse_record)


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
    """Return (time of last use in ns, bytes, path) of all shards, complete or not, least recently used first."""
    found = []
    for path in root.glob("*/shards/*"):
        # A .part file that disappeared since the listing has probably become the tar.
        for name in {".tar": [path], ".part": [path, path.with_suffix(".tar")]}.get(path.suffix, []):
            with suppress(FileNotFoundError):
                stat = name.stat()
                found.append((stat.st_mtime_ns, stat.st_size, name))
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
