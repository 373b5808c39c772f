"""Repair re-extracts exactly the corrupt shards and restores the cache as it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from extraction import only_cache, run, snapshot, words, write_corpus

from pipeline.maintain.repair import repair
from shards.commit.finalize import stray_files
from shards.errors import UserError
from shards.format.layout import Layout
from shards.inspect.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, whisper) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert run(words(root, corpus, whisper)) == 0
    return root


@pytest.fixture
def broken(whole, tmp_path) -> Layout:
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    return Layout(only_cache(root))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def written(layout: Layout) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in layout.shards.iterdir()}


def assert_whole(layout: Layout, whole: Path) -> None:
    assert snapshot(layout.path.parent.parent) == snapshot(whole)
    assert verify(layout.path, deep=True) == []
    assert list(stray_files(layout)) == []


def test_exactly_the_shards_that_fail_verification_are_re_extracted(broken, whole):
    flip(broken.tar(1), 700)
    broken.tar(3).write_bytes(broken.tar(3).read_bytes()[:-512])
    broken.record(4).unlink()
    before = written(broken)
    assert {problem.shard for problem in repair(broken.path)} - {None} == {1, 3, 4}
    assert_whole(broken, whole)
    after = written(broken)
    assert {name.split(".")[0] for name in after if after[name] != before.get(name)} == {"000001", "000003", "000004"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda layout: flip(layout.manifest(0), 100),
        lambda layout: layout.manifest(0).unlink(),
        lambda layout: layout.failures(0).write_bytes(b""),
        lambda layout: next(layout.labels.glob("*.parquet")).unlink(),
    ],
)
def test_merged_files_are_rewritten_and_no_shard_is_touched(broken, whole, damage):
    before = written(broken)
    damage(broken)
    assert repair(broken.path)
    assert_whole(broken, whole)
    assert written(broken) == before


@pytest.mark.parametrize("damage", [lambda plan: flip(plan, 60), lambda plan: plan.unlink()])
def test_a_corrupt_plan_is_rewritten_and_no_shard_is_touched(broken, whole, damage):
    before = written(broken)
    damage(broken.plan(0))
    assert repair(broken.path)
    assert_whole(broken, whole)
    assert written(broken) == before


def test_a_valid_cache_is_left_alone(broken, whole, capsys):
    from pipeline.__main__ import main

    before = written(broken), broken.cache.stat().st_mtime_ns
    assert main(["repair", str(broken.path)]) == 0
    assert "nothing to fix" in capsys.readouterr().out
    assert (written(broken), broken.cache.stat().st_mtime_ns) == before


def test_a_repair_without_the_original_audio_is_refused_and_removes_nothing(broken, corpus, tmp_path):
    flip(broken.tar(1), 700)
    other = tmp_path / "other audio"
    other.mkdir()
    write_corpus(other, 24, seconds=0.3)
    before = snapshot(broken.path)
    with pytest.raises(UserError, match="restore the original audio"):
        repair(broken.path, source=f"{other}/clips.csv")
    assert snapshot(broken.path) == before


def test_a_cache_without_its_settings_cannot_be_repaired(broken):
    broken.cache.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"python -m pipeline extract --verify"):
        repair(broken.path)
