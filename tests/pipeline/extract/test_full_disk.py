"""Disk full, quota, file-size limit, read-only, no permission: one sentence, exit status 2, and a run that resumes."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from extraction import only_cache, run, snapshot, words
from tiny_disk import drop_capabilities, fail_writes, limit_file_size, small_disk
from tiny_run import losses, make_config, write_config
from tiny_step import step_metrics

from shards.commit.finalize import stray_files
from shards.errors import UserError, run_command
from shards.format.layout import Layout
from shards.read.cache import Cache
from train.__main__ import command
from train.runs.metrics_log import MetricsLogger


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, whisper) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run(words(root, corpus, whisper)) == 0
    return root


def committed_tars(root: Path) -> dict[str, tuple[int, bytes]]:
    records = sorted(root.glob("[!.]*/*/shards/*.json"))
    tars = [path.with_suffix(".tar") for path in records]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in tars}


def assert_one_sentence(log: Path, *expected: str) -> None:
    """The command ended with one line that names the problem, without a traceback."""
    output = log.read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert any(text in line for text in expected), line
    assert "Traceback" not in output
    log.unlink()


def assert_clean(root: Path) -> None:
    for cache in root.glob("[!.]*/*"):
        assert list(stray_files(Layout(cache))) == []
    assert not list(root.rglob("*.claim"))


@pytest.mark.parametrize("step", [40, pytest.param(4, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_repeatedly_and_grows_yields_the_same_cache(step, tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "disk", tmp_path / "log"
    with small_disk(root, size := 100) as disk:
        stops = 0
        kept: dict[str, tuple[int, bytes]] = {}
        while run(words(root, corpus, whisper), log=log) != 0:
            assert_one_sentence(log, "the disk is full", "GB free")
            assert_clean(root)
            now = committed_tars(root)
            assert {name: now[name] for name in kept} == kept
            kept, stops, size = now, stops + 1, size + step
            assert size < 1000
            disk.set(f"size={size}k")
        print(f"stopped {stops} times between 100 and {size} KiB")
        assert stops >= 3
        assert snapshot(root) == snapshot(undisturbed)


FULL, QUOTA, DEVICE = "the disk is full", "the disk quota is used up", "the device reports an input/output error"


@pytest.mark.parametrize(
    ("error", "sentence", "free_bytes"),
    [
        (errno.ENOSPC, FULL, 5_000),
        (errno.EDQUOT, QUOTA, 100_000),
        pytest.param(errno.EIO, DEVICE, 100_000, marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, FULL, 100, marks=pytest.mark.slow),
        pytest.param(errno.EDQUOT, QUOTA, 5_000, marks=pytest.mark.slow),
    ],
)
def test_a_failed_write_stops_the_run_with_one_sentence_and_the_next_resumes(
    error, sentence, free_bytes, tmp_path, undisturbed, corpus, whisper
):
    root, log = tmp_path / "root", tmp_path / "log"
    assert run(words(root, corpus, whisper), log=log, before=partial(fail_writes, error, free_bytes)) == 2
    assert_one_sentence(log, sentence)
    assert_clean(root)
    kept = committed_tars(root)
    assert bool(kept) == (free_bytes == 100_000)
    assert run(words(root, corpus, whisper)) == 0
    now = committed_tars(root)
    assert {name: now[name] for name in kept} == kept
    assert snapshot(root) == snapshot(undisturbed)


def test_a_file_size_limit_is_reported_with_the_setting_that_fixes_it(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "root", tmp_path / "log"
    assert run(words(root, corpus, whisper), log=log, before=partial(limit_file_size, 12_000)) == 2
    assert_one_sentence(log, "larger than allowed here; use a smaller shard_mb")
    assert_clean(root)
    assert run(words(root, corpus, whisper)) == 0
    assert snapshot(root) == snapshot(undisturbed)


def test_lost_permission_is_reported_and_the_next_run_resumes(tmp_path, undisturbed, corpus, whisper):
    root, log = tmp_path / "root", tmp_path / "log"
    assert run(words(root, corpus, whisper), before=partial(fail_writes, errno.ENOSPC, 100_000)) == 2
    kept = committed_tars(root)
    shards = Layout(only_cache(root)).shards
    os.chmod(shards, 0o555)
    try:
        assert run(words(root, corpus, whisper), log=log, before=drop_capabilities) == 2
    finally:
        os.chmod(shards, 0o755)
    assert_one_sentence(log, "permission denied; make the folder writable")
    assert run(words(root, corpus, whisper)) == 0
    assert {name: committed_tars(root)[name] for name in kept} == kept
    assert snapshot(root) == snapshot(undisturbed)


def fit(config: Path, *more: str) -> int:
    return run_command(command, ["fit", "--config", str(config), *more])


def test_a_complete_read_only_cache_is_recognized_and_can_be_trained_on(tmp_path, undisturbed, corpus, whisper, capsys):
    root, log = tmp_path / "disk", tmp_path / "log"
    with small_disk(root, 2000) as disk:
        assert run(words(root, corpus, whisper)) == 0
        disk.set("ro")
        assert run(words(root, corpus, whisper), log=log) == 0
        assert "nothing to do, complete" in log.read_text()
        cache = Cache.open(only_cache(root))
        whole = Cache.open(only_cache(undisturbed))
        assert all(np.array_equal(cache.features(i), whole.features(i)) for i in range(len(cache)))
        keys = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 2, "eval_every": 0}
        there = write_config(tmp_path / "there.yaml", make_config(tmp_path, cache.path, "", **keys))
        assert fit(there) == 0
        capsys.readouterr()
        assert fit(there, f"runs={root}/runs") == 2
        output = capsys.readouterr().err.splitlines()
        assert [line for line in output if "the file system is read-only" in line] == [output[-1]]


def test_an_incomplete_read_only_cache_is_reported(tmp_path, corpus, whisper):
    root, log = tmp_path / "disk", tmp_path / "log"
    with small_disk(root, 2000) as disk:
        assert run(words(root, corpus, whisper), before=partial(fail_writes, errno.ENOSPC, 100_000)) == 2
        disk.set("ro")
        assert run(words(root, corpus, whisper), log=log) == 2
        assert_one_sentence(log, "the file system is read-only; remount it writable or choose another root")


def test_metrics_on_a_full_disk_end_with_one_sentence_even_when_the_files_are_closed(tmp_path):
    def fill(folder: Path) -> None:
        with MetricsLogger(folder, 1000) as logger:
            for number in range(1, 1001):
                logger.log_step(step_metrics(number), 1.0)

    with small_disk(tmp_path / "run", 12), pytest.raises(UserError, match=r"writing metrics failed .*disk is full"):
        fill(tmp_path / "run")


def test_a_trainer_whose_disk_fills_up_reports_it_and_resumes_when_there_is_space(tmp_path, undisturbed, capsys):
    keys = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 5, "checkpoint_every": 1, "eval_every": 0}
    free = make_config(tmp_path, only_cache(undisturbed), "", **keys)
    assert fit(write_config(tmp_path / "free.yaml", free)) == 0
    checkpoint = max((tmp_path / "runs/run/checkpoints").iterdir()).stat().st_size
    tight = write_config(tmp_path / "tight.yaml", free.model_copy(update={"runs": f"{tmp_path}/disk/runs"}))
    with small_disk(tmp_path / "disk", 2 * checkpoint // 1024 + 100) as disk:
        capsys.readouterr()
        assert fit(tight) == 2
        output = capsys.readouterr().err
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "saving a checkpoint failed" in line
        assert "the disk is full; free space" in line
        folder = tmp_path / "disk/runs/run"
        assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]
        disk.set(f"size={5 * checkpoint // 1024 + 200}k")
        assert run_command(command, ["fit", "--resume", str(folder)]) == 0
        assert losses(folder) == losses(tmp_path / "runs/run")
