"""Extract features: audio in, committed shards out.

    python -m pipeline extract --config configs/extract/speech.yaml source.limit=100

```
reads audio -> threads decode -> main thread encodes -> one thread joins windows, stores (codec, tar, hash) -> commit
```

In: a :class:`pipeline.job.Job`. Out: for each cache a folder of committed shards. :func:`extract_shard` makes one shard
for every layer that lacks it in one encoder pass. Each stage hands on through a short queue, so that all others hide
behind the slowest and memory does not grow with the corpus. Who calls ``extract_shard`` for which shard is the engine's
business (``pipeline/engines.py``).
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.frames import NotFinite, join, spans_of
from pipeline.job import Job, Target
from pipeline.stages import Stages
from pipeline.threads import Background
from shards import codec
from shards.codec import CodecError
from shards.disk import told
from shards.errors import WorkFailed
from shards.writer import ShardWriter, clean

Samples = npt.NDArray[np.float32]
Step = Callable[[int, float], None]  # utterances, audio seconds


@dataclass
class Tally:
    """What a run has done so far; failures are shared by all shards of a run."""

    utterances: int = 0
    audio_seconds: float = 0.0
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # key, stage, reason
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True, slots=True)
class Failure:
    stage: str
    reason: str


@dataclass
class Heard:
    """An utterance whose windows are on their way through the encoder, or the failure that ended it."""

    row: dict[str, Any]  # of the plan
    digest: str  # sha256 of the audio file
    samples: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    parts: list[Mapping[int, Samples]] = field(default_factory=list)  # a window's output by layer
    failure: Failure | None = None

    def ready(self) -> bool:
        return len(self.parts) == len(self.spans)


def extract_shard(job: Job, shard: int, targets: Sequence[Target], tally: Tally, step: Step | None = None) -> None:
    """Make ``shard`` for ``targets`` (whose claims the caller holds) in one encoder pass, and commit it.

    ``step`` is told of progress. Batches never cross a shard's edge, so that a shard's bytes do not depend on which
    shards were made before it.

    Raises:
        WorkFailed: more failures than ``max_failures`` allows; nothing of this shard is committed.
    """
    started, encode_before, audio_before = time.perf_counter(), tally.stages.seconds["encode"], tally.audio_seconds
    with ExitStack() as stack:
        writers = []
        for target in targets:
            with told("writing a shard", target.layout.path):
                clean(target.layout, shard)
                writer = ShardWriter(target.layout, shard, target.spec, job.plan.id, job.owner)
                writers.append(stack.enter_context(writer))

        def keep(heard: Heard) -> None:
            failure = heard.failure or _store(job, targets, writers, heard, tally.stages)
            if failure is not None:
                attempt = job.attempts.get(heard.row["key"], 0) + 1
                for writer in writers:
                    writer.fail(heard.row["key"], failure.stage, failure.reason, attempt)
                tally.failures.append((heard.row["key"], failure.stage, failure.reason))
                check_failures(job, tally)
            seconds = heard.samples / job.encoder.sampling_rate
            tally.utterances, tally.audio_seconds = tally.utterances + 1, tally.audio_seconds + seconds
            if step:
                step(1, seconds)

        storing = stack.enter_context(Background(keep, job.encoder.batch_size))
        for heard in _heard(job, shard, [t.layer for t in targets], tally.stages):
            with tally.stages.waiting("store"):
                storing.put(heard)
        storing.finish()
        timings = {
            "seconds": round(time.perf_counter() - started, 3),
            "encode_seconds": round(tally.stages.seconds["encode"] - encode_before, 3),
            "audio_seconds": round(tally.audio_seconds - audio_before, 3),
        }
        for target, writer in zip(targets, writers, strict=True):
            with tally.stages.busy("commit"), told("committing a shard", target.layout.path):
                writer.commit(timings)
                target.store.publish(shard)


def _store(
    job: Job, targets: Sequence[Target], writers: Sequence[ShardWriter], heard: Heard, stages: Stages
) -> Failure | None:
    """Append an utterance to every target's tar, or to none."""
    try:
        with stages.busy("codec"):
            features = join(heard.parts, heard.spans, [t.layer for t in targets], job.encoder.hop)
            encoded = [codec.encode(target.spec.codec, features[target.layer]) for target in targets]
    except NotFinite as error:
        return Failure("encode", str(error))
    except CodecError as error:
        return Failure("store", str(error))
    for target, writer, values in zip(targets, writers, encoded, strict=True):
        with stages.busy("write"), told("writing a shard", target.layout.path):
            writer.add_encoded(heard.row, values, samples=heard.samples, audio_sha256=heard.digest)
    return None


