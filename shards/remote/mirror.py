"""Remote caches: whole shards fetched ahead of need into a local folder, hashed before anybody sees them.

In: the URL of a complete cache folder (``shards/remote/client.py``). Out: :class:`Mirror`, a local folder of the same
layout in which a shard stands from the moment it is whole until its room is needed.

```
CACHE.json -> manifest.parquet -> shards/000042.json (the sha256) -> 000042.part --hash, rename--> 000042.tar
```

Ranks, workers and runs of one machine share the folder: whoever locks ``.lock`` fetches the shard and the others wait.
A reader keeps a shared lock on what it has mapped; making room removes the least recently used shards and passes over
locked ones. All locks are the kernel's: a killed process leaves none.

    EARSHARD_CACHE=/scratch/earshard   the folder (default ~/.cache/earshard)
    EARSHARD_CACHE_GB=200              most gigabytes of shards in it, over all caches (default 50)
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
FETCHERS = 4  # shards that a process fetches at once, ahead of need
POLL = 0.02  # seconds between looks at fetches whose room is needed


class Mirror:
    """A remote cache, and the local folder that holds a part of it. Make it with :meth:`open`.

    Attributes:
        url: of the cache folder, without a trailing slash.
        folder: the local folder, named by the sha256 of ``CACHE.json``: a cache that was replaced gets another.
        budget: most bytes of shards under the folder's parent.
        shard_bytes: mean size of a shard of this cache.
    """

    def __init__(self, url: str, folder: Path, budget: int) -> None:
        self.url, self.folder, self.budget = url, folder, budget
        self.layout = Layout(folder)
        self._info = CacheInfo.model_validate(unseal(self.layout.cache))
        self.shard_bytes = self._info.counts["bytes"] / max(self._info.counts["shards"], 1)
        self.detach()

    @classmethod
    def open(cls, url: str, root: str | Path | None = None, budget: int | None = None) -> Mirror:
        """Fetch ``CACHE.json`` and the manifest of the cache at ``url``; shards come when they are needed.

        Args:
            root: the folder of all mirrors; ``None`` is ``EARSHARD_CACHE``.
            budget: bytes; ``None`` is ``EARSHARD_CACHE_GB``.

        Raises:
            UserError: there is no such cache, it cannot be reached, or the local folder cannot be written.
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
        """Forget connections, threads and requests: for a process that was forked."""
        self._lock = threading.Lock()
        self._remote = Remote(self.url)
        self._requested: deque[int] = deque()
        self._running = 0

    def open_shard(self, shard: int) -> io.FileIO:
        """The tar of a shard, open for reading, fetched if it is not here; it stays while the file or a mapping lives.

        Raises:
            UserError: it cannot be had.
        """
        path = self.layout.tar(shard)
        while True:
            self.fetch(shard)
            with suppress(FileNotFoundError):  # just made room for another
                return open_file(path, lock=True)  # a mapping duplicates the descriptor, and so holds the lock

    def fetch(self, shard: int, needed: bool = True) -> bool:
        """Have a shard's tar in the folder. Not ``needed``: only if there is room and nobody else fetches it.

        Raises:
            UserError: it cannot be fetched.
        """
        return self._fetch(self.layout.tar(shard), lambda: self._tar_info(shard), needed, reserve=True)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order, after those that were requested before."""
        with self._lock:
            self._requested = deque(dict.fromkeys([*self._requested, *shards]))
            more = max(min(FETCHERS, len(self._requested)) - self._running, 0)
            self._running += more
        for _ in range(more):
            # Daemons: a program that ends does not wait for shards that nobody will read.
            threading.Thread(target=self._fetch_requested, name="earshard-fetch", daemon=True).start()

    def cancel_prefetch(self) -> None:
        """Begin no further fetch in the background."""
        with self._lock:
            self._requested.clear()

    def _fetch_requested(self) -> None:
        while True:
            with self._lock:
                if not self._requested:
                    self._running -= 1
                    return
                shard = self._requested.popleft()
            with suppress(Exception):  # whoever needs the shard tries again, and reports
                self.fetch(shard, needed=False)

    def _tar_info(self, shard: int) -> FileInfo:
        """Size and sha256 of a shard's tar, by its commit record."""
        path = self.layout.record(shard)
        try:
            record = ShardRecord.model_validate(unseal(path))
        except (FileNotFoundError, RecordError, ValidationError):
            data, record = fetch_record(self._remote, shard, self._info)
            _save(path, data)
        return record.tar

    def _fetch(self, path: Path, file_info: Callable[[], FileInfo], needed: bool, reserve: bool = False) -> bool:
        """Fetch one file of ``declared`` size and hash, or wait for whoever does; ``counted`` needs room."""
        part, lock = path.with_suffix(".part"), path.with_suffix(".lock")
        with suppress(FileNotFoundError):
            os.utime(path)  # the time of last use
            return True
        # The lock is a file of its own: whoever waits on the data's would wait for those who read it, too.
        with translate_os_errors("storing a part of a remote cache", self.folder), file_lock(lock, wait=needed) as held:
            if not held:
                return False
            try:
                if path.exists():
                    return True
                file, name = file_info(), str(path.relative_to(self.folder))
                part.unlink(missing_ok=True)  # of a killed process
                # Made at its full size while the room is reserved: what is under way counts whole.
                space = self.reserve_space(file.bytes, needed) if reserve else None
                return self._remote.download(name, path, part, file.bytes, file.sha256, space)
            finally:
                lock.unlink(missing_ok=True)

    @contextmanager
    def reserve_space(self, size: int, needed: bool) -> Iterator[bool]:
        """Remove the least recently used shards until ``size`` more bytes fit; False when they do not and need not.

        What is needed waits for fetches that are under way: once whole, they can leave again. Only shards that are all
        mapped by readers let the folder grow over its budget.
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
    """``CACHE.json`` of a complete remote cache, as it stands there and parsed.

    Raises:
        UserError: there is no such cache, it is not complete, of another format, or cannot be reached.
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
                f"'{remote.url}' holds a CACHE.json of another format: name a cache that earshard made"
            ) from None

    return remote.read("CACHE.json", MAX_JSON + 1, parse_info)


