"""Far caches: whole shards fetched ahead of need into a local folder, hashed before anybody sees them.

In: the URL of a complete cache folder (``shards/remote/client.py``). Out: :class:`Mirror`, a local folder of the same
layout in which a shard stands from the moment it is whole until its room is needed.

```
CACHE.json -> manifest.parquet -> shards/000042.json (the sha256) -> 000042.part --hash, rename--> 000042.tar
```

Ranks, workers and runs of one machine share the folder: whoever locks ``.lock`` fetches the shard and the others wait.
A reader keeps a shared lock on what it has mapped; making room takes the longest unused shards and passes over locked
ones. All locks are the kernel's: a killed process leaves none.

    EARSHARD_CACHE=/scratch/earshard   the folder (default ~/.cache/earshard)
    EARSHARD_CACHE_GB=200              most gigabytes of shards in it, over all caches (default 50)
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shards.errors import UserError
from shards.files import file_sha256, make_folder, open_file, told, write_all
from shards.format.layout import Layout
from shards.format.records import MAX_JSON, CacheInfo, RecordError, ShardRecord, is_claim, parse, unseal
from shards.remote.client import Broken, Remote, connect, insist, next_chunk, read_small

BUDGET_GB = 50.0
FETCHERS = 4  # shards that a process fetches at once, ahead of need
POLL = 0.02  # seconds between looks at fetches whose room is needed


class Mirror:
    """A far cache, and the local folder that holds a part of it. Make it with :meth:`open`.

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
        url = url.rstrip("/")
        root = Path(root or os.environ.get("EARSHARD_CACHE") or "~/.cache/earshard").expanduser()
        remote = connect(url)

        def fetch() -> bytes:
            data = read_small(remote, "CACHE.json", MAX_JSON + 1)
            if is_claim(data):
                raise UserError(f"the cache '{url}' is not complete: finish its extraction first")
            try:
                CacheInfo.model_validate(parse(data, "CACHE.json"))
            except RecordError as error:
                raise Broken(str(error)) from None
            return data

        try:
            data = insist(fetch, f"{url}/CACHE.json")
        except ValidationError:
            raise UserError(f"'{url}' holds a CACHE.json of another format: name a cache that earshard made") from None
        folder = root / hashlib.sha256(data).hexdigest()[:32]
        with told("mirroring a far cache", root):
            make_folder(folder / "shards")
            _write_small(folder / "CACHE.json", data)
        mirror = cls(url, folder, _budget() if budget is None else budget)
        manifest = mirror._info.files["manifest.parquet"]
        found = mirror.layout.manifest
        if not (found.is_file() and found.stat().st_size == manifest.bytes and file_sha256(found) == manifest.sha256):
            found.unlink(missing_ok=True)
            mirror._fetch(found, "manifest.parquet", lambda: (manifest.bytes, manifest.sha256), needed=True)
        return mirror

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.url, self.folder, self.budget)

    def detach(self) -> None:
        """Forget connections, threads and wishes: for a process that was forked."""
        self._lock = threading.Lock()
        self._remote: Remote | None = None
        self._wanted: deque[int] = deque()
        self._running = 0

    def open_shard(self, shard: int) -> io.FileIO:
        """The tar of a shard, open for reading, fetched if it is not here; it stays while the file or a mapping lives.

        Raises:
            UserError: it cannot be had.
        """
        path = self.layout.tar(shard)
        while True:
            self.ensure(shard)
            try:
                file = open_file(path)
            except FileNotFoundError:  # just made room for another
                continue
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)  # a mapping duplicates the descriptor, and so holds the lock
            return file

    def ensure(self, shard: int, needed: bool = True) -> bool:
        """Have a shard's tar in the folder. Not ``needed``: only if there is room and nobody else fetches it.

        Raises:
            UserError: it cannot be had.
        """
        path = self.layout.tar(shard)
        return self._fetch(path, f"shards/{path.name}", lambda: self._tar_of(shard), needed, counted=True)

    def want(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order, after those that are wanted already."""
        with self._lock:
            self._wanted = deque(dict.fromkeys([*self._wanted, *shards]))
            more = max(min(FETCHERS, len(self._wanted)) - self._running, 0)
            self._running += more
        for _ in range(more):
            # Daemons: a program that ends does not wait for shards that nobody will read.
            threading.Thread(target=self._fetch_wanted, name="earshard-fetch", daemon=True).start()

    def want_nothing(self) -> None:
        """Begin no further fetch in the background."""
        with self._lock:
            self._wanted.clear()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    return
                shard = self._wanted.popleft()
            with suppress(Exception):  # whoever needs the shard tries again, and tells
                self.ensure(shard, needed=False)

    def _tar_of(self, shard: int) -> tuple[int, str]:
        """Size and sha256 of a shard's tar, by its commit record."""
        path = self.layout.record(shard)
        ids = (self._info.feature_id, self._info.plan_id, shard)

        def fetch() -> ShardRecord:
            data = read_small(self._connected(), f"shards/{path.name}", MAX_JSON + 1)
            try:
                record = ShardRecord.model_validate(parse(data, path.name))
            except (RecordError, ValidationError) as error:
                raise Broken(str(error) if isinstance(error, RecordError) else "it is no commit record") from None
            if (record.feature_id, record.plan_id, record.shard) != ids:
                raise Broken("it belongs to another cache")
            _write_small(path, data)
            return record

        try:
            record = ShardRecord.model_validate(unseal(path))
        except (FileNotFoundError, RecordError, ValidationError):
            record = insist(fetch, f"{self.url}/shards/{path.name}")
        return record.tar.bytes, record.tar.sha256

    def _connected(self) -> Remote:
        with self._lock:
            if self._remote is None:
                self._remote = connect(self.url)
            return self._remote

    def _fetch(
        self, path: Path, name: str, expected: Callable[[], tuple[int, str]], needed: bool, counted: bool = False
    ) -> bool:
        """Bring one file, or wait for whoever does; ``expected`` gives size and sha256; ``counted`` needs room."""
        part, lock = path.with_suffix(".part"), path.with_suffix(".lock")
        while True:
            with suppress(FileNotFoundError):
                os.utime(path)  # the time of last use
                return True
            # The lock is a file of its own: whoever waits on the data's would wait for those who read it, too.
            with told("storing a part of a far cache", self.folder), _locked(lock, wait=needed) as held:
                if held is None:
                    return False
                if not _still(held, lock):
                    continue
                try:
                    return path.exists() or self._fetch_locked(part, path, name, expected, needed, counted)
                finally:
                    part.unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)

    def _fetch_locked(
        self, part: Path, path: Path, name: str, expected: Callable[[], tuple[int, str]], needed: bool, counted: bool
    ) -> bool:
        size, sha256 = expected()
        part.unlink(missing_ok=True)  # of a killed process
        # Made at its full size, inside the lock of who makes room: what is under way counts whole.
        with self._room(size, needed) if counted else nullcontext(True) as fits:
            if not fits:
                return False
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(fd, size)
        try:
            self._transfer(fd, name, size, sha256)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
        return True

    def _transfer(self, fd: int, name: str, size: int, sha256: str) -> None:
        """Fill ``fd`` with a file of that size and hash; a cut transfer goes on where it was cut."""
        at, best, digest = 0, 0, hashlib.sha256()

        def attempt() -> None:
            nonlocal at, digest
            source = self._connected().stream(name, at, size) if at < size else iter(())
            while (chunk := next_chunk(source)) is not None:
                chunk = chunk[: size - at]
                os.lseek(fd, at, os.SEEK_SET)
                write_all(fd, chunk)
                digest.update(chunk)
                at += len(chunk)
            if at < size:
                raise Broken(f"it ended after {at} of {size} bytes")
            if digest.hexdigest() != sha256:
                at, digest = 0, hashlib.sha256()
                raise Broken("its sha256 is not the one in its record")

        def progressed() -> bool:
            nonlocal best
            before, best = best, max(best, at)
            return best > before

        insist(attempt, f"{self.url}/{name}", progressed)

    @contextmanager
    def _room(self, size: int, needed: bool) -> Iterator[bool]:
        """Remove the longest unused shards until ``size`` more bytes fit; false when they do not and need not.

        What is needed waits for fetches that are under way: once whole, they can leave again. Only shards that are all
        mapped by readers let the folder grow over its budget.
        """
        root = self.folder.parent
        while True:
            with _locked(root / "room.lock", wait=True):
                stored, under_way = _stored(root), False
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


