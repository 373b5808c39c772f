from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.files import (
    TEMPORARY_INFIX,
    atomic_write,
    create_file,
    file_lock,
    file_sha256,
    lock_file,
    make_folder,
    open_file,
    read_json,
    scratch_folder,
    temporary_path,
    translate_os_errors,
    write_all,
)

COMMIT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_cache import make_cache
make_cache(Path({path!r}), n=4, shards=2)
"""
Event = tuple[str, str, str]  # call, path, other path


def strace_works() -> bool:
    strace = shutil.which("strace")
    return bool(strace) and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def traced_by_strace(path: Path) -> list[Event]:
    """The calls that a process makes while it writes a cache at ``path``, as the kernel saw them."""
    log = path.with_name("strace.log")
    program = COMMIT.format(tests=str(Path(__file__).parent.parent / "helpers"), path=str(path))
    calls = "trace=write,writev,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    command = ["strace", "-f", "-y", "-e", calls, "-s", "1", "-o", log, sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=60)
    events: list[Event] = []
    for line in log.read_text().splitlines():
        if not line.endswith("= -1") and " = -1 " not in line and str(path) in line:
            call = line.split("(")[0].split()[-1]
            names = re.findall(r'"([^"]*)"', line) if call.startswith(("rename", "link", "unlink")) else []
            names = names or re.findall(r"\(\d+<([^>]*)>", line)
            kind = "fsync" if "sync" in call else "write" if "write" in call else call[:4].rstrip("_")
            events.append((kind, *[*names, ""][:2]))
    return events


def recorded_by_a_layer(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The same without strace: the calls that go through the os module."""
    events: list[Event] = []

    def record(name: str, kind: str) -> None:
        real = getattr(os, name)

        def call(*args, **more):
            result = real(*args, **more)
            places = args[:2] if kind in ("rena", "link") else args[:1]
            names = [os.readlink(f"/proc/self/fd/{at}") if isinstance(at, int) else os.fspath(at) for at in places]
            if str(path) in names[0]:
                events.append((kind, *[*names, ""][:2]))
            return result

        monkeypatch.setattr(os, name, call)

    for name, kind in {"write": "write", "writev": "write", "pwrite": "write", "fsync": "fsync"}.items():
        record(name, kind)
    for name, kind in {"replace": "rena", "rename": "rena", "link": "link", "unlink": "unli"}.items():
        record(name, kind)
    from tiny_cache import make_cache

    make_cache(path, n=4, shards=2)
    return events


