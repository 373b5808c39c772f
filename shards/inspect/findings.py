"""Reads the files of an untrusted cache and collects the problems found in them.

Takes paths in one cache folder and the sizes and hashes recorded for them; returns the content of valid files, collects
a list of :class:`Problem` and reports progress. A file is parsed only after its seal or sha256 has been verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.files import open_file
from shards.format.records import FileInfo, RecordError, unseal
from shards.format.schemas import read_parquet

ProgressCallback = Callable[[int, int], None]  # (done, total)
CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference from what was written. ``file`` is relative to the cache folder, ``key`` names an utterance."""

    shard: int | None
    file: str
    key: str | None
    what: str


class Findings:
    """The problems of one cache folder, in the order they were found.

    Args:
        folder: the cache folder; problems name files relative to it.
        progress: called with (bytes read, total bytes to read).
    """

    def __init__(self, folder: Path, progress: ProgressCallback | None = None) -> None:
        self.folder, self.progress = folder, progress
        self.problems: list[Problem] = []
        self.done = self.total = 0

    def report(self, shard: int | None, file: Path, what: str, key: str | None = None) -> None:
        self.problems.append(Problem(shard, str(file.relative_to(self.folder)), key, what))

    def report_error(self, shard: int | None, file: Path, error: Exception) -> None:
        """Report an exception raised while reading ``file``."""
        if isinstance(error, FileNotFoundError):
            what = "is missing"
        elif isinstance(error, OSError):
            what = f"cannot be read: {error.strerror}"
        else:
            what = str(error).removeprefix(file.name).strip()
        self.report(shard, file, what)

    def expect(self, paths: Iterable[Path]) -> None:
        """Add the bytes of ``paths``, which will be read, to the progress total."""
        for path in paths:
            try:
                self.total += path.stat().st_size
            except OSError:  # reported when the file is read
                continue

    def step(self, size: int) -> None:
        """Advance the progress by ``size`` bytes."""
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    def read_sealed(self, path: Path, shard: int | None) -> dict[str, Any] | None:
        """Read a sealed JSON file; None if it does not exist or is corrupt. Corruption is reported."""
        try:
            return unseal(path)
        except FileNotFoundError:
            return None
        except RecordError as error:
            self.report_error(shard, path, error)
            return None

    def check_file(self, path: Path, wanted: FileInfo, shard: int | None = None) -> bool:
        """Return whether a file has the recorded size and sha256; otherwise report the problem."""
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                self.report(shard, path, f"has {size} bytes, not {wanted.bytes}")
            elif self.hash_file(path) != wanted.sha256:
                self.report(shard, path, "does not match its sha256")
            else:
                return True
        except OSError as error:
            self.report_error(shard, path, error)
        return False

    def read_table(self, path: Path, wanted: FileInfo, schema: pa.Schema, shard: int | None) -> pa.Table | None:
        """Parse a parquet file of the expected size and sha256; otherwise report the problem and return None."""
        try:
            return read_parquet(path, schema) if self.check_file(path, wanted, shard) else None
        except (RecordError, OSError) as error:
            self.report_error(shard, path, error)
        return None

    def hash_file(self, path: Path) -> str:
        """Return the sha256 of a file (64 hex digits), and add its bytes to the progress. Raises OSError."""
        digest = hashlib.sha256()
        with open_file(path) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                self.step(len(chunk))
        return digest.hexdigest()
