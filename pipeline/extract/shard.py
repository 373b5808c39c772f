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
from pipeline.extract.job import Job
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.targets import Target
from pipeline.profile import StageTimes
from pipeline.threads import BackgroundThread
from shards.commit.writer import ShardWriter, StoredMembers, remove_stray_shard_files
from shards.errors import UserError
from shards.files import translate_os_errors
from shards.format import codec
from shards.format.codec import CodecError
from shards.format.schemas import UNKNOWN_AUDIO

Float32Array = npt.NDArray[np.float32]
UtterancesCallback = Callable[[int, float, int], None]  # utterances, audio seconds, how many were copied
STORE_QUEUE = 64  # utterances that wait for the storing thread


@dataclass
class PendingUtterance:
    """An utterance whose windows are being encoded, or its failure."""

    row: dict[str, Any]  # row of the plan
    labels: dict[str, Any]  # text, speaker and split, for the .json member
    audio_id: bytes = UNKNOWN_AUDIO
    num_samples: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    window_outputs: list[Mapping[int, Float32Array]] = field(default_factory=list)  # per window, its output by layer
    failure: UtteranceFailure | None = None
    copies: list[StoredMembers] | None = None  # per target, if the features are copied from other caches

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
        on_utterances: called for each utterance with 1, its duration in seconds, and 1 if it was copied.

    Raises:
        WorkFailed: more utterances failed than ``max_failures`` allows; the files of this shard are removed.
    """
    started, encode_before, num_samples = time.perf_counter(), stats.stage_times.busy_seconds["encode"], 0
    num_copied = 0
    with ExitStack() as stack:
        writers: list[ShardWriter] = []
        for target in targets:
            with translate_os_errors("writing a shard", target.layout.path):
                remove_stray_shard_files(target.layout, shard)
                writer = ShardWriter(target.layout, shard, target.spec, job.plan.id, job.owner)
                writers.append(stack.enter_context(writer))

        def store_utterance(utterance: PendingUtterance) -> None:
            if utterance.copies is not None:
                _append_copies(targets, writers, utterance, stats.stage_times)
            failure = utterance.failure
            if failure is None and utterance.copies is None:
                failure = _append_features(job, targets, writers, utterance, stats.stage_times)
            if failure is not None:
                attempt = job.failed_attempts.get(utterance.row["key"], 0) + 1
                for writer in writers:
                    writer.add_failure(utterance.row["key"], failure.stage, failure.reason, attempt)
                stats.add_failure(utterance.row["key"], failure.stage, failure.reason)
                check_failures(stats, job.config.max_failures, len(job.plan))
            seconds = utterance.num_samples / job.encoder.sampling_rate
            copied = int(utterance.copies is not None)
            stats.add(1, seconds, copied)
            if on_utterances:
                on_utterances(1, seconds, copied)

        store_thread = stack.enter_context(BackgroundThread(store_utterance, STORE_QUEUE))
        for utterance in _encode_utterances(job, shard, targets, stats.stage_times, decoders):
            num_samples += utterance.num_samples
            num_copied += utterance.copies is not None
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
        "copied": num_copied,
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
                utterance.row,
                values,
                samples=utterance.num_samples,
                audio_id=utterance.audio_id,
                labels=utterance.labels,
            )
    return None


def _append_copies(
    targets: Sequence[Target], writers: Sequence[ShardWriter], utterance: PendingUtterance, stage_times: StageTimes
) -> None:
    """Append the copied features of an utterance to the tar of every target."""
    assert utterance.copies is not None
    for target, writer, members in zip(targets, writers, utterance.copies, strict=True):
        with stage_times.timed("write"), translate_os_errors("writing a shard", target.layout.path):
            writer.add_stored(utterance.row, members, utterance.labels, checked=True)


def _encode_utterances(
    job: Job, shard: int, targets: Sequence[Target], stage_times: StageTimes, decoders: AudioDecoders
) -> Iterator[PendingUtterance]:
    """Yield the utterances of a shard, encoded, copied or failed, in row order."""
    encoder, layers = job.encoder, [target.layer for target in targets]
    queue, windows = deque[PendingUtterance](), deque[tuple[PendingUtterance, Float32Array]]()
    rows = job.plan.shard_rows(shard)
    labels = job.labels.find([row["key"] for row in rows])
    copies = _Copies(job, shard, targets)
    audio = decoders.read([row for row, is_copied in zip(rows, copies.planned, strict=True) if not is_copied])

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

    for number, (row, texts, is_copied) in enumerate(zip(rows, labels, copies.planned, strict=True)):
        utterance = PendingUtterance(row, texts)
        queue.append(utterance)
        copy = copies.read(number) if is_copied else None
        if copy is not None:
            utterance.copies, utterance.num_samples = copy, copy[0].samples
        else:
            _, digest, samples = next(decoders.read([row]) if is_copied else audio)
            _decoded(utterance, digest, samples, job)
            if not isinstance(samples, UtteranceFailure) and utterance.failure is None:
                windows.extend((utterance, samples[start:stop]) for start, stop in utterance.spans)
        if windows:
            encode(len(windows) // encoder.batch_size * encoder.batch_size)  # only full batches
        yield from ready()
    encode(len(windows))
    yield from ready()


def _decoded(utterance: PendingUtterance, digest: bytes, audio: Float32Array | UtteranceFailure, job: Job) -> None:
    """Set the audio id and the windows of an utterance that was read, or its failure."""
    planned = utterance.row["audio_id"]
    utterance.audio_id = planned if digest == UNKNOWN_AUDIO else digest
    if isinstance(audio, UtteranceFailure):
        utterance.failure = audio
    elif planned != UNKNOWN_AUDIO and utterance.audio_id != planned:
        utterance.failure = UtteranceFailure("read", "the audio changed after it was planned; rerun the extraction")
    else:
        utterance.num_samples = len(audio)
        utterance.spans = window_spans(len(audio), job.encoder, job.config.overlap)


class _Copies:
    """The rows of a shard that are copied from other caches.

    Attributes:
        planned: for each row, whether every target can copy it.
    """

    def __init__(self, job: Job, shard: int, targets: Sequence[Target]) -> None:
        self._begin, end = np.searchsorted(job.plan.shard, [shard, shard + 1]).tolist()
        self._targets = targets
        self._reuse = [reuse for target, reuse in zip(job.targets, job.reuse, strict=True) if target in targets]
        self.planned: list[bool] = np.all([each.copied[self._begin : end] for each in self._reuse], axis=0).tolist()

    def read(self, row: int) -> list[StoredMembers] | None:
        """Return the stored features of a row, one per target; None if they are gone or do not match their checksum."""
        try:
            members = [each.members(self._begin + row) for each in self._reuse]
            for target, each in zip(self._targets, members, strict=True):
                each.check(target.spec)
        except (CodecError, UserError):
            return None
        return members


def open_decoders(job: Job, stage_times: StageTimes) -> AudioDecoders:
    """Start the decoding threads of ``job``; they read far enough ahead to fill a batch."""
    ahead = job.encoder.batch_size if job.encoder.loaded else 0  # an encoder that is not loaded has nothing to encode
    prefetch = 2 * job.decode_workers + ahead
    return AudioDecoders(job.source, job.decode_workers, prefetch, stage_times, job.config.source.max_hours)
