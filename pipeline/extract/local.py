"""More processes of this machine on one extraction: one a GPU, each with an encoder of its own.

In: a job whose configuration asks for n processes. Out: n - 1 further ones (``python -m pipeline.extract.child``),
which take shards by claims like any process that shares the folder, and whose progress, failures and notes come back
through a pipe. This process is the first of the n: it goes on when another dies, and makes that one's shard again. When
this one dies, the others see their pipe closed and end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.extract.child import ReportCounter, ShardReport, job_to_json
from pipeline.extract.job import provenance
from pipeline.extract.loop import count_committed_failures, finish_caches, make_shards
from pipeline.extract.progress import ProgressBar
from pipeline.extract.resources import Worker, process_devices
from pipeline.extract.shard import open_decoders
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.profile import StageTimes

if TYPE_CHECKING:
    from pipeline.extract.job import Job

CHILD_EXIT_TIMEOUT = 10.0  # seconds that a process may take to abandon its shard


class WorkerProcesses:
    """The processes beside this one; a context manager that ends them."""

    def __init__(self, job: Job, stats: ExtractionStats, progress_bar: ProgressBar) -> None:
        self._job, self._stats, self._progress_bar = job, stats, progress_bar
        self._running: list[tuple[str, subprocess.Popen[str], threading.Thread]] = []

    def __enter__(self) -> WorkerProcesses:
        import torch

        names = process_devices(self._job.config.encoder.device, self._job.config.processes, torch.cuda.device_count())
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
            process.stdin.close()  # ends it, should the signal have come too early
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
        """Note processes that ended badly; raises WorkFailed when all of them together have too many failures."""
        for entry in [entry for entry in self._running if entry[1].poll() not in (None, 0)]:
            device, process, thread = entry
            thread.join()
            self._running.remove(entry)
            self._report_exit(device, process.returncode)
        check_failures(self._stats, self._job.config.max_failures, len(self._job.plan.table))

    def _start(self, device: str, threads: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.extract.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is this process's business
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({**job_to_json(self._job), "device": device}) + "\n")
        process.stdin.flush()  # and stays open: its end is the sign that this process is gone
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
                except ValueError:  # a line cut short by the process's death
                    continue
                counter.add(report)
        counter.discard_uncommitted()

    @staticmethod
    def _report_exit(device: str, code: int) -> None:
        if code:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            print(f"note: the process on {device} ended {how}: its shard is made again", file=sys.stderr)


def run_local(job: Job, *, worker: Worker | None = None, trace: bool = False) -> ExtractionStats:
    """Extract with this process's encoder, and those it starts, until every shard is committed; then finish.

    ``worker`` decides which shards it tries first. ``trace`` keeps every block of work in ``Tally.stages`` for a
    profile.

    Raises:
        WorkFailed: too many failures.
        UserError: the disk is full, read-only, or the like; what is committed stays.
    """
    started = time.perf_counter()
    stats = ExtractionStats(stage_times=StageTimes(trace=trace))
    count_committed_failures(job, stats)
    with job.hold_leases():
        if job.todo:
            with (
                _open_progress_bar(job, stats) as progress_bar,
                WorkerProcesses(job, stats, progress_bar) as others,
                open_decoders(job, stats.stage_times) as decoders,
            ):
                make_shards(job, stats, decoders, progress_bar, worker=worker, before_each_shard=others.check)
        finish_caches(job.targets, job.plan, provenance(job), time.perf_counter() - started)
        stats.stage_times.wall_seconds = time.perf_counter() - started
    return stats


def _open_progress_bar(job: Job, stats: ExtractionStats) -> ProgressBar:
    sizes = Counter(job.plan.table["shard"].to_pylist())
    return ProgressBar(sizes, lambda: stats.stage_times.bottleneck(job.decode_workers))
