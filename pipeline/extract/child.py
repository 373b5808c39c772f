"""One of several processes of an extraction; started by ``pipeline/extract/local.py`` or a Ray cluster, not by hand.

In, on standard input: one line of JSON, the job; then nothing, and its end means that the starting process is gone.
Out: committed shards; on standard output a :class:`Report` for every utterance and every commit, as a line of JSON.

What is told travels as plain values: :func:`tell` puts a job into them, :func:`join` makes it a job again, :func:`work`
makes its shards. A :class:`Listener` in the starting process counts what is reported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipeline.extract.progress import Progress, Watch
from pipeline.extract.stats import Tally
from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from pipeline.extract.job import Job, Target
    from pipeline.extract.resources import Worker

GRACE = 8.0  # seconds to abandon the shard in


class Report(NamedTuple):
    """What a process did for a shard."""

    shard: int
    utterances: int = 0
    audio_seconds: float = 0.0
    failures: Sequence[tuple[str, str, str]] = ()  # key, stage, reason
    committed: bool = False


def command(argv: object) -> int:
    """Make shards until all are committed."""
    from pipeline.extract.loop import count_committed_failures

    reports, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
    line = sys.stdin.readline()
    if not line:  # the starting process is gone already
        return 0
    threading.Thread(target=_end_with, args=(sys.stdin,), name="lifeline", daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    job, tally = join(json.loads(line)), Tally()
    count_committed_failures(job, tally)
    work(job, tally, _Reports(reports, tally))
    return 0


def tell(job: Job) -> dict[str, Any]:
    """A scheduled job as JSON values: what :func:`join` needs."""
    return {
        "config": job.config.model_dump(mode="json"),
        "device": job.config.encoder.device,
        "fingerprint": job.fingerprint,
        "plan_id": job.plan.id,
        "todo": job.todo,
        "failed": job.failed,
        "attempts": job.attempts,
        "targets": [(t.layer, t.store.location, t.spec.model_dump()) for t in job.targets],
    }


def told_targets(told: dict[str, Any]) -> list[Target]:
    """The caches of a job that :func:`tell` told of; needs no encoder. Records that are ``void`` count no more."""
    from pipeline.extract.job import Target
    from shards.commit.store import open_store
    from shards.format.spec import FeatureSpec

    scratch = told["config"]["scratch"]
    targets = [
        Target(layer, open_store(location, scratch), FeatureSpec.parse(spec, location))
        for layer, location, spec in told["targets"]
    ]
    for target, records in zip(targets, told.get("void", ()), strict=False):
        if records and not target.store.is_complete(target.spec.feature_id, told["plan_id"]):  # all were made again
            target.store.reopen(records)
    return targets


def join(told: dict[str, Any]) -> Job:
    """The job of the process that told of it: its plan stands, the source is not listed again, no record is read.

    Raises:
        UserError: the encoder here is not the one that the caches are made with.
    """
    from pipeline.config import ExtractConfig
    from pipeline.encoders.load import speed_up
    from pipeline.extract.job import Job, feature_spec, open_weights
    from pipeline.extract.plan import windows_of
    from pipeline.sources import open_source
    from shards.config.base import validate_config

    config = validate_config(ExtractConfig, told["config"], "the configuration")
    weights, encoder = open_weights(config, told["device"])
    targets = told_targets(told)
    for target in targets:
        different = target.spec.differences(feature_spec(config, encoder, target.layer))
        if different:
            raise UserError(
                f"the encoder on {encoder.device} makes other features than '{target.store.location}' holds "
                f"({'; '.join(different)}): set encoder.dtype and encoder.device"
            )
    plan = targets[0].store.plan()
    assert plan is not None
    source = open_source(config.source)
    job = Job(config, source, encoder, weights, targets, plan, told["fingerprint"], todo=told["todo"])
    job.failed, job.attempts = told["failed"], told["attempts"]
    speed_up(encoder, config.encoder.compile, windows_of(plan.table, encoder, config.overlap))
    return job


def work(job: Job, tally: Tally, watch: Watch, worker: Worker | None = None) -> None:
    """Make shards until all are committed; whoever told of the job merges. ``tally`` knows of earlier failures.

    Raises:
        WorkFailed: too many failures.
        UserError: the disk is full, or the like.
    """
    from pipeline.extract.loop import make_shards
    from pipeline.extract.shard import open_decoders

    with job.at_work(), open_decoders(job, tally.stages) as decoders:
        make_shards(job, tally, decoders, watch, worker=worker)


class _Reports(Watch):
    """A line for each utterance and each commit."""

    def __init__(self, file: IO[str], tally: Tally) -> None:
        self._file, self._tally, self._lock = file, tally, threading.Lock()
        self._known = len(tally.failures)  # of earlier runs, and those that were reported

    def step(self, shard: int, utterances: int, audio_seconds: float) -> None:
        failures = self._tally.failures[self._known :]
        self._known += len(failures)
        self._send(Report(shard, utterances, audio_seconds, failures))

    def made(self, shard: int) -> None:
        self._send(Report(shard, committed=True))

    def _send(self, report: Report) -> None:
        with self._lock:
            print(json.dumps(report), file=self._file, flush=True)


class Listener:
    """Counts what another process reports; what it did for shards that it did not live to commit counts no more."""

    def __init__(self, tally: Tally, progress: Progress) -> None:
        self._tally, self._progress = tally, progress
        self._uncommitted: defaultdict[int, list[Report]] = defaultdict(list)

    def hear(self, report: Report) -> None:
        self._count(report, 1)
        if report.committed:
            self._uncommitted.pop(report.shard, None)
            self._progress.made(report.shard)
        else:
            self._uncommitted[report.shard].append(report)

    def end(self) -> None:
        """The process has ended, or was lost."""
        for reports in self._uncommitted.values():
            for report in reports:
                self._count(report, -1)
        self._uncommitted.clear()

    def _count(self, report: Report, sign: int) -> None:
        for failure in report.failures:
            if sign > 0:
                self._tally.fail(*failure)
            else:
                self._tally.failures.remove((failure[0], failure[1], failure[2]))
        self._tally.add(sign * report.utterances, sign * report.audio_seconds)
        self._progress.step(report.shard, sign * report.utterances, sign * report.audio_seconds)


def _end_with(parent: IO[str]) -> None:
    parent.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(run_command(command, []))
