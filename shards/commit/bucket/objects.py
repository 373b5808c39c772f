"""Objects of a bucket, each write on a condition: what stands in for exclusive creation and rename.

In: the URL of a folder in an object store. Out: :class:`Objects`, by which a process writes an object only where
nothing stands, or only over what it has seen; the store decides between two who try at once. :func:`connect_objects`
tries whether the store keeps to the conditions: one that ignores them would lose shards without a word.

S3's conditions are ``If-None-Match: *`` and ``If-Match: <ETag>`` (Google's: ``shards/commit/bucket/gcs.py``); every
read and write goes by one object, whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.remote.client import open_filesystem


@dataclass(frozen=True, slots=True)
class Found:
    """An object as it stands: its bytes, and a tag that changes with them."""

    data: bytes
    tag: str


class Objects(Protocol):
    """The objects below one folder of a store; names are relative to it. Methods may be called from any thread.

    All raise UserError when the store cannot be reached, refuses, or has no such bucket.
    """

    url: str

    def read(self, name: str) -> Found | None:
        """A small object, or None."""

    def tag(self, name: str) -> str | None:
        """The tag of an object, or None."""

    def put(self, name: str, data: bytes | Path, over: str | None) -> str | None:
        """Write ``data``, or a file's bytes, if the object's tag is ``over`` (None: if there is no object).

        Returns the new tag, or None when something else stands there.
        """

    def delete(self, name: str, over: str) -> None:
        """Delete an object whose tag is ``over``; another is left."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object directly below ``folder``, by name without the folder."""


class InBucket:
    """A folder of a bucket by its URL, and the filesystem whose session the requests go through."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, path = open_filesystem(self.url)
        self._bucket, _, prefix = path.strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def _below(self, folder: str) -> str:
        """What the names of the objects below ``folder`` begin with."""
        return f"{self._prefix}{folder}/" if folder else self._prefix
