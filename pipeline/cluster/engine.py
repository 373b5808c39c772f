"""A Ray cluster as engine: actors that are workers of one extraction like any others, and a driver that listens.

    python -m pipeline extract --engine ray --config configs/extract/librispeech.yaml

In: a configuration, and a cluster: the one at ``--ray-address`` or ``RAY_ADDRESS``, else one of this machine alone that
lives as long as the command. Out: the same caches as any engine makes. One actor a GPU, or one for every
``--actor-cpus`` cores where there is none; as many as fit, more when a node joins. The first actor prepares the job,
the others join it as the processes of one machine do (``pipeline/extract/child.py``); claims decide who makes which
shard. The driver holds no encoder: it starts actors, counts what they report, and merges the caches at the end. A lost
worker or node costs the shard that it was making. The driver may be killed and started again: what is committed stands
in the cache alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from pipeline.config import ExtractConfig
from pipeline.extract.child import Listener, Report, join, tell, told_targets, work
from pipeline.extract.job import Job, prepare, provenance, schedule
from pipeline.extract.loop import finish_caches, tidy
from pipeline.extract.progress import Progress
from pipeline.extract.resources import Worker
from pipeline.extract.stats import Tally, check_failures
from pipeline.extract.summary import Facts, facts_of
from shards.commit.claims import new_owner
from shards.config.base import validate_config
from shards.errors import UserError, WorkFailed, missing_package

OBJECT_STORE = 80 << 20  # bytes, of a local cluster: counts are all that travels, and Ray's least is 75 MB
TICK = 1.0  # seconds between two looks at what the cluster has
GRACE = 2.0  # seconds to wait for actors that have reported nothing, once another has found everything committed
DEFAULT_CPUS = 4  # cores of an actor that computes on the CPU
MAX_LOSSES = 3  # actors that one worker may lose in a row without having committed a shard


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
        WorkFailed: too many failures, or a worker lost several actors in a row.
    """
    with _connected(cluster) as ray:
        driver = _Driver(ray, config.model_copy(update={"processes": None}), cluster.cpus)
        try:
            facts = driver.prepare(verify, retry_failed)
            if not facts.complete:
                begin(facts)
                driver.run(facts)
        finally:
            driver.close()
        return facts, driver.tally


class Extractor:
    """What an actor holds: the job, with its encoder."""

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        if os.path.isdir(folder):  # relative paths are relative to the driver's folder, where this node has it
            os.chdir(folder)
        self._config = validate_config(ExtractConfig, config, "the configuration")
        self._job: Job | None = None

    def prepare(self, verify: bool, retry_failed: bool) -> tuple[Facts, dict[str, Any]]:
        """Load the encoder, list the source, fix the plan; what there is to do, and what others need to join."""
        job = self._job = prepare(self._config)
        schedule(job, verify=verify, retry_failed=retry_failed)
        facts = facts_of(job)
        if facts.complete:
            tidy(job)
        return facts, {**tell(job), "void": job.void, "about": provenance(job)}

    def work(self, told: dict[str, Any], worker: Worker) -> Iterator[Report]:
        """Make shards until all are committed, by whomever."""
        if self._job is None:
            self._job = join(told)
            for target, records in zip(self._job.targets, told["void"], strict=False):
                if records:
                    target.store.reopen(records)
        reports: SimpleQueue[Report | None] = SimpleQueue()
        with ThreadPoolExecutor(1) as executor:
            ending = executor.submit(work, self._job, reports.put, worker)
            ending.add_done_callback(lambda _: reports.put(None))
            while (report := reports.get()) is not None:
                yield report
            ending.result()


class _Lost(Exception):
    """An actor or its node died, or cannot be reached; the message says how."""


@dataclass
class _Actor:
    """One actor: its handle, which worker it is, and the generator of its reports."""

    handle: Any
    index: int
    reports: Any
    listener: Listener
    reported: bool = False


