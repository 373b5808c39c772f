"""Caches made in a bucket, on a store in memory; tests/pipeline/extract/test_bucket.py has a real S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import obstore
import pytest
from tiny_bucket import SPEC, finish, make, plan_table, write
from tiny_objects import MemoryObjects, memory, names

from pipeline.config import ExtractConfig
from pipeline.extract.job import prepare_job
from shards.commit.bucket import store as bucket_module
from shards.commit.bucket.store import BucketStore, connect_objects
from shards.errors import UserError
from shards.format.layout import Plan
from shards.format.records import is_released
from shards.inspect.info import describe_cache
from shards.inspect.verify import verify
from shards.read.cache import Cache
from shards.share.transfer import pull


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_module, "connect_objects", MemoryObjects)
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    return f"tiny://bucket/{uuid.uuid4().hex}"


def change(url: str, name: str, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(obstore.get(memory(url), name).bytes())
    edit(data)
    obstore.put(memory(url), name, bytes(data))


def test_two_that_share_a_bucket_alone_agree_on_a_plan_and_make_one_cache(url):
    a, b = BucketStore(url), BucketStore(url)
    assert a.plan() is None
    plan = a.write_plan(plan_table())
    assert b.write_plan(plan_table().slice(0, 2)).id == plan.id
    with a.hold_leases("a"), b.hold_leases("b"):
        assert a.acquire(0)
        assert not b.acquire(0)
        assert b.acquire(1)
        for store, shard in ((a, 0), (b, 1)):
            write(store, shard, plan)
            store.publish(shard)
        make(a, plan)
        assert not a.is_complete(SPEC.feature_id, plan.id)
        finish(b, plan)
    assert a.is_complete(SPEC.feature_id, plan.id)
    assert verify(url, deep=True) == []
    assert len(Cache.open(url)) == 6
    assert [name for name in a._objects.puts + b._objects.puts if name.endswith("2.tar")] == ["shards/000002.tar"]
    shards = [f"shards/{i:06d}.{kind}" for i in range(3) for kind in ("tar", "parquet", "json")]
    assert names(url) == {"plan.parquet", "manifest.parquet", "failures.parquet", "CACHE.json", *shards}


def test_a_shard_that_was_taken_over_meanwhile_is_left_to_the_other(url):
    a, b = BucketStore(url), BucketStore(url)
    plan = a.write_plan(plan_table(1))
    with a.hold_leases("a"), b.hold_leases("b", lease=0.0):
        assert a.acquire(0)
        write(a, 0, plan)
        assert not b.acquire(0)
        assert b.acquire(0)  # a lease of nothing has passed
        write(b, 0, plan, shift=1.0)
        b.publish(0)
        a.publish(0)
        finish(a, plan)
    assert verify(url, deep=True) == []
    assert Cache.open(url).features(0)[0, 0] == 1.0


def test_a_reader_sees_no_cache_before_it_is_complete(url):
    store = BucketStore(url)
    store.write_plan(plan_table())
    with store.hold_leases("a"):
        assert store.acquire(0)
        assert [problem.what for problem in verify(url)][:2] == [
            "is missing: the extraction is not complete",
            "is missing: the shard is not committed",
        ]
        about = describe_cache(url)
        assert (about["complete"], about["path"]) == (False, url)
        assert (about["counts"]["committed"], about["counts"]["shards"]) == (0, 3)
        with pytest.raises(UserError, match="does not exist"):
            Cache.open(url)
        assert store.acquire(None)
        with pytest.raises(UserError, match="is not complete: finish its extraction first"):
            Cache.open(url)


def test_what_was_released_or_reopened_counts_as_absent_and_does_not_stay(url, tmp_path):
    store, near = BucketStore(url), tmp_path / "near"
    plan = store.write_plan(plan_table(2))
    with store.hold_leases("a"):
        assert store.acquire(0)
        store.release(0)
        make(store, plan)
        assert store.acquire(None)
        store.release(None)
        assert store.info() is None
        finish(store, plan)
        pull(url, near)
        store.reopen({})
    assert is_released(store._objects.read("CACHE.json").data)
    assert store.info() is None
    assert not store.is_complete(SPEC.feature_id, plan.id)
    assert [problem.file for problem in verify(url)] == ["CACHE.json"]
    assert not describe_cache(url)["complete"]
    for attempt in (lambda: pull(url, tmp_path / "other"), lambda: Cache.open(url)):
        with pytest.raises(UserError, match="complete"):
            attempt()
    with store.hold_leases("b"):
        finish(store, plan)
    assert verify(url, deep=True) == []
    shards = [f"shards/{i:06d}.{kind}" for i in range(2) for kind in ("tar", "parquet", "json")]
    assert names(url) == {"plan.parquet", "manifest.parquet", "failures.parquet", "CACHE.json", *shards}


def test_leftovers_of_a_killed_writer_are_written_over(url):
    store = BucketStore(url)
    plan = store.write_plan(plan_table(1))
    for name in ("shards/000000.tar", "shards/000000.parquet"):
        store._objects.put(name, b"half", None)
    store._objects.put("shards/000000.json", b'{"of": "something else"}', None)
    with store.hold_leases("a"):
        assert store.commit_record(0, SPEC.feature_id, plan.id) is None
        make(store, plan)
        finish(store, plan)
    assert verify(url, deep=True) == []


def test_a_record_whose_files_are_gone_counts_as_none(url):
    store = BucketStore(url)
    plan = store.write_plan(plan_table(2))
    with store.hold_leases("a"):
        make(store, plan)
    obstore.delete(memory(url), "shards/000001.tar")
    again = BucketStore(url)
    assert again.commit_record(0, SPEC.feature_id, plan.id) is not None
    assert again.commit_record(1, SPEC.feature_id, plan.id) is None
    with again.hold_leases("b"):
        make(again, plan)
        finish(again, plan)
    assert verify(url, deep=True) == []


def test_shards_with_failures_are_made_again_once_by_the_first_process(url):
    store, other = BucketStore(url), BucketStore(url)
    plan = store.write_plan(plan_table(2))
    with store.hold_leases("a"):
        make(store, plan, fail="utt-1")
        finish(store, plan)
    for one in (store, other):
        found = one.commit_record(0, SPEC.feature_id, plan.id)
        assert [failure["key"] for failure in found["failures"]] == ["utt-1"]
        one.reopen({0: found})
    assert not store.is_complete(SPEC.feature_id, plan.id)
    with store.hold_leases("a"):
        make(store, plan)
    assert other.commit_record(0, SPEC.feature_id, plan.id) is None  # as it knew the shard …
    with other.hold_leases("b"):
        assert not other.acquire(0)  # … but it was made again
        other._listed_at = 0.0
        assert other.commit_record(0, SPEC.feature_id, plan.id)["failures"] == []
        finish(other, plan)
    assert verify(url, deep=True) == []


def test_what_exists_of_other_features_counts_as_nothing_and_is_made_again(url):
    store, other = BucketStore(url), "0" * 64
    plan = store.write_plan(plan_table(1))
    with store.hold_leases("a"):
        make(store, plan)
        finish(store, plan)
        assert store.commit_record(0, other, plan.id) is None
        assert not store.is_complete(other, plan.id)
        assert store.acquire(0)
        assert store.acquire(None)


def test_the_cache_file_of_a_bucket_is_there_when_the_cache_is_complete(url):
    store = BucketStore(url)
    plan = store.write_plan(plan_table(1))
    with store.hold_leases("a"):
        assert store.info() is None
        make(store, plan)
        assert store.acquire(None)
        assert store.info() is None  # a claim stands there
        store.finalize(SPEC, plan, {"source": {"name": "small"}})
    assert store.info()["feature_id"] == SPEC.feature_id


def test_a_cache_is_not_finished_while_a_shard_is_missing_or_its_rows_are_corrupt(url):
    store = BucketStore(url)
    plan = store.write_plan(plan_table(2))
    with store.hold_leases("a"):
        make(store, Plan(plan.table.slice(0, 2), plan.id))
        with pytest.raises(UserError, match=r"shard 000001 of .* is not committed: rerun the same extraction"):
            finish(store, plan)
        make(store, plan)
        change(url, "shards/000000.parquet", lambda data: data.reverse())
        with pytest.raises(
            UserError, match=r"shard 000000 of .* is corrupt: .* rerun the same extraction with --verify"
        ):
            store.finalize(SPEC, plan, {})
    assert not store.is_complete(SPEC.feature_id, plan.id)


def test_damage_is_found_by_reading_a_shard_whole(url):
    store = BucketStore(url)
    plan = store.write_plan(plan_table(2))
    with store.hold_leases("a"):
        make(store, plan)
    record = store.commit_record(1, SPEC.feature_id, plan.id)
    assert not store.is_corrupt(1, record)
    change(url, "shards/000001.tar", lambda data: data.append(0))
    assert store.is_corrupt(1, record)
    change(url, "shards/000001.tar", lambda data: data.pop())
    assert not store.is_corrupt(1, record)
    change(url, "shards/000001.tar", lambda data: data.reverse())
    assert store.is_corrupt(1, record)
    obstore.delete(memory(url), "shards/000001.tar")
    assert store.is_corrupt(1, record)


def test_scratch_folders_go_with_their_process_and_those_of_killed_ones_go_at_the_next_start(url, tmp_path):
    left = tmp_path / "earshard-scratch-dead"
    left.mkdir()
    (left / "lock").touch()
    store = BucketStore(url, tmp_path)
    other = BucketStore(url, tmp_path)
    assert {store.layout.path, other.layout.path} == set(tmp_path.glob("earshard-scratch-*"))
    del store, other
    assert not list(tmp_path.glob("earshard-scratch-*"))


@pytest.mark.parametrize("scheme", ["hf", "sftp", "file"])
def test_a_store_without_known_conditions_is_refused_in_a_sentence(scheme):
    with pytest.raises(UserError, match=rf"does not support conditional writes for {scheme}://.* push"):
        connect_objects(f"{scheme}://bucket/cache")


def test_shards_larger_than_a_bucket_takes_at_once_are_refused_before_any_work():
    source = {"kind": "manifest", "path": "clips.csv"}
    with pytest.raises(UserError, match="shard_mb=8000 exceeds the largest object that can be uploaded at once"):
        prepare_job(ExtractConfig(root="s3://bucket/caches", shard_mb=8000, source=source))


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_written(url):
    class Careless(MemoryObjects):
        def put(self, name, data, over):
            return super().put(name, data, self.version(name))

    with pytest.raises(UserError, match="does not support conditional writes"):
        Careless(url).check_conditions()
    assert names(url) == set()
    MemoryObjects(url).check_conditions()
    assert names(url) == set()
