"""Objects of Google Cloud Storage, each write on a condition: :class:`shards.commit.bucket.objects.Objects` by its JSON
API.

In: a URL ``gs://bucket/folder``. Out: the same as of S3; the tag of an object is its generation, the conditions are
``ifGenerationMatch`` (0: where there is nothing). Requests go through gcsfs's own session, so credentials are those of
reading.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from shards.commit.bucket.objects import Found, InBucket
from shards.errors import UserError
from shards.remote.client import Broken, Doing, insist

T = TypeVar("T")


class GCSObjects(InBucket):
    """The objects below a folder of a bucket. A file is read into memory to be written: a shard at a time."""

    def read(self, name: str) -> Found | None:
        def get() -> Found:
            headers, data = self._files.call("GET", self._files.url(f"{self._bucket}/{self._prefix}{name}"))
            return Found(bytes(data), headers["X-Goog-Generation"])

        return self._insist(get, name)

    def tag(self, name: str) -> str | None:
        about = self._about(name)
        return about["generation"] if about else None

    def put(self, name: str, data: bytes | Path, over: str | None) -> str | None:
        body = data if isinstance(data, bytes) else data.read_bytes()
        where = f"{self._files._location}/upload/storage/v1/b/{quote(self._bucket)}/o"
        condition = {"name": self._prefix + name, "ifGenerationMatch": over or "0"}

        def put() -> str:
            answer = self._files.call("POST", where, uploadType="media", data=body, json_out=True, **condition)
            return str(answer["generation"])

        try:
            tag = self._insist(put, name, "written", absent=False)
        except FileNotFoundError:
            raise UserError(f"there is no bucket '{self._bucket}': make it, or correct the URL '{self.url}'") from None
        if tag is None:  # our own write may stand there, its answer lost; or the same bytes, which is as good
            about = self._about(name)
            if about and about.get("md5Hash") == base64.b64encode(hashlib.md5(body).digest()).decode():
                return str(about["generation"])
        return tag

    def delete(self, name: str, over: str) -> None:
        def delete() -> None:
            self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._prefix + name, ifGenerationMatch=over)

        self._insist(delete, name, "written")

    def sizes(self, folder: str) -> dict[str, int]:
        prefix = self._below(folder)

        def listed() -> dict[str, int]:
            found: dict[str, int] = {}
            more: dict[str, str] = {}
            while True:
                page = self._files.call(
                    "GET", "b/{}/o", self._bucket, prefix=prefix, delimiter="/", json_out=True, **more
                )
                found.update((item["name"][len(prefix) :], int(item["size"])) for item in page.get("items", ()))
                if "nextPageToken" not in page:
                    return found
                more = {"pageToken": page["nextPageToken"]}

        return self._insist(listed, folder) or {}

    def _about(self, name: str) -> dict[str, Any] | None:
        def get() -> dict[str, Any]:
            about: dict[str, Any] = self._files.call(
                "GET", "b/{}/o/{}", self._bucket, self._prefix + name, json_out=True
            )
            return about

        return self._insist(get, name)

    def _insist(self, call: Callable[[], T], name: str, doing: Doing = "fetched", absent: bool = True) -> T | None:
        """The call's answer; None when the condition does not hold, and, if that is no error, when nothing is there."""

        def attempt() -> T | FileNotFoundError | None:
            try:
                return call()
            except FileExistsError:  # gcsfs's word for 412
                return None
            except FileNotFoundError as error:
                return None if absent else error
            except OSError as error:
                if str(error).startswith("Forbidden"):
                    raise PermissionError(" ".join(str(error).split())) from None
                raise Broken(str(error) or type(error).__name__) from None
            except ValueError as error:  # gcsfs's word for 400
                raise UserError(f"'{self.url}' refuses what an extraction needs ({error})") from None
            except Exception as error:  # of aiohttp, requests, google.auth: gcsfs has tried several times
                raise Broken(str(error) or type(error).__name__) from error

        found = insist(attempt, f"{self.url}/{name}", doing=doing)
        if isinstance(found, FileNotFoundError):
            raise found
        return found
