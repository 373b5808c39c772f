"""Who of a Ray cluster's actors makes which shard, until none is left.

In: a connected ``ray`` and a configuration. Out: every shard committed by some actor, the caches merged, and the counts
of all as one :class:`Tally`. Every call to an actor may end with the actor's loss; then its shard goes back to the
queue and another actor is started where the cluster has room.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.actor import Extractor, Outcome, Ready, Trouble
from pipeline.config import ExtractConfig
from pipeline.extract.finish import POLL
from pipeline.extract.progress import Progress
from pipeline.extract.stats import Tally, check_failures
from pipeline.extract.summary import Facts
from shards.errors import UserError, WorkFailed

TICK = 1.0  # seconds between two looks at progress and at what the cluster has
DEFAULT_CPUS = 4  # cores of an actor that computes on the CPU
MOST_LOSSES = 3  # workers that one shard, or loading the encoder, may lose before the run is stopped


@dataclass
class _Actor:
    """One actor: its handle, the call that is under way, and what of it the progress line has counted."""

    handle: Any
    call: Any
    shard: int | None = None
    loaded: bool = False
    counted: tuple[int, float] = (0, 0.0)
    busiest: str = ""
    pulse: Any = None


@dataclass
class Driver:
    """Keeps the actors of one run busy. ``ray`` is the module, connected; ``cpus`` what an actor reserves."""

    ray: Any
    config: ExtractConfig
    cpus: int | None
    flags: dict[str, bool]
    tally: Tally = field(default_factory=Tally)
    facts: Facts | None = None
    redo: list[int] = field(default_factory=list)
    actors: list[_Actor] = field(default_factory=list)
    todo: deque[int] = field(default_factory=deque)
    held: dict[int, float] = field(default_factory=dict)  # shard that somebody else makes -> when to ask again
    losses: Counter[int | None] = field(default_factory=Counter)
    encode_seconds: float = 0.0

    def first(self) -> Facts:
        """What the first actor that has its encoder found; what is to be made again is for one alone to find."""
        while self.facts is None:
            self._hire(most=1 if any(self.flags.values()) else sys.maxsize)
            done, _ = self.ray.wait([actor.call for actor in self.actors], timeout=TICK)
            for actor in [actor for actor in self.actors if actor.call in done]:
                self._loaded(actor)
        self.todo.extend(self.facts.todo)
        return self.facts

    def run(self) -> None:
        """Hand out shards until all are committed, then have the caches finished."""
        assert self.facts is not None
        started = time.perf_counter()
        with Progress(dict(enumerate(self.facts.sizes)), self._busiest) as progress:
            for shard in set(range(len(self.facts.sizes))) - set(self.todo):
                progress.found(shard)
            while self.todo or self.held or any(actor.shard is not None for actor in self.actors):
                self._hire(most=len(self.todo) + len(self.held) + sum(a.shard is not None for a in self.actors))
                self._hand_out()
                self._hear(progress)
            self._finish(started)
        self.tally.stages.seconds["encode"] = self.encode_seconds / max(1, len(self.actors))

    def dismiss(self) -> None:
        """End the actors: what they have in flight is not committed."""
        for actor in self.actors:
            self.ray.kill(actor.handle)

    def _hire(self, most: int) -> None:
        """Start actors where the cluster has room for more, ``most`` in all."""
        gpu, cpus, room = self._room()
        if room == 0:
            raise UserError(
                f"no node of the Ray cluster has {cpus} CPUs for an encoder: start nodes, or set --actor-cpus"
            )
        for _ in range(min(room, most) - len(self.actors)):
            remote = self.ray.remote(Extractor).options(num_gpus=int(gpu), num_cpus=cpus, max_concurrency=2)
            handle = remote.remote(self.config.model_dump(mode="json"), os.getcwd())
            flags = self.flags if self.facts is None else dict.fromkeys(self.flags, False)
            self.actors.append(_Actor(handle, handle.ready.remote(**flags, redo=self.redo)))

    def _room(self) -> tuple[bool, int, int]:
        """Whether an actor takes a GPU, its cores, and how many such actors the nodes that live can hold."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpu = self.config.encoder.device != "cpu" and any(node.get("GPU") for node in nodes)
        if gpu:
            cpus = 1 if self.cpus is None else self.cpus
            return gpu, cpus, sum(int(min(node.get("GPU", 0), node.get("CPU", 0) // cpus)) for node in nodes)
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        cpus = self.cpus if self.cpus is not None else max(1, min(DEFAULT_CPUS, largest))
        return gpu, cpus, sum(int(node.get("CPU", 0) // cpus) for node in nodes)

    def _hand_out(self) -> None:
        now = time.monotonic()
        for shard in [shard for shard, when in self.held.items() if when <= now]:
            del self.held[shard]
            self.todo.append(shard)
        for actor in self.actors:
            if actor.loaded and actor.call is None and self.todo:
                actor.shard, actor.counted = self.todo.popleft(), (0, 0.0)
                actor.call = actor.handle.extract.remote(actor.shard)

    def _hear(self, progress: Progress) -> None:
        """Wait for something to end, at most a tick; then ask how far the others are."""
        by_call = {actor.call: actor for actor in self.actors if actor.call is not None}
        if not by_call:
            time.sleep(POLL)  # somebody else makes all that is left
            return
        done, _ = self.ray.wait(list(by_call), num_returns=1, timeout=TICK)
        for call in done:
            if by_call[call].loaded:
                self._ended(by_call[call], progress)
            else:
                self._loaded(by_call[call])
        for actor in self.actors:
            self._feel(actor, progress)

    def _feel(self, actor: _Actor, progress: Progress) -> None:
        """Take the pulse of a shard in flight, without waiting for it."""
        if actor.shard is None:
            actor.pulse = None
            return
        if actor.pulse is not None and self.ray.wait([actor.pulse], timeout=0)[0]:
            try:
                shard, utterances, seconds, actor.busiest = self.ray.get(actor.pulse)
            except self.ray.exceptions.RayActorError:
                return  # the call that is under way ends likewise, and tells
            if shard == actor.shard:
                self._count(actor, utterances, seconds, progress)
            actor.pulse = None
        if actor.pulse is None:
            actor.pulse = actor.handle.pulse.remote()

    def _count(self, actor: _Actor, utterances: int, seconds: float, progress: Progress) -> None:
        before, actor.counted = actor.counted, (utterances, seconds)
        progress.step(utterances - before[0], seconds - before[1])

    def _result(self, actor: _Actor) -> Any:
        """What the call gave, None when the actor is lost: it is struck off, its shard is to be made again."""
        call, actor.call = actor.call, None
        try:
            found = self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            self._lose(actor, error)
            return None
        if isinstance(found, Trouble):
            raise found.again()
        return found

    def _lose(self, actor: _Actor, error: Exception) -> None:
        self.actors.remove(actor)
        self.ray.kill(actor.handle)  # if it only cannot be reached
        self.losses[actor.shard] += 1
        what = "while it loaded the encoder" if actor.shard is None else f"in shard {actor.shard:06d}"
        if self.losses[actor.shard] >= MOST_LOSSES:
            reason = " ".join(str(error).split())[:300]
            raise WorkFailed(
                f"{MOST_LOSSES} workers were lost {what} (the last: {reason}): look into Ray's logs for memory and "
                "crashes; what is committed stays"
            )
        print(f"note: a worker was lost {what}, another one takes over", file=sys.stderr)
        if actor.shard is not None:
            self.todo.appendleft(actor.shard)

    def _loaded(self, actor: _Actor) -> None:
        found = self._result(actor)
        if not isinstance(found, Ready):
            return
        actor.loaded = True
        if self.facts is None:
            self.facts, self.redo = found.facts, found.redo
            self.tally.failures += found.failures
        elif found.facts.identity != self.facts.identity:
            raise UserError(
                f"two nodes of the cluster would make different caches ({found.facts.caches[0]} in "
                f"{found.facts.dtype} on {found.facts.device}, and {self.facts.caches[0]} in {self.facts.dtype} on "
                f"{self.facts.device}): set encoder.dtype and encoder.device, and keep the corpus as it is meanwhile"
            )

    def _ended(self, actor: _Actor, progress: Progress) -> None:
        """A call for a shard came to its end, one way or another."""
        assert actor.shard is not None
        assert self.facts is not None
        shard = actor.shard
        found = self._result(actor)
        if not isinstance(found, Outcome):
            self._count(actor, 0, 0.0, progress)
            return
        actor.shard = None
        made = found.state == "made"
        self._count(actor, made * found.utterances, made * found.audio_seconds, progress)
        if made:
            progress.made(shard)
        elif found.state == "found":
            progress.found(shard)
        else:
            self.held[shard] = time.monotonic() + POLL
        self.tally.utterances += found.utterances
        self.tally.audio_seconds += found.audio_seconds
        self.tally.failures += found.failures
        self.encode_seconds += found.encode_seconds
        check_failures(self.tally, self.config.max_failures, self.facts.utterances)

    def _finish(self, started: float) -> None:
        """Have the caches merged by any actor that lives until it is done."""
        while True:
            self._hire(most=1)
            actor = next((actor for actor in self.actors if actor.loaded), self.actors[0])
            if not actor.loaded:
                self._loaded(actor)
                continue
            actor.call = actor.handle.finish.remote(time.perf_counter() - started)
            self._result(actor)
            if actor in self.actors:
                return

    def _busiest(self) -> str:
        loaded = [actor for actor in self.actors if actor.loaded]
        return f"{len(loaded)} workers, {next((a.busiest for a in loaded if a.busiest), 'starting')}"
