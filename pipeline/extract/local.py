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

from pipeline.extract.child import Listener, Report, tell
from pipeline.extract.job import provenance
from pipeline.extract.loop import count_committed_failures, finish_caches, make_shards
from pipeline.extract.progress import Progress
from pipeline.extract.resources import Worker, devices
from pipeline.extract.shard import open_decoders
from pipeline.extract.stats import Tally, check_failures
from pipeline.profile import Stages

if TYPE_CHECKING:
    from pipeline.extract.job import Job

PATIENCE = 10.0  # seconds that a process may take to abandon its shard


class Processes:
    """The processes beside this one; a context manager that ends them."""

    def __init__(self, job: Job, tally: Tally, progress: Progress) -> None:
        self._job, self._tally, self._progress = job, tally, progress
        self._running: list[tuple[str, subprocess.Popen[str], threading.Thread]] = []

    def __enter__(self) -> Processes:
        import torch

        names = devices(self._job.config.encoder.device, self._job.config.processes, torch.cuda.device_count())
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
                asked = process.wait(PATIENCE) == 128 + signal.SIGTERM
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                asked = True
            thread.join()
            if kind is None and not asked:
                self._tell(device, process.returncode)
        self._running.clear()

    def check(self) -> None:
        """Note processes that ended badly; raises WorkFailed when all of them together have too many failures."""
        for entry in [entry for entry in self._running if entry[1].poll() not in (None, 0)]:
            device, process, thread = entry
            thread.join()
            self._running.remove(entry)
            self._tell(device, process.returncode)
        check_failures(self._tally, self._job.config.max_failures, len(self._job.plan.table))

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
        process.stdin.write(json.dumps({**tell(self._job), "device": device}) + "\n")
        process.stdin.flush()  # and stays open: its end is the sign that this process is gone
        thread = threading.Thread(target=self._listen, args=(process,), name=f"worker on {device}", daemon=True)
        thread.start()
        self._running.append((device, process, thread))

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        listener = Listener(self._tally, self._progress)
        with process.stdout:
            for line in process.stdout:
                try:
                    report = Report(*json.loads(line))
                except ValueError:  # a line cut short by the process's death
                    continue
                listener.hear(report)
        listener.end()

    @staticmethod
    def _tell(device: str, code: int) -> None:
        if code:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            print(f"note: the process on {device} ended {how}: its shard is made again", file=sys.stderr)


def run_local(job: Job, *, worker: Worker | None = None, trace: bool = False) -> Tally:
    """Extract with this process's encoder, and those it starts, until every shard is committed; then finish.

    ``worker`` decides which shards it tries first. ``trace`` keeps every block of work in ``Tally.stages`` for a
    profile.

    Raises:
        WorkFailed: too many failures.
        UserError: the disk is full, read-only, or the like; what is committed stays.
    """
    started = time.perf_counter()
    tally = Tally(stages=Stages(trace=trace))
    count_committed_failures(job, tally)
    with job.at_work():
        if job.todo:
            with (
                _progress(job, tally) as progress,
                Processes(job, tally, progress) as others,
                open_decoders(job, tally.stages) as decoders,
            ):
                make_shards(job, tally, decoders, progress, worker=worker, look=others.check)
        finish_caches(job.targets, job.plan, provenance(job), time.perf_counter() - started)
        tally.stages.wall = time.perf_counter() - started
    return tally


def _progress(job: Job, tally: Tally) -> Progress:
    sizes = Counter(job.plan.table["shard"].to_pylist())
    return Progress(sizes, lambda: tally.stages.bottleneck(job.workers))
