"""Caches made in a bucket, on a store in memory; tests/pipeline/extract/test_bucket.py has a real S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_bucket import SPEC, finish, label_table, make, plan_table, write
from tiny_objects import MemoryObjects, memory, names

from shards.commit.bucket import store as bucket_module
from shards.commit.bucket.store import BucketStore, connect_objects
from shards.errors import UserError
from shards.format.records import is_released, unseal_bytes
from shards.inspect.info import describe_cache
from shards.inspect.verify import verify
from shards.read.cache import Cache
from shards.share.transfer import pull


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_module, "connect_objects", MemoryObjects)
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    return f"tiny://bucket/{uuid.uuid4().hex}"


def whole(shards: int, generations: int = 1) -> set[str]:
    """Return the objects of a complete cache, without its label sets."""
    tables = [f"{kind}/{i:03d}.parquet" for kind in ("plans", "manifests", "failures") for i in range(generations)]
    files = [f"shards/{i:06d}.{kind}" for i in range(shards) for kind in ("tar", "parquet", "json")]
    return {"CACHE.json", "finish.claim", "labels/LABELS.json", *tables, *files}


def file_of(store: BucketStore, name: str) -> str:
    return f"labels/{store.labels().current(name).file.name}"


def objects(url: str) -> dict[str, bytes]:
    return {name: bytes(obstore.get(memory(url), name).bytes()) for name in names(url)}


def change(url: str, name: str, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(obstore.get(memory(url), name).bytes())
    edit(data)
    obstore.put(memory(url), name, bytes(data))


def test_two_that_share_a_bucket_alone_agree_on_a_plan_and_make_one_cache(url):
    a, b = BucketStore(url), BucketStore(url)
    assert a.plan(0) is None
    plan = a.write_plan(0, [plan_table()])
    assert b.write_plan(0, [plan_table().slice(0, 2)]).id == plan.id
    with a.hold_leases("a"), b.hold_leases("b"):
        assert a.acquire(0)
        assert not b.acquire(0)
        assert b.acquire(1)
        for store, shard in ((a, 0), (b, 1)):
            write(store, shard, plan)
            store.publish(shard)
        make(a, plan)
        assert not a.lists_plan(SPEC.feature_id, plan.id)
        finish(b, plan)
    assert a.lists_plan(SPEC.feature_id, plan.id)
    assert verify(url, deep=True) == []
    assert len(Cache.open(url)) == 6
    assert [name for name in a._objects.puts + b._objects.puts if name.endswith("2.tar")] == ["shards/000002.tar"]
    assert names(url) == {*whole(3), file_of(a, "source")}


def test_a_shard_that_was_taken_over_meanwhile_is_left_to_the_other(url):
    a, b = BucketStore(url), BucketStore(url)
    plan = a.write_plan(0, [plan_table(1)])
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
    store.write_plan(0, [plan_table()])
    with store.hold_leases("a"):
        assert store.acquire(0)
        assert [problem.what for problem in verify(url)][:2] == [
            "is missing: the extraction is not complete",
            "is missing: the shard is not committed",
        ]
        about = describe_cache(url)
        assert (about["complete"], about["path"]) == (False, url)
        assert (about["counts"]["committed"], about["counts"]["shards"]) == (0, 3)
        assert store.acquire(None)
        with pytest.raises(UserError, match="does not exist"):
            Cache.open(url)


def test_what_was_released_or_reopened_counts_as_absent_and_does_not_stay(url, tmp_path):
    store, near = BucketStore(url), tmp_path / "near"
    plan = store.write_plan(0, [plan_table(2)])
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
        finish_claim = store._objects.read("finish.claim").data
    assert is_released(finish_claim)
    assert is_released(store._objects.read("CACHE.json").data)
    assert store.info() is None
    assert not store.lists_plan(SPEC.feature_id, plan.id)
    assert [problem.file for problem in verify(url)] == ["CACHE.json"]
    assert not describe_cache(url)["complete"]
    for attempt in (lambda: pull(url, tmp_path / "other"), lambda: Cache.open(url)):
        with pytest.raises(UserError, match="complete"):
            attempt()
    with store.hold_leases("b"):
        finish(store, plan)
    assert verify(url, deep=True) == []
    assert names(url) == {*whole(2), file_of(store, "source")}


def test_leftovers_of_a_killed_writer_are_written_over(url):
    store = BucketStore(url)
    plan = store.write_plan(0, [plan_table(1)])
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
    plan = store.write_plan(0, [plan_table(2)])
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
    plan = store.write_plan(0, [plan_table(2)])
    with store.hold_leases("a"):
        make(store, plan, fail="utt-1")
        finish(store, plan)
    for one in (store, other):
        found = one.commit_record(0, SPEC.feature_id, plan.id)
        assert [failure["key"] for failure in found["failures"]] == ["utt-1"]
        one.reopen({0: found})
    assert not store.lists_plan(SPEC.feature_id, plan.id)
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
    plan = store.write_plan(0, [plan_table(1)])
    with store.hold_leases("a"):
        make(store, plan)
        finish(store, plan)
        assert store.commit_record(0, other, plan.id) is None
        assert not store.lists_plan(other, plan.id)
        assert store.acquire(0)
        assert store.acquire(None)


def test_the_cache_file_of_a_bucket_is_there_when_the_cache_is_complete(url):
    store = BucketStore(url)
    plan = store.write_plan(0, [plan_table(1)])
    with store.hold_leases("a"):
        assert store.info() is None
        make(store, plan)
        assert store.acquire(None)
        assert store.info() is None
        store.finalize(SPEC, 0, plan, {"source": {"name": "small"}})
    assert store.info()["feature_id"] == SPEC.feature_id


def test_a_cache_is_not_finished_while_a_shard_is_missing_or_its_rows_are_corrupt(url):
    store = BucketStore(url)
    plan = store.write_plan(0, [plan_table(2)])
    with store.hold_leases("a"):
        assert store.acquire(0)
        write(store, 0, plan)
        store.publish(0)
        with pytest.raises(UserError, match=r"shard 000001 of .* is not committed: rerun the same extraction"):
            finish(store, plan)
        make(store, plan)
        change(url, "shards/000000.parquet", lambda data: data.reverse())
        with pytest.raises(
            UserError, match=r"shard 000000 of .* is corrupt: .* rerun the same extraction with --verify"
        ):
            store.finalize(SPEC, 0, plan, {})
    assert not store.lists_plan(SPEC.feature_id, plan.id)


def test_damage_is_found_by_reading_a_shard_whole(url):
    store = BucketStore(url)
    plan = store.write_plan(0, [plan_table(2)])
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
    assert {store.layout.path.parent, other.layout.path.parent} == set(tmp_path.glob("earshard-scratch-*"))
    del store, other
    assert not list(tmp_path.glob("earshard-scratch-*"))


@pytest.mark.parametrize("scheme", ["hf", "sftp", "file"])
def test_a_store_without_known_conditions_is_refused_in_a_sentence(scheme):
    with pytest.raises(UserError, match=rf"does not support conditional writes for {scheme}://.* push"):
        connect_objects(f"{scheme}://bucket/cache")


def test_shards_larger_than_a_bucket_takes_at_once_are_refused_before_any_work():
    from pipeline.config import ExtractConfig
    from pipeline.extract.job import prepare

    source = {"kind": "manifest", "path": "clips.csv"}
    with pytest.raises(UserError, match="shard_mb=8000 exceeds the largest object that can be uploaded at once"):
        prepare(ExtractConfig(root="s3://bucket/caches", shard_mb=8000, source=source))


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_written(url):
    class Careless(MemoryObjects):
        def put(self, name, data, over):
            return super().put(name, data, self.version(name))

    with pytest.raises(UserError, match="does not support conditional writes"):
        Careless(url).check_conditions()
    assert names(url) == set()
    MemoryObjects(url).check_conditions()
    assert names(url) == set()


@pytest.fixture
def grown(url):
    """A bucket with a complete generation of three shards; a store, and the plan of one more shard."""
    store = BucketStore(url)
    plan = store.write_plan(0, [plan_table()])
    with store.hold_leases("a"):
        make(store, plan)
        finish(store, plan)
    return store


def test_a_second_generation_in_a_bucket_changes_no_object_of_the_first(grown, url):
    before, old = objects(url), Cache.open(url)
    features = [old.features(i).tobytes() for i in range(6)]
    new = BucketStore(url)  # another process, which has no tables of its own
    plan = new.write_plan(1, [plan_table(1, first=3)])
    with new.hold_leases("b"):
        make(new, plan)
        finish(new, plan, 1)
    after = objects(url)
    assert {name for name in before if after[name] != before[name]} <= {"CACHE.json", "finish.claim"}
    assert set(after) == {*whole(4, 2), file_of(new, "source")}
    cache = Cache.open(url)
    assert (cache.generation, len(cache), cache.info.counts["superseded"]) == (1, 8, 0)
    assert [Cache.open(url, generation=0).features(i).tobytes() for i in range(6)] == features
    assert verify(url, deep=True) == []


def test_a_generation_in_a_bucket_supersedes_the_rows_of_keys_that_it_plans_again(grown, url):
    table = plan_table(1).set_column(5, "shard", pa.array([3, 3], pa.int32()))  # utt-0 and utt-1 once more
    new = BucketStore(url)
    plan = new.write_plan(1, [table])
    with new.hold_leases("b"):
        make(new, plan, fail="utt-1")
        finish(new, plan, 1)
    cache = Cache.open(url)
    assert cache.info.counts["superseded"] == 2
    assert cache.strings("key", range(len(cache))) == ["utt-2", "utt-3", "utt-4", "utt-5", "utt-0"]
    assert np.all(cache.features(4) == 3.0)


def test_an_unfinished_generation_in_a_bucket_does_not_disturb_readers(grown, url):
    plan = grown.write_plan(1, [plan_table(2, first=3)])
    with grown.hold_leases("b"):
        assert grown.acquire(3)
        write(grown, 3, plan)
        grown.publish(3)
        assert grown.acquire(4)
        assert grown.acquire(None)
        assert len(Cache.open(url)) == 6
        with pytest.raises(UserError, match=r"shard 000004 of .* is not committed"):
            grown.finalize(SPEC, 1, plan, {})
    assert len(Cache.open(url)) == 6
    assert not grown.lists_plan(SPEC.feature_id, plan.id)


def test_of_two_plans_of_a_generation_at_once_one_wins(grown, url):
    other = BucketStore(url)
    first = grown.write_plan(1, [plan_table(1, first=3)])
    second = other.write_plan(1, [plan_table(2, first=3)])
    assert (second.id, len(second), second.first_shard) == (first.id, 2, 3)


def test_a_late_finalization_does_not_take_back_a_generation(grown, url):
    """A process stands still before it writes CACHE.json, and others finish its generation and the next one."""
    late = BucketStore(url)
    plans = [grown.write_plan(1, [plan_table(1, first=3)]), grown.write_plan(2, [plan_table(1, first=4)])]
    with late.hold_leases("late"), grown.hold_leases("b"):
        make(late, plans[0])
        grown._listed_at = None

        def overtake(what: str, name: str) -> None:
            if (what, name) == ("put", "CACHE.json"):
                late._objects.before = lambda what, name: None
                grown.finalize(SPEC, 1, plans[0], {})
                make(grown, plans[1])
                grown.finalize(SPEC, 2, plans[1], {})

        assert late.acquire(None)
        grown._claims._held["finish.claim"] = late._objects.version("finish.claim")  # taken over
        late._objects.before = overtake
        late.finalize(SPEC, 1, plans[0], {})
    assert len(Cache.open(url).info.generations) == 3


def test_a_generation_cannot_be_finished_when_a_table_before_it_is_gone(grown, url):
    obstore.delete(memory(url), "failures/000.parquet")
    new = BucketStore(url)
    plan = new.write_plan(1, [plan_table(1, first=3)])
    with new.hold_leases("b"):
        make(new, plan)
        with pytest.raises(UserError, match=r"failures/000.parquet' does not exist: rerun the same extraction"):
            finish(new, plan, 1)


def test_two_label_sets_of_one_name_at_once_are_both_kept_and_one_is_current(grown, url):
    other, entries = BucketStore(url), []

    def overtake(what: str, name: str) -> None:
        if (what, name) == ("put", "labels/LABELS.json"):
            grown._objects.before = lambda what, name: None
            entries.append(other.add_labels(label_table(2, "theirs"), "mine", "test"))

    grown._objects.before = overtake
    entries.append(grown.add_labels(label_table(2, "ours"), "mine", "test"))
    assert [entry.name for entry in grown.labels().sets] == ["source", "mine", "mine"]
    assert Cache.open(url, "mine").strings("text", [0, 1]) == ["ours 0", "ours 1"]
    assert Cache.open(url, entries[0].id).strings("text", [0, 1]) == ["theirs 0", "theirs 1"]
    assert grown.open_labels("mine").id == entries[1].id


def test_an_older_label_set_becomes_current_again_without_another_file(grown, url):
    first = grown.add_labels(label_table(2, "first"), "mine", "test")
    grown.add_labels(label_table(2, "second"), "mine", "test")
    files = {name for name in names(url) if name.startswith("labels/")}
    again = BucketStore(url).add_labels(label_table(2, "first"), "mine", "test")
    assert (again.id, again.file) == (first.id, first.file)
    assert {name for name in names(url) if name.startswith("labels/")} == files
    assert Cache.open(url, "mine").strings("text", [0]) == ["first 0"]


@pytest.mark.parametrize("left", ["the same rows, written otherwise", "half a file", "other rows"])
def test_a_label_file_left_by_a_killed_process_is_used_or_written_over(grown, url, left, tmp_path):
    wanted = label_table(3, "new")
    entry = BucketStore(f"{url}-other").add_labels(wanted, "mine", "test")
    path = tmp_path / "left.parquet"
    pq.write_table(wanted if left.startswith("the same") else label_table(3, "x"), path, compression="none")
    data = path.read_bytes()[: 40 if left.startswith("half") else None]
    grown._objects.put(f"labels/{entry.file.name}", data, None)
    added = grown.add_labels(wanted, "mine", "test")
    assert (added.id, added.file.name) == (entry.id, entry.file.name)
    assert (objects(url)[f"labels/{entry.file.name}"] == data) == left.startswith("the same")
    assert Cache.open(url, "mine").strings("text", [0, 1, 2]) == ["new 0", "new 1", "new 2"]


def test_a_name_that_no_label_set_can_have_is_refused_in_a_bucket_too(grown):
    with pytest.raises(UserError, match="cannot name a label set"):
        grown.add_labels(label_table(2), "../mine", "test")


def test_the_cache_file_and_the_label_index_of_a_bucket_are_sealed(grown, url):
    for name in ("CACHE.json", "labels/LABELS.json"):
        assert unseal_bytes(objects(url)[name], name)["schema_version"] == 2
