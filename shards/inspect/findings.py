"""The files of a cache, read without believing them, and what was found wrong with them.

In: paths below one cache folder, and what another file says of each. Out: their content where it is whole, a list of
:class:`Problem`, and how far the reading has come. A file is parsed only after its seal or sha256 is found right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.errors import UserError
from shards.files import open_file
from shards.format.records import FileInfo, RecordError, unseal
from shards.format.schemas import read_parquet
from shards.format.spec import SCHEMA_VERSION

ProgressCallback = Callable[[int, int], None]  # (done, total)
CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as written; ``file`` is relative to the cache folder, ``key`` names an utterance."""

    shard: int | None
    file: str
    key: str | None
    what: str


class Findings:
    """The problems of one cache folder, in the order in which they were found.

    Args:
        folder: the cache; problems name their files relative to it.
        progress: called with (bytes read, bytes to read in all).
    """

    def __init__(self, folder: Path, progress: ProgressCallback | None = None) -> None:
        self.folder, self.progress = folder, progress
        self.problems: list[Problem] = []
        self.done = self.total = 0

    def report(self, shard: int | None, file: Path, what: str, key: str | None = None) -> None:
        self.problems.append(Problem(shard, str(file.relative_to(self.folder)), key, what))

    def report_error(self, shard: int | None, file: Path, error: Exception) -> None:
        """An exception of reading ``file`` as a problem of it."""
        if isinstance(error, FileNotFoundError):
            what = "is missing"
        elif isinstance(error, OSError):
            what = f"cannot be read: {error.strerror}"
        else:
            what = str(error).removeprefix(file.name).strip()
        self.report(shard, file, what)

    def expect(self, paths: Iterable[Path]) -> None:
        """Count the bytes of ``paths``, which will be read, for the progress."""
        for path in paths:
            try:
                self.total += path.stat().st_size
            except OSError:  # told where it is read
                continue

    def step(self, size: int) -> None:
        """``size`` bytes more were read."""
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    def read_sealed(self, path: Path, shard: int | None) -> dict[str, Any] | None:
        """The object of a JSON file whose seal is whole; None when there is no file, or it is not whole, which is told.

        Raises:
            UserError: it is of a newer format.
        """
        try:
            tree = unseal(path)
        except FileNotFoundError:
            return None
        except RecordError as error:
            self.report_error(shard, path, error)
            return None
        version = tree.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UserError(
                f"'{path}' is of cache format {version} and this earshard reads {SCHEMA_VERSION}: update earshard"
            )
        return tree

    def read_table(self, path: Path, wanted: FileInfo, schema: pa.Schema, shard: int | None) -> pa.Table | None:
        """A parquet file of the right size and sha256, parsed; else None, and told."""
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                self.report(shard, path, f"has {size} bytes, not {wanted.bytes}")
            elif self.hash_file(path) != wanted.sha256:
                self.report(shard, path, "does not match its sha256")
            else:
                return read_parquet(path, schema)
        except (RecordError, OSError) as error:
            self.report_error(shard, path, error)
        return None

    def hash_file(self, path: Path, count: bool = True) -> str:
        """64 hex digits: sha256 of a file; ``count`` its bytes for the progress. Raises OSError."""
        digest = hashlib.sha256()
        with open_file(path) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                if count:
                    self.step(len(chunk))
        return digest.hexdigest()
