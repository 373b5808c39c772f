"""A worker process of an extraction, started by ``pipeline/extract/local.py``; its functions also serve Ray actors.

Reads the job as one line of JSON from standard input, which then stays open; end of file means that the parent process
is gone. Commits shards, and writes a :class:`ShardReport` for every utterance and every commit to standard output, as
one line of JSON each.

:func:`job_to_json` serializes a job, :func:`job_from_json` restores it, and :func:`run_worker` extracts its shards. A
:class:`ReportCounter` in the parent process counts the reports.
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

from pipeline.extract.progress import ProgressBar, ProgressListener
from pipeline.extract.stats import ExtractionStats
from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from pipeline.extract.job import Job
    from pipeline.extract.resources import Worker
    from pipeline.extract.targets import Target

EXIT_TIMEOUT = 8.0  # seconds allowed for abandoning the shard in progress


class ShardReport(NamedTuple):
    """Progress of one process on one shard, since its previous report."""

    shard: int
    utterances: int = 0
    audio_seconds: float = 0.0
    failures: Sequence[tuple[str, str, str]] = ()  # key, stage, reason
    committed: bool = False
    copied: int = 0


def command(argv: object) -> int:
    """Extract shards until all are committed."""
    from pipeline.extract.loop import count_committed_failures

    reports, sys.stdout = sys.stdout, sys.stderr  # libraries may print, and standard output is for reports
    line = sys.stdin.readline()
    if not line:  # the parent process is already gone
        return 0
    threading.Thread(target=_exit_when_closed, args=(sys.stdin,), name="lifeline", daemon=True).start()
    signal.signal(signal.SIGTERM, _on_sigterm)
    job, stats = job_from_json(json.loads(line)), ExtractionStats()
    count_committed_failures(job, stats)
    run_worker(job, stats, _ReportWriter(reports, stats))
    return 0


def job_to_json(job: Job) -> dict[str, Any]:
    """Return a scheduled job as JSON values, for :func:`job_from_json`."""
    return {
        "config": job.config.model_dump(mode="json"),
        "device": job.config.encoder.device,
        "generation": job.generation,
        "plan_id": job.plan.id,
        "reuse": [reuse.donors for reuse in job.reuse],
        "todo": job.todo,
        "failed": job.earlier_failures,
        "attempts": job.failed_attempts,
        "targets": [(t.layer, t.store.location, t.spec.model_dump()) for t in job.targets],
    }


def targets_from_json(job_json: dict[str, Any]) -> list[Target]:
    """Return the caches of a job from :func:`job_to_json`; needs no encoder.

    Invalidates the commit records under the key ``void``, if there are any.
    """
    from pipeline.extract.targets import Target
    from shards.commit.store import open_store
    from shards.format.spec import FeatureSpec

    scratch = job_json["config"]["scratch"]
    targets = [
        Target(layer, open_store(location, scratch), FeatureSpec.parse(spec, location))
        for layer, location, spec in job_json["targets"]
    ]
    for target, records in zip(targets, job_json.get("void", ()), strict=False):
        # if the generation is listed, all of them were extracted again
        if records and not target.store.lists_plan(target.spec.feature_id, job_json["plan_id"]):
            target.store.reopen(records)
    return targets


def job_from_json(job_json: dict[str, Any]) -> Job:
    """Restore a job from :func:`job_to_json`, without listing the source or reading commit records again.

    Raises:
        UserError: the encoder of this process computes other features than the caches hold.
    """
    from pipeline.config import ExtractConfig
    from pipeline.extract.job import Job, feature_spec, open_configured_encoder
    from pipeline.extract.reuse import Donor, Reuse
    from pipeline.extract.targets import LabelLookup
    from pipeline.sources import open_source
    from shards.config.base import validate_config

    config = validate_config(ExtractConfig, job_json["config"], "the configuration")
    weights, encoder = open_configured_encoder(config, job_json["device"])
    targets = targets_from_json(job_json)
    for target in targets:
        different = target.spec.differences(feature_spec(config, encoder, target.layer))
        if different:
            raise UserError(
                f"the encoder on {encoder.device} computes other features than '{target.store.location}' holds "
                f"({'; '.join(different)}): set encoder.dtype and encoder.device"
            )
    generation = job_json["generation"]
    plan = targets[0].store.plan(generation)
    assert plan is not None
    reuse = [
        Reuse(target.spec, plan, [Donor(*donor) for donor in donors])
        for target, donors in zip(targets, job_json["reuse"], strict=True)
    ]
    labels = LabelLookup(targets[0].store)
    job = Job(
        config, open_source(config.source), encoder, weights, targets, generation, plan, reuse, labels,
        todo=job_json["todo"], earlier_failures=job_json["failed"], failed_attempts=job_json["attempts"],
    )  # fmt: skip
    job.load_encoder()
    return job


def run_worker(job: Job, stats: ExtractionStats, listener: ProgressListener, worker: Worker | None = None) -> None:
    """Extract shards until all are committed; the process that started the job merges the caches.

    Args:
        job: a scheduled job.
        stats: already includes the failures of earlier runs.
        listener: receives the progress.
        worker: decides which shards are tried first.

    Raises:
        WorkFailed: too many utterances failed.
        UserError: the disk is full or read-only.
    """
    from pipeline.extract.loop import make_shards
    from pipeline.extract.shard import open_decoders

    with job.hold_leases(), open_decoders(job, stats.stage_times) as decoders:
        make_shards(job, stats, decoders, listener, worker=worker)


class _ReportWriter(ProgressListener):
    """Writes one line for each utterance and each commit."""

    def __init__(self, file: IO[str], stats: ExtractionStats) -> None:
        self._file, self._stats, self._lock = file, stats, threading.Lock()
        self._num_reported = len(stats.failures)  # failures of earlier runs, and those reported so far

    def on_utterances(self, shard: int, utterances: int, audio_seconds: float, copied: int = 0) -> None:
        failures = self._stats.failures[self._num_reported :]
        self._num_reported += len(failures)
        self._send(ShardReport(shard, utterances, audio_seconds, failures, copied=copied))

    def on_shard_committed(self, shard: int) -> None:
        self._send(ShardReport(shard, committed=True))

    def _send(self, report: ShardReport) -> None:
        with self._lock:
            print(json.dumps(report), file=self._file, flush=True)


class ReportCounter:
    """Counts the reports of another process, and takes back those of shards that it did not commit."""

    def __init__(self, stats: ExtractionStats, progress_bar: ProgressBar) -> None:
        self._stats, self._progress_bar = stats, progress_bar
        self._uncommitted: defaultdict[int, list[ShardReport]] = defaultdict(list)

    def add(self, report: ShardReport) -> None:
        self._count(report, 1)
        if report.committed:
            self._uncommitted.pop(report.shard, None)
            self._progress_bar.on_shard_committed(report.shard)
        else:
            self._uncommitted[report.shard].append(report)

    def discard_uncommitted(self) -> None:
        """Subtract the reports of uncommitted shards; call it when the process has ended."""
        for reports in self._uncommitted.values():
            for report in reports:
                self._count(report, -1)
        self._uncommitted.clear()

    def _count(self, report: ShardReport, sign: int) -> None:
        for failure in report.failures:
            if sign > 0:
                self._stats.add_failure(*failure)
            else:
                self._stats.failures.remove((failure[0], failure[1], failure[2]))
        self._stats.add(sign * report.utterances, sign * report.audio_seconds, sign * report.copied)
        self._progress_bar.on_utterances(report.shard, sign * report.utterances, sign * report.audio_seconds)


def _exit_when_closed(parent: IO[str]) -> None:
    parent.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(EXIT_TIMEOUT)
    os._exit(128 + signal.SIGTERM)


def _on_sigterm(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(run_command(command, []))
