"""Run an extraction on this machine with several processes: one per GPU, each with its own encoder.

For a job with n processes, this process is the first and starts n - 1 child processes
(``python -m pipeline.extract.child``). They claim shards like any process that shares the folder, and report progress
and failures through a pipe. When a child dies, the others continue and extract its shard again. When this process dies,
the pipes close and the children exit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.extract.child import ReportCounter, ShardReport, job_to_json
from pipeline.extract.job import prepare, provenance
from pipeline.extract.loop import cleanup, count_committed_failures, finish_caches, make_shards
from pipeline.extract.progress import ProgressBar
from pipeline.extract.resources import Worker, count_gpus, process_devices
from pipeline.extract.shard import open_decoders
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.summary import JobSummary, Outcome, open_outcome, summarize
from pipeline.profile import StageTimes

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig
    from pipeline.extract.job import Job

CHILD_EXIT_TIMEOUT = 10.0  # seconds that a child may take to abandon its shard


class WorkerProcesses:
    """The child processes of this one; a context manager that ends them."""

    def __init__(self, job: Job, stats: ExtractionStats, progress_bar: ProgressBar) -> None:
        self._job, self._stats, self._progress_bar = job, stats, progress_bar
        self._running: list[tuple[str, subprocess.Popen[str], threading.Thread]] = []

    def __enter__(self) -> WorkerProcesses:
        if not self._job.encoder.loaded:  # everything is copied
            return self
        import torch

        names = process_devices(self._job.config.encoder.device, self._job.config.processes, count_gpus())
        for device in names[1:]:
            self._start(self._job.encoder.device if device == "auto" else device, torch.get_num_threads())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process, _ in self._running:
            if process.poll() is None and kind is not None:
                process.terminate()
        for device, process, thread in self._running:
            assert process.stdin is not None
            process.stdin.close()  # ends it if the signal arrived before its handler was set
            try:
                expected = process.wait(CHILD_EXIT_TIMEOUT) == 128 + signal.SIGTERM
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                expected = True
            thread.join()
            if kind is None and not expected:
                self._report_exit(device, process.returncode)
        self._running.clear()

    def check(self) -> None:
        """Report children that exited with an error; raise WorkFailed if too many utterances failed in total."""
        for entry in [entry for entry in self._running if entry[1].poll() not in (None, 0)]:
            device, process, thread = entry
            thread.join()
            self._running.remove(entry)
            self._report_exit(device, process.returncode)
        check_failures(self._stats, self._job.config.max_failures, len(self._job.plan))

    def _start(self, device: str, threads: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.extract.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # only this process handles Ctrl-C
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({**job_to_json(self._job), "device": device}) + "\n")
        process.stdin.flush()  # stays open: end of file tells the child that this process is gone
        thread = threading.Thread(target=self._listen, args=(process,), name=f"worker on {device}", daemon=True)
        thread.start()
        self._running.append((device, process, thread))

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        counter = ReportCounter(self._stats, self._progress_bar)
        with process.stdout:
            for line in process.stdout:
                try:
                    report = ShardReport(*json.loads(line))
                except ValueError:  # the process died while writing this line
                    continue
                counter.add(report)
        counter.discard_uncommitted()

    @staticmethod
    def _report_exit(device: str, code: int) -> None:
        if code:
            how = f"on signal {-code}" if code < 0 else f"with status {code}"
            print(f"note: the process on {device} exited {how}; its shard is extracted again", file=sys.stderr)


def extract(
    config: ExtractConfig,
    *,
    worker: Worker | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    rehash: bool = False,
    trace: bool = False,
    on_start: Callable[[JobSummary], None] = lambda summary: None,
) -> Outcome:
    """Extract everything that the caches of ``config`` lack, on this machine.

    Args:
        worker: decides which shards this process tries first.
        verify: re-hash the committed shards and extract corrupt ones again.
        retry_failed: try the utterances again that failed before.
        rehash: see :func:`pipeline.extract.job.prepare`.
        trace: see :func:`run_local`.
        on_start: called with the summary of each job before its first shard.

    Raises:
        UserError, WorkFailed: see :func:`pipeline.extract.job.prepare` and :func:`run_local`.
    """
    extraction = prepare(config, rehash=rehash)
    outcome = open_outcome(extraction)
    while jobs := extraction.jobs(verify=verify, retry_failed=retry_failed):
        for job in jobs:
            summary = summarize(job)
            on_start(summary)
            outcome.add(summary, run_local(job, worker=worker, trace=trace))
            extraction.learn_audio_ids(job)
        verify = retry_failed = False
    outcome.changed_audio = extraction.changed_audio
    cleanup(extraction)
    return outcome


def run_local(job: Job, *, worker: Worker | None = None, trace: bool = False) -> ExtractionStats:
    """Extract in this process and its children until every shard is committed, then finalize the generation.

    Args:
        job: a scheduled job.
        worker: decides which shards this process tries first.
        trace: keep every timed block in ``ExtractionStats.stage_times``, for ``--profile``.

    Raises:
        WorkFailed: too many utterances failed.
        UserError: the disk is full or read-only; committed shards are kept.
    """
    started = time.perf_counter()
    stats = ExtractionStats(stage_times=StageTimes(trace=trace))
    count_committed_failures(job, stats)
    with job.hold_leases():
        if job.todo:
            job.load_encoder()
            with (
                _open_progress_bar(job, stats) as progress_bar,
                WorkerProcesses(job, stats, progress_bar) as others,
                open_decoders(job, stats.stage_times) as decoders,
            ):
                make_shards(job, stats, decoders, progress_bar, worker=worker, before_each_shard=others.check)
        finish_caches(job.targets, job.generation, job.plan, provenance(job), time.perf_counter() - started)
        stats.stage_times.wall_seconds = time.perf_counter() - started
    return stats


def _open_progress_bar(job: Job, stats: ExtractionStats) -> ProgressBar:
    return ProgressBar(job.plan.sizes, lambda: stats.stage_times.bottleneck(job.decode_workers))
