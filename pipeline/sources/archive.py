"""A tar archive read from its start to its end, once, compressed or not, and never a cut one taken for a whole one.

In: a ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file. Out: its members in order, and the bytes of those that
are wanted.
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

ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError)


class ArchiveReader:
    """One reading of an archive, forward only.

    Raises:
        EOFError: the archive is cut short. ``tarfile`` by itself takes many cuts for the end.
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
        """Whether the member may still come in this pass over the file called ``archive``."""
        return archive == self._file.name and not self._ended and name not in self._passed

    def read_wanted(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of the members in ``wanted``, from here on."""
        for member in self.members():
            self._passed.add(member.name)
            if member.name in wanted:
                yield member.name, self.content(member)
        self._ended = True

    def members(self) -> Iterator[tarfile.TarInfo]:
        """The members from here on; ``for member in tar`` would remember every one of them."""
        tar = self._tar
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]
            yield member
        if self._stream.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise EOFError("its end is missing")
        while self._stream.read(1 << 20):  # up to the checksum of the compressed data
            pass

    def content(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of the member that came last."""
        file = self._tar.extractfile(member)
        data = file.read() if file is not None else b""
        if len(data) != member.size:
            raise EOFError(f"{member.name} is cut short")
        return data

    def close(self) -> None:
        self._tar.close()
        self._stream.close()


def _open_decompressed(file: Path) -> Any:
    """The tar inside; unlike tarfile's own streams these tell when the compressed data are cut short."""
    with open(file, "rb") as raw:
        magic = raw.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if magic.startswith(b"BZh"):
        return bz2.open(file)
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(file)
    return open(file, "rb")
