"""Access to remote files with retries, resumption, size limits and hashes.

:class:`Remote` takes the URL of a folder, of any scheme that fsspec or plain HTTP supports, and reads the files in it
by their relative names. It lists nothing, so a plain web server is sufficient.

    remote = Remote("https://host/caches/mine")
    info = remote.read("CACHE.json", MAX_JSON + 1, parse_info)
    remote.download("shards/000042.tar", path, record.tar.bytes, record.tar.sha256)
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit

from shards.errors import UserError, missing_package, without_secrets
from shards.files import create_file, rename_durably

T = TypeVar("T")
TransferAction = Literal["fetched", "written"]
CHUNK = 8 << 20  # bytes per request to an object store
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt; progress resets it
EXTRAS = {  # scheme -> package, extra
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), ("adlfs", "azure")),
}
TIMEOUT = 30.0  # seconds without a byte after which an HTTP transfer fails
DATASET_URL = re.compile(
    r"(?P<hub>hf|modelscope)://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?"
)


def is_url(path: str | Path) -> bool:
    """Return whether ``path`` is a string of the form ``scheme://…``."""
    return isinstance(path, str) and "://" in path


class TransientError(Exception):
    """A transfer failed and may succeed when repeated. The message is one phrase."""


@contextmanager
def _transient_errors() -> Iterator[None]:
    """Raise any file system error as a TransientError, except for missing files and denied permission."""
    try:
        yield
    except (FileNotFoundError, PermissionError, TransientError, UserError):
        raise
    except Exception as error:
        raise TransientError(str(getattr(error, "reason", "") or error) or type(error).__name__) from error


class Remote:
    """The files below a URL. Methods may be called from any thread, but not after a fork: create a new object there.

    A URL with a password or a token is refused: URLs stand in messages, records and reports. Methods
    retry transient errors and raise UserError if retrying does not help.

    Attributes:
        url: the URL of the folder, without a trailing slash.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        _refuse_secrets(self.url)
        self._opened: Any = None

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        return self._unless_absent(name, lambda: self._connection.size(name))

    def read(self, name: str, limit: int, parse: Callable[[bytes], T]) -> T:
        """Return ``parse`` of a file's first ``limit`` bytes; read them again if ``parse`` raises TransientError."""
        return retry(lambda: parse(b"".join(self.stream(name, 0, limit))), f"{self.url}/{name}")

    def read_if_exists(self, name: str, limit: int) -> bytes | None:
        """Return the first ``limit`` bytes of a small file, or None if it does not exist."""
        return self._unless_absent(name, lambda: b"".join(self.stream(name, 0, limit)))

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yield bytes ``start:end`` of a file, or fewer if it is shorter, never more. Does not retry."""
        with _transient_errors():
            for chunk in self._connection.stream(name, start, end) if start < end else ():
                yield chunk[: end - start]
                start += len(chunk)

    def fetch(self, name: str, file: BinaryIO, size: int, sha256: str | None = None) -> None:
        """Write a remote file of exactly ``size`` bytes, and of this ``sha256`` if given, to the start of ``file``.

        An interrupted transfer resumes where it stopped and fails after several attempts without progress. A wrong hash
        restarts it. Never writes more than ``size`` bytes.
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
                raise TransientError("its sha256 does not match the recorded one")

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
        """:meth:`fetch` a file into ``partial``, then rename it durably to ``path``: ``path`` is complete or absent.

        Args:
            space: entered before ``partial`` is created at its full size. Yields False if there is no space.

        Returns:
            False if there is no space; nothing was fetched then.

        Raises:
            UserError: the file there has another size than ``size``; nothing is created and no space made then.
        """
        found = self.size(name)
        if found != size:
            there = "does not exist" if found is None else f"has {found} bytes, not {size} as the cache says"
            raise UserError(f"'{self.url}/{name}' {there}: run `python -m shards verify {self.url}`")
        try:
            with space or nullcontext(True) as fits:
                if not fits:
                    return False
                file = os.fdopen(create_file(partial), "wb")  # closed below, outside of ``space``
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
        """Upload a local file as ``name``, replacing an existing file."""
        retry(lambda: self._connection.put(path, name), f"{self.url}/{name}", action="written")

    @property
    def _connection(self) -> Any:
        # Without the lock of functools.cached_property: a process forked meanwhile would inherit it locked.
        if self._opened is None:
            kinds = {"http": _Http, "https": _Http, "modelscope": _ModelScope}
            self._opened = kinds.get(self.url.partition("://")[0], _Filesystem)(self.url)
        return self._opened

    def _unless_absent(self, name: str, attempt: Callable[[], T]) -> T | None:
        def found() -> T | None:
            try:
                return attempt()
            except FileNotFoundError:
                return None

        return retry(found, f"{self.url}/{name}")


def _refuse_secrets(url: str) -> None:
    account, at, _ = urlsplit(url).netloc.rpartition("@")  # Azure: container@account
    if at and (":" in account or url.startswith(("http://", "https://"))):
        raise UserError(
            f"the URL of '{url.replace(f'{account}@', '')}' contains a user name or password, which logs would show: "
            "remove it"
        )
    if without_secrets(url) != url:
        raise UserError(f"the URL '{without_secrets(url)}' contains a token, which logs would show: remove it")


