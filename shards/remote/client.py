"""Remote files: the one way to fetch them, with retries, resume, bounds and hashes.

In: the URL of a folder, of any scheme that fsspec or plain HTTP supports. Out: :class:`Remote`, the files below it by
their relative names. Nothing is listed, so a plain web server is enough.

    remote = Remote("https://host/caches/mine")
    info = remote.read("CACHE.json", MAX_JSON + 1, parse_info)
    remote.download("shards/000042.tar", path, record.tar.bytes, record.tar.sha256)
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, urlsplit

from shards.errors import UserError, missing_package
from shards.files import rename_durably

T = TypeVar("T")
TransferAction = Literal["fetched", "written"]
CHUNK = 8 << 20  # bytes per request to an object store
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt; progress starts the row anew
EXTRAS = {  # scheme -> package, extra
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), ("adlfs", "azure")),
}
TIMEOUT = 30.0  # seconds without a byte after which an HTTP transfer is given up


def is_url(path: str | Path) -> bool:
    """True for ``scheme://…`` as text."""
    return isinstance(path, str) and "://" in path


class TransientError(Exception):
    """A transfer failed and may succeed when repeated: one phrase."""


@contextmanager
def _transient_errors() -> Iterator[None]:
    """Whatever a file system raises, except for absence and refusal, may pass."""
    try:
        yield
    except (FileNotFoundError, PermissionError, TransientError, UserError):
        raise
    except Exception as error:
        raise TransientError(str(getattr(error, "reason", "") or error) or type(error).__name__) from error