def check_failures(job: Job, tally: Tally) -> None:
    """Stop a run that is going wrong."""
    allowed = job.config.max_failures
    most = math.ceil(allowed * len(job.plan.table)) if allowed < 1 else int(allowed)
    if len(tally.failures) > most:
        first = "; ".join(f"{key}: {reason}" for key, _, reason in tally.failures[:5])
        raise WorkFailed(
            f"{len(tally.failures)} of {len(job.plan.table)} utterances failed, more than max_failures={allowed:g} "
            f"allows ({first}): mend the audio or raise max_failures, then run the same command again"
        )


def _heard(job: Job, shard: int, layers: Sequence[int], stages: Stages) -> Iterator[Heard]:
    """The utterances of a shard, encoded or failed, in row order."""
    encoder, batch_size = job.encoder, job.encoder.batch_size
    queue, windows = deque[Heard](), deque[tuple[Heard, Samples]]()

    def encode(least: int) -> None:
        while len(windows) >= least and windows:
            batch = [windows.popleft() for _ in range(min(batch_size, len(windows)))]
            with stages.busy("encode"):
                outputs = encoder.encode([clip for _, clip in batch], layers, job.config.trim)
            for (heard, _), output in zip(batch, outputs, strict=True):
                heard.parts.append(output)

    def ready() -> Iterator[Heard]:
        while queue and queue[0].ready():
            yield queue.popleft()

    for row, digest, audio in _decoded(job, job.plan.shard(shard), stages):
        heard = Heard(row, digest)
        if isinstance(audio, Failure):
            heard.failure = audio
        else:
            heard.samples, heard.spans = len(audio), spans_of(len(audio), encoder, job.config.overlap)
            windows.extend((heard, audio[start:stop]) for start, stop in heard.spans)
        queue.append(heard)
        encode(batch_size)
        yield from ready()
    encode(1)
    yield from ready()


def _decoded(
    job: Job, rows: Sequence[dict[str, Any]], stages: Stages
) -> Iterator[tuple[dict[str, Any], str, Samples | Failure]]:
    """Plan row, sha256 of the audio file and its samples, in order; ``workers`` threads decode a little ahead."""

    def prepare_one(data: bytes) -> tuple[str, Samples | Failure]:
        with stages.busy("decode"):
            digest = hashlib.sha256(data).hexdigest()
            try:
                return digest, decode(data)
            except AudioError as error:
                return digest, Failure("decode", str(error))

    ahead: deque[tuple[dict[str, Any], Future[tuple[str, Samples | Failure]]]] = deque()

    def first() -> tuple[dict[str, Any], str, Samples | Failure]:
        row, future = ahead.popleft()
        with stages.waiting("decode"):
            return row, *future.result()

    with ThreadPoolExecutor(job.config.workers, thread_name_prefix="decode") as pool:
        read = job.source.read([row["audio"] for row in rows])
        for row in rows:
            with stages.busy("read"):
                _, data = next(read)
            if isinstance(data, Exception):
                failed: Future[tuple[str, Samples | Failure]] = Future()
                failed.set_result(("", Failure("read", _short(data))))
                ahead.append((row, failed))
            else:
                ahead.append((row, pool.submit(prepare_one, data)))
            while len(ahead) > 2 * job.config.workers + job.encoder.batch_size:
                yield first()
        while ahead:
            yield first()


def _short(error: Exception) -> str:
    """A reason of one line that names no absolute folder (a shared cache must not differ by where the audio stood)."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
