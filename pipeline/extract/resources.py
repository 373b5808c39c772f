"""Which worker of how many this process is: from the command line, a SLURM array or a Kubernetes indexed Job.

In: ``--worker-index`` and ``--num-workers``, or the environment of the launcher. Out: a :class:`Worker` and the order
in which it takes shards. The order is a preference: claims decide who makes what, so that a worker that is lost, late
or numbered twice costs time and never a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def shard_order(self, shards: int) -> list[int]:
        """All of ``range(shards)`` in this worker's order: its own i, i + n, i + 2n …, then what others may have left.

        It helps the worker after it first, and there from the end, where that one is not.
        """
        own = list(range(self.index, shards, self.count))
        for step in range(1, self.count):
            own += reversed(range((self.index + step) % self.count, shards, self.count))
        return own


def find_worker(index: int | None, count: int | None, environ: Mapping[str, str]) -> Worker:
    """The worker that the options name; what they leave open is read from a launcher's variables.

    A SLURM array tells index and count (any array range: indices count from its first). A Kubernetes indexed Job tells
    the index (``JOB_COMPLETION_INDEX``) and the count is ``--num-workers``. Without any of it: worker 0 of 1.

    Raises:
        UserError: an index without a count, a count without an index, or numbers that do not fit each other.
    """
    if index is not None and count is None and "SLURM_ARRAY_TASK_COUNT" not in environ:
        raise UserError(f"--worker-index {index} does not say of how many: add --num-workers")
    worker_index = _launcher_index(environ) if index is None else index
    if count is None and "SLURM_ARRAY_TASK_ID" in environ:
        count = _int_variable(environ, "SLURM_ARRAY_TASK_COUNT")
    if count is None:
        return Worker()
    if count < 1:
        raise UserError(f"--num-workers is {count}: at least one worker must work")
    if worker_index is None:
        raise UserError(
            f"--num-workers {count} does not say which of them this is: add --worker-index (0 to {count - 1}), or "
            "start it from a SLURM array or a Kubernetes indexed Job"
        )
    if index is None:
        return Worker(worker_index % count, count)  # an array with gaps (1,5,9) has indices beyond its count
    if not 0 <= index < count:
        raise UserError(f"--worker-index is {index} and --num-workers {count}: indices go from 0 to {count - 1}")
    return Worker(index, count)


def _launcher_index(environ: Mapping[str, str]) -> int | None:
    """The index from 0 that a launcher gave this process."""
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
        raise UserError(f"the variable {name} is '{text}', not a number: give --worker-index and --num-workers")
    return int(text)


def num_decode_workers(configured: int | None, *, device: str, cpus: int, gpus: int) -> int:
    """How many threads decode: ``wanted``, or by the encoder's device.

    An encoder on the CPU needs few and wants the cores itself; a GPU leaves its share of them but for what reads,
    prepares batches and stores.
    """
    if configured is not None:
        return configured
    return 2 if not device.startswith("cuda") else min(16, max(2, cpus // max(1, gpus) - 2))


def process_devices(device: str, processes: int | None, gpus: int) -> list[str]:
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


def first_device(config: ExtractConfig) -> str:
    """The device of this process, the first; a CPU's cores are divided among the processes first."""
    import torch

    names = process_devices(config.encoder.device, config.processes, torch.cuda.device_count())
    if len(names) > 1 and not names[0].startswith("cuda"):
        torch.set_num_threads(max(1, torch.get_num_threads() // len(names)))
    return names[0]
