"""A web server on the loopback interface that can be told to misbehave, for tests of what is fetched from afar."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What may happen to one answer: the connection is cut in the middle, trickles, is refused, ends early with a length to
# match, carries a flipped byte, or is an error page with status 200.
FAULTS = ("cut", "slow", "503", "truncated", "corrupt", "page")


class Server(ThreadingHTTPServer):
    """Serves a folder. ``faults[name]`` are used up one an answer, the last of ``always[name]`` never."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []  # (name, Range header)
        self.waiting = threading.Event()  # set when an answer hangs …
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

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        self.server.asked.append((name, wanted))
        path = self.server.folder / name
        fault = next(
            (self.server.faults[n].pop(0) for n in self.server.faults if name.endswith(n) and self.server.faults[n]),
            None,
        )
        fault = fault or next((f for n, f in self.server.always.items() if name.endswith(n)), None)
        if fault == "503":
            self.send_error(503)
            return
        if fault == "403":
            self.send_error(403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        if fault == "page":
            data = b"<html>please log in</html>"
        elif wanted and self.server.ranges:
            start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            data = data[start : end + 1]
        if fault == "corrupt":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault == "truncated":
            data = data[: len(data) // 2]
        self.send_response(206 if wanted and self.server.ranges and fault != "page" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
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
            self.server.waiting.set()
            self.server.go_on.wait(60)
        else:
            self.wfile.write(data)


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[Server]:
    """Serve ``folder`` until the end of the block."""
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
