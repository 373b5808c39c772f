"""Read a tar archive in a single pass, and detect truncated ones.

Reads a ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file from start to end; yields its members in order, or the
contents of the wanted ones.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

ARCHIVE_ERRORS = (  # ValueError and OverflowError: numbers in PAX headers; MemoryError: a member of a false size
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    OSError,
    ValueError,
    OverflowError,
    MemoryError,
)


class ArchiveReader:
    """A single forward pass over an archive.

    Raises:
        EOFError: The archive is truncated. ``tarfile`` alone accepts many truncated archives as complete.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = _open_decompressed(file)
        try:
            self._tar = tarfile.open(fileobj=self._stream, mode="r|")  # noqa: SIM115 closed by close()
        except BaseException:
            self._stream.close()
            raise
        self._passed: set[str] = set()
        self._ended = False

    def may_reach(self, archive: str, name: str) -> bool:
        """Return whether this pass is over the file ``archive`` and may still reach the member ``name``."""
        return archive == self._file.name and not self._ended and name not in self._passed

    def read_wanted(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the name and content of each remaining member in ``wanted``."""
        for member in self.members():
            self._passed.add(member.name)
            if member.name in wanted:
                yield member.name, self.content(member)
        self._ended = True

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the remaining members. Unlike ``for member in tar``, does not keep them in memory."""
        tar = self._tar
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]
            yield member
        if self._stream.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise EOFError("the end of the archive is missing")
        while self._stream.read(1 << 20):  # reads and verifies the checksum of the compressed data
            pass

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Return the bytes of the most recent member."""
        file = self._tar.extractfile(member)
        data = file.read() if file is not None else b""
        if len(data) != member.size:
            raise EOFError(f"{member.name} is truncated")
        return data

    def close(self) -> None:
        """Close the archive."""
        self._tar.close()
        self._stream.close()


def _open_decompressed(file: Path) -> Any:
    """Open the tar stream inside. Unlike tarfile's streams, these raise an error for truncated compressed data."""
    with open(file, "rb") as raw:
        magic = raw.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if magic.startswith(b"BZh"):
        return bz2.open(file)
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(file)
    return open(file, "rb")
