"""Run an extraction on a Ray cluster: each actor is a worker, and a driver starts actors and tracks their commits.

    python -m pipeline extract --engine ray --config configs/extract/librispeech.yaml

The cluster is the one at ``--ray-address`` or ``RAY_ADDRESS``, else a new one on this machine that ends with the
command. The caches are the same as with the local engine. There is one actor per GPU, or one per ``--actor-cpus`` cores
on a cluster without GPUs: as many as fit, and more when a node joins. The first actor prepares the job; the others join
it as the processes of one machine do (``pipeline/extract/child.py``). Claims decide which worker extracts which shard.
The driver loads no encoder: it starts actors, reads the commit records, and merges the caches at the end. Losing a
worker or a node loses only the shard it was extracting. The driver can be killed and restarted, because all state is in
the cache.
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
from pipeline.extract.child import job_from_json, job_to_json, run_worker, targets_from_json
from pipeline.extract.job import Job, prepare, provenance
from pipeline.extract.loop import POLL_INTERVAL, cleanup, count_committed_failures, finish_caches
from pipeline.extract.progress import ProgressBar, ProgressListener
from pipeline.extract.resources import Worker
from pipeline.extract.stats import ExtractionStats, check_failures
from pipeline.extract.summary import CacheResult, JobSummary, Outcome, open_outcome, summarize
from shards.commit.claims import new_owner
from shards.config.base import validate_config
from shards.errors import UserError, WorkFailed

CLUSTER_POLL_INTERVAL = 1.0  # seconds between two checks of the cluster's resources
DEFAULT_ACTOR_CPUS = 4  # cores of an actor that encodes on the CPU
Opened = tuple[list[CacheResult], list[str], int]  # the first three fields of an Outcome, which has locks in the others
MAX_LOST_ACTORS = 3  # actors that one worker may lose in a row without committing a shard


def run_ray(
    config: ExtractConfig,
    *,
    address: str | None = None,
    cpus_per_actor: int | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    rehash: bool = False,
    on_start: Callable[[JobSummary], None] = lambda summary: None,
) -> Outcome:
    """Extract on a Ray cluster until the caches hold everything.

    The ``encode`` seconds of the returned statistics are an average over the actors.

    Args:
        config: what to extract; ``processes`` is ignored.
        address: address of the cluster; None uses ``RAY_ADDRESS``, else starts a new cluster on this machine.
        cpus_per_actor: CPU cores that each actor reserves; None is 1 with a GPU, else ``DEFAULT_ACTOR_CPUS``.
        verify, retry_failed, rehash, on_start: see :func:`pipeline.extract.local.extract`.

    Raises:
        UserError: Ray is not installed, no cluster answers, no node has enough CPUs, or
            :func:`pipeline.extract.job.prepare` raised it.
        WorkFailed: too many utterances failed, or a worker lost several actors in a row.
    """
    with connect("--engine ray", address) as ray:
        found: Outcome | None = None
        config = config.model_copy(update={"processes": None})
        while True:  # a generation at a time, until nothing is new
            driver = _Driver(ray, config, cpus_per_actor)
            try:
                outcome, summary = driver.prepare(verify, retry_failed, rehash)
                found = found or outcome
                found.changed_audio = max(found.changed_audio, outcome.changed_audio)
                if summary is None:
                    return found
                on_start(summary)
                driver.run(summary)
                found.add(summary, driver.stats)
            finally:
                driver.close()
            verify = retry_failed = rehash = False


class ExtractionActor:
    """One worker of the extraction, with its own encoder; runs in a Ray actor."""

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        if os.path.isdir(folder):  # relative paths refer to the driver's folder, if this node has it
            os.chdir(folder)
        self._config = validate_config(ExtractConfig, config, "the configuration")
        self._job: Job | None = None

    def prepare(
        self, verify: bool, retry_failed: bool, rehash: bool
    ) -> tuple[Opened, JobSummary | None, dict[str, Any]]:
        """Prepare the next job.

        Returns:
            The outcome so far, the summary of the job (None: nothing is left to do), and the JSON values that other
            actors need to join. All of it can be pickled.
        """
        extraction = prepare(self._config, rehash=rehash)
        outcome = open_outcome(extraction)
        jobs = extraction.jobs(verify=verify, retry_failed=retry_failed)
        opened = outcome.results, outcome.problems, extraction.changed_audio
        if not jobs:
            cleanup(extraction)
            return opened, None, {}
        job = self._job = jobs[0]
        return opened, summarize(job), {**job_to_json(job), "void": job.invalidated, "about": provenance(job)}

    def work(self, job_json: dict[str, Any], worker: Worker) -> Iterator[int]:
        """Extract shards until all workers together have committed all; yield each shard committed here."""
        job, stats, commits = self._job or job_from_json(job_json), ExtractionStats(), _CommitQueue()
        job.load_encoder()
        count_committed_failures(job, stats)
        with ThreadPoolExecutor(1) as executor:
            working = executor.submit(run_worker, job, stats, commits, worker)
            working.add_done_callback(lambda _: commits.put(None))
            while (shard := commits.get()) is not None:
                yield shard
            working.result()


class _CommitQueue(ProgressListener, SimpleQueue["int | None"]):
    """Queue of the shards that this actor committed."""

    def on_shard_committed(self, shard: int) -> None:
        self.put(shard)


class _ActorLostError(Exception):
    """An actor or its node died or cannot be reached; the message is Ray's reason."""