class Remote:
    """The files below a URL. Methods may be called from any thread, but not after a fork: make a new one there.

    Methods retry what may pass, and raise UserError, one sentence, when retrying is no use.

    Attributes:
        url: without a trailing slash.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: Any = None

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if it does not exist."""
        return self._unless_absent(name, lambda: self._connection.size(name))

    def read(self, name: str, limit: int, parse: Callable[[bytes], T]) -> T:
        """``parse`` of a small file's first ``limit`` bytes; the file is read again if it raises TransientError."""
        return retry(lambda: parse(b"".join(self.stream(name, 0, limit))), f"{self.url}/{name}")

    def read_if_exists(self, name: str, limit: int) -> bytes | None:
        """The first ``limit`` bytes of a small file, or None if it does not exist."""
        return self._unless_absent(name, lambda: b"".join(self.stream(name, 0, limit)))

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes ``start:end`` of a file, or fewer where it is shorter, never more. Without retries."""
        with _transient_errors():
            for chunk in self._connection.stream(name, start, end) if start < end else ():
                yield chunk[: end - start]
                start += len(chunk)

    def fetch(self, name: str, file: BinaryIO, size: int, sha256: str | None = None) -> None:
        """Write a file of exactly ``size`` bytes, and of this ``sha256`` if given, into ``file`` from its beginning.

        A broken transfer resumes where it broke; it is given up after several attempts without any progress. A wrong
        hash starts it anew. Never more than ``size`` bytes are written.
        """
        done, furthest, digest = 0, 0, hashlib.sha256()

        def attempt() -> None:
            nonlocal done, digest
            file.seek(done)
            for chunk in self.stream(name, done, size):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
            if done < size:
                raise TransientError(f"it ended after {done} of {size} bytes")
            if sha256 not in (None, digest.hexdigest()):
                done, digest = 0, hashlib.sha256()
                raise TransientError("its sha256 is not the declared one")

        def progressed() -> bool:
            nonlocal furthest
            before, furthest = furthest, max(furthest, done)
            return furthest > before

        retry(attempt, f"{self.url}/{name}", progressed)

    def download(
        self,
        name: str,
        path: Path,
        partial: Path,
        size: int,
        sha256: str | None = None,
        space: AbstractContextManager[bool] | None = None,
    ) -> bool:
        """:meth:`fetch` a file into ``partial``, then rename it durably to ``path``: whole under its name, or absent.

        Args:
            space: entered before ``partial`` is made in its full size; False in it means that there is no room.

        Returns:
            False if there is no room; then nothing was fetched.
        """
        try:
            with space or nullcontext(True) as fits:
                if not fits:
                    return False
                file = open(partial, "wb")  # noqa: SIM115 - closed below, outside of ``space``
                file.truncate(size)
            with file:
                self.fetch(name, file, size, sha256)
                file.flush()
                os.fsync(file.fileno())
            rename_durably(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def upload(self, path: Path, name: str) -> None:
        """Write a local file under ``name``, over what is there."""
        retry(lambda: self._connection.put(path, name), f"{self.url}/{name}", action="written")

    @property
    def _connection(self) -> Any:
        # Without the lock of functools.cached_property: a process forked meanwhile would inherit it locked.
        if self._opened is None:
            self._opened = (_Http if self.url.startswith(("http://", "https://")) else _Filesystem)(self.url)
        return self._opened

    def _unless_absent(self, name: str, attempt: Callable[[], T]) -> T | None:
        def found() -> T | None:
            try:
                return attempt()
            except FileNotFoundError:
                return None

        return retry(found, f"{self.url}/{name}")


def retry(
    attempt: Callable[[], T],
    what: str,
    progressed: Callable[[], bool] = lambda: False,
    action: TransferAction = "fetched",
) -> T:
    """``attempt()`` until it raises no TransientError, waiting longer each time; UserError when it is no use."""
    start, failures = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise UserError(f"there is no '{what}': name the folder of a complete cache") from None
        except PermissionError as error:
            raise UserError(f"permission denied for '{what}' ({error}): check credentials and access rights") from None
        except TransientError as error:
            reason = " ".join(str(error).split())[:200]
        failures = 0 if progressed() else failures + 1
        if failures > len(BACKOFF):
            raise UserError(
                f"'{what}' could not be {action} in {failures} attempts and {time.monotonic() - start:.0f} s "
                f"({reason}): check the connection and the files there, then rerun the same command"
            )
        time.sleep(BACKOFF[max(failures - 1, 0)] * random.uniform(0.5, 1.0))  # not all ranks at the same moment


class _Http:
    """A plain web server, by Python's own client.

    Not by obstore, whose runtime hangs forever in a forked DataLoader worker, and which needs ranges and an ETag to
    resume; not by fsspec, whose HTTP needs aiohttp and has no limit on silence.
    """

    def __init__(self, url: str) -> None:
        from urllib.request import HTTPRedirectHandler, build_opener

        class StaysEncrypted(HTTPRedirectHandler):
            def redirect_request(self, request: Any, *answer: Any) -> Any:
                if request.type == "https" and not answer[-1].startswith("https://"):
                    raise UserError(f"'{request.full_url}' redirects from https to http: name another URL")
                return super().redirect_request(request, *answer)

        account, at, _ = urlsplit(url).netloc.rpartition("@")
        if at:
            shown = url.replace(f"{account}@", "")
            raise UserError(f"the URL of '{shown}' holds a user name or password, which logs would show: leave it out")
        self.url = quote(url, safe="%/:?&=@+,;~!$'()*[]")  # spaces and letters as typed; what is quoted stays
        self.open = build_opener(StaysEncrypted).open

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-{end - 1}"} if start else {}
        with self._answer(name, "GET", headers) as answer:
            skip, left = (0 if answer.status == 206 else start), end - start  # 200: the server ignores ranges
            while left > 0 and (chunk := answer.read(min(1 << 20, skip or left))):
                if skip:
                    skip -= len(chunk)
                else:
                    left -= len(chunk)
                    yield chunk

    @_transient_errors()
    def size(self, name: str) -> int:
        with self._answer(name, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length", "")
            if not length.isdigit():
                raise TransientError("the server does not tell its length")
            return int(length)

    @contextmanager
    def _answer(self, name: str, method: str, headers: dict[str, str]) -> Iterator[Any]:
        from urllib.error import HTTPError
        from urllib.request import Request

        headers = {"User-Agent": "earshard", "Accept-Encoding": "identity", **headers}
        request = Request(f"{self.url}/{quote(name)}", headers=headers, method=method)
        try:
            with self.open(request, timeout=TIMEOUT) as answer:
                yield answer
        except HTTPError as error:
            error.close()  # it holds the connection
            if error.code in (404, 410):
                raise FileNotFoundError(name) from None
            if error.code in (401, 403):
                raise PermissionError(f"HTTP {error.code}") from None
            raise TransientError(f"HTTP {error.code} {error.reason}") from None


class _Filesystem:
    """Any other scheme, by fsspec, which resets itself after a fork."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, scheme = url, url.split("://")[0]
        try:  # a filesystem of our own, which remembers no listings
            self.files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            if scheme in EXTRAS:
                raise missing_package(f"{scheme}://", *EXTRAS[scheme]) from None
            raise UserError(f"'{scheme}://' needs another package ({error}): install it with pip") from None
        except ValueError as error:
            raise UserError(f"'{url}' names no cache ({error}): write scheme://bucket/folder") from None
        self.path = path.rstrip("/")

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            stop = min(end, start + CHUNK)
            chunk: bytes = self.files.cat_file(f"{self.path}/{name}", start=start, end=stop)
            yield chunk
            start += len(chunk)
            if start < stop:
                return

    @_transient_errors()
    def size(self, name: str) -> int:
        return int(self.files.info(f"{self.path}/{name}")["size"])

    @_transient_errors()
    def put(self, path: Path, name: str) -> None:
        try:
            self.files.put_file(str(path), f"{self.path}/{name}")
        except NotImplementedError as error:
            raise UserError(
                f"'{self.url}' cannot be written ({error or 'read-only'}): name a bucket, such as s3://…"
            ) from None
