"""Files that are far away: one connection type, two ways there, and patience.

In: the URL of a folder, of any scheme that fsspec or plain HTTP knows. Out: :class:`Remote`, which streams parts of the
files below it, and :func:`insist`, which tries again for as long as that may help and then tells why in one sentence.
Nothing is listed, so a plain web server will do.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from shards.errors import UserError

T = TypeVar("T")
Doing = Literal["fetched", "written"]
CHUNK = 8 << 20  # bytes asked for at once from an object store
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt; progress starts the row anew
SILENCE = 30.0  # seconds without a byte after which an HTTP transfer is given up


def is_url(path: str | Path) -> bool:
    """True for ``scheme://…`` as text."""
    return isinstance(path, str) and "://" in path


class Broken(Exception):
    """A transfer failed and may succeed when repeated: one phrase."""


class Remote(Protocol):
    """Where the files of a cache come from."""

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes ``start:end`` of a file, or less where it is shorter."""

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError, PermissionError, or anything else that may pass."""


def connect(url: str) -> Remote:
    """The remote of a URL's scheme.

    Raises:
        UserError: no installed package knows the scheme.
    """
    if url.startswith(("http://", "https://")):
        return _Http(url)
    return _Store(url)


class _Http:
    """A plain web server. Not through fsspec: its HTTP wants aiohttp, an event loop, and has no limit on silence."""

    def __init__(self, url: str) -> None:
        from urllib.parse import quote

        self.url = quote(url, safe="%/:?&=@+,;~!$'()*[]")  # blanks and letters as they were typed; what is quoted stays

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-{end - 1}"} if start else {}
        with self._opened(name, "GET", headers) as answer:
            skip, left = (0 if answer.status == 206 else start), end - start  # 200: it knows no ranges
            while left and (chunk := answer.read(min(1 << 20, skip or left))):
                if skip:
                    skip -= len(chunk)
                    continue
                left -= len(chunk)
                yield chunk

    def size(self, name: str) -> int:
        with self._opened(name, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length", "")
            if not length.isdigit():
                raise Broken("it does not tell its length")
            return int(length)

    @contextmanager
    def _opened(self, name: str, method: str, headers: dict[str, str]) -> Iterator[Any]:
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.parse import quote
        from urllib.request import Request, urlopen

        headers = {"User-Agent": "earshard", "Accept-Encoding": "identity", **headers}
        try:
            request = Request(f"{self.url}/{quote(name)}", headers=headers, method=method)
            with urlopen(request, timeout=SILENCE) as answer:
                yield answer
        except HTTPError as error:
            error.close()  # it holds the connection
            if error.code in (404, 410):
                raise FileNotFoundError(name) from None
            if error.code in (401, 403):
                raise PermissionError(f"HTTP {error.code}") from None
            raise Broken(f"HTTP {error.code} {error.reason}") from None
        except (HTTPException, OSError) as error:
            raise Broken(str(getattr(error, "reason", "") or error) or type(error).__name__) from None


class _Store:
    """Any other scheme, by fsspec. Opened in the process that reads: fsspec's filesystems do not survive a fork."""

    def __init__(self, url: str) -> None:
        self.files, self.path = open_filesystem(url)

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            wanted = min(end, start + CHUNK)
            chunk: bytes = self.files.cat_file(f"{self.path.rstrip('/')}/{name}", start=start, end=wanted)
            yield chunk
            start += len(chunk)
            if start < wanted:
                return

    def size(self, name: str) -> int:
        return int(self.files.info(f"{self.path.rstrip('/')}/{name}")["size"])


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path in it; a filesystem of our own, which remembers no listings.

    Raises:
        UserError: no installed package knows the scheme.
    """
    import fsspec

    scheme = url.split("://")[0]
    try:
        files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise UserError(f"'{scheme}://' needs another package ({error}): install it with pip") from None
    except ValueError as error:
        raise UserError(f"'{url}' names no cache ({error}): write scheme://bucket/folder") from None
    return files, path


def insist(
    attempt: Callable[[], T],
    what: str,
    progressed: Callable[[], bool] = lambda: False,
    doing: Doing = "fetched",
) -> T:
    """``attempt()`` until it succeeds, waiting longer each time; UserError when it is no use."""
    begun, failures = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise UserError(f"there is no '{what}': name the folder of a complete cache, copied whole") from None
        except PermissionError as error:
            may = "read" if doing == "fetched" else doing
            raise UserError(f"'{what}' may not be {may} ({error}): check credentials and rights") from None
        except Broken as error:
            reason = str(error)
        failures = 0 if progressed() else failures + 1
        if failures > len(WAITS):
            raise UserError(
                f"'{what}' could not be {doing} in {failures} attempts and {time.monotonic() - begun:.0f} s "
                f"({_one_line(reason)}): check the connection and the files there, then run the same command again"
            )
        time.sleep(WAITS[max(failures - 1, 0)] * random.uniform(0.5, 1.0))  # not all ranks at the same moment


def file_size(remote: Remote, name: str, what: str) -> int | None:
    """Bytes of a file, None where there is none; UserError when it cannot be told."""

    def attempt() -> int | None:
        try:
            return remote.size(name)
        except FileNotFoundError:
            return None
        except (PermissionError, Broken, UserError):
            raise
        except Exception as error:  # whatever a filesystem raises may pass
            raise Broken(str(error) or type(error).__name__) from error

    return insist(attempt, what)


def fetch_file(remote: Remote, name: str, size: int, path: Path, what: str, sha256: str | None = None) -> None:
    """Bring a file of ``size`` bytes, and of this ``sha256`` if given; a cut transfer goes on where it was cut."""
    at, best, digest = 0, 0, hashlib.sha256()

    def attempt() -> None:
        nonlocal at, digest
        with open(path, "r+b" if at else "wb") as file:
            file.seek(at)
            source = remote.stream(name, at, size) if at < size else iter(())
            while (chunk := next_chunk(source)) is not None:
                file.write(chunk)
                digest.update(chunk)
                at += len(chunk)
        if at < size:
            raise Broken(f"it ended after {at} of {size} bytes")
        if sha256 not in (None, digest.hexdigest()):
            at, digest = 0, hashlib.sha256()
            raise Broken("its sha256 is not the one in its record")

    def progressed() -> bool:
        nonlocal best
        before, best = best, max(best, at)
        return best > before

    insist(attempt, what, progressed)


def read_small(remote: Remote, name: str, most: int) -> bytes:
    """A whole file of at most ``most`` bytes, or its beginning; Broken when it may come another time."""
    source = remote.stream(name, 0, most)
    return b"".join(iter(lambda: next_chunk(source), None))


def next_chunk(source: Iterator[bytes]) -> bytes | None:
    """The next chunk; whatever a filesystem raises besides absence and refusal may pass."""
    try:
        return next(source, None)
    except (FileNotFoundError, PermissionError, Broken, UserError):
        raise
    except Exception as error:
        raise Broken(str(error) or type(error).__name__) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
