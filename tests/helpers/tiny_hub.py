"""A minimal hub on loopback: the parts of Hugging Face's dataset API that reading and publishing need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = 20  # entries of a tree in one answer


class Hub(ThreadingHTTPServer):
    """One dataset repository. It exists if it has files or was created.

    Attributes:
        files: path -> content.
        large: sha256 -> content that was uploaded by the LFS protocol, committed or not.
        requests: ``GET /path`` of every request.
        commits: the paths of every commit.
        parents: the commit that each commit must follow, None if any.
        fail_at: commits from this one on are answered 403; None never.
        xet: a folder that Xet's own library writes chunks to in place of its server; None: uploads are LFS's.
        kind: ``dataset`` or ``model``.
        private: whether it is private.
        senders: a folder that holds what is uploaded by Xet, by which a sha256 is known; the bytes come from ``xet``.
    """

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes], kind: str = "dataset") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self.private = kind, False
        self.web, self.api = f"/datasets/{name}" if kind == "dataset" else f"/{name}", f"/api/{kind}s/{name}"
        self.name, self.files, self.exists = name, files, bool(files)
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[list[str]] = []
        self.parents: list[str | None] = []
        self.fail_at: int | None = None
        self.xet: Path | None = None
        self.senders = Path()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def is_large(self, path: str) -> bool:
        return path.endswith((".tar", ".parquet", ".safetensors"))

    def content(self, oid: str) -> bytes:
        """Return the content that was uploaded with this sha256."""
        if oid not in self.large:
            self.large[oid] = self._from_xet(oid)
        return self.large[oid]

    def _from_xet(self, oid: str) -> bytes:
        from hf_xet import XetFileInfo, hash_files
        from huggingface_hub.utils._xet import get_xet_session

        files = [path for path in self.senders.rglob("*") if path.is_file()]
        file = next(path for path in files if hashlib.sha256(path.read_bytes()).hexdigest() == oid)
        info = XetFileInfo(hash_files([str(file)])[0].hash, file.stat().st_size)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.xet, f"{folder}/xet")  # the sender has locked its own
            with get_xet_session().new_file_download_group(endpoint=f"local://{folder}/xet") as group:
                group.start_download_file(info, f"{folder}/file")
            return Path(folder, "file").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
        file = re.fullmatch(rf"{hub.web}/resolve/[^/]+/(.+)", url.path)
        tree = re.fullmatch(rf"{hub.api}/tree/[^/]+/?(.*)", url.path)
        if url.path == "/api/datasets":
            owners = urllib.parse.parse_qs(url.query).get("author", [])
            self.answer([{"id": hub.name, "private": False, "tags": []}] if hub.name.split("/")[0] in owners else [])
        elif not hub.exists:
            self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif file and file[1] in hub.files:
            self.answer_file(hub.files[file[1]])
        elif hub.xet and re.fullmatch(rf"{hub.api}/xet-write-token/[^/]+", url.path):
            self.answer({"casUrl": f"local://{hub.xet}", "accessToken": "token", "exp": 4102444800})
        elif re.fullmatch(rf"{hub.api}(/revision/[^/]+)?", url.path):
            siblings = [{"rfilename": path} for path in hub.files]
            self.answer({"id": hub.name, "sha": COMMIT, "private": hub.private, "tags": [], "siblings": siblings})
        elif tree and (entries := self.entries_below(tree[1], "recursive=" in url.query.lower())):
            self.answer_page(entries, url)
        elif tree and not tree[1]:
            self.answer([])
        else:
            missing = "EntryNotFound" if file or tree else "RepoNotFound"
            self.answer({"error": "not found"}, 404, {"X-Error-Code": missing})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            told = hub.kind == "model" or json.loads(body)["content"].startswith("---\nlicense: ")
            self.answer({"errors": [] if told else [{"message": "no licence"}], "warnings": []})
        elif not hub.exists:
            self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(rf"{hub.api}/paths-info/[^/]+", path):
            text = body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text)["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            self.answer([entry for entry in self.entries_below("", True) if entry["path"] in asked])
        elif re.fullmatch(rf"{hub.api}/preupload/[^/]+", path):
            self.answer({"files": [self.mode_of(file["path"]) for file in json.loads(body)["files"]]})
        elif path == f"{hub.web}.git/info/lfs/objects/batch":
            self.answer_lfs({"objects": [self.place_of(entry) for entry in json.loads(body)["objects"]]})
        elif re.fullmatch(rf"{hub.api}/commit/[^/]+", path):
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.removeprefix("/upload/")
        self.server.requests.append(f"{self.command} {self.path}")
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer({"error": "other content than announced"}, 400)
            return
        self.server.large[oid] = data
        self.answer({})

    def create(self, asked: dict) -> None:
        hub = self.server
        if asked.get("type", "model") != hub.kind or f"{asked['organization']}/{asked['name']}" != hub.name:
            self.answer({"error": "You don't have the rights to create a dataset under this namespace"}, 403)
        elif hub.exists:
            self.answer({"error": "You already created this dataset repo", "url": f"{hub.url}{hub.web}"}, 409)
        else:
            hub.exists, hub.private = True, asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer({"url": f"{hub.url}{hub.web}"})

    def mode_of(self, path: str) -> dict:
        entry = self.entry(path, "file", 0) if path in self.server.files else {}
        lfs = entry.get("lfs") or {}
        mode = "lfs" if self.server.is_large(path) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": lfs.get("oid") or entry.get("oid")}

    def place_of(self, entry: dict) -> dict:
        if entry["oid"] in self.server.large:
            return entry
        return {**entry, "actions": {"upload": {"href": f"{self.server.url}/upload/{entry['oid']}"}}}

    def commit(self, lines: list[dict]) -> None:
        """Apply a commit completely or not at all, as git does."""
        hub = self.server
        if hub.fail_at is not None and len(hub.commits) >= hub.fail_at:
            self.answer({"error": "your quota is used up"}, 403)  # a 503 is retried for a minute
            return
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = hub.content(value["oid"])
        hub.files.update(added)
        hub.commits.append(list(added))
        hub.parents.append(next(line["value"] for line in lines if line["key"] == "header").get("parentCommit"))
        self.answer({"commitUrl": f"{hub.url}{hub.web}/commit/{COMMIT}", "commitOid": COMMIT})

    def entries_below(self, folder: str, recursive: bool) -> list[dict]:
        prefix, files = f"{folder}/" if folder else "", self.server.files
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
        if kind == "directory":
            return {"type": kind, "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
        data = self.server.files[path]
        entry = {"type": kind, "path": path, "size": size}
        if self.server.is_large(path):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
            data = oid.encode()
        return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}

    def answer_page(self, entries: list[dict], url: urllib.parse.SplitResult) -> None:
        query = urllib.parse.parse_qs(url.query)
        start = int(query.pop("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            query["cursor"] = [str(start + PAGE)]
            more = f"{self.server.url}{url.path}?{urllib.parse.urlencode(query, doseq=True)}"
            headers["Link"] = f'<{more}>; rel="next"'
        self.answer(entries[start : start + PAGE], 200, headers)

    def answer_file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not span:
            self.send(200, data, headers)
            return
        first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, data[first : last + 1], headers)

    def answer_lfs(self, tree: object) -> None:
        self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/vnd.git-lfs+json"})

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


@contextmanager
def serve_hub(name: str, files: dict[str, bytes], kind: str = "dataset") -> Iterator[Hub]:
    """Serve one repository until the end of the block; without files it does not exist yet."""
    with Hub(name, files, kind) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextmanager
def dataset_hub(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve one dataset repository; yield the endpoint and the growing list of requests (``GET /path``)."""
    with serve_hub(name, files) as hub:
        yield hub.url, hub.requests
