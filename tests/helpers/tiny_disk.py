"""Storage that fails: a small tmpfs, if mounting is permitted, and functions that make the writes of a process fail.

:class:`Disk` can be filled, grown and made read-only. The functions are for ``extraction.start(before=…)``: they give
one process a file-size limit, a full disk or no permissions.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """A tmpfs at ``path``; sizes in KiB (whole pages of 4)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Disk]:
    """Mount a tmpfs at ``path`` for the block; skip the test if mounting is not permitted."""
    path.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here ({done.stderr.strip()}); the other tests fail single writes")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def limit_file_size(size: int) -> None:
    """No file of this process may grow beyond ``size`` bytes: EFBIG (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fail_writes(error: int, room: int) -> None:
    """Let ``os.write`` and ``os.writev`` store ``room`` bytes in total, the last ones by a short write, then fail."""
    left = [room]
    write = os.write

    def store(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(error, os.strerror(error))
        part = data[: left[0]]
        left[0] -= len(part)
        return write(fd, part)

    def replace(join: Callable[[Any], bytes]) -> Callable[[int, Any], int]:
        return lambda fd, data: store(fd, join(data))

    os.write, os.writev = replace(bytes), replace(b"".join)  # type: ignore[assignment]


def drop_capabilities() -> None:
    """Drop root's privileges, so that file permissions apply to it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")
