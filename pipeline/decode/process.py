"""Decoding in processes of their own: audio files or uris in, sha256 and samples out.

:class:`ProcessPool` starts ``python -m pipeline.decode.process`` n times and talks to each through its standard input
and output, a thread for each. A request is a kind (``b`` audio file, ``u`` uri), its length and itself; a reply is a
kind (``s`` float32 samples, ``f`` stage and reason of a failure), its length, the sha256 of the audio file and itself.

No process outlives its use: each ends when its input does, however the starting process ended. A recording that a
process dies of is tried in another one and then counts as failed.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from pipeline.decode.pool import Failure

if TYPE_CHECKING:
    from pipeline.decode.pool import Decoded
    from pipeline.profile import Stages
    from pipeline.sources import Source, SourceConfig

TRIES = 2  # a process may have been killed for what another one did
PIPE = 1 << 20  # bytes that wait in a pipe: a clip of 15 s
PATIENCE = 5.0  # seconds that a process may take for its last recording, after which it is killed
_REQUEST, _REPLY = struct.Struct("<cQ"), struct.Struct("<cQ64s")

_Task = tuple[bytes, bytes, "Future[Decoded]"]  # kind, payload


class ProcessPool:
    """See :class:`pipeline.decode.pool.Pool`; ``source`` is read in the processes, None reads it in this one."""

    def __init__(self, n: int, stages: Stages, source: SourceConfig | None) -> None:
        self.reads = source is not None
        self._stages = stages
        self._source = source.model_dump_json() if source else ""
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        self._processes: list[_Process | None] = [None] * n
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"decode {i}", daemon=True) for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, data: bytes, uri: str) -> Future[Decoded]:
        future: Future[Decoded] = Future()
        self._tasks.put((b"u", uri.encode(), future) if self.reads else (b"b", data, future))
        return future

    def close(self) -> None:
        """Drop what waits, end the processes."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        for i, thread in enumerate(self._threads):
            thread.join(PATIENCE)
            process = self._processes[i]
            if thread.is_alive() and process is not None:
                process.kill()
            thread.join()

    def _serve(self, i: int) -> None:
        """One thread: hand what waits to its process, one by one."""
        try:
            while (task := self._tasks.get()) is not None:
                kind, payload, future = task
                if self._closed or not future.set_running_or_notify_cancel():
                    continue
                try:
                    with self._stages.busy("decode"):
                        future.set_result(self._answer(i, kind, payload))
                except BaseException as error:  # whoever waits for the recording raises it
                    future.set_exception(error)
        finally:
            process = self._processes[i]
            if process is not None:
                process.end()

    def _answer(self, i: int, kind: bytes, payload: bytes) -> Decoded:
        code = 0
        for _ in range(TRIES):
            process = self._processes[i]
            if process is None:
                process = self._processes[i] = _Process(self._source)
            answer = process.ask(kind, payload)
            if answer is not None:
                return answer
            code, self._processes[i] = process.end(), None
            if self._closed:
                break
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        return "", Failure("decode", f"the decoding process ended {how} at this recording")


class _Process:
    """A running ``python -m pipeline.decode.process``."""

    def __init__(self, source: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decode.process", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the starting process's business
        )

    def ask(self, kind: bytes, payload: bytes) -> Decoded | None:
        """The reply; None when the process died."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert isinstance(replies, io.BufferedReader)
        try:
            requests.write(_REQUEST.pack(kind, len(payload)) + payload)
            requests.flush()
            head = replies.read(_REPLY.size)
            if len(head) < _REPLY.size:
                return None
            found, length, digest = _REPLY.unpack(head)
            body = np.empty(length, np.uint8)
            if replies.readinto(body.data) < length:  # a buffered reader waits for all of it
                return None
        except BrokenPipeError:
            return None
        sha256 = digest.rstrip(b"\0").decode()
        if found == b"s":
            return sha256, body.view(np.float32)
        stage, _, reason = body.tobytes().decode().partition("\n")
        return sha256, Failure(stage, reason)

    def end(self) -> int:
        """Close its input, wait for its end; returns the exit status, negative for a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End it at once; a thread that waits for its reply finds it dead."""
        self._process.kill()


def main() -> None:
    """Answer requests until there are no more."""
    from pipeline.decode.pool import decode_file

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no reply
    source = _open(sys.argv[1])
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        kind, length = _REQUEST.unpack(head)
        payload = requests.read(length)
        if len(payload) < length:
            break
        digest, audio = _read(source, payload.decode()) if kind == b"u" and source else decode_file(payload)
        if isinstance(audio, Failure):
            found, body = b"f", f"{audio.stage}\n{audio.reason}".encode()
        else:
            found, body = b"s", audio.tobytes()
        try:
            replies.write(_REPLY.pack(found, len(body), digest.encode()))
            replies.write(body)
            replies.flush()
        except BrokenPipeError:  # nobody waits for it any more
            break


def _open(config: str) -> Source | None:
    if not config:
        return None
    from pipeline.sources import SourceConfig, open_source

    return open_source(SourceConfig.model_validate_json(config))


def _read(source: Source, uri: str) -> Decoded:
    from pipeline.decode.pool import decode_file, short_reason

    ((_, data),) = source.read([uri])
    return ("", Failure("read", short_reason(data))) if isinstance(data, Exception) else decode_file(data)


if __name__ == "__main__":
    main()
