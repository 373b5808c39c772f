"""Extract one shard: decode, encode, write, commit.

    python -m pipeline extract --config configs/extract/speech.yaml source.limit=100

```
decoders (threads) -> main thread encodes, or launches on a GPU (windows.py)
    -> one thread per shard joins windows, stores (codec, tar, hash), commits (sync, read back, rename)
```

A :class:`ShardStore` stores one shard for every layer that lacks it, in its own thread; :func:`read_shard` gives it the
utterances. The stages are connected by queues: they overlap, so the slowest stage sets the speed, and memory does not
grow with the corpus. ``pipeline/extract/loop.py`` decides which shards to extract.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.decode import AudioDecoders, UtteranceFailure
from pipeline.encoders.recording import NonFiniteFeaturesError, join_windows, window_spans
from pipeline.extract.job import Job
from pipeline.extract.progress import ProgressListener
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.targets import Target
from pipeline.extract.windows import WindowBatches, open_batches
from pipeline.profile import StageTimes
from pipeline.threads import BackgroundThread
from shards.commit.writer import ShardWriter, StoredMembers, remove_stray_shard_files
from shards.errors import UserError
from shards.files import translate_os_errors
from shards.format import codec
from shards.format.codec import CodecError, Encoded
from shards.format.schemas import UNKNOWN_AUDIO
from shards.format.variants import split_key

if TYPE_CHECKING:
    from pipeline.encoders.device import WindowOutput

Float32Array = npt.NDArray[np.float32]
STORE_QUEUE = 64  # utterances that wait for the storing thread, besides those whose windows wait for a batch


@dataclass
class PendingUtterance:
    """An utterance whose windows are being encoded, or its failure."""

    row: dict[str, Any]  # row of the plan
    labels: dict[str, Any]  # text, speaker and split, for the .json member
    audio_id: bytes = UNKNOWN_AUDIO
    num_samples: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    windows: Sequence[Future[WindowOutput]] = ()  # the output of each span, to come
    failure: UtteranceFailure | None = None
    copies: list[StoredMembers] | None = None  # per target, if the features are copied from other caches


class ShardStore:
    """Stores the utterances of ``shard`` in a thread, and commits it after the last.

    Call :meth:`put` for each utterance in row order, :meth:`complete` and then :meth:`wait`, or :meth:`abort` at any
    time. The claims of the targets are released when it is committed or aborted.

    Args:
        job: a scheduled job.
        shard: number of the shard.
        targets: caches that lack the shard; the caller holds their claims.
        stats: counts utterances and failures.
        listener: receives each utterance and the commit.
        queue: utterances that may wait.
    """

    def __init__(
        self,
        job: Job,
        shard: int,
        targets: Sequence[Target],
        stats: ExtractionStats,
        listener: ProgressListener,
        queue: int,
    ) -> None:
        self.shard, self.targets = shard, targets
        self._job, self._stats, self._listener = job, stats, listener
        self._stage_times = stats.stage_times
        self._stored: list[tuple[int, float, int]] = []  # what was reported: utterances, audio seconds, copied
        self._writers: list[ShardWriter] = []
        self._committed = self.aborted = False
        with ExitStack() as stack:
            stack.callback(self._release)
            for target in targets:
                with translate_os_errors("writing a shard", target.layout.path):
                    remove_stray_shard_files(target.layout, shard)
                    writer = ShardWriter(target.layout, shard, target.spec, job.plan.id, job.owner)
                    self._writers.append(writer)
            self._thread: BackgroundThread[PendingUtterance | dict[str, float]] = BackgroundThread(self._work, queue)
            stack.pop_all()

    def put(self, utterance: PendingUtterance) -> None:
        """Queue ``utterance``. Raises what storing an earlier one raised, such as WorkFailed after many failures."""
        with self._stage_times.timed_wait("store"):
            self._thread.put(utterance)

    def complete(self, timings: dict[str, float]) -> None:
        """Commit the shard after the utterances that are queued, with ``timings`` in its record."""
        with self._stage_times.timed_wait("store"):
            self._thread.put(timings)

    def wait(self) -> None:
        """Wait until the shard is committed; raises what storing or :meth:`ShardWriter.commit` raised."""
        with self._stage_times.timed_wait("commit"):
            self._thread.finish()

    def check(self) -> None:
        """Raise what storing or committing has raised so far."""
        self._thread.check()

    def abort(self) -> None:
        """End the thread and remove what is not committed; does nothing after a commit."""
        self._thread.stop()
        self.aborted = not self._committed
        self._release()

    def take_back(self) -> None:
        """Take back the utterances that were counted, because they will be stored again. Call it after an abort."""
        for utterances, seconds, copied in self._stored:
            self._stats.add(-utterances, -seconds, -copied)
            self._listener.on_utterances(self.shard, -utterances, -seconds, -copied)

    def _work(self, item: PendingUtterance | dict[str, float]) -> None:
        if isinstance(item, PendingUtterance):
            self._store(item)
        else:
            self._commit(item)

    def _store(self, utterance: PendingUtterance) -> None:
        job, stats = self._job, self._stats
        if utterance.copies is not None:
            _append_copies(self.targets, self._writers, utterance, self._stage_times)
        failure = utterance.failure
        if failure is None and utterance.copies is None:
            failure = _append_features(job, self.targets, self._writers, utterance, self._stage_times)
        if failure is not None:
            key = utterance.row["key"]
            attempt = job.failed_attempts.get(key, 0) + 1
            for writer in self._writers:
                writer.add_failure(key, failure.stage, failure.reason, attempt)
            stats.add_failure(key, failure.stage, failure.reason)
            check_failures(stats, job.config.max_failures, len(job.plan))
        counts = 1, utterance.num_samples / job.encoder.sampling_rate, int(utterance.copies is not None)
        self._stored.append(counts)
        stats.add(*counts)
        self._listener.on_utterances(self.shard, *counts)

    def _commit(self, timings: dict[str, float]) -> None:
        """Sync, read back, compare, rename and publish."""
        for target, writer in zip(self.targets, self._writers, strict=True):
            with self._stage_times.timed("commit"), translate_os_errors("committing a shard", target.layout.path):
                writer.commit(timings)
                target.store.publish(self.shard)
        self._committed = True
        self._listener.on_shard_committed(self.shard)
        self._release()

    def _release(self) -> None:
        for writer in self._writers:
            writer.abort()
        release_shard(self.shard, self.targets)
        self.targets = ()


def release_shard(shard: int, targets: Sequence[Target]) -> None:
    """Release the claims on ``shard``."""
    for target in targets:
        target.store.release(shard)


class BatchesOnDemand:
    """Opens the batches of windows, and with them the encoder, when the first window is there.

    Attributes:
        opened: the batches, if they are open.
    """

    def __init__(self, job: Job, stage_times: StageTimes) -> None:
        self._job, self._stage_times = job, stage_times
        self.opened: WindowBatches | None = None
        if job.encoder.loaded:
            self()

    def __call__(self) -> WindowBatches:
        if self.opened is None:
            config = self._job.config
            self.opened = open_batches(self._job.encoder.load(), config.trim, config.codec, self._stage_times)
        return self.opened

    @property
    def queue(self) -> int:
        """Utterances that may wait for a storing thread; 0, without a limit, while it is not known what waits."""
        return STORE_QUEUE + self.opened.max_waiting if self.opened is not None else 0


def read_shard(
    job: Job, store: ShardStore, batches: BatchesOnDemand, stage_times: StageTimes, decoders: AudioDecoders
) -> None:
    """Give ``store`` the utterances of its shard, decoded, copied or failed, in row order.

    Args:
        job: a scheduled job.
        store: the shard.
        batches: opens the batches of windows when the first is needed.
        stage_times: receives the times.
        decoders: see :func:`open_decoders`.

    Raises:
        WorkFailed: more utterances failed than ``max_failures`` allows.
    """
    started, encode_before = time.perf_counter(), stage_times.busy_seconds["encode"]
    num_samples = num_copied = 0
    layers = [target.layer for target in store.targets]
    rows = job.plan.shard_rows(store.shard)
    labels = job.labels.find([split_key(row["key"])[0] for row in rows])
    copies = _Copies(job, store.shard, store.targets)
    audio = decoders.read([row for row, is_copied in zip(rows, copies.planned, strict=True) if not is_copied])
    for number, (row, texts, is_copied) in enumerate(zip(rows, labels, copies.planned, strict=True)):
        utterance = PendingUtterance(row, texts)
        copy = copies.read(number) if is_copied else None
        if copy is not None:
            utterance.copies, utterance.num_samples = copy, copy[0].samples
        else:
            _, digest, samples = next(decoders.read([row]) if is_copied else audio)
            _decoded(utterance, digest, samples, job)
            if not isinstance(samples, UtteranceFailure) and utterance.failure is None:
                clips = [samples[start:stop] for start, stop in utterance.spans]
                utterance.windows = batches().add(store.shard, clips, layers)
        num_samples += utterance.num_samples
        num_copied += copy is not None
        store.put(utterance)
    if batches.opened is not None:
        batches.opened.end_shard()
    store.complete(
        {
            "seconds": round(time.perf_counter() - started, 3),
            "encode_seconds": round(stage_times.busy_seconds["encode"] - encode_before, 3),
            "audio_seconds": round(num_samples / job.encoder.sampling_rate, 3),
            "copied": num_copied,
        }
    )


def _append_features(
    job: Job,
    targets: Sequence[Target],
    writers: Sequence[ShardWriter],
    utterance: PendingUtterance,
    stage_times: StageTimes,
) -> UtteranceFailure | None:
    """Append an utterance to the tar of every target, or to none of them; return the failure, if any."""
    outputs = [window.result() for window in utterance.windows]
    try:
        with stage_times.timed("codec"):
            encoded = _encode_features(outputs, utterance.spans, targets, job.encoder.hop)
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


def _encode_features(
    outputs: Sequence[WindowOutput], spans: list[tuple[int, int]], targets: Sequence[Target], hop: int
) -> list[Encoded]:
    """Return the features of an utterance for each target; a single window may be encoded already, on a GPU.

    Raises:
        NonFiniteFeaturesError, CodecError: they cannot be stored.
    """
    given = [outputs[0][target.layer] for target in targets]
    encoded = [each for each in given if isinstance(each, Encoded)]
    if not encoded:
        features = join_windows(cast(Any, outputs), spans, [target.layer for target in targets], hop)
        return [codec.encode(target.spec.codec, features[target.layer]) for target in targets]
    for target, each in zip(targets, encoded, strict=True):
        if not math.isfinite(each.peak):
            raise NonFiniteFeaturesError(f"layer {target.layer} of the encoder returned NaN or infinite values")
    for target, each in zip(targets, encoded, strict=True):
        codec.check_peak(target.spec.codec, each.peak)
    return encoded


def _append_copies(
    targets: Sequence[Target], writers: Sequence[ShardWriter], utterance: PendingUtterance, stage_times: StageTimes
) -> None:
    """Append the copied features of an utterance to the tar of every target."""
    assert utterance.copies is not None
    for target, writer, members in zip(targets, writers, utterance.copies, strict=True):
        with stage_times.timed("write"), translate_os_errors("writing a shard", target.layout.path):
            writer.add_stored(utterance.row, members, utterance.labels, checked=True)


def _decoded(utterance: PendingUtterance, digest: bytes, audio: Float32Array | UtteranceFailure, job: Job) -> None:
    """Set the audio id and the windows of an utterance that was read, or its failure."""
    planned = utterance.row["audio_id"]
    utterance.audio_id = planned if digest == UNKNOWN_AUDIO else digest
    if isinstance(audio, UtteranceFailure):
        utterance.failure = audio
    elif planned != UNKNOWN_AUDIO and utterance.audio_id != planned:
        what = "the audio or augment" if split_key(utterance.row["key"])[1] else "the audio"
        utterance.failure = UtteranceFailure("read", f"{what} changed after it was planned; rerun the extraction")
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
    hours, rate, variants = job.config.source.max_hours, job.encoder.sampling_rate, job.config.augment
    return AudioDecoders(job.source, job.decode_workers, prefetch, stage_times, hours, rate, variants)
