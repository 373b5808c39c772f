"""Claims of processes that share nothing but a bucket: the claim stands where the commit will stand.

In: the names of objects that complete something (``shards/000042.json``, ``CACHE.json``). Out: each is written once by
whoever holds its claim. A claim is an object of that very name; committing replaces it by the record, on the condition
that it is still the claim that the holder wrote last. So one object decides, and a holder that stood still while
another took over can commit no more. Files that belong to the record are put on condition of what stood there before
the holder made sure of its claim: a late upload cannot fall on those of a successor.

The holder counts up a beat in its claim every third of a lease. A contender that sees the same beat for one lease of
its own monotonic clock replaces the claim; a holder that died on the same machine is replaced at once.

A claim that comes to nothing is released by a marker in its place, on the same condition, for there is no conditional
delete. A marker is never deleted: a plain delete could fall on the claim, or the record, of whoever came in between.
It stands where a record will stand, so a complete cache holds none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shards.commit.bucket.objects import Objects, StoredObject, Version
from shards.commit.claims import LEASE, LeaseHolder, owner_is_dead, process_identity
from shards.errors import UserError
from shards.format.records import RELEASED, is_claim, is_released


class ClaimLost(Exception):
    """Another process took the claim while this one stood still; what it was for is that one's business now."""


class RemoteClaims(LeaseHolder[str, Version]):
    """The claims of one process on the objects below one URL: for each name the version of the claim written last."""

    def __init__(self, objects: Objects, owner: str, lease: float = LEASE) -> None:
        super().__init__(owner, lease)
        self.objects = objects
        self._num_heartbeats = 0

    def acquire(self, name: str, is_invalidated: Callable[[bytes], bool]) -> bool:
        """Claim ``name``; False while a live holder's claim stands there, or what is not ``void``."""
        found = self.objects.read(name)
        if found is not None and not self._is_free(name, found, is_invalidated):
            return False
        version = self.objects.put(name, self._claim(), found.version if found else None)
        if version is None:
            return False
        with self._lock:
            self._held[name] = version
        self._last_heartbeats.pop(name, None)
        return True

    def commit(self, name: str, data: bytes) -> None:
        """Replace the claim by what it was for; ClaimLost when it is no longer ours."""
        with self._lock:
            if self.objects.put(name, data, self._version(name)) is None:
                del self._held[name]
                raise ClaimLost(name)
            del self._held[name]

    def put(self, name: str, data: bytes | Path, claim: str) -> None:
        """Write an object that belongs to what ``claim`` is for, over what a lost holder left there.

        Raises:
            ClaimLost: the claim is no longer ours; the successor's object is untouched.
        """
        left: Version | None = None
        while self.objects.put(name, data, left) is None:
            left = self.objects.version(name)  # seen before the claim is made sure of: a successor writes after that
            self._heartbeat(claim)

    def release(self, name: str) -> None:
        """Give a claim back that came to nothing; one that was taken over, or committed, is left as it stands.

        Where the store is away the claim stays, and runs out by itself: what went wrong before is to be told, not this.
        """
        with self._lock:
            version = self._held.pop(name, None)
            if version is not None:
                with suppress(UserError):
                    self.objects.put(name, RELEASED, version)

    def _version(self, name: str) -> Version:
        if name not in self._held:
            raise ClaimLost(name)
        return self._held[name]

    def _heartbeat(self, name: str) -> None:
        with self._lock:
            version = self.objects.put(name, self._claim(), self._version(name))
            if version is None:
                del self._held[name]
                raise ClaimLost(name)
            self._held[name] = version

    def _heartbeat_all(self) -> None:
        for name in list(self._held):
            with suppress(ClaimLost, UserError):  # a store that is away for a moment must not end the refreshing
                self._heartbeat(name)

    def _claim(self) -> bytes:
        with self._lock:
            self._num_heartbeats += 1
            return json.dumps({"claim": self.owner, "beat": self._num_heartbeats, **process_identity()}).encode()

    def _is_free(self, name: str, found: StoredObject, is_invalidated: Callable[[bytes], bool]) -> bool:
        """Whether what stands there may be replaced: void, released, or claimed by a holder that is dead or silent."""
        if not is_claim(found.data):
            return is_invalidated(found.data)
        return is_released(found.data) or owner_is_dead(found.data) or self._is_expired(name, found.version)
