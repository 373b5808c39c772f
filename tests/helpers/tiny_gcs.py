"""As much of Google Cloud Storage's JSON API as reading a cache and extracting into a bucket need, on loopback."""

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

PAGE = 7  # objects in one answer to a listing


class GCS(ThreadingHTTPServer):
    """``objects``: (bucket, name) -> (generation, bytes). A generation is never given twice."""

    daemon_threads = True

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = buckets
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
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
        if not found or found[2] not in self.server.buckets:
            self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        elif not found[3]:
            self.answer(200, {"name": found[2]})
        elif not found[4]:
            self.list(found[2], query)
        else:
            self.get((found[2], unquote(found[5])), query.get("alt") == "media")

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path)
        if not found or found[1] not in self.server.buckets or query.get("uploadType") != "media":
            self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
            return
        key = (found[1], query["name"])
        with self.server.lock:
            if self.holds(key, query):
                self.server.generation += 1
                self.server.objects[key] = (self.server.generation, data)
        if self.server.objects[key][1] is data:
            self.answer(200, self.about(key))
        else:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})

    def do_DELETE(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        bucket, _, name = url.path.removeprefix("/storage/v1/b/").partition("/o/")
        key = (bucket, unquote(name))
        with self.server.lock:
            held = self.holds(key, query)
            gone = self.server.objects.pop(key, None) if held else None
        if gone:
            self.send(204, b"", {})
        else:
            self.answer(412 if not held else 404, {"error": {"code": 412, "message": "conditionNotMet"}})

    def holds(self, key: tuple[str, str], query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.server.objects.get(key, (0, b""))[0]

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

    def list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "\0")
        names = sorted(name for held, name in self.server.objects if held == bucket and name.startswith(prefix))
        inside = [name for name in names if delimiter not in name[len(prefix) :]]
        below = {f"{prefix}{name[len(prefix) :].split(delimiter)[0]}{delimiter}" for name in set(names) - set(inside)}
        start = int(query.get("pageToken", 0))
        tree: dict = {"items": [self.about((bucket, name)) for name in inside[start : start + PAGE]]}
        if start == 0:
            tree["prefixes"] = sorted(below)
        if start + PAGE < len(inside):
            tree["nextPageToken"] = str(start + PAGE)
        self.answer(200, tree)

    def answer(self, status: int, tree: object) -> None:
        self.send(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serve_gcs(*buckets: str) -> Iterator[GCS]:
    """Empty ``buckets`` until the end of the block."""
    with GCS(*buckets) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
