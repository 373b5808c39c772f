"""One encoder on one machine of a cluster: takes shards of the plan by number, tells what became of them.

In: a configuration, then shard numbers from a driver (``pipeline/cluster/engine.py``). Out: committed shards in the
caches; to the driver plain values alone. It is a process like any other on the caches: it claims what it makes, so that
a second driver, or an extraction by other means at the same time, does no harm. Knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import ExtractConfig
from pipeline.decode.pool import Decoders
from pipeline.extract.job import Job, prepare, schedule
from pipeline.extract.loop import claim, count_committed_failures, finish_caches, release
from pipeline.extract.shard import encode_shard, open_decoders
from pipeline.extract.stats import Tally
from pipeline.extract.summary import Facts, facts_of
from pipeline.profile import Stages
from shards.config.base import validate_config
from shards.errors import UserError, WorkFailed

Failure = tuple[str, str, str]  # key, stage, reason


@dataclass(frozen=True)
class Ready:
    """An actor that has its encoder: what it found, committed shards to make again, earlier runs' failures."""

    facts: Facts
    redo: list[int]
    failures: list[Failure]


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: ``made``, ``found`` committed already, or ``held`` by somebody else who makes it."""

    state: Literal["made", "found", "held"]
    utterances: int = 0
    audio_seconds: float = 0.0
    encode_seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Trouble:
    """An error that is a person's to mend, on its way to the driver: :meth:`again` is what was raised."""

    kind: Literal["user", "work"]
    text: str

    def again(self) -> UserError | WorkFailed:
        return UserError(self.text) if self.kind == "user" else WorkFailed(self.text)


class Extractor:
    """Holds the encoder. :meth:`pulse` may be called by another thread while a shard is made.

    Args:
        config: an :class:`ExtractConfig` as JSON values.
        folder: what relative paths in it are relative to: the driver's working folder, where this machine has it.
    """

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._tree = config
        if os.path.isdir(folder):
            os.chdir(folder)
        self._job: Job | None = None
        self._shard = -1
        self._decoders: Decoders | None = None
        self._life = ExitStack()  # of claims and decoders: as long as this process
        self._stages = Stages()
        self._tally = Tally(stages=self._stages)  # of the shard in flight

    def ready(self, verify: bool, retry_failed: bool, redo: Sequence[int]) -> Ready | Trouble:
        """Load the encoder, list the source, agree on the plan; mark shards to make again."""
        try:
            job = self._job = prepare(validate_config(ExtractConfig, self._tree, "the configuration"))
            redo = sorted(schedule(job, verify=verify, retry_failed=retry_failed, shards=redo))
            self._life.enter_context(job.at_work())
            self._decoders = self._life.enter_context(open_decoders(job, self._stages))
            earlier = Tally()
            count_committed_failures(job, earlier)
            if job.complete():
                for target in job.targets:
                    target.store.tidy()
            return Ready(facts_of(job), redo, list(earlier.failures))
        except (UserError, WorkFailed) as error:
            return _trouble(error)

    def extract(self, shard: int) -> Outcome | Trouble:
        """Make a shard, if nobody else does."""
        job, decoders = self._job, self._decoders
        assert job is not None
        assert decoders is not None
        targets = job.missing(shard)
        if not targets:
            return Outcome("found")
        self._shard, self._tally = shard, Tally(stages=self._stages)
        tally = self._tally
        before = tally.stages.seconds["encode"]
        try:
            with ExitStack() as stack:
                mine = claim(job, shard, targets)
                stack.callback(release, shard, mine)
                if mine:
                    made = encode_shard(job, shard, mine, tally, decoders)
                    stack.callback(made.abort)
                    made.commit()
        except (UserError, WorkFailed) as error:
            return _trouble(error)
        return Outcome(
            "held" if job.missing(shard) else "made" if len(mine) == len(targets) else "found",
            tally.utterances,
            tally.audio_seconds,
            tally.stages.seconds["encode"] - before,
            tally.failures,
        )

    def pulse(self) -> tuple[int, int, float, str]:
        """The shard in flight, its utterances and audio seconds so far, and the busiest stage."""
        workers = self._job.workers if self._job else 1
        return self._shard, self._tally.utterances, self._tally.audio_seconds, self._tally.stages.bottleneck(workers)

    def finish(self, seconds: float) -> Trouble | None:
        """Merge the caches; every shard must be committed. ``seconds``: how long the run took."""
        assert self._job is not None
        try:
            finish_caches(self._job, seconds)
        except (UserError, WorkFailed) as error:
            return _trouble(error)
        return None


def _trouble(error: UserError | WorkFailed) -> Trouble:
    return Trouble("user" if isinstance(error, UserError) else "work", str(error))
