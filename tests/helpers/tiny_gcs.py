"""A minimal Google Cloud Storage on loopback, for reading a cache and extracting into a bucket.

gcsfs reads through the JSON API; obstore reads and writes through the XML API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 7  # objects in one answer to a listing


class GCS(ThreadingHTTPServer):
    """A server and a record of its requests.

    Attributes:
        objects: (bucket, name) -> (generation, bytes). Generations are never reused.
        marks: (bucket, name) -> the user's metadata, by the name of its header.
        puts: names that were written, in order.
        loses: every n-th write is performed but answered with an error; 0 is none.
    """

    daemon_threads = True

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = buckets
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.marks: dict[tuple[str, str], dict[str, str]] = {}
        self.puts: list[str] = []
        self.loses = 0
        self.generation = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GCS

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        found = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)(/o(/(.+))?)?", url.path)
        if not found:
            self.get_xml(url.path, query)
        elif found[2] not in self.server.buckets:
            self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        elif not found[3]:
            self.answer(200, {"name": found[2]})
        elif not found[4]:
            self.list(found[2], query)
        else:
            self.get((found[2], unquote(found[5])), query.get("alt") == "media")

    def do_HEAD(self) -> None:
        self.get_xml(self.path, {})

    def get_xml(self, path: str, query: dict[str, str]) -> None:
        bucket, _, name = path[1:].partition("/")
        key = (bucket, unquote(name))
        if bucket not in self.server.buckets:
            self.refuse(404, "NoSuchBucket")
        elif not name:
            self.list_xml(bucket, query)
        elif key in self.server.objects:
            generation, data = self.server.objects[key]
            headers = {
                "ETag": f'"{generation}"',
                "X-Goog-Generation": str(generation),
                **self.server.marks.get(key, {}),
            }
            self.send(200, data, {**headers, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"})
        else:
            self.refuse(404, "NoSuchKey")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, name = self.path[1:].partition("/")
        key, server = (bucket, unquote(name)), self.server
        if bucket not in server.buckets:
            self.refuse(404, "NoSuchBucket")
            return
        wanted = self.headers.get("X-Goog-If-Generation-Match")
        with server.lock:
            if written := wanted is None or int(wanted) == server.objects.get(key, (0, b""))[0]:
                server.generation += 1
                server.objects[key] = (server.generation, data)
                server.marks[key] = {h: v for h, v in self.headers.items() if h.lower().startswith("x-goog-meta-")}
                server.puts.append(key[1])
            generation, lost = server.objects.get(key, (0, b""))[0], bool(server.loses)
            lost = lost and written and len(server.puts) % server.loses == 0
        if not written:
            self.refuse(412, "PreconditionFailed")
        elif lost:
            self.refuse(503, "ServiceUnavailable")
        else:
            self.send(200, b"", {"ETag": f'"{generation}"', "X-Goog-Generation": str(generation)})

    def do_DELETE(self) -> None:
        bucket, _, name = self.path[1:].partition("/")
        with self.server.lock:
            gone = self.server.objects.pop((bucket, unquote(name)), None)
        if gone:
            self.send(204, b"", {})
        else:
            self.refuse(404, "NoSuchKey")

    def refuse(self, status: int, code: str) -> None:
        self.send(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})

    def about(self, key: tuple[str, str]) -> dict:
        generation, data = self.server.objects[key]
        return {
            "kind": "storage#object",
            "bucket": key[0],
            "name": key[1],
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }

    def get(self, key: tuple[str, str], media: bool) -> None:
        if key not in self.server.objects:
            self.answer(404, {"error": {"code": 404, "message": "no such object"}})
            return
        if not media:
            self.answer(200, self.about(key))
            return
        generation, data = self.server.objects[key]
        headers = {"X-Goog-Generation": str(generation)}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and int(span[1]) >= len(data):
            self.send(416, b"", headers)
        elif span:
            part = data[int(span[1]) : int(span[2]) + 1]
            at = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}"
            self.send(206, part, {**headers, "Content-Range": at})
        else:
            self.send(200, data, headers)

    def page(self, bucket: str, query: dict[str, str], token: str) -> tuple[list[str], list[str], str | None]:
        """Return the names directly below a prefix, the folders there, and the start of the next page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "\0")
        names = sorted(name for held, name in self.server.objects if held == bucket and name.startswith(prefix))
        inside = [name for name in names if delimiter not in name[len(prefix) :]]
        below = {f"{prefix}{name[len(prefix) :].split(delimiter)[0]}{delimiter}" for name in set(names) - set(inside)}
        start = int(query.get(token, 0))
        after = str(start + PAGE) if start + PAGE < len(inside) else None
        return inside[start : start + PAGE], [] if start else sorted(below), after

    def list(self, bucket: str, query: dict[str, str]) -> None:
        names, folders, after = self.page(bucket, query, "pageToken")
        tree = {"items": [self.about((bucket, name)) for name in names], "prefixes": folders}
        self.answer(200, {**tree, "nextPageToken": after} if after else tree)

    def list_xml(self, bucket: str, query: dict[str, str]) -> None:
        names, folders, after = self.page(bucket, query, "continuation-token")
        lines = [f"<NextContinuationToken>{after}</NextContinuationToken>"] if after else []
        lines += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
        for name in names:
            generation, data = self.server.objects[bucket, name]
            lines.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{generation}</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        self.send(200, f"<ListBucketResult>{''.join(lines)}</ListBucketResult>".encode(), {})

    def answer(self, status: int, tree: object) -> None:
        self.send(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serve_gcs(*buckets: str) -> Iterator[GCS]:
    """Serve empty ``buckets`` until the end of the block."""
    with GCS(*buckets) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