def require_room(wanted: Sequence[tuple[Mirror, int]], setting: str) -> None:
    """UserError unless so many shards of each mirror fit into the budget together; names the ``setting`` to lower."""
    total = sum(mirror.shard_bytes * count for mirror, count in wanted)
    budget = min((mirror.budget for mirror, _ in wanted), default=0)
    if total > budget:
        raise UserError(
            f"the {sum(count for _, count in wanted)} shards that are mixed at a time take {total / 1e9:.3g} GB and "
            f"the local folder may hold {budget / 1e9:.3g} GB: set EARSHARD_CACHE_GB to {1.5 * total / 1e9:.2g} or "
            f"more, or lower {setting}"
        )


def _budget() -> int:
    text = os.environ.get("EARSHARD_CACHE_GB") or str(BUDGET_GB)
    try:
        budget = float(text)
        if not 0 < budget < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(f"EARSHARD_CACHE_GB is '{text}': set it to a number of gigabytes") from None
    return int(budget * 1e9)


def _write_small(path: Path, data: bytes) -> None:
    """Put a small file in place whole; several processes may do so at once."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    partial.write_bytes(data)
    os.replace(partial, path)


@contextmanager
def _locked(path: Path, wait: bool, make: bool = True) -> Iterator[int | None]:
    """A descriptor of the file, exclusively locked; ``None`` when it is taken and we do not wait."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a fork has copied the descriptor
        os.close(fd)


def _still(fd: int, path: Path) -> bool:
    """True while the open file is the one of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _stored(root: Path) -> list[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of all shards, whole or under way; the longest unused first."""
    found = []
    for path in root.glob("*/shards/*"):
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
    return sorted(found)


def _remove_unused(path: Path) -> bool:
    """Remove a shard that nobody has mapped, or a part that nobody fetches."""
    guard = path.with_suffix(".lock") if path.suffix == ".part" else path
    with suppress(FileNotFoundError), _locked(guard, wait=False, make=guard is not path) as held:
        if held is None:
            return False
        path.unlink(missing_ok=True)
        if guard is not path:
            guard.unlink(missing_ok=True)
    return True
