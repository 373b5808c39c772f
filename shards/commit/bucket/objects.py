"""Conditional writes to the objects below one URL, which replace exclusive creation and rename.

:class:`Objects` takes the URL of a folder in an object store. It creates an object only if there is none, or replaces
only the version that the process has seen; the store decides between concurrent writes. A store that ignores the
conditions would lose shards silently, so :func:`shards.commit.bucket.store.connect_objects` tests it first.

obstore sends the conditions: ``If-None-Match: *`` and ``If-Match`` to S3 and Azure, ``x-goog-if-generation-match`` to
Google. It has no conditional delete, so :class:`Objects` has none either.
"""

from __future__ import annotations

import hashlib
import mmap
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from shards.errors import UserError
from shards.remote import object_store
from shards.remote.client import TransferAction, TransientError, retry

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Metadata that tells our own write, whose answer was lost, from another's. An identifier, because Azure requires one.
WRITE_ID_ATTRIBUTE = "earshardput"
T = TypeVar("T")
Version = dict[str, str]  # ``e_tag`` and, if the store has object versions, ``version``


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in the store: its bytes, and a version that changes with them."""

    data: bytes
    version: Version


class Objects:
    """The objects below one folder of a store; names are relative to it. Methods may be called from any thread.

    All methods raise UserError if the store cannot be reached, rejects the request, or the bucket does not exist.

    Args:
        store: the store to use instead of connecting to ``url``.

    Attributes:
        url: URL of the folder, without a trailing slash.
    """

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        self.url = url.rstrip("/")
        self._store = store or object_store.connect(self.url)

    def read(self, name: str) -> StoredObject | None:
        """Read a small object; None if it does not exist."""

        def get() -> StoredObject:
            answer = obstore.get(self._store, name)
            return StoredObject(bytes(answer.bytes()), _version(answer.meta))

        return self._request(get, name)

    def version(self, name: str) -> Version | None:
        """Return the version of an object; None if it does not exist."""
        return self._request(lambda: _version(obstore.head(self._store, name)), name)

    def put(self, name: str, data: bytes | Path, expected: Version | None) -> Version | None:
        """Write ``data``, or a file's bytes, if the object's version is ``expected`` (None: if it does not exist).

        A write whose response was lost is repeated, and recognizes its own object by a write id.

        Returns:
            The new version, or None if the condition does not hold.
        """
        write_id = uuid.uuid4().hex
        if isinstance(data, bytes):
            return self._put(self._store, name, data, write_id, expected)
        with open(data, "rb") as file:
            body = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # obstore would read a file into memory
        return self._put(object_store.for_upload(self._store, len(body)), name, body, write_id, expected)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every object directly below ``folder``, by name without the folder."""

        def list_sizes() -> dict[str, int]:
            entries = obstore.list_with_delimiter(self._store, folder or None)["objects"]
            return {entry["path"].rpartition("/")[2]: entry["size"] for entry in entries}

        return self._request(list_sizes, folder) or {}

    def sha256(self, name: str, limit: int) -> str | None:
        """Return the sha256 of an object's first ``limit`` bytes (64 hex digits), or None if it does not exist."""

        def read() -> str:
            digest, left = hashlib.sha256(), limit
            for chunk in obstore.get(self._store, name):
                digest.update(memoryview(chunk)[:left])
                left -= len(chunk)
                if left <= 0:
                    break
            return digest.hexdigest()

        return self._request(read, name)

    def check_conditions(self) -> None:
        """Check that the store rejects a second creation and the replacement of an outdated version.

        Raises:
            UserError: the store does not support conditional writes.
        """
        name = f"trial-{uuid.uuid4().hex}"
        first = self.put(name, b"1", None)
        if first is None:
            raise UserError(f"the store of '{self.url}' rejected the creation of a new object: check the store")
        again = self.put(name, b"2", None)
        second = self.put(name, b"3", first) if again is None else None
        stale = self.put(name, b"4", first) if second is not None else None
        self._request(lambda: obstore.delete(self._store, name), name, "written")  # no other process knows its name
        if again is not None or second is None or stale is not None:
            raise UserError(
                f"the store of '{self.url}' does not support conditional writes (If-None-Match, If-Match), so workers "
                "could overwrite each other's shards: extract to a local root, then run `python -m shards push`"
            )

    def _put(
        self, store: ObjectStore, name: str, body: bytes | mmap.mmap, write_id: str, expected: Version | None
    ) -> Version | None:
        mode: Any = "create" if expected is None else expected

        def put() -> Version | None:
            try:
                return _version(obstore.put(store, name, body, mode=mode, attributes={WRITE_ID_ATTRIBUTE: write_id}))
            except FileNotFoundError:
                raise object_store.missing_bucket(self.url) from None
            except (AlreadyExistsError, PreconditionError) as error:
                try:
                    existing = obstore.get(store, name, options={"head": True})
                except FileNotFoundError:
                    existing = None
                # The response to our own write was lost.
                if existing and existing.attributes.get(WRITE_ID_ATTRIBUTE) == write_id:
                    return _version(existing.meta)
                if isinstance(error, AlreadyExistsError) and (expected is not None or existing is None):
                    raise TransientError("a concurrent write was in progress") from None  # HTTP 409
                return None

        return self._request(put, name, "written")

    def _request(self, call: Callable[[], T], name: str, action: TransferAction = "fetched") -> T | None:
        """Return the result of ``call``, or None if the object does not exist. Retries transient errors."""

        def attempt() -> T | None:
            try:
                with object_store.translate_errors(self.url):
                    return call()
            except FileNotFoundError:
                return None
            except ConnectionError as error:
                raise TransientError(str(error)) from None

        return retry(attempt, f"{self.url}/{name}", action=action)


def _version(meta: Any) -> Version:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}
