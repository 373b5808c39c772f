"""Groups of a sweep as tasks of a Ray cluster.

In: groups of experiments, and a cluster: the one at ``RAY_ADDRESS``, else one of this machine alone that lives as long
as the command. Out: their run folders. A task is a whole group in lockstep in one process, on one GPU where the cluster
has any; ``max_group_size`` cuts groups smaller, so that there are as many as nodes. Caches and runs must stand on
storage that all nodes see under the same paths. A task that is lost with its node is tried again, from its checkpoints.
What groups tell comes through an actor, the mailbox, which the driver empties once a second.

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
POLL_INTERVAL = 1.0  # seconds between two looks at what the groups tell


def run_groups(parts: Sequence[list[TrainConfig]], mode: LockstepMode) -> None:
    """Run every group as a task; returns when all are done.

    Raises:
        UserError: ray is not installed, no cluster answers, or a group is refused.
        WorkFailed: a task was lost more often than MAX_RETRIES.
    """
    with connect("engine=ray") as ray:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) and parts[0][0].device != "cpu" else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(_run_group)
        settings = [[config.model_dump(mode="json") for config in part] for part in parts]
        mailbox = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox).remote()
        names = {}
        for number, part in enumerate(settings, 1):
            place = f"group {number} of {len(parts)}"
            names[task.remote(part, mode, mailbox, place)] = ", ".join(each["name"] for each in part)
        waiting = list(names)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_INTERVAL)
            _print_lines(ray, mailbox)
            for call in done:
                _check_result(ray, call, names[call])


class Mailbox:
    """Lines of all groups, on their way to the driver. Lost with its node, it begins anew, empty."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        """Keep ``line`` for the driver."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """What has come since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _print_lines(ray: Any, mailbox: Any) -> None:
    """Print what is in the mailbox; while it is lost, nothing: ``metrics.jsonl`` of the experiments has it all."""
    try:
        lines = ray.get(mailbox.take.remote())
    except ray.exceptions.RayError:
        return
    for line in lines:
        print(line, flush=True)


def _check_result(ray: Any, call: Any, names: str) -> None:
    """Say that a group is done, or raise why it is not."""
    try:
        refusal = ray.get(call)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-300:]
        raise WorkFailed(f"the group {names} was lost ({reason}): go on with --resume") from None
    if refusal is not None:
        raise UserError(refusal)
    print(f"done: {names}", flush=True)


def _run_group(settings: list[dict[str, Any]], mode: LockstepMode, mailbox: Any, place: str) -> str | None:
    """On a node: one group; why it was refused, if it was. A second attempt leaves finished experiments alone.

    Its lines go to ``mailbox``, each with its ``place`` before it, and nothing waits for them but the end.
    """
    import ray

    from train.sweeps.group import LmCache, LockstepTrainer, unfinished

    sent: list[Any] = []

    def tell(line: str) -> None:
        sent.append(mailbox.put.remote(f"{place}  {line}"))

    configs = unfinished([TrainConfig.model_validate(tree) for tree in settings])
    tell(f"begins: {', '.join(str(config.name) for config in configs)}")
    try:
        if configs:
            from train.distributed.signals import StopRequest

            LockstepTrainer(configs, LmCache(), mode, StopRequest(), tell).run()
    except UserError as error:
        return str(error)
    finally:
        ray.wait(
            sent, num_returns=len(sent), timeout=10 * POLL_INTERVAL
        )  # the driver looks once more when this has ended
    return None
