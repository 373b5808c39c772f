"""Extract one shard: decode, encode, write, commit.

    python -m pipeline extract --config configs/extract/speech.yaml source.limit=100

```
decoders (threads) -> main thread encodes -> one thread joins windows, stores (codec, tar, hash)
    -> commit (sync, read back, rename) in another thread, while the next shard is encoded
```

:func:`encode_shard` writes one shard for every layer that lacks it, in one encoder pass, and
:meth:`WrittenShard.commit` makes it visible. The stages are connected by short queues: they overlap, so the slowest
stage sets the speed, and memory does not grow with the corpus. ``pipeline/extract/loop.py`` decides which shards to
extract.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.decode import AudioDecoders, UtteranceFailure
from pipeline.encoders.batching import encode_in_batches
from pipeline.encoders.recording import NonFiniteFeaturesError, join_windows, window_spans
from pipeline.extract.job import Job, Target
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.profile import StageTimes
from pipeline.threads import BackgroundThread
from shards.commit.writer import ShardWriter, remove_stray_shard_files
from shards.files import translate_os_errors
from shards.format import codec
from shards.format.codec import CodecError

Float32Array = npt.NDArray[np.float32]
UtterancesCallback = Callable[[int, float], None]  # utterances, audio seconds


@dataclass
class PendingUtterance:
    """An utterance whose windows are being encoded, or its failure."""

    row: dict[str, Any]  # row of the plan
    audio_sha256: str  # of the audio file
    num_samples: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    window_outputs: list[Mapping[int, Float32Array]] = field(default_factory=list)  # per window, its output by layer
    failure: UtteranceFailure | None = None

    def is_done(self) -> bool:
        return len(self.window_outputs) == len(self.spans)


class WrittenShard:
    """A shard whose tars are written but not committed; call :meth:`commit` or :meth:`abort`."""

    def __init__(
        self, shard: int, targets: Sequence[Target], writers: Sequence[ShardWriter], stage_times: StageTimes
    ) -> None:
        self.shard, self.targets = shard, targets
        self.timings: dict[str, float] = {}
        self._writers, self._stage_times = writers, stage_times

    def commit(self) -> None:
        """Sync, read back, compare, rename and publish. Thread-safe; raises what :meth:`ShardWriter.commit` raises."""
        for target, writer in zip(self.targets, self._writers, strict=True):
            with self._stage_times.timed("commit"), translate_os_errors("committing a shard", target.layout.path):
                writer.commit(self.timings)
                target.store.publish(self.shard)

    def abort(self) -> None:
        """Remove uncommitted files; does nothing after a commit."""
        for writer in self._writers:
            writer.abort()


def encode_shard(
    job: Job,
    shard: int,
    targets: Sequence[Target],
    stats: ExtractionStats,
    decoders: AudioDecoders,
    on_utterances: UtterancesCallback | None = None,
) -> WrittenShard:
    """Write the tars of ``shard`` for ``targets`` in one encoder pass.

    Batches never cross a shard boundary, so the bytes of a shard do not depend on the shards extracted before it.

    Args:
        job: a scheduled job.
        shard: number of the shard.
        targets: caches that lack the shard; the caller holds their claims.
        stats: counts utterances and failures.
        decoders: see :func:`open_decoders`.
        on_utterances: called for each utterance with 1 and its duration in seconds.

    Raises:
        WorkFailed: more utterances failed than ``max_failures`` allows; the files of this shard are removed.
    """
    started, encode_before, num_samples = time.perf_counter(), stats.stage_times.busy_seconds["encode"], 0
    with ExitStack() as stack:
        writers: list[ShardWriter] = []
        for target in targets:
            with translate_os_errors("writing a shard", target.layout.path):
                remove_stray_shard_files(target.layout, shard)
                writer = ShardWriter(target.layout, shard, target.spec, job.plan.id, job.owner)
                writers.append(stack.enter_context(writer))

        def store_utterance(utterance: PendingUtterance) -> None:
            failure = utterance.failure or _append_features(job, targets, writers, utterance, stats.stage_times)
            if failure is not None:
                attempt = job.failed_attempts.get(utterance.row["key"], 0) + 1
                for writer in writers:
                    writer.add_failure(utterance.row["key"], failure.stage, failure.reason, attempt)
                stats.add_failure(utterance.row["key"], failure.stage, failure.reason)
                check_failures(stats, job.config.max_failures, len(job.plan.table))
            seconds = utterance.num_samples / job.encoder.sampling_rate
            stats.add(1, seconds)
            if on_utterances:
                on_utterances(1, seconds)

        store_thread = stack.enter_context(BackgroundThread(store_utterance, job.encoder.batch_size))
        for utterance in _encode_utterances(job, shard, [t.layer for t in targets], stats.stage_times, decoders):
            num_samples += utterance.num_samples
            with stats.stage_times.timed_wait("store"):
                store_thread.put(utterance)
        with stats.stage_times.timed_wait("store"):
            store_thread.finish()
        stack.pop_all()  # the caller now owns the writers
    written_shard = WrittenShard(shard, targets, writers, stats.stage_times)
    written_shard.timings = {
        "seconds": round(time.perf_counter() - started, 3),
        "encode_seconds": round(stats.stage_times.busy_seconds["encode"] - encode_before, 3),
        "audio_seconds": round(num_samples / job.encoder.sampling_rate, 3),
    }
    return written_shard


def _append_features(
    job: Job,
    targets: Sequence[Target],
    writers: Sequence[ShardWriter],
    utterance: PendingUtterance,
    stage_times: StageTimes,
) -> UtteranceFailure | None:
    """Append an utterance to the tar of every target, or to none of them; return the failure, if any."""
    try:
        with stage_times.timed("codec"):
            features = join_windows(
                utterance.window_outputs, utterance.spans, [t.layer for t in targets], job.encoder.hop
            )
            encoded = [codec.encode(target.spec.codec, features[target.layer]) for target in targets]
    except NonFiniteFeaturesError as error:
        return UtteranceFailure("encode", str(error))
    except CodecError as error:
        return UtteranceFailure("store", str(error))
    for target, writer, values in zip(targets, writers, encoded, strict=True):
        with stage_times.timed("write"), translate_os_errors("writing a shard", target.layout.path):
            writer.add_encoded(
                utterance.row, values, samples=utterance.num_samples, audio_sha256=utterance.audio_sha256
            )
    return None


def _encode_utterances(
    job: Job, shard: int, layers: Sequence[int], stage_times: StageTimes, decoders: AudioDecoders
) -> Iterator[PendingUtterance]:
    """Yield the utterances of a shard, encoded or failed, in row order."""
    encoder = job.encoder
    queue, windows = deque[PendingUtterance](), deque[tuple[PendingUtterance, Float32Array]]()

    def encode(count: int) -> None:
        if count:
            clips = [windows.popleft() for _ in range(count)]
            with stage_times.timed("encode"):
                outputs = encode_in_batches(encoder, [clip for _, clip in clips], layers, job.config.trim)
            for (clip_utterance, _), output in zip(clips, outputs, strict=True):
                clip_utterance.window_outputs.append(output)

    def ready() -> Iterator[PendingUtterance]:
        while queue and queue[0].is_done():
            yield queue.popleft()

    for row, digest, audio in decoders.read(job.plan.shard_rows(shard)):
        utterance = PendingUtterance(row, digest)
        if isinstance(audio, UtteranceFailure):
            utterance.failure = audio
        else:
            utterance.num_samples, utterance.spans = len(audio), window_spans(len(audio), encoder, job.config.overlap)
            windows.extend((utterance, audio[start:stop]) for start, stop in utterance.spans)
        queue.append(utterance)
        encode(len(windows) // encoder.batch_size * encoder.batch_size)  # only full batches
        yield from ready()
    encode(len(windows))
    yield from ready()


def open_decoders(job: Job, stage_times: StageTimes) -> AudioDecoders:
    """Start the decoding threads of ``job``; they read far enough ahead to fill a batch."""
    return AudioDecoders(job.source, job.decode_workers, 2 * job.decode_workers + job.encoder.batch_size, stage_times)
