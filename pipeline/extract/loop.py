"""The worker loop: claim a shard, encode it, commit it, until every shard of the job is committed.

Processes that share a cache divide the work by claims (``shards/commit/claims.py``): each takes the next shard that no
other process holds and waits for the others at the end. Any process that finds all shards committed may finalize the
cache, which is idempotent. :func:`pipeline.extract.local.run_local` starts the processes of one machine
(``processes``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from pipeline.decode import AudioDecoders
from pipeline.extract.job import Extraction, Job
from pipeline.extract.progress import ProgressListener
from pipeline.extract.resources import Worker
from pipeline.extract.shard import WrittenShard, encode_shard
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.targets import Target
from pipeline.profile import StageTimes
from pipeline.threads import BackgroundThread
from shards.commit.claims import new_owner
from shards.format.layout import Plan

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

    A shard is committed while the next one is encoded, so the encoder does not wait for fsync and reading back.

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
    with CommitThread(stats.stage_times, listener) as commit_thread:
        while pending:
            encoded_here, held_by_others = [], []
            for shard in pending:
                before_each_shard()
                targets = job.missing_targets(shard)
                if not targets:
                    listener.on_shard_skipped(shard)
                    continue
                acquired = acquire_shard(job, shard, targets)
                if acquired:
                    try:
                        written_shard = encode_shard(
                            job, shard, acquired, stats, decoders, partial(listener.on_utterances, shard)
                        )
                    except BaseException:
                        release_shard(shard, acquired)
                        raise
                    encoded_here.append(shard)
                    commit_thread.put(written_shard)
                if len(acquired) < len(targets):
                    held_by_others.append(shard)
            commit_thread.finish()
            # a shard encoded here that is still missing was taken over by another process while this one was suspended
            taken_over = [shard for shard in encoded_here if shard not in held_by_others and job.missing_targets(shard)]
            pending = held_by_others + taken_over
            if pending:
                listener.on_waiting(len(pending))
                time.sleep(POLL_INTERVAL)


class CommitThread:
    """Commits shards in order in a background thread, reports each one and releases its claims.

    At most one shard waits while another is committed.
    """

    def __init__(self, stage_times: StageTimes, listener: ProgressListener) -> None:
        self._stage_times, self._listener = stage_times, listener
        self._uncommitted: list[WrittenShard] = []

    def __enter__(self) -> CommitThread:
        self._thread = BackgroundThread(self._commit, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.__exit__(kind, error, trace)
        for written_shard in list(self._uncommitted):  # dropped by an exception
            self._release(written_shard)

    def put(self, written_shard: WrittenShard) -> None:
        """Queue ``written_shard`` for commit. Raises the exception of an earlier commit."""
        self._uncommitted.append(written_shard)
        with self._stage_times.timed_wait("commit"):
            self._thread.put(written_shard)

    def finish(self) -> None:
        """Wait until everything is committed. Raises the exception of a commit."""
        if not self._uncommitted:
            return
        with self._stage_times.timed_wait("commit"):
            self._thread.finish()
        self._thread = BackgroundThread(self._commit, 1)

    def _commit(self, written_shard: WrittenShard) -> None:
        written_shard.commit()
        self._listener.on_shard_committed(written_shard.shard)
        self._release(written_shard)

    def _release(self, written_shard: WrittenShard) -> None:
        written_shard.abort()
        release_shard(written_shard.shard, written_shard.targets)
        self._uncommitted.remove(written_shard)


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


def release_shard(shard: int, targets: Sequence[Target]) -> None:
    """Release the claims on ``shard``."""
    for target in targets:
        target.store.release(shard)


def count_committed_failures(job: Job, stats: ExtractionStats) -> None:
    """Add the failures of earlier runs to ``stats``; they count toward ``max_failures``. Raises WorkFailed."""
    for failure in job.earlier_failures:
        stats.add_failure(failure["key"], failure["stage"], failure["error"])
    check_failures(stats, job.config.max_failures, len(job.plan))
