"""Several processes of one machine in one extraction: the same bytes, one run, no orphans."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from extraction import only_cache, run, snapshot, start, words

from pipeline.encoders import load
from pipeline.extract.child import ReportCounter, ShardReport
from pipeline.extract.progress import ProgressBar
from pipeline.extract.resources import count_gpus, process_devices
from pipeline.extract.stats import ExtractionStats
from shards.commit.finalize import stray_files
from shards.errors import UserError
from shards.format.layout import Layout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, whisper) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run(words(root, corpus, whisper)) == 0
    return root


def jump_a_day() -> None:
    """Let the wall clock of this process jump a day forwards or backwards each time that it is read."""
    days, now, now_ns = itertools.cycle((0, 1, -1)), time.time, time.time_ns
    time.time = lambda: now() + 86_400 * next(days)
    time.time_ns = lambda: now_ns() + 86_400 * 10**9 * next(days)


@pytest.mark.parametrize("more", [[], pytest.param(["processes=2"], marks=pytest.mark.slow)])
def test_a_clock_that_jumps_a_day_changes_nothing(undisturbed, tmp_path, corpus, whisper, more):
    for _ in range(2):  # the second finds nothing to do
        assert run(words(tmp_path, corpus, whisper, *more), before=jump_a_day) == 0
        assert snapshot(tmp_path) == snapshot(undisturbed)


def children(pid: int) -> set[int]:
    """Return the running child processes of ``pid``."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(child) for child in file.read_text().split()}
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def claimants(root: Path) -> set[int]:
    """Return the processes that hold a shard below ``root``."""
    found = set()
    for claim in root.rglob("shards/*.claim"):
        with suppress(FileNotFoundError, ValueError):  # released, or half written
            found.add(json.loads(claim.read_text())["pid"])
    return found


def start_two(root: Path, corpus: Path, whisper: Path, log: Path) -> tuple[Any, int]:
    """Start an extraction with two processes; the first is stopped once the second holds a shard. Return both."""
    process = start(words(root, corpus, whisper, "processes=2", "lease_seconds=60"), log=log)
    wait_for(lambda: claimants(root))
    os.kill(process.pid, signal.SIGSTOP)
    (other,) = children(process.pid)
    wait_for(lambda: other in claimants(root))
    return process, other


def test_two_processes_write_the_same_cache_as_one_and_report_as_one_run(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "two", tmp_path / "log"
    process, _ = start_two(root, corpus, whisper, log)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert snapshot(root) == snapshot(undisturbed)
    assert "extracted 24 utterances" in log.read_text()
    assert "exited" not in log.read_text()


def test_a_killed_process_loses_only_its_shard_and_is_reported(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "one dies", tmp_path / "log"
    process, other = start_two(root, corpus, whisper, log)
    os.kill(other, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert snapshot(root) == snapshot(undisturbed)
    assert "note: the process on cpu exited on signal 9; its shard is extracted again" in log.read_text()
    assert list(stray_files(Layout(only_cache(root)))) == []


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_no_process_outlives_an_extraction_that_is_terminated(tmp_path, undisturbed, corpus, whisper, how):
    root = tmp_path / "ended"
    process = start(words(root, corpus, whisper, "processes=2"))
    started = wait_for(lambda: children(process.pid))
    wait_for(lambda: claimants(root))
    os.kill(process.pid, how)
    process.join(20)
    assert process.exitcode == (-how if how == signal.SIGKILL else 128 + how)
    wait_for(lambda: not any(runs(pid) for pid in started), 20)
    assert run(words(root, corpus, whisper)) == 0
    assert snapshot(root) == snapshot(undisturbed)


def test_reports_on_uncommitted_shards_of_a_lost_process_are_taken_back():
    stats = ExtractionStats()
    with ProgressBar({0: 3, 1: 3}, str) as progress:
        listener = ReportCounter(stats, progress)
        listener.add(ShardReport(0, 3, 30.0, [("a", "read", "gone")]))
        listener.add(ShardReport(1, 2, 20.0, [("b", "read", "gone")]))
        listener.add(ShardReport(0, committed=True))
        listener.discard_uncommitted()
    assert (stats.utterances, stats.audio_seconds, stats.failures) == (3, 30.0, [("a", "read", "gone")])


def test_each_device_of_a_machine_gets_one_process():
    assert process_devices("auto", None, 0) == ["auto"]
    assert process_devices("auto", None, 1) == ["auto"]
    assert process_devices("auto", None, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert process_devices("cuda", 2, 4) == ["cuda:0", "cuda:1"]
    assert process_devices("cuda:1", None, 4) == ["cuda:1"]
    assert process_devices("cpu", 3, 4) == ["cpu"] * 3
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        process_devices("auto", 3, 2)
    with pytest.raises(UserError, match=r"encoder\.device=cuda for"):
        process_devices("cuda:0", 2, 2)


def test_a_machine_without_gpu_devices_has_no_gpus_and_torch_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "DEVICES", tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    (tmp_path / "nvme0").touch()  # a disk
    assert count_gpus() == 0
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ImportError):
        count_gpus()
