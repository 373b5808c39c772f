"""The worker loop: claim a shard, encode it, commit it, until every shard of the job is committed.

Processes that share a cache divide the work by claims (``shards/commit/claims.py``): each takes the next shard that no
other process holds and waits for the others at the end. Any process that finds all shards committed may finalize the
cache, which is idempotent. :func:`pipeline.extract.local.run_local` starts the processes of one machine
(``processes``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from pipeline.decode import AudioDecoders
from pipeline.extract.job import Extraction, Job
from pipeline.extract.progress import ProgressListener
from pipeline.extract.resources import Worker
from pipeline.extract.shard import BatchesOnDemand, ShardStore, read_shard, release_shard
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.targets import Target
from pipeline.extract.windows import BatchSizeReducedError
from shards.commit.claims import new_owner
from shards.format.layout import Plan

MAX_SHARDS_IN_FLIGHT = 3  # job.py counts as many on a scratch disk
POLL_INTERVAL = 0.5  # seconds between two checks on other processes


def finish_caches(
    targets: Sequence[Target], generation: int, plan: Plan, provenance: dict[str, Any], seconds: float
) -> None:
    """Finalize a generation in each cache; if another process is already doing so, wait until it is complete.

    Any process may call this any number of times, within ``hold_leases`` of the stores.

    Args:
        targets: caches whose shards are all committed.
        generation: number of the generation.
        plan: its plan.
        provenance: see :func:`pipeline.extract.job.provenance`.
        seconds: duration of the run.
    """
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    provenance = {**provenance, "last_run_seconds": round(seconds, 1), "finished": finished}
    for target in targets:
        while not target.store.lists_plan(target.spec.feature_id, plan.id):
            if target.store.acquire(None):
                try:
                    target.store.finalize(target.spec, generation, plan, provenance)
                finally:
                    target.store.release(None)
            else:
                time.sleep(POLL_INTERVAL)


def make_shards(
    job: Job,
    stats: ExtractionStats,
    decoders: AudioDecoders,
    listener: ProgressListener,
    *,
    worker: Worker | None = None,
    before_each_shard: Callable[[], None] = lambda: None,
) -> None:
    """Extract every shard that no other process holds, until all shards are committed.

    A shard is stored and committed while the next ones are encoded, so the encoder does not wait for hashing, fsync and
    reading back.

    Args:
        job: a scheduled job, within :meth:`pipeline.extract.job.Job.hold_leases`.
        stats: counts utterances and failures.
        decoders: see :func:`pipeline.extract.shard.open_decoders`.
        listener: receives the progress.
        worker: decides which shards are tried first.
        before_each_shard: called before each shard; an exception that it raises stops the loop.
    """
    todo = set(job.todo)
    shards = job.plan.shards
    for shard in shards:
        if shard not in todo:
            listener.on_shard_skipped(shard)
    pending = [shards[place] for place in (worker or Worker()).shard_order(len(shards)) if shards[place] in todo]
    with ShardsInFlight(job, stats, decoders, listener) as in_flight:
        while pending:
            encoded_here, held_by_others = set[int](), list[int]()
            left = deque(pending)
            while left or in_flight:
                try:
                    if not left:
                        in_flight.finish()
                        continue
                    shard = left.popleft()
                    before_each_shard()
                    targets = job.missing_targets(shard)
                    if not targets:
                        listener.on_shard_skipped(shard)
                        continue
                    in_flight.make_room()
                    acquired = acquire_shard(job, shard, targets)
                    if len(acquired) < len(targets):
                        held_by_others.append(shard)
                    if acquired:
                        encoded_here.add(shard)
                        in_flight.encode(shard, acquired)
                except BatchSizeReducedError:
                    left.extendleft(reversed(in_flight.take_back()))
            # a shard encoded here that is still missing was taken over by another process while this one was suspended
            taken_over = [
                shard
                for shard in pending
                if shard in encoded_here and shard not in held_by_others and job.missing_targets(shard)
            ]
            pending = held_by_others + taken_over
            if pending:
                listener.on_waiting(len(pending))
                time.sleep(POLL_INTERVAL)


class ShardsInFlight:
    """The shards that are being encoded, stored or committed, the oldest first; a context manager that aborts them.

    Each is stored by its own thread, so that several are hashed at the same time.
    """

    def __init__(self, job: Job, stats: ExtractionStats, decoders: AudioDecoders, listener: ProgressListener) -> None:
        self._job, self._stats, self._decoders, self._listener = job, stats, decoders, listener
        self._batches = BatchesOnDemand(job, stats.stage_times)
        self._stores = deque[ShardStore]()

    def __bool__(self) -> bool:
        return bool(self._stores)

    def __enter__(self) -> ShardsInFlight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort()

    def encode(self, shard: int, targets: Sequence[Target]) -> None:
        """Encode ``shard`` for ``targets``, whose claims are held; it is stored and committed in the background."""
        for store in self._stores:
            store.check()
        store = ShardStore(self._job, shard, targets, self._stats, self._listener, self._batches.queue)
        self._stores.append(store)
        read_shard(self._job, store, self._batches, self._stats.stage_times, self._decoders)

    def make_room(self) -> None:
        """Wait until another shard may begin. Raises the exception of a commit."""
        while len(self._stores) >= MAX_SHARDS_IN_FLIGHT:
            self._finish_oldest()

    def finish(self) -> None:
        """Wait until everything is committed. Raises the exception of a commit."""
        while self._stores:
            self._finish_oldest()

    def take_back(self) -> list[int]:
        """Abort the shards that are not committed and return them; their utterances no longer count."""
        shards = []
        for store in self._abort():
            if store.aborted:
                store.take_back()
                shards.append(store.shard)
        return shards

    def _finish_oldest(self) -> None:
        store = self._stores[0]
        if self._batches.opened is not None:
            self._batches.opened.flush(store.shard)
        store.wait()
        self._stores.popleft()

    def _abort(self) -> list[ShardStore]:
        if self._batches.opened is not None:
            self._batches.opened.cancel()
        stores = list(self._stores)
        self._stores.clear()
        for store in stores:
            store.abort()
        return stores


def cleanup(extraction: Extraction) -> None:
    """Remove the files that killed processes left in complete caches."""
    for target in extraction.targets:
        with target.store.hold_leases(new_owner(), extraction.config.lease_seconds):
            target.store.cleanup()


def acquire_shard(job: Job, shard: int, targets: list[Target]) -> list[Target]:
    """Claim ``shard`` in ``targets``; return the targets that were claimed here and still lack the shard."""
    acquired = [target for target in targets if target.store.acquire(shard)]
    already_committed = [t for t in acquired if t not in job.missing_targets(shard)]
    release_shard(shard, already_committed)
    return [t for t in acquired if t not in already_committed]


def count_committed_failures(job: Job, stats: ExtractionStats) -> None:
    """Add the failures of earlier runs to ``stats``; they count toward ``max_failures``. Raises WorkFailed."""
    for failure in job.earlier_failures:
        stats.add_failure(failure["key"], failure["stage"], failure["error"])
    check_failures(stats, job.config.max_failures, len(job.plan))
