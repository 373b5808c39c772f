"""Crash-safe file writes: temporary file, fsync, rename, fsync of the folder. Also file locks.

After a crash, a file is either complete or absent. The name of a temporary file contains the owner tag of its writer,
so that a cleanup can distinguish the files of live and dead writers.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.errors import UserError

TEMPORARY_INFIX = ".tmp-"
LOCK = "lock"  # in a scratch folder
MAX_JSON_BYTES = (
    16 << 20
)  # bytes; larger files are rejected, because parsed JSON takes up to 30 times the memory of its text


def temporary_path(path: Path, owner: str) -> Path:
    """Return a new, unpredictable name under which ``owner`` writes before renaming to ``path``."""
    return path.with_name(f"{path.name}{TEMPORARY_INFIX}{owner}-{secrets.token_hex(6)}")


def create_file(path: Path) -> int:
    """Create a file that does not exist; return a descriptor to read and write. Never follows a link at ``path``.

    Raises:
        FileExistsError: something is there, a link perhaps.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Call ``os.write`` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def atomic_write(path: Path, data: bytes | memoryview, owner: str) -> None:
    """Write ``data`` to ``path`` durably: a reader sees the old file or the new one, even after a power loss."""
    partial = temporary_path(path, owner)
    fd = create_file(partial)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        rename_durably(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish_file(partial: Path, path: Path, *, replace: bool = False) -> bool:
    """Sync a finished file and give it the name ``path`` durably.

    Returns:
        False if there was a file of that name, which is kept unless ``replace`` is set.
    """
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if replace:
        rename_durably(partial, path)
        return True
    fsync_folder(path.parent)
    try:
        os.link(partial, path)  # unlike a rename, a link cannot replace a file that another process just wrote
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
        fsync_folder(path.parent)


def rename_durably(partial: Path, path: Path) -> None:
    """Rename a file whose bytes are already synced, and sync its folder."""
    fsync_folder(path.parent)
    os.replace(partial, path)
    fsync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_file(path: Path, *, lock: bool = False) -> io.FileIO:
    """Open a regular file for reading. Raises OSError for pipes, which would block, and for devices, which have no end.

    Args:
        lock: first take a shared lock on the file. It lasts as long as the descriptor or a mapping created from it.
    """
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if lock:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def file_lock(path: Path, *, wait: bool = True, create: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on ``path`` inside the ``with`` block. The kernel releases it if the process dies.

    Yields True if the lock is held. The holder may unlink the file. Yields False if another process, thread or
    :func:`open_file` with ``lock`` holds it and ``wait`` is false.

    Raises:
        FileNotFoundError: ``create`` is false and the file does not exist.
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    fd = lock_file(path, wait=wait, create=create)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a fork has copied the descriptor
            os.close(fd)


def lock_file(path: Path, *, wait: bool = True, create: bool = True) -> int | None:
    """Like :func:`file_lock`, but return a descriptor that holds the lock until it is closed, or None for False."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the last holder unlinked the file: a lock on it protects nothing, so open the path again


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a private folder, removed at the end of the block; first remove those of processes that were killed.

    A kernel lock marks the folder of a living process.

    Args:
        prefix: how the name of the folder begins.
        parent: where it is created; ``None``: the temporary folder of the system.

    Raises:
        UserError: no temporary folder can be written, such as one on a full disk.
    """
    try:
        parent = parent or Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        reason = " ".join(str(error.strerror).split())
        raise UserError(f"there is no temporary folder to write to ({reason}): free space, or set TMPDIR") from None
    for folder in parent.glob(f"{prefix}*"):
        _remove_abandoned(folder)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with file_lock(path / LOCK):
            (path / "files").mkdir()
            yield path / "files"
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        if folder.lstat().st_uid == os.geteuid():
            with file_lock(folder / LOCK, wait=False, create=False) as held:
                if held:
                    shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file (64 hex digits)."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, missing_hint: str, corrupt_hint: str) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        UserError: the file does not exist (the message ends with ``missing_hint``), or it is not a JSON object (the
            message ends with ``corrupt_hint``).
    """
    try:
        with io.BufferedReader(open_file(path)) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        tree = json.loads(data.decode())
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: {missing_hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): {corrupt_hint}") from None
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' does not contain a JSON object: {corrupt_hint}")
    return tree


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def translate_os_errors(action: str, path: Path) -> Iterator[None]:
    """Raise the storage errors that a user can fix as a UserError of one sentence."""
    try:
        yield
    except OSError as error:
        fix = _REASONS.get(error.errno or 0)
        if fix is None:
            raise
        reason, remedy = fix
        raise UserError(f"{action} failed in '{path}': {reason}; {remedy}") from error


_AGAIN = "then rerun the same command; committed data is kept"
_REASONS = {
    errno.ENOSPC: ("the disk is full", f"free space, {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free space or raise the quota, {_AGAIN}"),
    errno.EFBIG: ("the file is larger than allowed here", f"use a smaller shard_mb, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", f"remount it writable or choose another root, {_AGAIN}"),
    errno.EACCES: ("permission denied", f"make the folder writable or choose another root, {_AGAIN}"),
    errno.EPERM: ("operation not permitted", f"make the folder writable or choose another root, {_AGAIN}"),
    errno.EIO: ("the device reports an input/output error", f"check the disk, {_AGAIN}"),
    errno.ESTALE: ("the network file handle went stale", f"remount the share, {_AGAIN}"),
    errno.ENOLCK: ("the file system has no locks", "mount it with locks, or choose another root"),
    errno.ELOOP: ("a symbolic link stands in the place of a file", f"remove the link, {_AGAIN}"),
    errno.ENOTDIR: ("a component of the path is a file", "choose another root"),
}
