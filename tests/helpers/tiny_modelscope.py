"""A minimal hub on loopback: the parts of ModelScope's dataset API that listing and downloading need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class ModelScope(ThreadingHTTPServer):
    """One dataset repository.

    Attributes:
        revisions: revision -> path -> content.
        damaged: paths whose content is sent with its last byte changed.
        downloads: (revision, path) of each file that was sent.
    """

    daemon_threads = True

    def __init__(self, name: str, revisions: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.revisions = name, revisions
        self.damaged: set[str] = set()
        self.downloads: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, query: dict[str, str]) -> object:
        """Return the response to a GET: bytes, data for JSON, or None for 404."""
        files = self.revisions.get(query.get("Revision", "master"), {})
        if path == f"/api/v1/datasets/{self.name}":
            return {"Id": 7, "Type": 1}
        if path in (f"/api/v1/datasets/{self.name}/repo/tree", "/api/v1/datasets/7/repo/tree") and files:
            root = query.get("Root", "/").strip("/")
            entries = [entry(name, files[name]) for name in sorted(files) if not root or name.startswith(f"{root}/")]
            size = int(query["PageSize"])
            return {"Files": entries[(int(query["PageNumber"]) - 1) * size :][:size]}
        if path == f"/api/v1/datasets/{self.name}/repo" and query["FilePath"] in files:
            self.downloads.append((query["Revision"], query["FilePath"]))
            data = files[query["FilePath"]]
            return data[:-1] + bytes([data[-1] ^ 1]) if query["FilePath"] in self.damaged else data
        return None


def entry(path: str, data: bytes) -> dict:
    return {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelScope

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        answer = self.server.answer(url.path, {name: values[0] for name, values in parse_qs(url.query).items()})
        status = 404 if answer is None else 200
        tree = {"Code": status, "Success": status == 200, "Message": "" if answer else "not found", "Data": answer}
        data = answer if isinstance(answer, bytes) else json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data is answer else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serve_modelscope(name: str, revisions: dict[str, dict[str, bytes]]) -> Iterator[ModelScope]:
    """Run the hub until the end of the block."""
    with ModelScope(name, revisions) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
