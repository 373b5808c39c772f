"""A web server on loopback that can misbehave on request, for tests of remote reads."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

# What may happen to one answer: the connection is cut in the middle, trickles, is refused, ends early with a length to
# match, carries a flipped byte, or is an error page with status 200.
FAULTS = ("cut", "slow", "503", "truncated", "corrupt", "page")


class Server(ThreadingHTTPServer):
    """Serves a folder or proxies a server; each answer uses up one of ``faults[name]``, but never ``always``."""

    daemon_threads = True

    def __init__(self, folder: Path | str, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []  # (name, Range header)
        self.waiting = threading.Event()  # set while an answer hangs …
        self.go_on = threading.Event()  # … until this is

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that give up are part of the tests

    def count(self, name: str) -> int:
        return sum(asked.endswith(name) for asked, _ in self.asked)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        status, headers, data = self._ask("HEAD")
        self._head(status, {"Content-Length": str(len(data)), **headers})

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/").split("?")[0]
        server.asked.append((name, self.headers.get("Range")))
        queue = next((server.faults[n] for n in server.faults if name.endswith(n) and server.faults[n]), None)
        fault = queue.pop(0) if queue else next((f for n, f in server.always.items() if name.endswith(n)), None)
        if fault in ("503", "403"):
            self.send_error(int(fault))
            return
        status, headers, data = self._ask("GET")
        if fault == "page":
            data = b"<html>please log in</html>"
        elif fault == "corrupt":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        elif fault == "truncated":
            data = data[: len(data) // 2]
        self._head(status, {**headers, "Content-Length": str(len(data))})
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
        elif fault == "slow":
            for at in range(0, len(data), 257):
                self.wfile.write(data[at : at + 257])
                self.wfile.flush()
        elif fault == "hang":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            server.waiting.set()
            server.go_on.wait(60)
        else:
            self.wfile.write(data)

    def _ask(self, method: str) -> tuple[int, dict[str, str], bytes]:
        """Return the correct status, headers and body."""
        folder, wanted = self.server.folder, self.headers.get("Range")
        if isinstance(folder, str):
            request = Request(folder + self.path, headers=dict(self.headers), method=method)
            try:
                with urlopen(request) as answer:
                    return answer.status, dict(answer.headers), answer.read()
            except HTTPError as error:
                with error:
                    return error.code, dict(error.headers), error.read()
        path = folder / unquote(self.path).lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        data = path.read_bytes()
        if wanted and self.server.ranges:
            start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            return 206, {}, data[start : end + 1]
        return 200, {}, data

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve(folder: Path | str, ranges: bool = True) -> Iterator[Server]:
    """Serve ``folder``, or proxy the server at that URL, until the end of the block."""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    with Server(folder, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()
