"""Extraction with a tiny real Whisper in real processes: resume, kills, failures, several layers, several processes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from extraction import Kill, only_cache, run, snapshot, start, words, write_corpus

from shards.commit.finalize import stray_files
from shards.format.layout import Layout, read_plan
from shards.format.records import unseal
from shards.format.schemas import FAILURE_SCHEMA, read_parquet
from shards.read.cache import Cache


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, whisper) -> tuple[Path, int]:
    """A cache extracted without interruption, and the number of file operations that this took."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert run(words(root, corpus, whisper), count=root / "operations") == 0
    operations = int((root / "operations").read_text())
    (root / "operations").unlink()
    return root, operations


def test_a_cache_holds_every_utterance_with_its_frames_and_text(undisturbed):
    cache = Cache.open(only_cache(undisturbed[0]))
    assert len(cache) == 24
    for index in range(len(cache)):
        row = cache.row(index)
        features = cache.features(index)
        assert features.shape == (-(-row["samples"] // 320), cache.spec.channels)
        assert np.isfinite(features).all()
        assert row["text"] == f"text number {int(row['id'].removesuffix('.flac')[-2:])}"
    assert read_plan(Layout(cache.path).plan(0)).num_shards > 3


def test_a_finished_extraction_is_not_repeated(undisturbed, corpus, whisper):
    root = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in only_cache(root).rglob("*")}
    assert run(words(root, corpus, whisper)) == 0
    assert {path: path.stat().st_mtime_ns for path in only_cache(root).rglob("*")} == before


def log_records(file: Path) -> None:
    """From now on, log each commit record that this process opens as a line of ``file``."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and args[1] is None and re.search(r"/shards/\d+\.json$", str(args[0])):  # None: os.open
            os.write(log, f"{Path(str(args[0])).stem}\n".encode())

    sys.addaudithook(hook)


def test_commit_records_are_read_once_at_the_beginning_and_once_by_the_merge(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "resumed", tmp_path / "opened"
    shutil.copytree(undisturbed[0], root)
    layout = Layout(only_cache(root))
    argv, shards = words(root, corpus, whisper), read_plan(layout.plan(0)).num_shards
    assert run(argv, before=partial(log_records, log)) == 0
    assert log.read_text() == ""  # the cache is complete
    layout.cache.unlink()
    assert run(argv, before=partial(log_records, log)) == 0
    assert Counter(log.read_text().split()) == {f"{shard:06d}": 2 for shard in range(shards)}
    log.write_text("")
    layout.cache.unlink()
    layout.record(1).unlink()
    assert run(argv, before=partial(log_records, log)) == 0
    opened = Counter(log.read_text().split())
    assert opened.pop("000001") > 2  # read when its turn comes, when it is claimed, and when it is committed
    assert opened == {f"{shard:06d}": 2 for shard in range(shards) if shard != 1}
    assert_same(root, undisturbed[0])


def kill_until_done(root: Path, argv: list[str], rng: random.Random, operations: int, kills: int) -> int:
    """Run with up to ``kills`` SIGKILLs at random operations, then once undisturbed; return how many kills struck."""
    struck = 0
    for _ in range(kills):
        code = run(argv, Kill(rng.randrange(1, max(2, operations)), rng.choice(["before", "inside", "after"])))
        assert code in (0, -signal.SIGKILL)
        struck += code != 0
        if code == 0:
            break
    assert run(argv) == 0
    return struck


def assert_same(root: Path, wanted: Path) -> None:
    assert snapshot(root) == snapshot(wanted)
    assert list(stray_files(Layout(only_cache(root)))) == []
    assert not list(root.rglob("*.claim*"))


@pytest.mark.parametrize(("sequences", "kills"), [(2, 5), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_kills_at_random_file_operations_leave_the_same_cache(tmp_path, undisturbed, corpus, whisper, sequences, kills):
    wanted, operations = undisturbed
    rng = random.Random(sequences)
    struck = 0
    for sequence in range(sequences):
        root = tmp_path / f"killed {sequence}"
        struck += kill_until_done(root, words(root, corpus, whisper), rng, operations // 2, kills)
        assert_same(root, wanted)
        shutil.rmtree(root)
    print(f"kills {struck}, restarts {struck}, differences 0")
    assert struck >= sequences


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_ends_within_ten_seconds_and_leaves_no_temporary_file(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "terminated", tmp_path / "log"
    process = start(words(root, corpus, whisper), log=log)
    wait_for(lambda: list(root.rglob("shards/*.json")))
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "Interrupted. Committed shards are kept; rerun the same command to resume." in log.read_text()
    assert list(stray_files(Layout(only_cache(root)))) == []
    assert not list(root.rglob("*.claim*"))
    assert run(words(root, corpus, whisper)) == 0
    assert_same(root, undisturbed[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_a_cache_extract_each_shard_once(tmp_path, undisturbed, corpus, whisper, processes):
    root = tmp_path / "shared"
    logs = [tmp_path / f"log{i}" for i in range(processes)]
    running = [start(words(root, corpus, whisper), log=log) for log in logs]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes
    assert_same(root, undisturbed[0])
    made = sum(int(line.split()[1]) for log in logs for line in log.read_text().splitlines() if "extracted" in line)
    assert made == 24


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path, undisturbed, corpus, whisper):
    root = tmp_path / "orphaned"
    process = start(words(root, corpus, whisper))
    wait_for(lambda: list(root.rglob("*.claim")))
    process.kill()
    process.join()
    assert run(words(root, corpus, whisper)) == 0
    assert_same(root, undisturbed[0])


def test_a_claim_of_another_machine_is_taken_over_after_its_lease_regardless_of_its_clock(
    tmp_path, undisturbed, corpus, whisper
):
    root = tmp_path / "foreign"
    process = start(words(root, corpus, whisper))
    wait_for(lambda: list(root.rglob("plans/000.parquet")) and list(root.rglob("*.claim")))
    process.kill()
    process.join()
    for claim in root.rglob("*.claim"):
        claim.write_text('{"owner":"1-abc","host":"elsewhere","pid":1,"started":"1"}')
        later = time.time() + 120
        os.utime(claim, (later, later))
    assert run(words(root, corpus, whisper, "lease_seconds=1")) == 0
    assert_same(root, undisturbed[0])


def test_layers_come_from_one_pass_and_a_layer_added_later_changes_no_other(tmp_path, corpus, whisper):
    root = tmp_path / "layers"
    assert run(words(root, corpus, whisper, "encoder.layers=[0,2]")) == 0
    first = snapshot(root)
    assert {name.split("/")[1].split("-L")[1][0] for name in first} == {"0", "2"}
    assert run(words(root, corpus, whisper, "encoder.layers=[0,1,-1]")) == 0
    second = snapshot(root)
    assert {name: second[name] for name in first} == first
    alone = tmp_path / "alone"
    assert run(words(alone, corpus, whisper, "encoder.layers=[1]")) == 0
    made = snapshot(alone)
    assert {name: second[name] for name in made if not name.endswith("CACHE.json")} == {
        name: tree for name, tree in made.items() if not name.endswith("CACHE.json")
    }


def test_broken_audio_becomes_failure_rows_and_the_rest_is_kept(tmp_path, whisper):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    write_corpus(folder, 8)
    good = (folder / "clip 00.flac").read_bytes()
    nan = np.full(1600, np.nan, dtype=np.float32)
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(folder / "infinite.wav", nan * 0 + np.inf, 16000, subtype="FLOAT")
    soundfile.write(folder / "no samples.wav", np.zeros(0, dtype=np.float32), 16000)
    broken = {
        "empty.flac": b"",
        "text.flac": b"this is no audio at all\n" * 50,
        "header only.flac": good[:40],
        "half.flac": good[: len(good) // 2],
        "zeros.wav": b"\0" * 5000,
        "html.mp3": b"<!DOCTYPE html><html>404</html>",
        "riff.wav": b"RIFF\xff\xff\xff\xffWAVEfmt ",
        "flipped.flac": b"\xff" + good[1:],
        "missing.flac": None,
        "nan.wav": ...,
        "infinite.wav": ...,
        "no samples.wav": ...,
    }
    with open(folder / "clips.csv", "a") as manifest:
        for name, data in broken.items():
            if isinstance(data, bytes):
                (folder / name).write_bytes(data)
            manifest.write(f"{name},bad,s9\n")
    root, log = tmp_path / "root", tmp_path / "log"
    assert run(words(root, folder, whisper), log=log) == 1
    assert "max_failures" in log.read_text()
    assert run(words(root, folder, whisper, "max_failures=12"), log=log) == 0
    assert "MB/h of audio" in log.read_text()
    assert "s in the encoder" in log.read_text()
    layout = Layout(only_cache(root))
    failures = read_parquet(layout.failures(0), FAILURE_SCHEMA).to_pylist()
    assert len(failures) == len(broken)
    assert all(failure["error"] and failure["stage"] in ("read", "decode") for failure in failures)
    assert len(Cache.open(layout.path)) == 8
    soundfile.write(folder / "missing.flac", np.ones(1600, dtype=np.float32) * 0.1, 16000)
    assert run(words(root, folder, whisper, "max_failures=12"), log=log) == 0  # its audio id is known now
    assert "1 new utterance " in log.read_text()
    assert len(Cache.open(only_cache(root))) == 9


def test_retry_failed_appends_a_generation_of_the_failed_and_counts_attempts(tmp_path, whisper):
    folder = tmp_path / "flaky"
    folder.mkdir()
    write_corpus(folder, 8)
    good = (folder / "clip 03.flac").read_bytes()
    (folder / "clip 03.flac").write_bytes(good[:200] + bytes(len(good) - 200))  # same length in the header
    root, log = tmp_path / "root", tmp_path / "log"
    argv = words(root, folder, whisper, "max_failures=8")
    assert run(argv, log=log) == 0
    assert "extracted 7 utterances" in log.read_text()
    assert ", 1 failed" in log.read_text()
    layout = Layout(only_cache(root))
    before = {path.name: path.stat().st_mtime_ns for path in layout.shards.iterdir()}
    assert run(argv, log=log) == 0
    assert "nothing to do" in log.read_text()
    assert run([*argv, "--retry-failed"]) == 0
    (failure,) = read_parquet(layout.failures(1), FAILURE_SCHEMA).to_pylist()
    assert failure["attempt"] == 2
    (folder / "clip 03.flac").write_bytes(good)
    assert run(argv) == 0
    assert len(Cache.open(layout.path)) == 8
    assert unseal(layout.cache)["counts"]["failures"] == 2
    assert {name: (layout.shards / name).stat().st_mtime_ns for name in before} == before


def test_a_corrupt_shard_is_found_and_re_extracted_with_verify(tmp_path, undisturbed, corpus, whisper):
    root = tmp_path / "damaged"
    shutil.copytree(undisturbed[0], root)
    layout = Layout(only_cache(root))
    data = bytearray(layout.tar(1).read_bytes())
    data[700] ^= 1
    layout.tar(1).write_bytes(data)
    assert run([*words(root, corpus, whisper), "--verify"]) == 0
    assert_same(root, undisturbed[0])
