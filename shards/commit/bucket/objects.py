"""Objects below one URL, each written on a condition: what stands in for exclusive creation and rename.

In: the URL of a folder in an object store. Out: :class:`Objects`, by which a process writes an object only where there
is none, or only over the version that it has seen; the store decides between two who try at once.
:func:`connect_objects` tries whether the store honors the conditions: one that ignores them would lose shards silently.

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
Version = dict[str, str]  # ``e_tag`` and, where the store numbers its objects, ``version``


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it stands: its bytes, and a version that changes with them."""

    data: bytes
    version: Version


class Objects:
    """The objects below one folder of a store; names are relative to it. Methods may be called from any thread.

    All raise UserError when the store cannot be reached, refuses, or has no such bucket.

    Args:
        store: instead of the one that the URL names.

    Attributes:
        url: of the folder, without a trailing slash.
    """

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        self.url = url.rstrip("/")
        self._store = store or object_store.connect(self.url)

    def read(self, name: str) -> StoredObject | None:
        """A small object, or None."""

        def get() -> StoredObject:
            answer = obstore.get(self._store, name)
            return StoredObject(bytes(answer.bytes()), _version(answer.meta))

        return self._request(get, name)

    def version(self, name: str) -> Version | None:
        """The version of an object, or None."""
        return self._request(lambda: _version(obstore.head(self._store, name)), name)

    def put(self, name: str, data: bytes | Path, expected: Version | None) -> Version | None:
        """Write ``data``, or a file's bytes, if the object's version is ``over`` (None: if there is no object).

        A write whose answer was lost is repeated, and recognizes itself by a mark.

        Returns:
            The new version, or None when something else stands there.
        """
        write_id = uuid.uuid4().hex
        if isinstance(data, bytes):
            return self._put(self._store, name, data, write_id, expected)
        with open(data, "rb") as file:
            body = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # obstore would read a file into memory
        return self._put(object_store.for_upload(self._store, len(body)), name, body, write_id, expected)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object directly below ``folder``, by name without the folder."""

        def listed() -> dict[str, int]:
            entries = obstore.list_with_delimiter(self._store, folder or None)["objects"]
            return {entry["path"].rpartition("/")[2]: entry["size"] for entry in entries}

        return self._request(listed, folder) or {}

    def sha256(self, name: str, limit: int) -> str | None:
        """64 hex digits of an object's first ``limit`` bytes, or None."""

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
        """UserError unless the store refuses a second creation and a replacement of what has changed."""
        name = f"trial-{uuid.uuid4().hex}"
        first = self.put(name, b"1", None)
        if first is None:
            raise UserError(f"'{self.url}' refuses to create an object where there is none: check the store")
        again = self.put(name, b"2", None)
        second = self.put(name, b"3", first) if again is None else None
        stale = self.put(name, b"4", first) if second is not None else None
        self._request(lambda: obstore.delete(self._store, name), name, "written")  # nobody else knows its name
        if again is not None or second is None or stale is not None:
            raise UserError(
                f"the store of '{self.url}' does not keep to conditional writes (If-None-Match, If-Match), so two "
                "workers may spoil each other's shards: extract to a local root, then `python -m shards push` the cache"
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
                    standing = obstore.get(store, name, options={"head": True})
                except FileNotFoundError:
                    standing = None
                if (
                    standing and standing.attributes.get(WRITE_ID_ATTRIBUTE) == write_id
                ):  # the answer to our own write was lost
                    return _version(standing.meta)
                if isinstance(error, AlreadyExistsError) and (expected is not None or standing is None):
                    raise TransientError("another write to it was under way") from None  # HTTP 409
                return None

        return self._request(put, name, "written")

    def _request(self, call: Callable[[], T], name: str, doing: TransferAction = "fetched") -> T | None:
        """The call's answer, None when there is no such object; repeated for as long as that may help."""

        def attempt() -> T | None:
            try:
                with object_store.translate_errors(self.url):
                    return call()
            except FileNotFoundError:
                return None
            except ConnectionError as error:
                raise TransientError(str(error)) from None

        return retry(attempt, f"{self.url}/{name}", action=doing)


def _version(meta: Any) -> Version:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}
