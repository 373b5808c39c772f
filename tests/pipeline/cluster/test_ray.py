"""The Ray engine: its actor in this process, and real clusters of two nodes of which one is killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from extraction import only_cache, run, snapshot, words, write_corpus

from pipeline.__main__ import command
from pipeline.cluster.engine import ExtractionActor
from pipeline.config import ExtractConfig
from pipeline.extract.resources import Worker
from shards.commit.finalize import is_clean
from shards.config.base import load_config
from shards.errors import UserError, run_command
from shards.format.layout import Layout

SECONDS = 500


CLIPS = 150


@pytest.fixture(scope="module")
def world(corpus, whisper) -> tuple[Path, Path]:
    return corpus, whisper


@pytest.fixture(scope="module")
def large(tmp_path_factory, whisper) -> tuple[Path, Path]:
    """Clips that keep two nodes busy for some seconds, and the tiny Whisper."""
    folder = tmp_path_factory.mktemp("large")
    write_corpus(folder, CLIPS, seconds=0.1)
    return folder, whisper


def extract_locally(root: Path, world: tuple[Path, Path]) -> Path:
    """Extract with one local process; return the root."""
    assert run(words(root, *world)) == 0
    return root


def settings(root: Path, world: tuple[Path, Path], *more: str) -> dict[str, Any]:
    return load_config(ExtractConfig, None, [*words(root, *world)[1:], *more]).model_dump(mode="json")


def test_actors_extract_each_shard_once_and_exchange_plain_values(tmp_path, world):
    root = tmp_path / "actors"
    first, second = (ExtractionActor(settings(root, world), str(tmp_path)) for _ in range(2))
    _, summary, job_json = pickle.loads(pickle.dumps(first.prepare(False, False, False)))
    assert (summary.utterances, len(summary.shard_sizes), summary.todo) == (
        24,
        len(summary.todo),
        list(range(len(summary.shard_sizes))),
    )
    job_json = json.loads(json.dumps(job_json))
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(list, each.work(job_json, Worker(i, 2))) for i, each in enumerate((first, second))]
    assert sorted(shard for call in calls for shard in call.result()) == summary.todo
    assert run(words(root, *world)) == 0  # like the driver: only the merge is left
    assert snapshot(root) == snapshot(extract_locally(tmp_path / "alone", world))


def test_an_actor_that_joins_late_re_extracts_only_the_remaining_invalidated_shards(tmp_path, world):
    root = extract_locally(tmp_path / "root", world)
    before = snapshot(root)
    layout = Layout(only_cache(root))
    for shard in (0, 2):
        data = bytearray(layout.tar(shard).read_bytes())
        data[700] ^= 1
        layout.tar(shard).write_bytes(data)
    first, late = (ExtractionActor(settings(root, world), str(tmp_path)) for _ in range(2))
    _, summary, job_json = first.prepare(verify=True, retry_failed=False, rehash=False)
    assert summary.todo == [0, 2]
    assert first._job is not None
    first._job.todo = [0]
    assert list(first.work(job_json, Worker())) == [0]
    assert list(late.work(job_json, Worker())) == [2]
    assert run(words(root, *world)) == 0
    assert snapshot(root) == before


def test_an_actor_whose_encoder_computes_other_features_refuses_to_join(tmp_path, world):
    first, other = (ExtractionActor(settings(tmp_path, world), str(tmp_path)) for _ in range(2))
    _, _, job_json = first.prepare(False, False, False)
    ((layer, location, spec),) = job_json["targets"]
    job_json["targets"] = [(layer, location, {**spec, "dtype": "bfloat16"})]
    with pytest.raises(UserError, match=r"other features than .*dtype: bfloat16, not float32"):
        list(other.work(job_json, Worker()))


def test_without_ray_the_error_names_the_package_to_install(tmp_path, world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_command(command, [*words(tmp_path, *world), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == (
        "error: --engine ray needs the Python package ray, which is not installed: "
        "run `python -m pip install 'earshard[ray]'`\n"
    )
    assert run_command(command, [*words(tmp_path, *world), "--engine", "ray", "--num-workers", "2"]) == 2
    assert "--num-workers applies only to --engine local" in capsys.readouterr().err


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of two raylets with one CPU each; yields the cluster and its second node."""
    utilities = pytest.importorskip("ray.cluster_utils")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths are limited in length
    Path("/tmp/ray").mkdir(exist_ok=True)  # Ray writes the address here but does not create the folder
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = utilities.Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": folder}
    )
    try:
        yield cluster, cluster.add_node(**node)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def driver(argv: list[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        command = [sys.executable, "-m", "pipeline", *argv, "--engine", "ray", "--actor-cpus", "1"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(command, stdout=out, stderr=out, env={**environment, **env})


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def claimants(root: Path) -> set[int]:
    """Return the ids of the processes that hold claims on shards."""
    found = set()
    for claim in root.rglob("shards/*.claim"):
        try:
            found.add(int(json.loads(claim.read_bytes())["pid"]))
        except (FileNotFoundError, ValueError):  # just released, or just being written
            continue
    return found


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_killed_node_loses_only_its_shard(tmp_path, large):
    root, log = tmp_path / "cluster", tmp_path / "log"
    with two_nodes() as (cluster, doomed):
        raylet = doomed.all_processes["raylet"][0].process.pid
        process = driver(words(root, *large), log, RAY_ADDRESS=cluster.address)

        def in_the_middle() -> bool:
            return any(root.rglob("shards/*.json")) and any(parent(pid) == raylet for pid in claimants(root))

        wait_for(in_the_middle, process, log)
        victims = [pid for pid in claimants(root) if parent(pid) == raylet]
        assert victims
        os.kill(raylet, signal.SIGKILL)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(SECONDS) == 0, log.read_text()
    output = log.read_text()  # names the loss only if Ray detects it before the other worker is done
    assert snapshot(root) == snapshot(extract_locally(tmp_path / "alone", large))
    assert is_clean(Layout(only_cache(root)))
    (line,) = [line for line in output.splitlines() if line.startswith("extracted ")]
    assert line.split()[1] == str(CLIPS)


@pytest.mark.slow
def test_a_killed_driver_can_be_restarted_on_the_same_cluster(tmp_path, large):
    root, log = tmp_path / "cluster", tmp_path / "log"
    with two_nodes() as (cluster, _):
        argv = [*words(root, *large), "--ray-address", cluster.address]
        process = driver(argv, log)
        wait_for(lambda: any(root.rglob("shards/*.json")), process, log)
        process.kill()
        process.wait()
        assert driver(argv, log).wait(SECONDS) == 0, log.read_text()
        assert driver(argv, log).wait(SECONDS) == 0
    assert "nothing to do, complete:" in log.read_text()
    assert snapshot(root) == snapshot(extract_locally(tmp_path / "alone", large))


@pytest.mark.slow
def test_without_an_address_a_local_cluster_is_started_and_max_failures_holds(tmp_path, world):
    pytest.importorskip("ray")
    root, log = tmp_path / "local", tmp_path / "log"
    assert driver(words(root, *world), log).wait(SECONDS) == 0, log.read_text()
    assert snapshot(root) == snapshot(extract_locally(tmp_path / "alone", world))
    assert driver([*words(root, *world), "encoder.model=path:/nowhere"], log).wait(SECONDS) == 2
    assert log.read_text().splitlines()[-1].startswith("error: ")
    poisoned = tmp_path / "poisoned"
    shutil.copytree(world[0], poisoned)
    for clip in sorted(poisoned.glob("*.flac"))[:9]:
        clip.write_bytes(b"")
    argv = words(tmp_path / "failing", poisoned, world[1], "max_failures=8")
    assert driver(argv, log).wait(SECONDS) == 1
    assert "9 of 24 utterances failed, more than max_failures=8" in log.read_text()
