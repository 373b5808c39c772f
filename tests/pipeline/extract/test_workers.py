"""Workers of a job array on one cache, and how it is finalized."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from extraction import only_cache, run, snapshot, start, words, write_world

from pipeline.extract.resources import Worker, find_worker
from shards.errors import UserError
from shards.format.layout import Layout


@pytest.mark.parametrize(("shards", "count"), [(10, 1), (10, 3), (2, 5), (0, 4)])
def test_every_worker_takes_every_shard_once_its_own_first(shards, count):
    for index in range(count):
        turn = Worker(index, count).shard_order(shards)
        own = list(range(index, shards, count))
        assert turn[: len(own)] == own
        assert sorted(turn) == list(range(shards))


def test_a_worker_helps_others_from_the_end_of_their_list():
    assert Worker(1, 3).shard_order(9) == [1, 4, 7, 8, 5, 2, 6, 3, 0]


SLURM = {"SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("index", "count", "environ", "wanted"),
    [
        (None, None, {}, Worker(0, 1)),
        (2, 5, {}, Worker(2, 5)),
        (2, 5, SLURM, Worker(2, 5)),
        (None, None, {**SLURM, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5"}, Worker(2, 4)),
        (None, None, {**SLURM, "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "10"}, Worker(3, 4)),
        (None, None, {**SLURM, "SLURM_ARRAY_TASK_MIN": "1"}, Worker(1, 4)),  # --array=1,2,5,30
        (None, 8, {"JOB_COMPLETION_INDEX": "3"}, Worker(3, 8)),
        (None, None, {"JOB_COMPLETION_INDEX": "3"}, Worker(0, 1)),
    ],
)
def test_the_worker_comes_from_options_a_slurm_array_or_an_indexed_job(index, count, environ, wanted):
    assert find_worker(index, count, environ) == wanted


@pytest.mark.parametrize(
    ("index", "count", "environ", "sentence"),
    [
        (1, None, {}, "add --num-workers"),
        (None, 4, {}, "add --worker-index"),
        (4, 4, {}, "expected 0 to 3"),
        (-1, 4, {}, "expected 0 to 3"),
        (None, 0, {}, "expected at least 1"),
        (
            None,
            None,
            {**SLURM, "SLURM_ARRAY_TASK_ID": "x"},
            "SLURM_ARRAY_TASK_ID: expected a non-negative integer",
        ),
    ],
)
def test_inconsistent_worker_numbers_are_refused_with_one_sentence(index, count, environ, sentence):
    with pytest.raises(UserError, match=sentence):
        find_worker(index, count, environ)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    """12 clips and a tiny Whisper."""
    return write_world(tmp_path_factory.mktemp("workers"), 12)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, world) -> Path:
    """The cache of one process; the tests below may finalize it again."""
    root = tmp_path_factory.mktemp("alone")
    assert run(words(root, *world)) == 0
    return root


def test_three_workers_of_which_one_never_starts_write_the_same_cache_as_one(tmp_path, world, alone):
    root = tmp_path / "array"
    workers = [start([*words(root, *world), "--worker-index", str(i), "--num-workers", "3"]) for i in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert snapshot(root) == snapshot(alone)


def test_committed_shards_are_completed_without_reading_a_recording(tmp_path, world, alone):
    folder, whisper = world
    silent, root = tmp_path / "silent", tmp_path / "again"
    shutil.copytree(folder, silent)
    for clip in silent.glob("*.flac"):
        clip.unlink()
    shutil.copytree(alone, root)
    layout = Layout(only_cache(root))
    for path in (layout.cache, layout.manifest(0), layout.failures(0)):
        path.unlink()
    assert run(words(root, silent, whisper)) == 0
    before, after = (snapshot(each) for each in (alone, root))
    for tree in (before, after):
        del tree[f"{layout.path.relative_to(root)}/CACHE.json"]["generations"][0]["provenance"]["source"]
    assert before == after
