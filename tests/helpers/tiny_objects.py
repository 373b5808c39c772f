"""An object store in memory that keeps to conditions, for tests of what is built on them; readable as ``memory://``."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec

from shards.commit.bucket.objects import Found

LOCK = threading.Lock()
TAGS: dict[str, str] = {}


class MemoryObjects:
    """``shards.commit.bucket.objects.Objects`` on fsspec's filesystem in memory.

    ``before(what, name)`` is called ahead of every operation, so that a test can do something at the worst moment.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files = fsspec.filesystem("memory")
        self._top = "/" + self.url.removeprefix("memory://").strip("/")
        self.before: Callable[[str, str], object] = lambda what, name: None
        self.puts: list[str] = []

    def read(self, name: str) -> Found | None:
        self.before("read", name)
        with LOCK:
            path = f"{self._top}/{name}"
            return Found(self._files.cat_file(path), TAGS[path]) if self._files.isfile(path) else None

    def tag(self, name: str) -> str | None:
        found = self.read(name)
        return found.tag if found else None

    def put(self, name: str, data: bytes | Path, over: str | None) -> str | None:
        self.before("put", name)
        with LOCK:
            path = f"{self._top}/{name}"
            if (TAGS[path] if self._files.isfile(path) else None) != over:
                return None
            self._files.pipe_file(path, data if isinstance(data, bytes) else data.read_bytes())
            TAGS[path] = uuid.uuid4().hex
            self.puts.append(name)
            return TAGS[path]

    def delete(self, name: str, over: str) -> None:
        self.before("delete", name)
        with LOCK:
            path = f"{self._top}/{name}"
            if self._files.isfile(path) and TAGS[path] == over:
                self._files.rm_file(path)

    def sizes(self, folder: str) -> dict[str, int]:
        with LOCK:
            path = f"{self._top}/{folder}".rstrip("/")
            entries = self._files.ls(path, detail=True) if self._files.isdir(path) else []
            return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}
