"""Decode the audio files of a shard in threads, in order and slightly ahead of the encoder.

```
one thread: source.read -> bytes -> n threads: sha256, decode, resample -> samples -> caller of AudioDecoders.read
```

Threads suffice: libsndfile, soxr, sha256 and espeak-ng release the GIL, and threads do not copy samples between
processes (``bench/host.py``, ``docs/decisions.md``). At most ``prefetch`` recordings wait for the encoder. A recording
that cannot be read or decoded yields an :class:`UtteranceFailure`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.profile import StageTimes
from pipeline.sources import Source


@dataclass(frozen=True, slots=True)
class UtteranceFailure:
    """Why an utterance has no features: ``stage`` is read, decode, encode or store."""

    stage: str
    reason: str


Samples = npt.NDArray[np.float32]
Decoded = tuple[str, Samples | UtteranceFailure]  # sha256 of the audio file, its samples
Recording = tuple[dict[str, Any], str, Samples | UtteranceFailure]  # row of the plan, sha256, samples
AudioIterator = Iterator[tuple[str, bytes | Exception]]  # what Source.read yields


class AudioDecoders:
    """Decodes recordings in ``num_threads`` threads. A context manager: leaving the block ends the threads.

    Args:
        source: where the audio files are read from.
        num_threads: threads that hash, decode and resample.
        prefetch: recordings that may be read ahead of the caller.
        stage_times: receives the time spent in ``read`` and ``decode``.
    """

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
        """Yield the plan row, the sha256 of its audio file, and its samples or failure, in the order of ``rows``.

        Samples are float32 of shape [num_samples], mono at 16 kHz.
        """
        audio = self._source.read([row["audio"] for row in rows])
        waiting: deque[tuple[dict[str, Any], Future[Future[Decoded]]]] = deque()

        def first() -> Recording:
            row, future = waiting.popleft()
            with self._stage_times.timed_wait("decode"):
                return row, *future.result().result()

        try:
            for row in rows:
                waiting.append((row, self._reader.submit(self._read, audio)))
                if len(waiting) > self._prefetch:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:  # left over after an interrupt
                future.cancel()

    def _read(self, audio: AudioIterator) -> Future[Decoded]:
        """Read the next recording and submit it to a decoding thread; runs in the reading thread."""
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
    """Return a one-line reason without absolute paths: a cache must not depend on where the audio was stored."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
