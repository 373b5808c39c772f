"""Audio files of a shard in, samples out, in order and a little ahead of the encoder.

```
one thread: source.read -> bytes -> n threads: sha256, decode, resample -> samples -> whoever calls AudioDecoders.read
```

Threads are enough: libsndfile, soxr, sha256 and espeak-ng work without Python's lock, and no samples are copied between
processes (``bench/host.py``, ``docs/decisions.md``). At most ``ahead`` recordings wait. What goes wrong with a
recording is its :class:`Failure`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.profile import StageTimes
from pipeline.sources import Source

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class UtteranceFailure:
    """Why an utterance has no features: ``stage`` is read, decode, encode or store."""

    stage: str
    reason: str


Samples = npt.NDArray[np.float32]
Decoded = tuple[str, Samples | UtteranceFailure]  # sha256 of the audio file, its samples
Recording = tuple[dict[str, Any], str, Samples | UtteranceFailure]  # row of the plan, sha256, samples
AudioIterator = Iterator[tuple[str, bytes | Exception]]  # what Source.read gives


class AudioDecoders:
    """Decodes the recordings of rows of a plan in ``n`` threads; a context manager, because threads have to end."""

    def __init__(self, source: Source, num_threads: int, prefetch: int, stage_times: StageTimes) -> None:
        self._source, self._prefetch, self._stage_times = source, prefetch, stage_times
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __enter__(self) -> AudioDecoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def read(self, rows: Sequence[dict[str, Any]]) -> Generator[Recording, None, None]:
        """Plan row, sha256 of its audio file, and samples (float32, 16 kHz) or failure, in the order of ``rows``."""
        read = self._source.read([row["audio"] for row in rows])
        waiting: deque[tuple[dict[str, Any], Future[Future[Decoded]]]] = deque()

        def first() -> Recording:
            row, future = waiting.popleft()
            with self._stage_times.timed_wait("decode"):
                return row, *future.result().result()

        try:
            for row in rows:
                waiting.append((row, self._reader.submit(self._read, read)))
                if len(waiting) > self._prefetch:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:  # an interrupt leaves what nobody wants any more
                future.cancel()

    def _read(self, audio: AudioIterator) -> Future[Decoded]:
        """In the reading thread: the next recording, on its way through a decoding thread."""
        with self._stage_times.timed("read"):
            _, data = next(audio)
        return self._decoders.submit(self._decode, data)

    def _decode(self, data: bytes | Exception) -> Decoded:
        if isinstance(data, Exception):
            return "", UtteranceFailure("read", short_reason(data))
        with self._stage_times.timed("decode"):
            digest = hashlib.sha256(data).hexdigest()
            try:
                return digest, decode(data)
            except AudioError as error:
                return digest, UtteranceFailure("decode", str(error))


def short_reason(error: Exception) -> str:
    """A reason of one line that names no absolute folder (a shared cache must not differ by where the audio stood)."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
