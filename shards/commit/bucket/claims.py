"""Claims of processes that share nothing but a bucket: the claim stands where the commit will stand.

In: the names of objects that complete something (``shards/000042.json``, ``CACHE.json``). Out: each is written once by
whoever holds its claim. A claim is an object of that very name; committing replaces it by the record, on the condition
that it is still the claim that the holder wrote last. So one object decides, and a holder that stood still while
another took over can commit no more. Files that belong to the record are put on condition of what stood there before
the holder made sure of its claim: a late upload cannot fall on those of a successor.

The holder counts up a beat in its claim every third of a lease. A contender that sees the same beat for one lease of
its own monotonic clock replaces the claim; a holder that died on the same machine is replaced at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shards.commit.bucket.objects import Objects
from shards.commit.claims import LEASE, Holder, died_here, process_identity
from shards.errors import UserError
from shards.format.records import is_claim


class TakenOver(Exception):
    """Another process took the claim while this one stood still; what it was for is that one's business now."""


class FarClaims(Holder[str, str]):
    """The claims of one process on the objects below one URL: for each name the tag of the claim as written last."""

    def __init__(self, objects: Objects, owner: str, lease: float = LEASE) -> None:
        super().__init__(owner, lease)
        self.objects = objects
        self._beats = 0

    def take(self, name: str, void: Callable[[bytes], bool]) -> bool:
        """Claim ``name``; False while a live holder's claim stands there, or what is not ``void``."""
        found = self.objects.read(name)
        if found is not None and not (
            self._dead(name, found.data, found.tag) if is_claim(found.data) else void(found.data)
        ):
            return False
        tag = self.objects.put(name, self._claim(), found.tag if found else None)
        if tag is None:
            return False
        with self._lock:
            self._held[name] = tag
        self._seen.pop(name, None)
        return True

    def commit(self, name: str, data: bytes) -> None:
        """Replace the claim by what it was for; TakenOver when it is no longer ours."""
        with self._lock:
            if self.objects.put(name, data, self._tag(name)) is None:
                del self._held[name]
                raise TakenOver(name)
            del self._held[name]

    def put(self, name: str, data: bytes | Path, claim: str) -> None:
        """Write an object that belongs to what ``claim`` is for, over what a lost holder left there.

        Raises:
            TakenOver: the claim is no longer ours; the successor's object is untouched.
        """
        left: str | None = None
        while self.objects.put(name, data, left) is None:
            left = self.objects.tag(name)  # seen before the claim is made sure of: a successor writes after that
            self._beat(claim)

    def release(self, name: str) -> None:
        """Give a claim back that came to nothing; one that was taken over, or committed, is left as it stands.

        Where the store is away the claim stays, and runs out by itself: what went wrong before is to be told, not this.
        """
        with self._lock:
            tag = self._held.pop(name, None)
            if tag is not None:
                with suppress(UserError):
                    self.objects.delete(name, tag)

    def _tag(self, name: str) -> str:
        if name not in self._held:
            raise TakenOver(name)
        return self._held[name]

    def _beat(self, name: str) -> None:
        with self._lock:
            tag = self.objects.put(name, self._claim(), self._tag(name))
            if tag is None:
                del self._held[name]
                raise TakenOver(name)
            self._held[name] = tag

    def _refresh(self) -> None:
        for name in list(self._held):
            with suppress(TakenOver, UserError):  # a store that is away for a moment must not end the refreshing
                self._beat(name)

    def _claim(self) -> bytes:
        with self._lock:
            self._beats += 1
            return json.dumps({"claim": self.owner, "beat": self._beats, **process_identity()}).encode()

    def _dead(self, name: str, claim: bytes, tag: str) -> bool:
        """Whether a claim's holder died on this machine, or wrote nothing for one lease of our watching."""
        return died_here(claim) or self._silent(name, tag)
