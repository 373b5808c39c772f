"""More processes of this machine on one extraction: one a GPU, each with an encoder of its own.

In: a job whose configuration asks for n processes. Out: n - 1 further ones (``python -m pipeline.child``), which take
shards by claims like any process that shares the folder, and whose progress, failures and notes come back through a
pipe. This process is the first of the n: it goes on when another dies, and makes that one's shard again. When this one
dies, the others see their pipe closed and end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.tally import Tally, check_failures
from shards.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig
    from pipeline.job import Job
    from pipeline.progress import Progress

PATIENCE = 10.0  # seconds that a process may take to abandon its shard


def devices(device: str, processes: int | None, gpus: int) -> list[str]:
    """The encoder's device in each process of this machine.

    Args:
        device: ``encoder.device`` as configured: auto, cpu, cuda, cuda:1 …
        processes: as configured; None is one for each GPU that ``device`` allows, else one.
        gpus: how many torch sees.

    Raises:
        UserError: more processes on GPUs than there are GPUs.
    """
    on_gpus = gpus > 0 and device in ("auto", "cuda")
    n = processes if processes is not None else (gpus if on_gpus else 1)
    if n == 1:
        return [device]
    if on_gpus:
        if n > gpus:
            raise UserError(f"processes={n} and there are {gpus} GPUs: one process a GPU is most, set it to {gpus}")
        return [f"cuda:{i}" for i in range(n)]
    if device.startswith("cuda:"):
        raise UserError(f"processes={n} on encoder.device={device}: set encoder.device=cuda for one process a GPU")
    return [device] * n


def my_device(config: ExtractConfig) -> str:
    """The device of this process, the first; a CPU's cores are divided among the processes first."""
    import torch

    names = devices(config.encoder.device, config.processes, torch.cuda.device_count())
    if len(names) > 1 and not names[0].startswith("cuda"):
        torch.set_num_threads(max(1, torch.get_num_threads() // len(names)))
    return names[0]


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
            [sys.executable, "-m", "pipeline.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is this process's business
        )
        assert process.stdin is not None
        job = self._job
        told = {
            "config": job.config.model_dump(mode="json"),
            "device": device,
            "fingerprint": job.fingerprint,
            "attempts": job.attempts,
            "targets": [(t.layer, t.store.location, t.spec.feature_id) for t in job.targets],
        }
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()  # and stays open: its end is the sign that this process is gone
        thread = threading.Thread(target=self._listen, args=(process,), name=f"worker on {device}", daemon=True)
        thread.start()
        self._running.append((device, process, thread))

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Count what the process does; what it did for a shard that it did not live to make counts no more."""
        assert process.stdout is not None
        since: list[tuple[int, float]] = []
        with process.stdout:
            for line in process.stdout:
                try:
                    told: dict[str, Any] = json.loads(line)
                except ValueError:  # a line cut short by the process's death
                    continue
                if "failure" in told:
                    self._tally.fail(*told["failure"])
                elif "made" in told:
                    self._progress.made(told["made"])
                    since.clear()
                else:
                    since.append(told["step"])
                    self._count(*told["step"])
        self._count(-sum(n for n, _ in since), -sum(seconds for _, seconds in since))

    def _count(self, utterances: int, audio_seconds: float) -> None:
        self._tally.add(utterances, audio_seconds)
        self._progress.step(utterances, audio_seconds)

    @staticmethod
    def _tell(device: str, code: int) -> None:
        if code:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            print(f"note: the process on {device} ended {how}: its shard is made again", file=sys.stderr)
