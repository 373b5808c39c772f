"""Extract features: audio in, committed shards out.

    python -m pipeline extract --config configs/extract/speech.yaml source.limit=100

```
decoders (threads) -> main thread encodes -> one thread joins windows, stores (codec, tar, hash)
    -> commit (sync, read back, rename), which the engine lets run beside the next shard's encoding
```

In: a :class:`pipeline.extract.job.Job`. Out: for each cache a folder of committed shards. :func:`encode_shard` makes
one shard for every layer that lacks it in one encoder pass, and :meth:`Made.commit` makes it visible. Each stage hands
on through a short queue, so that all others hide behind the slowest and memory does not grow with the corpus. Who calls
for which shard is the engine's business (``pipeline/extract/loop.py``).
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

from pipeline.decode import Decoders, Failure
from pipeline.encoders.batching import encode_in_parts
from pipeline.encoders.recording import NotFinite, join, spans_of
from pipeline.extract.job import Job, Target
from pipeline.extract.stats import Tally, check_failures
from pipeline.profile import Stages
from pipeline.threads import Background
from shards.commit.writer import ShardWriter, clean
from shards.files import told
from shards.format import codec
from shards.format.codec import CodecError

Samples = npt.NDArray[np.float32]
Step = Callable[[int, float], None]  # utterances, audio seconds


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


class Made:
    """A shard whose tars are written and not committed: :meth:`commit` or :meth:`abort` it."""

    def __init__(self, shard: int, targets: Sequence[Target], writers: Sequence[ShardWriter], stages: Stages) -> None:
        self.shard, self.targets = shard, targets
        self.timings: dict[str, float] = {}
        self._writers, self._stages = writers, stages

    def commit(self) -> None:
        """Sync, read back, compare, rename, publish; any thread may call. Raises as :meth:`ShardWriter.commit`."""
        for target, writer in zip(self.targets, self._writers, strict=True):
            with self._stages.busy("commit"), told("committing a shard", target.layout.path):
                writer.commit(self.timings)
                target.store.publish(self.shard)

    def abort(self) -> None:
        """Remove what is not committed; harmless after a commit."""
        for writer in self._writers:
            writer.abort()


def encode_shard(
    job: Job, shard: int, targets: Sequence[Target], tally: Tally, decoders: Decoders, step: Step | None = None
) -> Made:
    """Write the tars of ``shard`` for ``targets`` (whose claims the caller holds) in one encoder pass.

    ``step`` is told of progress. Batches never cross a shard's edge, so that a shard's bytes do not depend on which
    shards were made before it.

    Raises:
        WorkFailed: more failures than ``max_failures`` allows; nothing of this shard is left.
    """
    started, encode_before, samples = time.perf_counter(), tally.stages.seconds["encode"], 0
    with ExitStack() as stack:
        writers: list[ShardWriter] = []
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
                tally.fail(heard.row["key"], failure.stage, failure.reason)
                check_failures(tally, job.config.max_failures, len(job.plan.table))
            seconds = heard.samples / job.encoder.sampling_rate
            tally.add(1, seconds)
            if step:
                step(1, seconds)

        storing = stack.enter_context(Background(keep, job.encoder.batch_size))
        for heard in _heard(job, shard, [t.layer for t in targets], tally.stages, decoders):
            samples += heard.samples
            with tally.stages.waiting("store"):
                storing.put(heard)
        with tally.stages.waiting("store"):
            storing.finish()
        stack.pop_all()  # from here on the writers are the caller's
    made = Made(shard, targets, writers, tally.stages)
    made.timings = {
        "seconds": round(time.perf_counter() - started, 3),
        "encode_seconds": round(tally.stages.seconds["encode"] - encode_before, 3),
        "audio_seconds": round(samples / job.encoder.sampling_rate, 3),
    }
    return made


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


def _heard(job: Job, shard: int, layers: Sequence[int], stages: Stages, decoders: Decoders) -> Iterator[Heard]:
    """The utterances of a shard, encoded or failed, in row order."""
    encoder = job.encoder
    queue, windows = deque[Heard](), deque[tuple[Heard, Samples]]()

    def encode(count: int) -> None:
        if count:
            clips = [windows.popleft() for _ in range(count)]
            with stages.busy("encode"):
                outputs = encode_in_parts(encoder, [clip for _, clip in clips], layers, job.config.trim)
            for (heard, _), output in zip(clips, outputs, strict=True):
                heard.parts.append(output)

    def ready() -> Iterator[Heard]:
        while queue and queue[0].ready():
            yield queue.popleft()

    for row, digest, audio in decoders.read(job.plan.shard(shard)):
        heard = Heard(row, digest)
        if isinstance(audio, Failure):
            heard.failure = audio
        else:
            heard.samples, heard.spans = len(audio), spans_of(len(audio), encoder, job.config.overlap)
            windows.extend((heard, audio[start:stop]) for start, stop in heard.spans)
        queue.append(heard)
        encode(len(windows) // encoder.batch_size * encoder.batch_size)  # whole batches
        yield from ready()
    encode(len(windows))
    yield from ready()


def open_decoders(job: Job, stages: Stages) -> Decoders:
    """The decoding threads of ``job``; enough recordings wait to fill a batch."""
    return Decoders(job.source, job.workers, 2 * job.workers + job.encoder.batch_size, stages)
