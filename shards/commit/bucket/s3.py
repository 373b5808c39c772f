"""s3."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.commit.bucket.objects import Found, InBucket
from shards.errors import UserError
from shards.remote.client import Broken, Doing, insist

MARK = "earshard-put"  # metadata that tells a write of ours, whose answer was lost, from another's


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
