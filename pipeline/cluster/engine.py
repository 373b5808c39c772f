"""A Ray cluster as engine: actors that are workers of one extraction like any others, and a driver that listens.

    python -m pipeline extract --engine ray --config configs/extract/librispeech.yaml

In: a configuration, and a cluster: the one at ``--ray-address`` or ``RAY_ADDRESS``, else one of this machine alone that
lives as long as the command. Out: the same caches as any engine makes. One actor a GPU, or one for every
``--actor-cpus`` cores where there is none; as many as fit, more when a node joins. The first actor prepares the job,
the others join it as the processes of one machine do (``pipeline/extract/child.py``); claims decide who makes which
shard. The driver holds no encoder: it starts actors, counts what their commit records say, and merges the caches at the
end. A lost worker or node costs the shard that it was making. The driver may be killed and started again: what is
committed stands in the cache alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from pipeline.cluster.connect import connect
from pipeline.config import ExtractConfig
from pipeline.extract.child import join, tell, told_targets, work
from pipeline.extract.job import Job, prepare, provenance, schedule
from pipeline.extract.loop import POLL, count_committed_failures, finish_caches, tidy
from pipeline.extract.progress import Progress, Watch
from pipeline.extract.resources import Worker
from pipeline.extract.stats import Tally, check_failures
from pipeline.extract.summary import Facts, facts_of
from shards.commit.claims import new_owner
from shards.config.base import validate_config
from shards.errors import UserError, WorkFailed

TICK = 1.0  # seconds between two looks at what the cluster has
DEFAULT_CPUS = 4  # cores of an actor that computes on the CPU
MAX_LOSSES = 3  # actors that one worker may lose in a row without having committed a shard


def run_ray(
    config: ExtractConfig,
    *,
    address: str | None = None,
    cpus: int | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    begin: Callable[[Facts], None] = lambda facts: None,
) -> tuple[Facts, Tally]:
    """Extract on a Ray cluster until every shard is committed and the caches are finished.

    The tally's ``encode`` seconds are an average actor's.

    Args:
        address: of the cluster; None is ``RAY_ADDRESS``, else a cluster of this machine alone.
        cpus: that an actor reserves; None is 1 beside a GPU, else ``DEFAULT_CPUS``.
        verify, retry_failed: see :func:`pipeline.extract.job.schedule`.
        begin: called with what will be done, once that is known.

    Raises:
        UserError: ray is not installed, no cluster answers or none of its nodes fits; what ``prepare`` raises.
        WorkFailed: too many failures, or a worker lost several actors in a row.
    """
    with connect("--engine ray", address) as ray:
        driver = _Driver(ray, config.model_copy(update={"processes": None}), cpus)
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

    def work(self, told: dict[str, Any], worker: Worker) -> Iterator[int]:
        """Make shards until all are committed, by whomever; gives the number of each that was committed here."""
        job, tally, commits = self._job or join(told), Tally(), _Commits()
        count_committed_failures(job, tally)
        with ThreadPoolExecutor(1) as executor:
            working = executor.submit(work, job, tally, commits, worker)
            working.add_done_callback(lambda _: commits.put(None))
            while (shard := commits.get()) is not None:
                yield shard
            working.result()


class _Commits(Watch, SimpleQueue["int | None"]):
    """Numbers of shards that this actor committed."""

    def made(self, shard: int) -> None:
        self.put(shard)


class _Lost(Exception):
    """An actor or its node died, or cannot be reached; the message says how."""


@dataclass
class _Actor:
    """One actor: its handle, which worker it is, and the generator of what it commits."""

    handle: Any
    index: int
    commits: Any


@dataclass
class _Driver:
    """Keeps a cluster busy. ``ray`` is the module, connected; ``cpus`` what an actor reserves."""

    ray: Any
    config: ExtractConfig
    cpus: int | None
    tally: Tally = field(default_factory=Tally)
    told: dict[str, Any] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)  # shards whose commit was not counted yet
    actors: list[_Actor] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)  # by worker, since it last committed a shard
    first: Any = None  # the actor that prepared the job, until it is given work
    ended: bool = False  # an actor found that everything is committed

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
        started, looked, sizes = time.perf_counter(), 0.0, dict(enumerate(facts.sizes))
        self.left = set(facts.todo)
        for failure in self.told["failed"]:
            self.tally.fail(failure["key"], failure["stage"], failure["error"])
        targets = told_targets(self.told)
        store, spec, plan = targets[0].store, targets[0].spec, targets[0].store.plan()
        assert plan is not None

        def count(shard: int) -> None:
            """Take the figures of a shard from its commit record, which it may take a moment to see."""
            record = store.committed(shard, spec.feature_id, plan.id) if shard in self.left else None
            if record is None:
                return
            self.left.discard(shard)
            timings = record["timings"]
            self.tally.add(sizes[shard], timings["audio_seconds"])
            self.tally.stages.seconds["encode"] += timings["encode_seconds"] / max(1, len(self.actors))
            for failure in record["failures"]:
                self.tally.fail(failure["key"], failure["stage"], failure["error"])
            progress.step(shard, sizes[shard], timings["audio_seconds"])
            check_failures(self.tally, self.config.max_failures, facts.utterances)

        with ExitStack() as stack:
            progress = stack.enter_context(Progress(sizes, self._busiest))
            for shard in sizes.keys() - self.left:
                progress.found(shard)
            while not self.ended:
                if not self.actors or time.monotonic() - looked >= TICK:
                    looked = time.monotonic()
                    self._hire()
                calls = {actor.commits: actor for actor in self.actors}
                for ready in self.ray.wait(list(calls), timeout=TICK)[0]:
                    if (committed := self._commit(calls[ready])) is not None:
                        count(committed)
            while self.left:  # what a lost actor did not live to tell of, and what this machine does not see yet
                for shard in sorted(self.left):
                    count(shard)
                time.sleep(POLL if self.left else 0)
            self.close()
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

    def _hire(self) -> None:
        """Start actors where the cluster has room for more, one a shard at most."""
        gpu, cpus, room = self._room()
        workers = min(room, len(self.left)) or 1
        for index in set(range(workers)) - {actor.index for actor in self.actors}:
            handle, self.first = self.first or self._start(gpu, cpus), None
            commits = handle.work.options(num_returns="streaming").remote(self.told, Worker(index, workers))
            self.actors.append(_Actor(handle, index, commits))

    def _commit(self, actor: _Actor) -> int | None:
        """The next shard that ``actor`` committed; None when it has come to its end, one way or another."""
        try:
            shard: int = self._get(next(actor.commits))
            self.losses[actor.index] = 0
            return shard
        except StopIteration:
            self.ended = True
        except _Lost as error:
            self.actors.remove(actor)
            self._lost(actor.handle, actor.index, error)
        return None

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

    def _busiest(self) -> str:
        return f"{len(self.actors)} workers, {self.tally.stages.bottleneck(1) or 'starting'}"
