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
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.sources import Source
from pipeline.stages import Stages
from pipeline.tally import Failure

if TYPE_CHECKING:
    from pipeline.job import Job

Samples = npt.NDArray[np.float32]
Decoded = tuple[str, Samples | Failure]  # sha256 of the audio file, its samples
PAYS = 200  # utterances from which on starting processes (half a second of a core each) is earned back
CORES = 3  # below, a process takes the encoder's core: 400 spoken sentences on two took 13.7 s, with threads 12.4 s


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


def open_decoders(job: Job, stages: Stages) -> Decoders:
    """Threads or processes for what is left of ``job``, as its setting ``decode_in`` and :func:`decode_in` say."""
    config, source = job.config, job.source
    rows = job.plan.table["shard"].to_pylist()
    todo = {shard for shard in set(rows) if job.missing(shard)}
    left = sum(shard in todo for shard in rows)
    pool: Pool
    device, cpus = job.encoder.device, len(os.sched_getaffinity(0))
    if decode_in(config.decode_in, cpu_bound=source.cpu_bound, device=device, cpus=cpus, utterances=left) == "thread":
        pool = ThreadPool(job.workers, stages)
    else:
        from pipeline.decode_process import ProcessPool

        pool = ProcessPool(job.workers, stages, config.source if source.cpu_bound else None)
    return Decoders(source, pool, 2 * job.workers + job.encoder.batch_size, stages)


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


def decode_in(wanted: str, *, cpu_bound: bool, device: str, cpus: int, utterances: int) -> Literal["thread", "process"]:
    """What the setting ``decode_in`` stands for: ``auto`` is processes where they pay.

    Args:
        wanted: auto, thread or process.
        cpu_bound: the source computes its audio.
        device: the encoder's; a GPU is faster than this process's lock lets threads decode.
        cpus: cores of this process.
        utterances: left to extract.
    """
    pays = utterances >= PAYS and (device != "cpu" or (cpu_bound and cpus >= CORES))
    return "process" if wanted == "process" or (wanted == "auto" and pays) else "thread"


def decoding_workers(wanted: int | None, *, device: str, cpus: int, gpus: int) -> int:
    """How many threads or processes decode: ``wanted``, or by the encoder's device.

    An encoder on the CPU needs few and wants the cores itself; a GPU leaves its share of them but for what reads,
    prepares batches and stores.
    """
    if wanted is not None:
        return wanted
    return 2 if not device.startswith("cuda") else min(16, max(2, cpus // max(1, gpus) - 2))


def short_reason(error: Exception) -> str:
    """A reason of one line that names no absolute folder (a shared cache must not differ by where the audio stood)."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
