"""Runs the groups of a sweep as tasks on a Ray cluster.

The cluster is the one at ``RAY_ADDRESS``, else a local one that lives as long as the command. A task trains a whole
group in lockstep in one process, on one GPU if the cluster has GPUs. Set ``max_group_size`` to split groups, so that
there is one for each node. Caches and runs must be on storage that all nodes mount under the same paths. A task that is
lost with its node is retried from its checkpoints. Log lines pass through an actor, the mailbox, which the driver
empties once per second.

    python -m train sweep --config configs/sweep/projectors.yaml --engine ray max_group_size=2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.cluster.connect import connect
from shards.errors import UserError, WorkFailed
from train.config.train import TrainConfig
from train.sweeps.group import LockstepMode

MAX_RETRIES = 3
POLL_INTERVAL = 1.0  # seconds between polls of the mailbox


def run_groups(parts: Sequence[list[TrainConfig]], mode: LockstepMode) -> None:
    """Run every group as a task; return when all have finished.

    Raises:
        UserError: ray is not installed, no cluster answers, or a group raised UserError.
        WorkFailed: a task was lost more than ``MAX_RETRIES`` times.
    """
    with connect("engine=ray") as ray:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) and parts[0][0].device != "cpu" else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(_run_group)
        settings = [[config.model_dump(mode="json") for config in part] for part in parts]
        mailbox = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox).remote()
        names = {}
        for number, part in enumerate(settings, 1):
            prefix = f"group {number} of {len(parts)}"
            names[task.remote(part, mode, mailbox, prefix)] = ", ".join(each["name"] for each in part)
        waiting = list(names)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_INTERVAL)
            _print_lines(ray, mailbox)
            for call in done:
                _check_result(ray, call, names[call])


class Mailbox:
    """An actor that buffers the log lines of all groups for the driver; it restarts empty if its node is lost."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """Return and remove all lines."""
        lines, self._lines = self._lines, []
        return lines


def _print_lines(ray: Any, mailbox: Any) -> None:
    """Print the lines in the mailbox; nothing while it is lost, since ``metrics.jsonl`` has all metrics."""
    try:
        lines = ray.get(mailbox.take.remote())
    except ray.exceptions.RayError:
        return
    for line in lines:
        print(line, flush=True)


def _check_result(ray: Any, call: Any, names: str) -> None:
    """Print that a group has finished, or raise its error."""
    try:
        user_error = ray.get(call)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-300:]
        raise WorkFailed(f"the group {names} was lost ({reason}): resume with --resume") from None
    if user_error is not None:
        raise UserError(user_error)
    print(f"finished: {names}", flush=True)


def _run_group(settings: list[dict[str, Any]], mode: LockstepMode, mailbox: Any, prefix: str) -> str | None:
    """Train one group on a node; return the message of a UserError, or None. A retry skips finished experiments.

    Log lines go to ``mailbox``, each after ``prefix``; only the end of the task waits for their delivery.
    """
    import ray

    from train.sweeps.group import LmCache, train_group, unfinished

    sent: list[Any] = []

    def send(line: str) -> None:
        sent.append(mailbox.put.remote(f"{prefix}  {line}"))

    configs = unfinished([TrainConfig.model_validate(tree) for tree in settings])
    send(f"started: {', '.join(str(config.name) for config in configs)}")
    try:
        if configs:
            from train.distributed.signals import StopRequest

            train_group(configs, LmCache(), mode, StopRequest(), send)
    except UserError as error:
        return str(error)
    finally:
        # the driver polls once more after the task has ended
        ray.wait(sent, num_returns=len(sent), timeout=10 * POLL_INTERVAL)
    return None