@dataclass
class _Driver:
    """Keeps a cluster busy. ``ray`` is the module, connected; ``cpus`` what an actor reserves."""

    ray: Any
    config: ExtractConfig
    cpus: int | None
    tally: Tally = field(default_factory=Tally)
    told: dict[str, Any] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)  # shards that are not committed
    actors: list[_Actor] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)  # by worker, since it last committed a shard
    first: Any = None  # the actor that prepared the job
    ended: float | None = None  # when an actor found that everything is committed

    def prepare(self, verify: bool, retry_failed: bool) -> Facts:
        """What one actor finds; another takes over when it is lost."""
        while True:
            self.first = self._start(*self._room()[:2])
            try:
                facts: Facts
                facts, self.told = self._get(self.first.prepare.remote(verify, retry_failed))
                return facts
            except _Lost as error:
                self._lost(self.first, 0, error)

    def run(self, facts: Facts) -> None:
        """Have every shard made, then merge the caches."""
        started, sizes, looked = time.perf_counter(), dict(enumerate(facts.sizes)), 0.0
        self.left = set(facts.todo)
        for failure in self.told["failed"]:
            self.tally.fail(failure["key"], failure["stage"], failure["error"])
        with Progress(sizes, self._busiest) as progress:
            for shard in sizes.keys() - self.left:
                progress.found(shard)
            while not self._over():
                if self.ended is None and (not self.actors or time.monotonic() - looked >= TICK):
                    self._hire(progress)
                    looked = time.monotonic()
                reports = {actor.reports: actor for actor in self.actors}
                self.ray.wait(list(reports), timeout=TICK)
                for ready in self.ray.wait(list(reports), num_returns=len(reports), timeout=0)[0]:
                    self._hear(reports[ready])
                check_failures(self.tally, self.config.max_failures, facts.utterances)
            for shard in sizes:
                progress.found(shard)
        targets = told_targets(self.told)
        plan = targets[0].store.plan()
        assert plan is not None
        with ExitStack() as stack:
            for target in targets:
                stack.enter_context(target.store.at_work(new_owner(), self.config.lease_seconds))
            finish_caches(targets, plan, self.told["about"], time.perf_counter() - started)

    def close(self) -> None:
        """End the actors: what they have in flight is not committed."""
        for handle in (self.first, *(actor.handle for actor in self.actors)):
            if handle is not None:
                self.ray.kill(handle)

    def _room(self) -> tuple[bool, int, int]:
        """Whether an actor takes a GPU, its cores, and how many such actors the nodes that live can hold."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpu = self.config.encoder.device != "cpu" and any(node.get("GPU") for node in nodes)
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        cpus = self.cpus if self.cpus is not None else 1 if gpu else max(1, min(DEFAULT_CPUS, largest))
        room = sum(int(min(node.get("GPU", 0) if gpu else largest, node.get("CPU", 0) // cpus)) for node in nodes)
        if room == 0:
            raise UserError(
                f"no node of the Ray cluster has {cpus} CPUs for an encoder: start nodes, or set --actor-cpus"
            )
        return gpu, cpus, room

    def _start(self, gpu: bool, cpus: int) -> Any:
        remote = self.ray.remote(Extractor).options(num_gpus=int(gpu), num_cpus=cpus)
        return remote.remote(self.config.model_dump(mode="json"), os.getcwd())

    def _hire(self, progress: Progress) -> None:
        """Start actors where the cluster has room for more, one a shard at most."""
        gpu, cpus, room = self._room()
        workers = min(room, len(self.left)) or 1
        for index in set(range(workers)) - {actor.index for actor in self.actors}:
            handle, self.first = self.first or self._start(gpu, cpus), None
            reports = handle.work.options(num_returns="streaming").remote(self.told, Worker(index, workers))
            self.actors.append(_Actor(handle, index, reports, Listener(self.tally, progress)))

    def _hear(self, actor: _Actor) -> None:
        """Take one report, or the end of them."""
        try:
            report: Report = self._get(next(actor.reports))
        except StopIteration:
            self.ended = self.ended or time.monotonic()
        except _Lost as error:
            self._lost(actor.handle, actor.index, error)
        else:
            actor.reported = True
            actor.listener.hear(report)
            self.tally.stages.seconds["encode"] += report.encode_seconds / len(self.actors)
            if report.committed:
                self.left.discard(report.shard)
                self.losses[actor.index] = 0
            return
        actor.listener.end()
        self.actors.remove(actor)
        self.ray.kill(actor.handle)

    def _get(self, call: Any) -> Any:
        """What a call gave; an error that the user can mend is raised as it was there, the actor's loss as _Lost."""
        try:
            return self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (UserError, WorkFailed)) else error from None
        except self.ray.exceptions.RayError as error:
            raise _Lost(" ".join(str(error).split())[:300]) from None

    def _lost(self, handle: Any, index: int, reason: _Lost) -> None:
        self.ray.kill(handle)  # if it only cannot be reached
        self.losses[index] += 1
        if self.losses[index] >= MAX_LOSSES:
            raise WorkFailed(
                f"worker {index} was lost {MAX_LOSSES} times without having committed a shard (the last time: "
                f"{reason}): look into Ray's logs for memory and crashes; committed shards are kept"
            )
        print("note: a worker was lost; another one takes over", file=sys.stderr)

    def _over(self) -> bool:
        """Whether all is committed, and every actor that had a part in it has reported all of it."""
        if self.ended is None or any(actor.reported for actor in self.actors):
            return False
        return not self.actors or time.monotonic() - self.ended > GRACE

    def _busiest(self) -> str:
        reported = sum(actor.reported for actor in self.actors)
        return f"{reported} workers, {self.tally.stages.bottleneck(1) or 'starting'}"


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
