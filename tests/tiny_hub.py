"""A hub on the loopback interface that speaks as much of Hugging Face's dataset API as streaming needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def dataset_hub(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve one dataset repository; gives the endpoint and the growing list of requests (``GET /path``)."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
            file = re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", url.path)
            tree = re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+/?(.*)", url.path)
            if file and file[1] in files:
                self.answer_file(files[file[1]])
            elif re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", url.path):
                siblings = [{"rfilename": path} for path in files]
                self.answer({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            elif tree and (entries := self.entries_below(tree[1], "recursive=" in url.query.lower())):
                self.answer(entries)
            else:
                missing = "EntryNotFound" if file or tree else "RepoNotFound"
                self.answer({"error": "not found"}, 404, {"X-Error-Code": missing})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if not re.fullmatch(rf"/api/datasets/{name}/paths-info/[^/]+", urllib.parse.urlsplit(self.path).path):
                self.answer({"error": "not found"}, 404)
                return
            asked = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            self.answer([entry for entry in self.entries_below("", True) if entry["path"] in asked])

        def entries_below(self, folder: str, recursive: bool) -> list[dict]:
            prefix = f"{folder}/" if folder else ""
            inside = [path for path in files if path.startswith(prefix)]
            entries = {path: self.entry(path, "file", len(files[path])) for path in inside}
            for path in inside:
                parents = path.split("/")[:-1]
                for depth in range(len(parents)):
                    parent = "/".join(parents[: depth + 1])
                    if parent.startswith(prefix):
                        entries[parent] = self.entry(parent, "directory", 0)
            return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]

        def entry(self, path: str, kind: str, size: int) -> dict:
            return {"type": kind, "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}

        def answer_file(self, data: bytes) -> None:
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not span:
                self.send(200, data, headers)
                return
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send(206, data[first : last + 1], headers)

        def answer(self, tree: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send(status, json.dumps(tree).encode(), {"Content-Type": "application/json", **(headers or {})})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