def retry(
    attempt: Callable[[], T],
    what: str,
    progressed: Callable[[], bool] = lambda: False,
    action: TransferAction = "fetched",
) -> T:
    """Call ``attempt()`` until it raises no TransientError, waiting longer each time, and return its result.

    Args:
        what: the file, for error messages.
        progressed: returns whether the last attempt made progress, which resets the count of failures.

    Raises:
        UserError: the file does not exist, access is denied, or too many attempts failed.
    """
    start, failures = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise UserError(f"'{what}' does not exist: pass the URL of a complete cache") from None
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
        time.sleep(BACKOFF[max(failures - 1, 0)] * random.uniform(0.5, 1.0))  # so that ranks do not retry in step


class _Http:
    """A plain web server, accessed with the HTTP client of the standard library.

    obstore is not used because its runtime hangs in a forked DataLoader worker and because it needs ranges and an ETag
    to resume; fsspec is not used because its HTTP client needs aiohttp and has no read timeout.
    """

    def __init__(self, url: str) -> None:
        from urllib.request import HTTPRedirectHandler, build_opener

        class KeepsScheme(HTTPRedirectHandler):
            def redirect_request(self, request: Any, *answer: Any) -> Any:
                scheme = urlsplit(answer[-1]).scheme
                if scheme != request.type:
                    raise UserError(f"'{request.full_url}' redirects from {request.type} to {scheme}: use another URL")
                return super().redirect_request(request, *answer)

            def http_error_302(self, request: Any, file: Any, code: int, message: str, headers: Any) -> Any:
                target = urljoin(request.full_url, headers.get("location") or headers.get("uri") or "")
                if urlsplit(target).scheme not in ("http", "https"):  # which the library would answer by an HTTPError
                    self.redirect_request(request, file, code, message, headers, target)
                return super().http_error_302(request, file, code, message, headers)

            http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]

        self.url = quote(url, safe="%/:?&=@+,;~!$'()*[]")  # keeps what is already quoted
        self.open = build_opener(KeepsScheme).open
        self.secrets: dict[str, str] = {}  # headers that are not sent to where an answer redirects

    def address(self, name: str) -> str:
        return f"{self.url}/{quote(name)}"

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
                raise TransientError("the server did not send its length")
            return int(length)

    @contextmanager
    def _answer(self, name: str, method: str, headers: dict[str, str]) -> Iterator[Any]:
        from urllib.error import HTTPError
        from urllib.request import Request

        headers = {"User-Agent": "earshard", "Accept-Encoding": "identity", **headers}
        request = Request(self.address(name), headers=headers, method=method)
        for key, value in self.secrets.items():
            request.add_unredirected_header(key, value)
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


class _ModelScope(_Http):
    """A dataset on ModelScope: the address from which the hub's own library downloads a file, with its token."""

    def __init__(self, url: str) -> None:
        match = DATASET_URL.fullmatch(url)
        if match is None:
            raise UserError(f"'{url}' is not a dataset URL: write modelscope://datasets/OWNER/NAME, or …/NAME/FOLDER")
        try:
            from modelscope_hub.config import get_default_config
        except ImportError:
            raise missing_modelscope() from None
        config = get_default_config()
        super().__init__(f"{config.endpoint}/api/v1/datasets/{match['repo']}/repo")
        self.revision, self.folder = match["revision"] or "master", match["folder"]
        if config.token:
            self.secrets = {"Authorization": f"Bearer {config.token}", "Cookie": f"m_session_id={config.token}"}

    def address(self, name: str) -> str:
        path = f"{self.folder}/{name}" if self.folder else name
        return f"{self.url}?{urlencode({'Revision': self.revision, 'FilePath': path})}"

    @_transient_errors()
    def size(self, name: str) -> int:
        with self._answer(name, "GET", {"Range": "bytes=0-0"}) as answer:  # the store behind it may refuse HEAD
            span = answer.headers.get("Content-Range", "").rpartition("/")[2]
            length = span if answer.status == 206 else answer.headers.get("Content-Length", "")
        if not length.isdigit():
            raise TransientError("the server did not send its length")
        return int(length)

    def put(self, path: Path, name: str) -> None:
        raise UserError("single files are not written to ModelScope: use `python -m shards push`")


def missing_modelscope() -> UserError:
    """Return the error to raise where ModelScope's library is not installed."""
    return UserError("modelscope:// needs the package modelscope_hub: run `python -m pip install modelscope-hub`")


class _Filesystem:
    """Any other scheme, accessed with fsspec, which resets itself after a fork."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, scheme = url, url.split("://")[0]
        try:  # a private instance, which caches no listings
            self.files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            if scheme in EXTRAS:
                raise missing_package(f"{scheme}://", *EXTRAS[scheme]) from None
            raise UserError(f"'{scheme}://' requires another package ({error}): install it with pip") from None
        except ValueError as error:
            raise UserError(f"'{url}' is not a valid cache URL ({error}): write scheme://bucket/folder") from None
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
                f"'{self.url}' is not writable ({error or 'read-only'}): use a bucket, such as s3://…"
            ) from None
