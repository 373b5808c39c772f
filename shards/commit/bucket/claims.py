"""Claims of processes that share only a bucket. A claim is stored under the name of the object that it will become.

A claim covers an object that completes something (``shards/000042.json``, ``CACHE.json``), and only the holder of the
claim writes that object. Committing replaces the claim with the record, on the condition that the object is still the
claim that the holder wrote last. One object therefore decides, and a holder that was suspended while another process
took over cannot commit. The files of a record are written on the condition of the version seen before the holder last
confirmed its claim, so a late upload cannot overwrite the files of a successor.

The holder increments a counter in its claim every third of a lease. A contender that sees the same counter for one
lease, measured with its own monotonic clock, replaces the claim. A holder that died on the same machine is replaced at
once.

A claim that is not committed is released by replacing it with a marker, on the same condition, because there is no
conditional delete. A marker is never deleted: a plain delete could remove the claim or the record of another process.
The record later replaces the marker, so a complete cache contains none.
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
    """Another process took over the claim while this one was suspended, and is responsible for the object now."""


class RemoteClaims(LeaseHolder[str, Version]):
    """The claims of one process on objects below one URL. Stores the last written version of each claim."""

    def __init__(self, objects: Objects, owner: str, lease: float = LEASE) -> None:
        super().__init__(owner, lease)
        self.objects = objects
        self._num_heartbeats = 0

    def acquire(self, name: str, is_invalidated: Callable[[bytes], bool]) -> bool:
        """Claim ``name``; returns False if a live process holds it, or if a record that is not invalidated is there."""
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
        """Replace the claim with ``data``; ClaimLost if this process no longer holds it."""
        with self._lock:
            if self.objects.put(name, data, self._version(name)) is None:
                del self._held[name]
                raise ClaimLost(name)
            del self._held[name]

    def put(self, name: str, data: bytes | Path, claim: str) -> None:
        """Write an object that is covered by ``claim``, replacing one left by a previous holder.

        Raises:
            ClaimLost: this process no longer holds the claim. The successor's object is unchanged.
        """
        left: Version | None = None
        while self.objects.put(name, data, left) is None:
            left = self.objects.version(name)  # read before the claim is confirmed: a successor writes later
            self._heartbeat(claim)

    def release(self, name: str) -> None:
        """Release a claim that was not committed. A claim that was taken over or committed is left unchanged.

        If the store cannot be reached, the claim stays and expires. The error is suppressed, so that it does not hide
        an earlier one.
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
            with suppress(ClaimLost, UserError):  # a temporarily unavailable store must not stop the heartbeats
                self._heartbeat(name)

    def _claim(self) -> bytes:
        with self._lock:
            self._num_heartbeats += 1
            return json.dumps({"claim": self.owner, "beat": self._num_heartbeats, **process_identity()}).encode()

    def _is_free(self, name: str, found: StoredObject, is_invalidated: Callable[[bytes], bool]) -> bool:
        """Return whether the object may be replaced: invalidated, released, or claimed by a dead or expired holder."""
        if not is_claim(found.data):
            return is_invalidated(found.data)
        return is_released(found.data) or owner_is_dead(found.data) or self._is_expired(name, found.version)
