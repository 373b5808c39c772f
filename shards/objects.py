"""Objects of a bucket, each write on a condition: what stands in for exclusive creation and rename.

In: the URL of a folder in an object store. Out: :class:`Objects`, by which a process writes an object only where
nothing stands, or only over what it has seen; the store decides between two who try at once. :func:`connect_objects`
tries whether the store keeps to the conditions: one that ignores them would lose shards without a word.

S3's conditions are ``If-None-Match: *`` and ``If-Match: <ETag>`` (Google's: ``shards/gcs.py``); every read and write
goes by one object, whole.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.errors import UserError
from shards.storage import Broken, Doing, insist, open_filesystem

MARK = "earshard-put"  # metadata that tells a write of ours, whose answer was lost, from another's


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


def connect_objects(url: str) -> Objects:
    """The objects below ``url``, of a store that keeps to conditions.

    Raises:
        UserError: no such bucket, no access, or a store whose writes cannot be made conditional.
    """
    scheme = url.split("://")[0]
    objects: Objects
    if scheme in ("s3", "s3a"):
        objects = S3Objects(url)
    elif scheme in ("gs", "gcs"):
        from shards.gcs import GCSObjects

        objects = GCSObjects(url)
    else:
        raise UserError(
            f"'{url}' cannot be extracted to: earshard knows no conditional writes for {scheme}://, and without them "
            "two workers may spoil each other's shards; extract to a local root, then `python -m shards push` the cache"
        )
    _try_conditions(objects)
    return objects


def _try_conditions(objects: Objects) -> None:
    """UserError unless the store refuses a second creation and a replacement of what has changed."""
    name = f"trial-{uuid.uuid4().hex}"
    first = objects.put(name, b"1", None)
    if first is None:
        raise UserError(f"'{objects.url}' refuses to create an object where there is none: check the store")
    again = objects.put(name, b"2", None)
    second = objects.put(name, b"3", first) if again is None else None
    stale = objects.put(name, b"4", first) if second is not None else None
    last = stale or second or again or first
    objects.delete(name, last)
    if again is not None or second is None or stale is not None:
        raise UserError(
            f"the store of '{objects.url}' does not keep to conditional writes (If-None-Match, If-Match), so two "
            "workers may spoil each other's shards: extract to a local root, then `python -m shards push` the cache"
        )


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


class S3Objects(InBucket):
    """Amazon S3 and what speaks its protocol, by s3fs's own client: credentials and endpoint are those of reading.

    Not by s3fs's methods: they know ``If-None-Match`` alone, and repeat a failed upload of an open file from its end.
    """

    def read(self, name: str) -> Found | None:
        async def get(client: Any) -> Found:
            answer = await client.get_object(Bucket=self._bucket, Key=self._prefix + name)
            async with answer["Body"] as body:
                return Found(await body.read(), answer["ETag"])

        found: Found | None = self._insist(get, name)
        return found

    def tag(self, name: str) -> str | None:
        head = self._head(name)
        return head["ETag"] if head else None

    def put(self, name: str, data: bytes | Path, over: str | None) -> str | None:
        mark = uuid.uuid4().hex
        condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}

        async def put(client: Any) -> str:
            where = {"Bucket": self._bucket, "Key": self._prefix + name, "Metadata": {MARK: mark}, **condition}
            if isinstance(data, bytes):
                answer = await client.put_object(Body=data, **where)
            else:
                with open(data, "rb") as file:  # anew at each attempt: from its beginning
                    answer = await client.put_object(Body=file, **where)
            return str(answer["ETag"])

        tag: str | None = self._insist(put, name, "written")
        if tag is None:
            head = self._head(name)
            if head and head.get("Metadata", {}).get(MARK) == mark:  # the answer to our own write was lost
                tag = head["ETag"]
        return tag

    def delete(self, name: str, over: str) -> None:
        async def delete(client: Any) -> None:
            await client.delete_object(Bucket=self._bucket, Key=self._prefix + name, IfMatch=over)

        self._insist(delete, name, "written")

    def sizes(self, folder: str) -> dict[str, int]:
        prefix = self._below(folder)

        async def listed(client: Any) -> dict[str, int]:
            found: dict[str, int] = {}
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/")
            async for page in pages:
                found.update((entry["Key"][len(prefix) :], entry["Size"]) for entry in page.get("Contents", ()))
            return found

        return self._insist(listed, folder) or {}

    def _head(self, name: str) -> dict[str, Any] | None:
        async def head(client: Any) -> dict[str, Any]:
            answer: dict[str, Any] = await client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            return answer

        found: dict[str, Any] | None = self._insist(head, name)
        return found

    def _insist(self, call: Callable[[Any], Any], name: str, doing: Doing = "fetched") -> Any:
        """The call's answer; None when there is no such object, or the condition does not hold."""

        async def with_client() -> Any:
            await self._files.set_session()
            return await call(await self._files.get_s3(self._bucket))

        def attempt() -> Any:
            try:
                return asyncio.run_coroutine_threadsafe(with_client(), self._files.loop).result()
            except Exception as error:
                return self._judge(error)

        return insist(attempt, f"{self.url}/{name}", doing=doing)

    def _judge(self, error: Exception) -> None:
        """None for an absent object or a failed condition; else raises what :func:`insist` understands."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            raise PermissionError(str(error)) from None
        if not isinstance(error, ClientError):
            if isinstance(error, BotoCoreError | ConnectionError | asyncio.TimeoutError):
                raise Broken(str(error) or type(error).__name__) from None
            raise error
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            raise UserError(f"there is no bucket '{self._bucket}': make it, or correct the URL '{self.url}'") from None
        if status in (404, 412):
            return
        if status in (401, 403):
            raise PermissionError(str(error)) from None
        if status in (400, 405, 501):  # no use in asking again: what the store does not know, or will not take
            raise UserError(f"'{self.url}' refuses what an extraction needs ({error}): use another store") from None
        raise Broken(str(error)) from None
