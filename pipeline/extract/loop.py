"""Who makes which shard: one process, or several of them on one cache.

In: a :class:`pipeline.extract.job.Job`. Out: every shard committed and the caches finished. Processes that share the
folder divide the work by claims (``shards/commit/claims.py``): each takes the next shard that nobody holds, waits for
the others at the end, and whoever finds everything committed finishes the cache, which is idempotent. :func:`run_local`
starts the processes of this machine itself (``processes``: one a GPU) and shows them as one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from pipeline.decode import Decoders
from pipeline.extract.job import Job, Target
from pipeline.extract.progress import Watch
from pipeline.extract.resources import Worker
from pipeline.extract.shard import Made, encode_shard
from pipeline.extract.stats import Tally, check_failures
from pipeline.profile import Stages
from pipeline.threads import Background
from shards.format.layout import Plan

POLL = 0.5  # seconds between two looks at what another process does


def finish_caches(targets: Sequence[Target], plan: Plan, about: dict[str, Any], seconds: float) -> None:
    """Merge each cache, all of whose shards are committed, unless another process does: then wait until it is complete.

    Any process may do it, any number of times, within ``at_work`` of the stores.

    Args:
        about: provenance, see :func:`pipeline.extract.job.provenance`.
        seconds: how long the run took.
    """
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {**about, "last_run_seconds": round(seconds, 1), "finished": finished}
    for target in targets:
        while not target.store.is_complete(target.spec.feature_id, plan.id):
            if target.store.take(None):
                try:
                    target.store.finish(target.spec, plan, about)
                finally:
                    target.store.release(None)
            else:
                time.sleep(POLL)


def make_shards(
    job: Job,
    tally: Tally,
    decoders: Decoders,
    watch: Watch,
    *,
    worker: Worker | None = None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Make every shard that nobody else makes, until all are committed; ``look`` is called between two of them.

    A shard is committed while the next one is encoded: its fsync and the reading back cost the encoder nothing.
    """
    todo = set(job.todo)
    for shard in range(job.plan.shards):
        if shard not in todo:
            watch.found(shard)
    waiting = [shard for shard in (worker or Worker()).turn(job.plan.shards) if shard in todo]
    with Committing(tally.stages, watch) as committing:
        while waiting:
            made_here, held_by_others = [], []
            for shard in waiting:
                look()
                targets = job.missing(shard)
                if not targets:
                    watch.found(shard)
                    continue
                mine = claim(job, shard, targets)
                if mine:
                    try:
                        made = encode_shard(job, shard, mine, tally, decoders, partial(watch.step, shard))
                    except BaseException:
                        release(shard, mine)
                        raise
                    made_here.append(shard)
                    committing.put(made)
                if len(mine) < len(targets):
                    held_by_others.append(shard)
            committing.finish()
            # what was made here and is missing was taken over by another process while this one stood still
            lost = [shard for shard in made_here if shard not in held_by_others and job.missing(shard)]
            waiting = held_by_others + lost
            if waiting:
                watch.waiting(len(waiting))
                time.sleep(POLL)


class Committing:
    """Commits shards in a thread, in order, one of them waiting at most; tells of it, gives their claims back."""

    def __init__(self, stages: Stages, watch: Watch) -> None:
        self._stages, self._watch = stages, watch
        self._open: list[Made] = []

    def __enter__(self) -> Committing:
        self._thread = Background(self._commit, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.__exit__(kind, error, trace)
        for made in list(self._open):  # dropped by an exception
            self._let_go(made)

    def put(self, made: Made) -> None:
        """Commit ``made`` soon; raises what an earlier commit raised."""
        self._open.append(made)
        with self._stages.waiting("commit"):
            self._thread.put(made)

    def finish(self) -> None:
        """Wait until everything is committed; raises what a commit raised."""
        if not self._open:
            return
        with self._stages.waiting("commit"):
            self._thread.finish()
        self._thread = Background(self._commit, 1)

    def _commit(self, made: Made) -> None:
        made.commit()
        self._watch.made(made.shard)
        self._let_go(made)

    def _let_go(self, made: Made) -> None:
        made.abort()
        release(made.shard, made.targets)
        self._open.remove(made)


def tidy(job: Job) -> None:
    """Remove what killed processes left in the caches of a finished job."""
    with job.at_work():
        for target in job.targets:
            target.store.tidy()


def claim(job: Job, shard: int, targets: list[Target]) -> list[Target]:
    """Those of ``targets`` whose claim this process got; a shard that was committed meanwhile is given back."""
    mine = [target for target in targets if target.store.take(shard)]
    late = [t for t in mine if t not in job.missing(shard)]
    release(shard, late)
    return [t for t in mine if t not in late]


def release(shard: int, targets: Sequence[Target]) -> None:
    """Give the claims of ``shard`` back."""
    for target in targets:
        target.store.release(shard)


def count_committed_failures(job: Job, tally: Tally) -> None:
    """Failures of earlier runs count towards ``max_failures``."""
    for failure in job.failed:
        tally.fail(failure["key"], failure["stage"], failure["error"])
    check_failures(tally, job.config.max_failures, len(job.plan.table))