@pytest.mark.parametrize("tracer", ["strace", "layer"])
def test_every_name_appears_after_its_bytes_and_is_durable_before_the_next(tracer, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    if tracer == "strace":
        if not strace_works():
            pytest.skip("strace cannot trace here; the layer test shows the same")
        events = traced_by_strace(path)
    else:
        events = recorded_by_a_layer(path, monkeypatch)
    dirty: set[str] = set()  # files with bytes that a power loss would take
    unsynced: dict[str, list[str]] = {}  # folder -> names that appeared since its last fsync
    appeared = []
    for kind, name, other in events:
        folder = os.path.dirname(other or name)
        if kind == "write":
            dirty.add(name)
        elif kind == "fsync":
            dirty.discard(name)
            unsynced.pop(name, None)
        elif kind in ("rena", "link"):
            assert name not in dirty, f"{other} appears before its bytes are synced"
            assert not unsynced.get(folder), f"{other} appears before {unsynced[folder]} is durable"
            unsynced.setdefault(folder, []).append(other)
            appeared.append(Path(other).relative_to(path).as_posix())
    assert not any(unsynced.values())
    assert [name for name in appeared if ".new-" not in name] == [
        "plans/000.parquet",
        *(f"labels/{file.name}" for file in (path / "labels").glob("*.parquet")),
        "labels/LABELS.json",
        *(f"shards/{shard:06d}.{kind}" for shard in range(2) for kind in ("tar", "parquet", "json")),
        "manifests/000.parquet",
        "failures/000.parquet",
        "CACHE.json",
    ]


def test_a_new_folder_is_durable_in_the_one_that_holds_it(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old", "me")

    def fail(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            atomic_write(path, b"new", "me")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_short_write_is_carried_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    atomic_write(tmp_path / "file", b"0123456789", "me")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_file_limit_of_the_system_is_told_and_leaves_nothing(tmp_path):
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from shards.files import atomic_write, translate_os_errors\n"
        "from shards.errors import run_command\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def command(argv):\n"
        "    with translate_os_errors('writing', Path(argv[0])):\n"
        "        atomic_write(Path(argv[0]) / 'big', bytes(5000), 'me')\n"
        "sys.exit(run_command(command))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: writing failed in ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_storage_error_becomes_one_sentence_with_its_cure(number):
    with (
        pytest.raises(UserError, match=r"^committing failed in '/x': .*; .*rerun the same command"),
        translate_os_errors("committing", Path("/x")),
    ):
        raise OSError(number, "?")


def test_an_error_that_no_user_can_fix_keeps_its_traceback():
    with pytest.raises(OSError, match="bad descriptor"), translate_os_errors("committing", Path("/x")):
        raise OSError(errno.EBADF, "bad descriptor")


def test_a_temporary_name_names_its_owner_and_is_in_the_same_folder(tmp_path):
    path = temporary_path(tmp_path / "000001.tar", "12-ab")
    assert path.parent == tmp_path
    assert path.name.startswith(f"000001.tar{TEMPORARY_INFIX}12-ab-")


def test_the_hash_of_a_file_is_the_hash_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_write_all_takes_views(tmp_path):
    with open(tmp_path / "x", "wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(b"xyz")[1:])
    assert (tmp_path / "x").read_bytes() == b"yz"


HOLD = """
import sys
from pathlib import Path
from shards.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_lock_held_by_another_process_is_refused_at_once_and_free_when_that_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    with held_by_another_process(path) as holder:
        with file_lock(path, wait=False) as held:
            assert not held
        holder.kill()
        with file_lock(path) as held:
            assert held


def test_a_lock_file_that_was_unlinked_while_one_waited_for_it_is_made_and_locked_again(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(fd, operation):
        if not calls:
            path.unlink()  # as the last holder did, before it let go
        calls.append(operation)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with file_lock(path) as held, file_lock(path, wait=False) as again:
        assert (held, again) == (True, False)


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    path, (end, start) = tmp_path / "lock", os.pipe()
    with file_lock(path):
        child = os.fork()
        if not child:
            os.close(start)
            os.read(end, 1)
            os._exit(0)
    try:
        with file_lock(path, wait=False) as held:
            assert held
    finally:
        os.close(start)
        os.close(end)
        os.waitpid(child, 0)


def test_a_file_opened_with_a_lock_is_shared_with_readers_and_kept_from_writers(tmp_path):
    path = tmp_path / "data"
    path.touch()
    with open_file(path, lock=True), open_file(path, lock=True), file_lock(path, wait=False) as held:
        assert not held
    with file_lock(path, wait=False) as held:
        assert held


def test_a_lock_on_a_file_that_must_exist_makes_none(tmp_path):
    with pytest.raises(FileNotFoundError), file_lock(tmp_path / "absent", create=False):
        pass
    assert not list(tmp_path.iterdir())


def test_a_json_file_larger_than_any_of_ours_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(UserError, match="it is larger than 16 MiB"):
        read_json(path, missing_hint="", corrupt_hint="copy it again")


def test_temporary_names_are_new_each_time_and_a_link_is_never_written_through(tmp_path, monkeypatch):
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_bytes(b"mine")
    assert len({temporary_path(path, "1") for _ in range(100)}) == 100
    monkeypatch.setattr("shards.files.secrets.token_hex", lambda digits: "known")
    for link in (target, tmp_path / "absent"):
        temporary_path(path, "1").symlink_to(link)
        for write in (lambda: atomic_write(path, b"theirs", "1"), lambda: create_file(temporary_path(path, "1"))):
            with pytest.raises(FileExistsError):
                write()
        temporary_path(path, "1").unlink()
    path.symlink_to(target)
    atomic_write(path, b"new", "1")  # replaces the link itself
    assert (path.is_symlink(), path.read_bytes(), target.read_bytes()) == (False, b"new", b"mine")
    (tmp_path / "lock").symlink_to(tmp_path / "absent")
    with (
        pytest.raises(UserError, match="a symbolic link stands in the place of a file"),
        translate_os_errors("x", path),
    ):
        lock_file(tmp_path / "lock")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "lock", "target"]


def test_the_scratch_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_kept(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom shards.files import scratch_folder\n"
        "with scratch_folder('x-', Path(sys.argv[1])) as folder:\n    print(folder, flush=True)\n    sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, tmp_path]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    one = Path(first.stdout.readline().strip())
    with scratch_folder("x-", tmp_path) as two:
        assert one.is_dir()
        (one / "file").touch()
        first.kill()
        first.communicate()
        with scratch_folder("x-", tmp_path) as three:
            assert not one.parent.exists()
            assert two.is_dir()
            assert three.stat().st_mode & 0o077 == 0 or three.parent.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []
