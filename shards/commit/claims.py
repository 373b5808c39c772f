"""Claims on shards that survive crashes and do not depend on synchronized clocks.

:class:`Claims` creates claim files. The holder touches its file every third of the lease. A contender that sees the
file untouched for one lease, measured with its own monotonic clock, takes it over. A dead holder on the same machine is
detected at once. Claims only avoid duplicate work: two owners of one shard write the same bytes under different
temporary names, and the commit is a rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from shards.files import temporary_path, write_all

LEASE = 60.0  # seconds
MAX_CLAIM = 4096  # bytes


def process_identity() -> dict[str, str | int]:
    """Return an identity of this process that can later be checked for whether the process still runs."""
    return {"host": _host(), "pid": os.getpid(), "started": _process_start_time(os.getpid()) or ""}


def _host() -> str:
    """Return machine, boot and pid namespace. Pids are comparable only if all three are equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _process_start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot, which tells reused pids apart; None if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]  # a zombie has ended, but its parent has not reaped it
    except (OSError, IndexError, ValueError):
        return None


def new_owner() -> str:
    """Return a unique owner tag for the files of this process, short and safe in a file name."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"


Name = TypeVar("Name")
Held = TypeVar("Held")


class LeaseHolder(ABC, Generic[Name, Held]):
    """Base class for the claims of one process. A thread sends heartbeats; leaving the block releases the claims."""

    def __init__(self, owner: str, lease: float = LEASE) -> None:
        self.owner, self.lease = owner, lease
        self._held: dict[Name, Held] = {}
        self._last_heartbeats: dict[Name, tuple[object, float]] = {}  # of other holders: heartbeat, when first seen
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._heartbeat_loop, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        for name in list(self._held):
            self.release(name)

    @abstractmethod
    def release(self, name: Name) -> None:
        """Release a claim. A claim that was taken over is left to its new owner."""

    @abstractmethod
    def _heartbeat_all(self) -> None:
        """Send a heartbeat for every held claim."""

    def _heartbeat_loop(self) -> None:
        while not self._stop.wait(self.lease / 3):
            self._heartbeat_all()

    def _is_expired(self, name: Name, heartbeat: object) -> bool:
        """Return whether another holder's claim has shown the same ``heartbeat`` for one lease."""
        now, before = time.monotonic(), self._last_heartbeats.get(name)
        if before is None or before[0] != heartbeat:
            self._last_heartbeats[name] = (heartbeat, now)
            return False
        return now - before[1] >= self.lease


class Claims(LeaseHolder[Path, int]):
    """The claims of one process, stored as files."""

    def acquire(self, path: Path) -> bool:
        """Claim ``path``; returns False while another live owner holds it."""
        if self._create(path):
            return True
        stale = self._stale_claim(path)
        return stale is not None and self._remove_stale(path, stale) and self._create(path)

    def release(self, path: Path) -> None:
        with self._lock:
            fd = self._held.pop(path, None)
        if fd is None:
            return
        try:
            if path.stat().st_ino == os.fstat(fd).st_ino:
                path.unlink()
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)

    def _create(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            write_all(fd, json.dumps({"owner": self.owner, **process_identity()}).encode())
        except BaseException:  # a full disk must not leave a claim without a holder
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._held[path] = fd
        self._last_heartbeats.pop(path, None)
        return True

    def _heartbeat_all(self) -> None:
        with self._lock:
            for fd in self._held.values():
                with contextlib.suppress(OSError):  # a temporarily unavailable share must not stop the heartbeats
                    os.utime(fd)  # by descriptor: does not touch the file of a new owner

    def _stale_claim(self, path: Path) -> bytes | None:
        """Return the claim's text if its holder died on this machine, or has not touched it for one lease."""
        try:
            with open(path, "rb") as file:  # open before stat: NFS refreshes file times only on open
                state, text = os.fstat(file.fileno()), file.read(MAX_CLAIM)
        except FileNotFoundError:
            return None  # just released: the next call creates it
        if owner_is_dead(text):
            return text
        return text if self._is_expired(path, (state.st_ino, state.st_mtime_ns)) else None

    def _remove_stale(self, path: Path, stale: bytes) -> bool:
        """Move the stale claim aside, or put it back if it was replaced by a fresh claim in the meantime."""
        aside = temporary_path(path, self.owner)  # a name that is cleaned up if this process dies here
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return True
        try:
            if aside.read_bytes() == stale:  # the owner tag in it is unique to a process
                return True
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            return False
        except FileNotFoundError:  # the new owner of the shard has removed stray files
            return False
        finally:
            aside.unlink(missing_ok=True)


def owner_is_dead(text: bytes) -> bool:
    """Return whether the claim names a process of this machine that no longer runs."""
    try:
        held = json.loads(text)
        if held["host"] != _host():
            return False
        pid, started = int(held["pid"]), _process_start_time(int(held["pid"]))
        if started is not None and held["started"]:
            return bool(started != held["started"])
        os.kill(pid, 0)  # if /proc is absent or hides the processes of other users
        return False
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError):
        return False
