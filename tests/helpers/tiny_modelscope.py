"""A minimal hub on loopback: the parts of ModelScope's dataset API that listing, downloading and publishing need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class ModelScope(ThreadingHTTPServer):
    """One dataset repository. It exists if it has revisions or was created.

    Attributes:
        revisions: revision -> path -> content.
        visibility: 1 is private, 5 is public.
        commits: the paths of every commit.
        large: sha256 -> content that was uploaded, committed or not.
        writes: (path, authorization) of every request that is no GET.
        refuse: whether commits are answered 403.
        redirects: whether files are answered by a redirection to another host.
        store: the authorization of every request to that host.
        damaged: paths whose content is sent with its last byte changed.
        downloads: (revision, path) of each file that was sent.
    """

    daemon_threads = True

    def __init__(self, name: str, revisions: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.revisions = name, revisions
        self.damaged: set[str] = set()
        self.downloads: list[tuple[str, str]] = []
        self.visibility, self.refuse, self.redirects = 5, False, False
        self.store: list[str] = []
        self.commits: list[list[str]] = []
        self.large: dict[str, bytes] = {}
        self.writes: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, query: dict[str, str]) -> object:
        """Return the response to a GET: bytes, data for JSON, or None for 404."""
        files = self.revisions.get(query.get("Revision", "master"), {})
        if path == f"/api/v1/datasets/{self.name}" and self.revisions:
            return {"Id": 7, "Type": 1, "Visibility": self.visibility}
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

    def write(self, path: str, body: bytes) -> tuple[int, object]:
        """Return the status and the data of the answer to a POST or PUT."""
        repository = f"/api/v1/repos/datasets/{self.name}"
        if path == "/api/v1/datasets":
            fields = dict(re.findall(rb'name="(\w+)"\r\n\r\n(.*?)\r\n', body))
            if f"{fields[b'Owner'].decode()}/{fields[b'Name'].decode()}" != self.name:
                return 403, "no rights"
            if self.revisions:
                return 400, "already exists"
            self.visibility, self.revisions = int(fields[b"Visibility"]), {"master": {}}
            return 200, {"Id": 7, "Visibility": self.visibility}
        if path == f"{repository}/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return 200, {"objects": [{**each, "actions": self.place_of(each["oid"])} for each in objects]}
        if path.startswith("/upload/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/upload/")
            self.large[path.removeprefix("/upload/")] = body
            return 200, {}
        if path == f"{repository}/commit/master" and not self.refuse:
            actions = json.loads(body)["actions"]
            added = {each["path"]: self.content(each) for each in actions}
            self.revisions["master"].update(added)
            self.commits.append(list(added))
            return 200, {}
        return 403, "no rights"

    def place_of(self, oid: str) -> dict:
        return {} if oid in self.large else {"upload": {"href": f"{self.url}/upload/{oid}"}}

    def content(self, action: dict) -> bytes:
        return self.large[action["sha256"]] if action["type"] == "lfs" else base64.b64decode(action["content"])


def entry(path: str, data: bytes) -> dict:
    return {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelScope

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if self.server.redirects and url.path.endswith("/repo"):
            target = f"http://localhost:{self.server.server_port}{self.path.replace('/repo?', '/repo/?')}"
            self.send(302, b"", {"Location": target})
            return
        if url.path.endswith("/repo/"):
            self.server.store.append(self.headers.get("Authorization", "") + self.headers.get("Cookie", ""))
            url = url._replace(path=url.path.rstrip("/"))
        answer = self.server.answer(url.path, {name: values[0] for name, values in parse_qs(url.query).items()})
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if isinstance(answer, bytes) and span:
            first, last = int(span[1]), min(int(span[2] or len(answer) - 1), len(answer) - 1)
            self.send(206, answer[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(answer)}"})
            return
        status = 404 if answer is None else 200
        tree = {"Code": status, "Success": status == 200, "Message": "" if answer else "not found", "Data": answer}
        data = answer if isinstance(answer, bytes) else json.dumps(tree).encode()
        kind = "application/octet-stream" if data is answer else "application/json"
        self.send(status, data, {"Content-Type": kind})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.writes.append((self.path, self.headers.get("Authorization", "")))
        status, answer = self.server.write(urlsplit(self.path).path, body)
        tree = {"Code": status, "Success": status == 200, "Message": answer if status != 200 else "", "Data": answer}
        self.send(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    do_PUT = do_POST

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
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
