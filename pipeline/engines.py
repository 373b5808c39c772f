"""Who makes which shard: one process, or several of them on one cache.

In: a :class:`pipeline.job.Job`. Out: every shard committed and the caches finished. Processes that share the folder
divide the work by claims (``shards/claims.py``): each takes the next shard that nobody holds, waits for the others at
the end, and whoever finds everything committed finishes the cache, which is idempotent.
"""

from __future__ import annotations

import time

from pipeline import merge
from pipeline.extract import Tally, check_failures, extract_shard
from pipeline.job import Job, Target, provenance
from pipeline.merge import POLL
from pipeline.progress import Progress
from pipeline.stages import Stages
from pipeline.workers import Worker


def run_local(job: Job, *, worker: Worker | None = None, trace: bool = False) -> Tally:
    """Extract with this process's encoder until every shard of every target is committed, then finish.

    ``worker`` decides which shards it tries first. ``trace`` keeps every block of work in ``Tally.stages`` for a
    profile.

    Raises:
        WorkFailed: too many failures.
        UserError: the disk is full, read-only, or the like; what is committed stays.
    """
    started = time.perf_counter()
    tally = Tally(stages=Stages(trace=trace))
    _count_committed_failures(job, tally)
    with job.at_work(), Progress(job, tally.stages) as progress:
        waiting = (worker or Worker()).turn(job.plan.shards)
        while waiting:
            held_by_others = []
            for shard in waiting:
                targets = job.missing(shard)
                if not targets:
                    progress.found(shard)
                    continue
                mine = _claim(job, shard, targets)
                if mine:
                    try:
                        extract_shard(job, shard, mine, tally, progress.step)
                    finally:
                        for target in mine:
                            target.store.release(shard)
                    progress.made(shard)
                if job.missing(shard):
                    held_by_others.append(shard)
            waiting = held_by_others
            if waiting:
                progress.waiting(len(waiting))
                time.sleep(POLL)
        for target in job.targets:
            about = {**provenance(job), "last_run_seconds": round(time.perf_counter() - started, 1)}
            merge.complete(target.store, target.spec, job.plan, about)
    return tally


def tidy(job: Job) -> None:
    """Remove what killed processes left in the caches of a finished job."""
    with job.at_work():
        for target in job.targets:
            target.store.tidy()


def _claim(job: Job, shard: int, targets: list[Target]) -> list[Target]:
    """Those of ``targets`` whose claim this process got; a shard that was committed meanwhile is given back."""
    mine = [target for target in targets if target.store.take(shard)]
    late = [t for t in mine if t not in job.missing(shard)]
    for target in late:
        target.store.release(shard)
    return [t for t in mine if t not in late]


def _count_committed_failures(job: Job, tally: Tally) -> None:
    """Failures of earlier runs count towards ``max_failures``."""
    target = job.targets[0]
    for shard in range(job.plan.shards):
        record = target.store.committed(shard, target.spec.feature_id, job.plan.id)
        for failure in record["failures"] if record else ():
            tally.failures.append((failure["key"], failure["stage"], failure["error"]))
    check_failures(job, tally)
