"""A Ray cluster as engine: actors hold the encoder, the shards of the plan are their tasks.

    python -m pipeline extract --engine ray --config configs/extract/librispeech.yaml

In: a configuration, and a cluster: the one at ``--ray-address`` or ``RAY_ADDRESS``, else one of this machine alone that
lives as long as the command. Out: the same caches as any engine makes. One actor a GPU, or one for every
``--actor-cpus`` cores where there is none; as many as fit, more when a node joins. The driver holds no encoder and no
plan: it hands out shard numbers and hears counts. A worker or node that is lost costs its shard in flight, which goes
to another actor; the driver may be killed and started again, for what is committed stands in the cache alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.driver import Driver
from pipeline.config import ExtractConfig
from pipeline.extract.stats import Tally
from pipeline.extract.summary import Facts
from shards.errors import UserError, missing_package

OBJECT_STORE = 80 << 20  # bytes, of a local cluster: numbers are all that travels, and Ray's least is 75 MB


@dataclass(frozen=True)
class Cluster:
    """Where to run: ``address`` None for a cluster of this machine alone; ``cpus`` an actor reserves, None: chosen."""

    address: str | None = None
    cpus: int | None = None


def run_ray(
    config: ExtractConfig,
    cluster: Cluster,
    *,
    verify: bool = False,
    retry_failed: bool = False,
    begin: Callable[[Facts], None] = lambda facts: None,
) -> tuple[Facts, Tally]:
    """Extract on a Ray cluster until every shard is committed and the caches are finished.

    ``begin`` is told what will be done, once that is known. The tally's ``encode`` seconds are an average actor's.

    Raises:
        UserError: ray is not installed, no cluster answers or none of its nodes fits; what ``prepare`` raises.
        WorkFailed: too many failures, or one shard lost several workers.
    """
    with _connected(cluster) as ray:
        driver = Driver(
            ray,
            config.model_copy(update={"processes": None}),
            cluster.cpus,
            {"verify": verify, "retry_failed": retry_failed},
        )
        try:
            facts = driver.first()
            if not facts.complete:
                begin(facts)
                driver.run()
        finally:
            driver.dismiss()
        return facts, driver.tally


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise missing_package("--engine ray", "ray", "ray") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a corpus tool sends nothing home
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    local = {"num_cpus": os.cpu_count(), "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else local),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no Ray cluster at '{address}' ({reason}): start one, or leave the address out") from None
    try:
        yield ray
    finally:
        ray.shutdown()
