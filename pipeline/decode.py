"""Decode the audio files of a shard in threads, in order and slightly ahead of the encoder.

```
one thread: source.read -> bytes -> n threads: sha256, decode, resample, vary -> samples -> caller of AudioDecoders.read
```

Threads suffice: libsndfile, soxr, sha256 and espeak-ng release the GIL, and threads do not copy samples between
processes (``bench/host.py``, ``docs/decisions.md``). At most ``prefetch`` recordings wait for the encoder. A recording
that cannot be read or decoded, or is longer or shorter than planned, yields an :class:`UtteranceFailure`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import MAX_HOURS, SAMPLING_RATE, TOLERANCE, AudioError, decode
from pipeline.profile import StageTimes
from pipeline.sources import Source
from pipeline.variants import VariantsConfig, apply_change, draw_change
from shards.files import file_sha256
from shards.format.audio_id import audio_id, variant_id
from shards.format.schemas import UNKNOWN_AUDIO
from shards.format.variants import split_key


@dataclass(frozen=True, slots=True)
class UtteranceFailure:
    """Why an utterance has no features: ``stage`` is read, decode, encode or store."""

    stage: str
    reason: str


Samples = npt.NDArray[np.float32]
Decoded = tuple[bytes, Samples | UtteranceFailure]  # audio id, samples
Recording = tuple[dict[str, Any], bytes, Samples | UtteranceFailure]  # row of the plan, audio id, samples
AudioIterator = Iterator[tuple[str, bytes | Exception]]  # what Source.read yields


class AudioDecoders:
    """Decodes recordings in ``num_threads`` threads. A context manager: leaving the block ends the threads.

    Args:
        source: where the audio files are read from.
        num_threads: threads that hash, decode and resample.
        prefetch: recordings that may be read ahead of the caller.
        stage_times: receives the time spent in ``read`` and ``decode``.
        max_hours: longer recordings are failures.
        variants: how the variants among the rows are made.
        rate: sampling rate of the samples, in Hz.
    """

    def __init__(
        self,
        source: Source,
        num_threads: int,
        prefetch: int,
        stage_times: StageTimes,
        max_hours: float = MAX_HOURS,
        rate: int = SAMPLING_RATE,
        variants: VariantsConfig | None = None,
    ) -> None:
        self._source, self._prefetch, self._stage_times = source, prefetch, stage_times
        self._max_hours, self._rate, self._variants = max_hours, rate, variants or VariantsConfig()
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
        """Yield the plan row, its audio id, and its samples or failure, in the order of ``rows``.

        Samples are float32 of shape [num_samples], mono. The audio id is 32 bytes, zeros if the audio could
        not be read.
        """
        audio = _read_once(self._source, [row["audio"] for row in rows])
        waiting: deque[tuple[dict[str, Any], Future[Future[Decoded]]]] = deque()

        def first() -> Recording:
            row, future = waiting.popleft()
            with self._stage_times.timed_wait("decode"):
                return row, *future.result().result()

        try:
            for row in rows:
                waiting.append((row, self._reader.submit(self._read, audio, row)))
                if len(waiting) > self._prefetch:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:  # left over after an interrupt
                future.cancel()

    def _read(self, audio: AudioIterator, row: dict[str, Any]) -> Future[Decoded]:
        """Read the next recording and submit it to a decoding thread; runs in the reading thread."""
        with self._stage_times.timed("read"):
            uri, data = next(audio)
        path, fragment = self._source.file_of(uri) or ("", "")
        if not fragment:
            return self._decoders.submit(self._decode, data, None, row)
        known = row["audio_id"]  # of the whole file and the fragment: the bytes of the segment do not tell it
        if known == UNKNOWN_AUDIO and not isinstance(data, Exception):
            known = self._own_id(row, audio_id(bytes.fromhex(file_sha256(Path(path))), fragment))
        return self._decoders.submit(self._decode, data, known, row)

    def _own_id(self, row: dict[str, Any], recording: bytes) -> bytes:
        """Return the audio id of a row whose recording has the audio id ``recording``."""
        return variant_id(recording, split_key(row["key"])[1], self._variants.recipe)

    def _decode(self, data: bytes | Exception, known: bytes | None, row: dict[str, Any]) -> Decoded:
        if isinstance(data, Exception):
            return UNKNOWN_AUDIO, UtteranceFailure("read", short_reason(data))
        with self._stage_times.timed("decode"):
            digest = self._own_id(row, hashlib.sha256(data).digest()) if known is None else known
            change = draw_change(digest, self._variants) if split_key(row["key"])[1] else None
            try:
                samples = decode(data, self._max_hours, self._rate)
                planned = change if row["audio_id"] != UNKNOWN_AUDIO else None  # else it is the recording's length
                length = len(samples) if planned is None else planned.num_samples(len(samples))
                require_planned_length(length, row["samples"], self._rate)
            except AudioError as error:
                return digest, UtteranceFailure("decode", str(error))
            return digest, samples if change is None else apply_change(samples, change)


def _read_once(source: Source, uris: Sequence[str]) -> AudioIterator:
    """Yield what ``source.read`` yields; a URI that follows itself is read once."""
    different = [uri for uri, _ in groupby(uris)]
    for (_, same), found in zip(groupby(uris), source.read(different), strict=False):
        for _ in same:
            yield found


def require_planned_length(samples: int, planned: int, rate: int = SAMPLING_RATE) -> None:
    """Raise AudioError unless a recording has the length that its manifest or its header declares, up to 0.1 s.

    Args:
        samples: Its samples.
        planned: Those of the plan; 0: unknown.
        rate: Sampling rate of both.
    """
    if planned and abs(samples - planned) > TOLERANCE * rate:
        raise AudioError(
            f"{samples / rate:.2f} s of audio, but the manifest or the header declares {planned / rate:.2f} s"
        )


def short_reason(error: Exception) -> str:
    """Return a one-line reason without absolute paths: a cache must not depend on where the audio was stored."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
