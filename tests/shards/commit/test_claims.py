from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards.commit import claims
from shards.commit.claims import Claims, process_identity

HOLDER = """
import sys
from pathlib import Path
from shards.commit.claims import Claims
with Claims(sys.argv[1]) as mine:
    print([name for name in sys.argv[2:] if mine.acquire(Path(name))], flush=True)
    sys.stdin.read()
"""


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(claims.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "000001.claim"


def holder(owner: str, *paths: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, owner, *map(str, paths)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.stdin.close()
    process.stdout.close()
    assert process.wait(20) == 0


def foreign(path: Path, **more) -> None:
    """A claim of an owner on another machine."""
    path.write_text(json.dumps({"owner": "7-other", **process_identity(), "host": "elsewhere", **more}))


def look_foreign(path: Path) -> None:
    """Turn a claim into one of another machine, so that only its touches speak for it."""
    text = json.loads(path.read_text())
    with open(path, "r+") as file:
        file.write(json.dumps({**text, "host": "x" * len(text["host"])}))


def test_a_claim_is_taken_once_and_free_again_when_released(path):
    with Claims("a") as a, Claims("b") as b:
        assert a.acquire(path)
        assert not b.acquire(path)
        a.release(path)
        assert not path.exists()
        assert b.acquire(path)
    assert not path.exists()


def test_a_claim_that_was_swept_away_is_released_without_a_word(path):
    """Whoever finishes a cache removes the claims of its committed shards, those of live processes too."""
    with Claims("a") as a, Claims("b") as b:
        assert a.acquire(path)
        path.unlink()
        assert b.acquire(path)
        a.release(path)
        assert path.exists()
        path.unlink()
        b.release(path)


def test_two_processes_divide_claims_without_sharing_or_losing_one(tmp_path):
    paths = [tmp_path / f"{i:06d}.claim" for i in range(60)]
    both = [holder("a", *paths), holder("b", *reversed(paths))]
    got = [json.loads(process.stdout.readline().replace("'", '"')) for process in both]
    assert sorted(got[0] + got[1]) == sorted(map(str, paths))
    for process in both:
        end(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_a_claim_whose_owner_was_killed_on_this_machine_is_taken_over_at_once(path, reaped):
    process = holder("dead", path)
    process.stdout.readline()
    with Claims("me") as mine:
        assert not mine.acquire(path)
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait(20)
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a zombie
        assert path.exists()
        assert mine.acquire(path)
        assert json.loads(path.read_text())["owner"] == "me"
        assert list(path.parent.iterdir()) == [path]
    process.communicate()


def test_a_process_that_got_the_number_of_a_dead_owner_does_not_keep_its_claim(path):
    path.write_text(json.dumps({"owner": "old", **process_identity(), "started": "1"}))
    with Claims("me") as mine:
        assert mine.acquire(path)


def test_without_proc_a_running_owner_keeps_its_claim_and_an_ended_one_loses_it(path, monkeypatch):
    monkeypatch.setattr(claims, "_process_start_time", lambda pid: None)
    with Claims("a") as a, Claims("b") as b:
        assert a.acquire(path)
        assert not b.acquire(path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    path.write_text(json.dumps({"owner": "old", **process_identity(), "pid": ended.pid}))
    with Claims("b") as b:
        assert b.acquire(path)


def test_a_claim_from_elsewhere_is_taken_over_after_one_lease_without_a_sign_of_life(path, clock):
    foreign(path)
    with Claims("me", lease=60) as mine:
        assert not mine.acquire(path)
        clock.now += 59
        assert not mine.acquire(path)
        clock.now += 2
        assert mine.acquire(path)


def test_a_heartbeat_starts_the_lease_again(path, clock):
    foreign(path)
    with Claims("me", lease=60) as mine:
        for turn in range(5):
            assert not mine.acquire(path)
            clock.now += 45
            os.utime(path, ns=(turn, turn))
        assert not mine.acquire(path)


@pytest.mark.parametrize("minutes", [-2, 2, 60 * 24 * 365])
def test_a_clock_that_is_off_neither_keeps_a_dead_claim_nor_loses_a_live_one(path, clock, minutes):
    foreign(path)
    skewed = time.time() + 60 * minutes
    with Claims("me", lease=60) as mine:
        for beat in range(4):  # the owner lives: its touches carry its own wrong time
            os.utime(path, (skewed + beat, skewed + beat))
            assert not mine.acquire(path)
            clock.now += 50
        assert not mine.acquire(path)
        clock.now += 61
        assert mine.acquire(path)


def test_a_clock_that_jumps_a_day_forwards_and_backwards_loses_no_live_claim_and_keeps_no_dead_one(path, clock):
    foreign(path)
    with Claims("me", lease=60) as mine:
        for day in (0, 1, -1, 2, 0):
            os.utime(path, (time.time() + day * 86400, time.time() + day * 86400))
            assert not mine.acquire(path)
            clock.now += 59
        clock.now += 2
        assert mine.acquire(path)


WALL_CLOCK = {  # dates that are shown, and times that are compared with those of files
    "pipeline/encoders/lazy.py",
    "pipeline/extract/listing.py",
    "pipeline/extract/loop.py",
    "shards/labels/store.py",
    "shards/remote/mirror.py",
    "train/lms/hf/model.py",
    "train/runs/folder.py",
    "train/runs/trackers.py",
}


def test_durations_are_not_measured_with_the_wall_clock():
    root, clocks = Path(__file__).parents[3], re.compile(r"\btime\.(time|time_ns|strftime)\(|\bdatetime\.(now|today)\(")
    files = [path for room in ("shards", "pipeline", "train") for path in (root / room).rglob("*.py")]
    assert {str(path.relative_to(root)) for path in files if clocks.search(path.read_text())} == WALL_CLOCK


def test_the_owner_sends_heartbeats_automatically(path, clock):
    with Claims("a", lease=0.06) as a, Claims("b", lease=0.06) as b:
        assert a.acquire(path)
        look_foreign(path)
        for _ in range(4):
            before = path.stat().st_mtime_ns
            assert not b.acquire(path)
            pause = threading.Event()
            while path.stat().st_mtime_ns == before:
                pause.wait(0.005)
            clock.now += 1000  # far beyond the lease, and yet the claim was touched meanwhile
            assert not b.acquire(path)


def test_an_owner_that_was_taken_over_leaves_the_new_claim_alone(path, clock):
    with Claims("slow", lease=60) as slow, Claims("fast", lease=60) as fast:
        assert slow.acquire(path)
        foreign(path)  # the same file, so that it no longer counts as a live process of this machine
        assert not fast.acquire(path)
        clock.now += 61
        assert fast.acquire(path)
        slow.release(path)
        assert json.loads(path.read_text())["owner"] == "fast"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"host": 1}',
        "\xff",
        "[" * 4000,
        '{"host": "%s", "pid": "x"}',
        '{"host": "%s", "pid": 1e400}',
    ],
)
def test_a_garbled_claim_is_waited_for_and_then_taken_over(path, clock, text):
    path.write_bytes(text.replace("%s", str(process_identity()["host"])).encode("latin-1"))
    with Claims("me", lease=60) as mine:
        assert not mine.acquire(path)
        clock.now += 61
        assert mine.acquire(path)


def test_a_claim_that_appears_while_a_dead_one_is_removed_is_put_back(path, clock, monkeypatch):
    foreign(path)
    with Claims("me", lease=60) as mine:
        assert not mine.acquire(path)
        clock.now += 61
        real = os.rename

        def late(source, target):
            foreign(path, owner="9-fresh")
            real(source, target)

        monkeypatch.setattr(os, "rename", late)
        assert not mine.acquire(path)
        assert json.loads(path.read_text())["owner"] == "9-fresh"
        assert list(path.parent.iterdir()) == [path]


def test_a_disk_too_full_for_a_claim_leaves_none(path, monkeypatch):
    def full(fd, data):
        raise OSError(28, "No space left on device")

    with Claims("me") as mine:
        with monkeypatch.context() as broken:
            broken.setattr(claims, "write_all", full)
            with pytest.raises(OSError, match="No space"):
                mine.acquire(path)
        assert not path.exists()
        assert mine.acquire(path)


def test_a_failed_touch_does_not_end_the_signs_of_life(path, monkeypatch):
    tries: list[int] = []
    again = threading.Event()

    def stale(fd):
        tries.append(fd)
        if len(tries) == 3:
            again.set()
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "utime", stale)
    with Claims("me", lease=0.03) as mine:
        assert mine.acquire(path)
        assert again.wait(20)


def test_a_holder_answers_to_its_own_end_of_input(path):
    process = holder("a", path)
    assert select.select([process.stdout], [], [], 20)[0]
    assert process.stdout.readline() == f"['{path}']\n"
    end(process)
    assert not path.exists()
