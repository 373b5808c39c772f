"""Writing so that a power loss cannot lie: temporary file, fsync, rename, fsync of the folder.

In: bytes and a path. Out: the whole file under its name, or nothing under its name. Every temporary file carries its
writer's owner tag, so that whoever cleans up can tell a live writer's file from a dead one's.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import UserError

TEMPORARY = ".tmp-"


def temporary(path: Path, owner: str) -> Path:
    """The name that ``owner`` writes under before the rename to ``path``."""
    return path.with_name(f"{path.name}{TEMPORARY}{owner}")


def write_all(fd: int, data: bytes | memoryview) -> None:
    """``os.write`` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def atomic_write(path: Path, data: bytes, owner: str) -> None:
    """Put ``data`` under ``path`` durably: a reader sees the old file or the new one, also after a power loss."""
    partial = temporary(path, owner)
    try:
        _write_synced(partial, data)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes, owner: str) -> bool:
    """Like :func:`atomic_write`, but a file that stands is left as it is; False when there was one."""
    partial = temporary(path, owner)
    try:
        _write_synced(partial, data)
        fsync_folder(path.parent)
        os.link(partial, path)  # unlike a rename, a link cannot replace what another process just wrote
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
        fsync_folder(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, path: Path) -> None:
    """Rename a file whose bytes are already synced, and sync the folder that holds the name."""
    fsync_folder(path.parent)
    os.replace(partial, path)
    fsync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durable in the one that holds it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_file(path: Path) -> io.FileIO:
    """Open for reading what must be a regular file: a pipe would wait for ever, a device has no end. Else OSError."""
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def file_sha256(path: Path) -> str:
    """64 hex digits: sha256 of the file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, absent: str, damaged: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: there is no file (the sentence ends with ``absent``), or it holds no JSON object (``damaged``).
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no '{path}': {absent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): {damaged}") from None
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' holds no JSON object: {damaged}")
    return tree


@contextmanager
def told(doing: str, where: Path) -> Iterator[None]:
    """Turn the storage errors that a user can mend into one sentence."""
    try:
        yield
    except OSError as error:
        mend = _MENDS.get(error.errno or 0)
        if mend is None:
            raise
        reason, cure = mend
        raise UserError(f"{doing} failed in '{where}': {reason}; {cure}") from error


_AGAIN = "then run the same command again: what is committed is kept"
_MENDS = {
    errno.ENOSPC: ("the disk is full", f"free space, {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free space or raise the quota, {_AGAIN}"),
    errno.EFBIG: ("the file is larger than allowed here", f"use a smaller shard_mb, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", f"remount it writable or choose another root, {_AGAIN}"),
    errno.EACCES: ("permission denied", f"make the folder writable or choose another root, {_AGAIN}"),
    errno.EPERM: ("operation not permitted", f"make the folder writable or choose another root, {_AGAIN}"),
    errno.EIO: ("the device reports an input/output error", f"check the disk, {_AGAIN}"),
    errno.ESTALE: ("the network file handle went stale", f"remount the share, {_AGAIN}"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another root"),
}