@dataclass
class _Actor:
    """One actor: its Ray handle, its worker index, and the generator of the shards it commits."""

    handle: Any
    index: int
    commits: Any


@dataclass
class _Driver:
    """Starts actors, replaces lost ones and counts their commits.

    ``ray`` is the connected module; ``cpus_per_actor`` is as in :func:`run_ray`.
    """

    ray: Any
    config: ExtractConfig
    cpus_per_actor: int | None
    stats: ExtractionStats = field(default_factory=ExtractionStats)
    job_json: dict[str, Any] = field(default_factory=dict)
    uncommitted: set[int] = field(default_factory=set)  # shards whose commit has not been counted yet
    actors: list[_Actor] = field(default_factory=list)
    consecutive_losses: Counter[int] = field(default_factory=Counter)  # by worker, since it last committed a shard
    prepared_actor: Any = None  # the actor that prepared the job, until it starts work
    all_committed: bool = False  # an actor found that every shard is committed

    def prepare(self, verify: bool, retry_failed: bool, rehash: bool) -> tuple[Outcome, JobSummary | None]:
        """Prepare the next job in one actor, or in another if that one is lost."""
        while True:
            self.prepared_actor = self._start_actor(*self._available_resources()[:2])
            try:
                call = self.prepared_actor.prepare.remote(verify, retry_failed, rehash)
                opened, summary, self.job_json = self._ray_get(call)
                return Outcome(*opened), summary
            except _ActorLostError as error:
                self._handle_lost_actor(self.prepared_actor, 0, error)

    def run(self, summary: JobSummary) -> None:
        """Extract every shard, then merge the caches."""
        started, last_check, shard_sizes = time.perf_counter(), 0.0, summary.shard_sizes
        self.uncommitted = set(summary.todo)
        for failure in self.job_json["failed"]:
            self.stats.add_failure(failure["key"], failure["stage"], failure["error"])
        targets = targets_from_json(self.job_json)
        generation = summary.generation
        store, spec, plan = targets[0].store, targets[0].spec, targets[0].store.plan(generation)
        assert plan is not None

        def count(shard: int) -> None:
            """Count a shard from its commit record, which may not be visible here yet."""
            record = store.commit_record(shard, spec.feature_id, plan.id) if shard in self.uncommitted else None
            if record is None:
                return
            self.uncommitted.discard(shard)
            timings = record["timings"]
            self.stats.add(shard_sizes[shard], timings["audio_seconds"], timings["copied"])
            self.stats.stage_times.busy_seconds["encode"] += timings["encode_seconds"] / max(1, len(self.actors))
            for failure in record["failures"]:
                self.stats.add_failure(failure["key"], failure["stage"], failure["error"])
            progress_bar.on_utterances(shard, shard_sizes[shard], timings["audio_seconds"])
            check_failures(self.stats, self.config.max_failures, summary.utterances)

        with ExitStack() as stack:
            progress_bar = stack.enter_context(ProgressBar(shard_sizes, self._bottleneck))
            for shard in shard_sizes.keys() - self.uncommitted:
                progress_bar.on_shard_skipped(shard)
            while not self.all_committed:
                if not self.actors or time.monotonic() - last_check >= CLUSTER_POLL_INTERVAL:
                    last_check = time.monotonic()
                    self._start_missing_actors()
                calls = {actor.commits: actor for actor in self.actors}
                for ready in self.ray.wait(list(calls), timeout=CLUSTER_POLL_INTERVAL)[0]:
                    if (committed := self._next_commit(calls[ready])) is not None:
                        count(committed)
            while self.uncommitted:  # commits that a lost actor did not report, or that are not visible here yet
                for shard in sorted(self.uncommitted):
                    count(shard)
                time.sleep(POLL_INTERVAL if self.uncommitted else 0)
            self.close()
            for target in targets:
                stack.enter_context(target.store.hold_leases(new_owner(), self.config.lease_seconds))
            finish_caches(targets, generation, plan, self.job_json["about"], time.perf_counter() - started)

    def close(self) -> None:
        """Kill the actors; the shards they are extracting are not committed."""
        for handle in (self.prepared_actor, *(actor.handle for actor in self.actors)):
            if handle is not None:
                self.ray.kill(handle)

    def _available_resources(self) -> tuple[bool, int, int]:
        """Return whether an actor uses a GPU, its CPU cores, and how many actors fit on the live nodes."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpu = self.config.encoder.device != "cpu" and any(node.get("GPU") for node in nodes)
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        cpus = (
            self.cpus_per_actor
            if self.cpus_per_actor is not None
            else 1
            if gpu
            else max(1, min(DEFAULT_ACTOR_CPUS, largest))
        )
        room = sum(int(min(node.get("GPU", 0) if gpu else largest, node.get("CPU", 0) // cpus)) for node in nodes)
        if room == 0:
            raise UserError(
                f"no node of the Ray cluster has {cpus} CPUs for an encoder: add nodes or lower --actor-cpus"
            )
        return gpu, cpus, room

    def _start_actor(self, gpu: bool, cpus: int) -> Any:
        remote = self.ray.remote(ExtractionActor).options(num_gpus=int(gpu), num_cpus=cpus)
        return remote.remote(self.config.model_dump(mode="json"), os.getcwd())

    def _start_missing_actors(self) -> None:
        """Start as many actors as the cluster has room for, at most one per uncommitted shard."""
        gpu, cpus, room = self._available_resources()
        workers = min(room, len(self.uncommitted)) or 1
        for index in set(range(workers)) - {actor.index for actor in self.actors}:
            handle, self.prepared_actor = self.prepared_actor or self._start_actor(gpu, cpus), None
            commits = handle.work.options(num_returns="streaming").remote(self.job_json, Worker(index, workers))
            self.actors.append(_Actor(handle, index, commits))

    def _next_commit(self, actor: _Actor) -> int | None:
        """Return the next shard that ``actor`` committed; None when it has finished or was lost."""
        try:
            shard: int = self._ray_get(next(actor.commits))
            self.consecutive_losses[actor.index] = 0
            return shard
        except StopIteration:
            self.all_committed = True
        except _ActorLostError as error:
            self.actors.remove(actor)
            self._handle_lost_actor(actor.handle, actor.index, error)
        return None

    def _ray_get(self, call: Any) -> Any:
        """Return the result of a call; re-raise the actor's UserError or WorkFailed.

        Raises:
            _ActorLostError: the actor was lost.
        """
        try:
            return self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (UserError, WorkFailed)) else error from None
        except self.ray.exceptions.RayError as error:
            raise _ActorLostError(" ".join(str(error).split())[:300]) from None

    def _handle_lost_actor(self, handle: Any, index: int, reason: _ActorLostError) -> None:
        self.ray.kill(handle)  # it may be alive but unreachable
        self.consecutive_losses[index] += 1
        if self.consecutive_losses[index] >= MAX_LOST_ACTORS:
            raise WorkFailed(
                f"worker {index} was lost {MAX_LOST_ACTORS} times without committing a shard (last reason: {reason}): "
                "check Ray's logs for crashes and out-of-memory errors; committed shards are kept"
            )
        print("note: a worker was lost; another one takes over", file=sys.stderr)

    def _bottleneck(self) -> str:
        return f"{len(self.actors)} workers, {self.stats.stage_times.bottleneck(1) or 'starting'}"
