"""Worker index, decoding threads and devices of a process.

The worker index comes from ``--worker-index`` and ``--num-workers``, a SLURM array or a Kubernetes indexed Job. It
determines only the order in which a worker tries shards. Claims decide which worker extracts a shard, so a lost, late
or duplicate worker costs time, never a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.encoders.load import may_have_gpu
from shards.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1

    def shard_order(self, shards: int) -> list[int]:
        """Return all of ``range(shards)`` in this worker's order: its own i, i + n, i + 2n …, then those of the others.

        It helps the next worker first, starting at the end of that worker's list to avoid contention.
        """
        own = list(range(self.index, shards, self.count))
        for step in range(1, self.count):
            own += reversed(range((self.index + step) % self.count, shards, self.count))
        return own


def find_worker(index: int | None, count: int | None, environ: Mapping[str, str]) -> Worker:
    """Return the worker given by the options; missing values are read from the launcher's environment variables.

    A SLURM array provides index and count; its range may start at any index. A Kubernetes indexed Job provides the
    index (``JOB_COMPLETION_INDEX``), and the count is ``--num-workers``. The default is worker 0 of 1.

    Raises:
        UserError: an index without a count, a count without an index, or an index that is not below the count.
    """
    if index is not None and count is None and "SLURM_ARRAY_TASK_COUNT" not in environ:
        raise UserError(f"--worker-index {index} needs the number of workers: add --num-workers")
    worker_index = _launcher_index(environ) if index is None else index
    if count is None and "SLURM_ARRAY_TASK_ID" in environ:
        count = _int_variable(environ, "SLURM_ARRAY_TASK_COUNT")
    if count is None:
        return Worker()
    if count < 1:
        raise UserError(f"--num-workers is {count}: expected at least 1")
    if worker_index is None:
        raise UserError(
            f"--num-workers {count} needs the index of this worker: add --worker-index (0 to {count - 1}), or start "
            "the command from a SLURM array or a Kubernetes indexed Job"
        )
    if index is None:
        return Worker(worker_index % count, count)  # an array with gaps (1,5,9) has indices above its count
    if not 0 <= index < count:
        raise UserError(f"--worker-index is {index}: expected 0 to {count - 1} with --num-workers {count}")
    return Worker(index, count)


def _launcher_index(environ: Mapping[str, str]) -> int | None:
    """Return the 0-based index that the launcher assigned to this process, or None."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        first = _int_variable(environ, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environ else 0
        step = _int_variable(environ, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environ else 1
        return (_int_variable(environ, "SLURM_ARRAY_TASK_ID") - first) // max(1, step)
    if "JOB_COMPLETION_INDEX" in environ:
        return _int_variable(environ, "JOB_COMPLETION_INDEX")
    return None


def _int_variable(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise UserError(
            f"environment variable {name}: expected a non-negative integer, got '{text}': set --worker-index and "
            "--num-workers"
        )
    return int(text)


def num_decode_workers(configured: int | None, *, device: str, cpus: int, gpus: int) -> int:
    """Return the number of decoding threads: ``configured``, or a default for the encoder's device.

    An encoder on a CPU needs few decoding threads and uses the cores itself. With a GPU, decoding gets that GPU's share
    of the cores, minus two for reading, batching and storing.
    """
    if configured is not None:
        return configured
    return 2 if not device.startswith("cuda") else min(16, max(2, cpus // max(1, gpus) - 2))


def process_devices(device: str, processes: int | None, gpus: int) -> list[str]:
    """Return the encoder's device for each process on this machine.

    Args:
        device: ``encoder.device`` as configured: auto, cpu, cuda, cuda:1 …
        processes: as configured; None is one per GPU that ``device`` allows, or one without a GPU.
        gpus: number of GPUs that torch detects.

    Raises:
        UserError: more processes on GPUs than there are GPUs.
    """
    on_gpus = gpus > 0 and device in ("auto", "cuda")
    n = processes if processes is not None else (gpus if on_gpus else 1)
    if n == 1:
        return [device]
    if on_gpus:
        if n > gpus:
            raise UserError(f"processes={n}, but this machine has {gpus} GPUs: set processes to at most {gpus}")
        return [f"cuda:{i}" for i in range(n)]
    if device.startswith("cuda:"):
        raise UserError(f"processes={n} with encoder.device={device}: set encoder.device=cuda for one process per GPU")
    return [device] * n


def count_gpus() -> int:
    """Return the number of GPUs that torch detects; torch is imported only if this machine may have one."""
    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def first_device(config: ExtractConfig) -> str:
    """Return the device of this process, the first one. On a CPU, also limit torch to this process's share of cores."""
    names = process_devices(config.encoder.device, config.processes, count_gpus())
    if len(names) > 1 and not names[0].startswith("cuda"):
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // len(names)))
    return names[0]
