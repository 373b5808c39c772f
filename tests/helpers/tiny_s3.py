"""A real S3 server on loopback: moto with atomic conditional writes and a record of all puts."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any


@dataclass
class S3:
    """A server and a record of its writes.

    Attributes:
        puts: (key with bucket, body) of every accepted write, in order.
        loses: every n-th write is performed but answered with an error; 0 is none.
    """

    url: str
    puts: list[tuple[str, bytes]] = field(default_factory=list)
    loses: int = 0

    def commits(self) -> list[str]:
        """Return the names of the commit records that were put, in order and with repetitions."""
        return [key.rpartition("/")[2] for key, body in self.puts if is_record(key, body)]

    def account(self) -> None:
        """Point the S3 clients of this process to this server."""
        use(self.url)


def is_record(key: str, body: bytes) -> bool:
    return "/shards/" in key and key.endswith(".json") and b'"timings"' in body


def use(url: str) -> None:
    """Point the S3 clients of a process to a server; also called in the processes that tests start."""
    os.environ.update(
        AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=url
    )


@contextmanager
def s3_server(*buckets: str) -> Iterator[S3]:
    """Serve empty ``buckets`` until the end of the block."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args: Any) -> None:
            pass

    moto = DomainDispatcherApplication(create_backend_app)
    lock, served = threading.Lock(), S3("")

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        begun: list[Any] = []

        def start(*answer: Any) -> None:
            begun.append(answer)

        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(body)
        with lock:  # S3 checks the condition and writes in one step; moto alone needs two
            answer = list(moto(environ, start))
            if environ["REQUEST_METHOD"] == "PUT" and begun[0][0].startswith("200"):
                served.puts.append((environ["PATH_INFO"].lstrip("/"), body))
                if served.loses and len(served.puts) % served.loses == 0:
                    start_response("500 Internal Server Error", [("Content-Length", "0")])
                    return [b""]
            start_response(*begun[0])
            return answer

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        client = boto3.client(
            "s3", endpoint_url=served.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        served.puts.clear()
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
