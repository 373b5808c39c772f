"""A minimal Azure Blob Storage on loopback: the requests that obstore makes when extracting into a container."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Azure(ThreadingHTTPServer):
    """A server and a record of its requests.

    Attributes:
        blobs: name -> (version, bytes, the user's metadata) in the only container. Versions are never reused.
        puts: names that were written, in order.
        loses: every n-th write is performed but answered with an error; 0 is none.
    """

    daemon_threads = True

    def __init__(self, container: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.path = f"/account/{container}"
        self.blobs: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.puts: list[str] = []
        self.loses = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/account"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Azure

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if name := self.blob(path):
            if name not in self.server.blobs:
                self.refuse(404, "BlobNotFound")
                return
            version, data, marks = self.server.blobs[name]
            self.send(200, data, {"ETag": f'"{version}"', "Last-Modified": DATE, **marks})
        elif name is not None:
            self.list(parse_qs(query)["prefix"][0])

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not (name := self.blob(self.path)):
            return
        server, only_new, over = self.server, self.headers.get("If-None-Match") == "*", self.headers.get("If-Match")
        with server.lock:
            exists = name in server.blobs
            held = not (only_new and exists) and (over is None or (exists and over == f'"{server.blobs[name][0]}"'))
            if held:
                marks = {key: value for key, value in self.headers.items() if key.lower().startswith("x-ms-meta-")}
                server.puts.append(name)
                server.blobs[name] = (version := len(server.puts), data, marks)
        if not held:
            self.refuse(*((409, "BlobAlreadyExists") if only_new else (412, "ConditionNotMet")))
        elif server.loses and version % server.loses == 0:
            self.refuse(503, "ServerBusy")
        else:
            self.send(201, b"", {"ETag": f'"{version}"', "Last-Modified": DATE})

    def do_POST(self) -> None:
        """Handle a batch of deletes; each is an HTTP request in a part of the body."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parts = []
        for number, path in enumerate(re.findall(r"DELETE (\S+) HTTP", body)):
            with self.server.lock:
                gone = self.server.blobs.pop(self.blob(urlsplit(path).path) or "", None)
            status = "202 Accepted" if gone else "404 Not Found"
            parts.append(
                f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
            )
        self.send(202, f"{''.join(parts)}--b--\r\n".encode(), {"Content-Type": "multipart/mixed; boundary=b"})

    def blob(self, path: str) -> str | None:
        """Return the name of a blob, empty for the container itself; refuse another container and return None."""
        if path != self.server.path and not path.startswith(f"{self.server.path}/"):
            self.refuse(404, "ContainerNotFound")
            return None
        return unquote(path[len(self.server.path) + 1 :])

    def list(self, prefix: str) -> None:
        entries = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{DATE}</Last-Modified>"
            f"<Content-Length>{len(data)}</Content-Length><Content-Type>x</Content-Type><Etag>{version}</Etag>"
            "</Properties></Blob>"
            for name, (version, data, _) in sorted(self.server.blobs.items())
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        )
        text = f"<EnumerationResults><Blobs>{entries}</Blobs><NextMarker/></EnumerationResults>"
        self.send(200, text.encode(), {})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})

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
def serve_azure(container: str) -> Iterator[Azure]:
    """Serve an empty ``container`` of the account ``account`` until the end of the block."""
    with Azure(container) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
