"""Audio files of a shard in, samples out, in order and a little ahead of the encoder.

```
source.read (main thread) -> bytes -> n threads, or n processes: sha256, decode, resample -> samples
uri ----------------------------------> n processes: synthesis as well (sources that are ``cpu_bound``)
```

Threads are enough where a CPU encodes: libsndfile and soxr work without Python's lock. Processes pay where a source
computes its audio or a GPU wants thousands of clips a second (:func:`decode_in`). Both are bounded: at most ``ahead``
recordings wait. What goes wrong with a recording is its :class:`Failure`, also the death of the process it was in.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.profile import Stages
from pipeline.sources import Source

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an utterance has no features: ``stage`` is read, decode, encode or store."""

    stage: str
    reason: str


Samples = npt.NDArray[np.float32]
Decoded = tuple[str, Samples | Failure]  # sha256 of the audio file, its samples


class Pool(Protocol):
    """Decodes somewhere else; ``reads``: takes a uri, and so spares the main thread the reading."""

    reads: bool

    def submit(self, data: bytes, uri: str) -> Future[Decoded]: ...

    def close(self) -> None: ...


class Decoders:
    """Decodes the recordings of rows of a plan; a context manager, because a pool has to end."""

    def __init__(self, source: Source, pool: Pool, ahead: int, stages: Stages) -> None:
        self._source, self._pool, self._ahead, self._stages = source, pool, ahead, stages

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def read(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, Samples | Failure]]:
        """Plan row, sha256 of its audio file, and samples (float32, 16 kHz) or failure, in the order of ``rows``."""
        waiting: deque[tuple[dict[str, Any], Future[Decoded]]] = deque()

        def first() -> tuple[dict[str, Any], str, Samples | Failure]:
            row, future = waiting.popleft()
            with self._stages.waiting("decode"):
                return row, *future.result()

        try:
            for row, future in self._submitted(rows):
                waiting.append((row, future))
                while len(waiting) > self._ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:  # an interrupt leaves what nobody wants any more
                future.cancel()

    def _submitted(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Future[Decoded]]]:
        if self._pool.reads:
            for row in rows:
                yield row, self._pool.submit(b"", row["audio"])
            return
        read = self._source.read([row["audio"] for row in rows])
        for row in rows:
            with self._stages.busy("read"):
                _, data = next(read)
            if isinstance(data, Exception):
                failed: Future[Decoded] = Future()
                failed.set_result(("", Failure("read", short_reason(data))))
                yield row, failed
            else:
                yield row, self._pool.submit(data, "")


class ThreadPool:
    """``n`` threads of this process."""

    reads = False

    def __init__(self, n: int, stages: Stages) -> None:
        self._stages = stages
        self._executor = ThreadPoolExecutor(n, thread_name_prefix="decode")

    def submit(self, data: bytes, uri: str) -> Future[Decoded]:
        return self._executor.submit(self._decode, data)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _decode(self, data: bytes) -> Decoded:
        with self._stages.busy("decode"):
            return decode_file(data)


def decode_file(data: bytes) -> Decoded:
    """The bytes of an audio file to its sha256 and samples."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        return digest, decode(data)
    except AudioError as error:
        return digest, Failure("decode", str(error))


def short_reason(error: Exception) -> str:
    """A reason of one line that names no absolute folder (a shared cache must not differ by where the audio stood)."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
