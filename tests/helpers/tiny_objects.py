"""In-memory object stores (obstore) that tests can inspect and interrupt; readable as ``tiny://``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import obstore
from obstore.store import MemoryStore

from shards.commit.bucket.objects import Objects, StoredObject, Version

STORES: dict[str, MemoryStore] = {}


class MemoryObjects(Objects):
    """The objects of the process below ``tiny://bucket/folder``.

    ``before(what, name)`` is called before every read and write, so that a test can interfere at the worst moment.
    ``puts`` are the names that were written, in order.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, memory(url))
        self.before: Callable[[str, str], object] = lambda what, name: None
        self.puts: list[str] = []

    def read(self, name: str) -> StoredObject | None:
        self.before("read", name)
        return super().read(name)

    def put(self, name: str, data: bytes | Path, expected: Version | None) -> Version | None:
        self.before("put", name)
        version = super().put(name, data, expected)
        if version is not None:
            self.puts.append(name)
        return version


def memory(url: str) -> MemoryStore:
    return STORES.setdefault(url, MemoryStore())


def names(url: str) -> set[str]:
    """Return the paths of all objects below a URL."""
    return {entry["path"] for entry in obstore.list(memory(url)).collect()}


class _Reading(fsspec.AbstractFileSystem):
    protocol = "tiny"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        folder, name = self._split(path)
        return {"name": path, "size": obstore.head(folder, name)["size"], "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        folder, name = self._split(path)
        return bytes(obstore.get(folder, name).bytes())[start:end]

    def _split(self, path: str) -> tuple[MemoryStore, str]:
        bucket, folder, name = path.split("/", 2)
        return memory(f"tiny://{bucket}/{folder}"), name


fsspec.register_implementation("tiny", _Reading, clobber=True)