def fetch_record(remote: Remote, shard: int, info: CacheInfo) -> tuple[bytes, ShardRecord]:
    """The commit record of a shard of the remote cache that ``info`` describes, as it stands there and parsed.

    Raises:
        UserError: it does not exist, is damaged, of another cache, or cannot be reached.
    """
    name = f"shards/{shard:06d}.json"

    def parse_record(data: bytes) -> tuple[bytes, ShardRecord]:
        try:
            record = ShardRecord.model_validate(unseal_bytes(data, name))
        except (RecordError, ValidationError) as error:
            raise TransientError(str(error) if isinstance(error, RecordError) else "it is no commit record") from None
        if (record.feature_id, record.plan_id, record.shard) != (info.feature_id, info.plan_id, shard):
            raise TransientError("it belongs to another cache")
        return data, record

    return remote.read(name, MAX_JSON + 1, parse_record)


def require_space(wanted: Sequence[tuple[Mirror, int]], setting: str) -> None:
    """UserError unless so many shards of each mirror fit into the budget together; names the ``setting`` to lower."""
    total = sum(mirror.shard_bytes * count for mirror, count in wanted)
    budget = min((mirror.budget for mirror, _ in wanted), default=0)
    if total > budget:
        raise UserError(
            f"the {sum(count for _, count in wanted)} shards that are mixed at a time take {total / 1e9:.3g} GB and "
            f"the local folder may hold {budget / 1e9:.3g} GB: set EARSHARD_CACHE_GB to {1.5 * total / 1e9:.2g} or "
            f"more, or lower {setting}"
        )


def _save(path: Path, data: bytes) -> None:
    """Put a small file in place whole; several processes and threads may do so at once."""
    atomic_write(path, data, f"{os.getpid()}-{threading.get_ident()}")


def _budget() -> int:
    text = os.environ.get("EARSHARD_CACHE_GB") or str(BUDGET_GB)
    try:
        budget = float(text)
        if not 0 < budget < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(f"EARSHARD_CACHE_GB is '{text}': set it to a number of gigabytes") from None
    return int(budget * 1e9)


def _mirrored_shards(root: Path) -> list[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of all shards, whole or under way; the least recently used first."""
    found = []
    for path in root.glob("*/shards/*"):
        # A part that is gone since it was listed has probably become the tar.
        for name in {".tar": [path], ".part": [path, path.with_suffix(".tar")]}.get(path.suffix, []):
            with suppress(FileNotFoundError):
                stat = name.stat()
                found.append((stat.st_mtime_ns, stat.st_size, name))
                break
    return sorted(found)


def _remove_unused(path: Path) -> bool:
    """Remove a shard that nobody has mapped, or a part that nobody fetches."""
    part = path.suffix == ".part"
    guard = path.with_suffix(".lock") if part else path
    with suppress(FileNotFoundError), file_lock(guard, wait=False, create=part) as held:
        if not held:
            return False
        path.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)
    return True
