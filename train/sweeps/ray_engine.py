"""Groups of a sweep as tasks of a Ray cluster.

In: groups of experiments, and a cluster: the one at ``RAY_ADDRESS``, else one of this machine alone that lives as long
as the command. Out: their run folders. A task is a whole group in lockstep in one process, on one GPU where the cluster
has any; ``together`` cuts groups smaller, so that there are as many as nodes. Caches and runs must stand on storage
that all nodes see under the same paths. A task that is lost with its node is tried again, from its checkpoints.

    python -m train sweep --config configs/sweep/projectors.yaml engine=ray together=2
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shards.errors import UserError, WorkFailed
from train.config import TrainConfig
from train.sweeps.lockstep import Mode

OBJECT_STORE = 80 << 20  # bytes, of a local cluster: settings are all that travels, and Ray's least is 75 MB
RETRIES = 3


def run_groups(parts: Sequence[list[TrainConfig]], mode: Mode) -> None:
    """Run every group as a task; returns when all are done.

    Raises:
        UserError: ray is not installed, no cluster answers, or a group is refused.
        WorkFailed: a task was lost more often than RETRIES.
    """
    with _connected() as ray:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) and parts[0][0].device != "cpu" else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_group)
        settings = [[config.model_dump(mode="json") for config in part] for part in parts]
        names = {task.remote(part, mode): ", ".join(each["name"] for each in part) for part in settings}
        waiting = list(names)
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                refusal = ray.get(done[0])
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[-300:]
                raise WorkFailed(f"the group {names[done[0]]} was lost ({reason}): go on with --resume") from None
            if refusal is not None:
                raise UserError(refusal)
            print(f"done: {names[done[0]]}", flush=True)


def _group(settings: list[dict[str, Any]], mode: Mode) -> str | None:
    """On a node: one group; why it was refused, if it was. A second attempt leaves finished experiments alone."""
    from train.sweeps.lockstep import Lockstep, Models
    from train.sweeps.sweep import unfinished

    configs = unfinished([TrainConfig.model_validate(tree) for tree in settings])
    try:
        if configs:
            from train.stopping import StopRequest

            Lockstep(configs, Models(), mode, StopRequest()).run()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def _connected() -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise UserError("engine=ray needs ray, which is not installed: `pip install 'earshard[ray]'`") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    local = {"num_cpus": os.cpu_count(), "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local))
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no Ray cluster at '{address}' ({reason}): start one, or unset RAY_ADDRESS") from None
    try:
        yield ray
    finally:
        ray.shutdown()
