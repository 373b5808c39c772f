"""One of several processes of an extraction; started by ``pipeline/extract/local.py`` or a Ray cluster, not by hand.

In, on standard input: one line of JSON, the job; then nothing, and its end means that the starting process is gone.
Out: committed shards; on standard output a :class:`Report` as a line of JSON, at most a few a second.

What is told travels as plain values: :func:`tell` puts a job into them, :func:`join` makes it a job again, and
:func:`work` makes its shards and reports to whoever started it, where :class:`Listener` counts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipeline.extract.stats import Tally
from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from pipeline.extract.job import Job, Target
    from pipeline.extract.progress import Progress
    from pipeline.extract.resources import Worker

GRACE = 8.0  # seconds to abandon the shard in
REPORT_EVERY = 0.5  # seconds


class Report(NamedTuple):
    """What a process did for a shard since its last report."""

    shard: int
    utterances: int = 0
    audio_seconds: float = 0.0
    encode_seconds: float = 0.0
    failures: list[tuple[str, str, str]] = []  # noqa: RUF012 - key, stage, reason; never changed
    committed: bool = False


def command(argv: object) -> int:
    """Make shards until none is left that nobody else makes."""
    reports, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
    line = sys.stdin.readline()
    if not line:  # the starting process is gone already
        return 0
    threading.Thread(target=_end_with, args=(sys.stdin,), name="lifeline", daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    work(join(json.loads(line)), lambda report: print(json.dumps(report), file=reports, flush=True))
    return 0


def tell(job: Job) -> dict[str, Any]:
    """A scheduled job as JSON values: what :func:`join` needs."""
    return {
        "config": job.config.model_dump(mode="json"),
        "device": job.config.encoder.device,
        "fingerprint": job.fingerprint,
        "todo": job.todo,
        "failed": job.failed,
        "attempts": job.attempts,
        "targets": [(t.layer, t.store.location, t.spec.model_dump()) for t in job.targets],
    }


def told_targets(told: dict[str, Any]) -> list[Target]:
    """The caches of a job that :func:`tell` told of; needs no encoder."""
    from pipeline.extract.job import Target
    from shards.commit.store import open_store
    from shards.format.spec import FeatureSpec

    scratch = told["config"]["scratch"]
    return [
        Target(layer, open_store(location, scratch), FeatureSpec.parse(spec, location))
        for layer, location, spec in told["targets"]
    ]


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


def work(job: Job, report: Callable[[Report], None], worker: Worker | None = None) -> None:
    """Make shards until all are committed; ``report`` is called from several threads, one at a time.

    Raises:
        WorkFailed: too many failures.
        UserError: the disk is full, or the like.
    """
    from pipeline.extract.loop import count_committed_failures, make_shards
    from pipeline.extract.shard import open_decoders

    tally = Tally()
    count_committed_failures(job, tally)
    with job.at_work(), open_decoders(job, tally.stages) as decoders:
        make_shards(job, tally, decoders, _Reports(report, tally), worker=worker)


class _Reports:
    """Reports of this process's work; see ``engines.Watch``."""

    def __init__(self, report: Callable[[Report], None], tally: Tally) -> None:
        self._report, self._tally, self._lock = report, tally, threading.Lock()
        self._failures, self._encode_seconds = len(tally.failures), 0.0  # that were reported
        self._open, self._last = Report(-1), 0.0

    def step(self, shard: int, utterances: int, audio_seconds: float) -> None:
        with self._lock:
            if shard != self._open.shard:
                self._send(Report(shard))
            failures = self._tally.failures[self._failures :]
            self._failures += len(failures)
            self._open = self._open._replace(
                utterances=self._open.utterances + utterances,
                audio_seconds=self._open.audio_seconds + audio_seconds,
                failures=[*self._open.failures, *failures],
            )
            if time.monotonic() - self._last >= REPORT_EVERY:
                self._send(Report(shard))

    def made(self, shard: int) -> None:
        with self._lock:
            if shard == self._open.shard:
                self._send(Report(-1))
            self._report(Report(shard, committed=True))

    def found(self, shard: int) -> None:
        """Others' shards are theirs to report."""

    def waiting(self, shards: int) -> None:
        """The starting process waits, too."""

    def _send(self, following: Report) -> None:
        """Report what is open, if it is anything, and open another."""
        if self._open.utterances:
            total = self._tally.stages.seconds["encode"]
            self._report(self._open._replace(encode_seconds=total - self._encode_seconds))
            self._encode_seconds, self._last = total, time.monotonic()
        self._open = following


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
