"""Storage that gives out: a small tmpfs where root may mount one, and, anywhere, a process whose writes fail.

In: a folder, or the process itself. Out: :class:`Disk` to fill, grow and make read-only; functions for
``extraction.start(before=…)`` that bring a file-size limit, a full disk or lost permissions into one process.
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
    """Mount one at ``path`` for the block; skips the test where mounting is not permitted."""
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
    """``os.write`` and ``os.writev`` store ``room`` bytes in all, the last of them by a short write, then fail."""
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
    """Root without privileges: permissions hold for it as for anybody else."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")
