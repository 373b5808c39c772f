"""gs:// against a server of Google Cloud Storage on the loopback interface: written by obstore, read by gcsfs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tiny_bucket import SPEC, finish, make, plan_table
from tiny_cache import make_cache
from tiny_gcs import GCS, serve_gcs

from shards.commit.bucket.store import BucketStore, connect_objects
from shards.errors import UserError
from shards.inspect.verify import verify
from shards.read.cache import Cache
from shards.remote import client as storage
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig


@pytest.fixture
def gcs(monkeypatch, tmp_path) -> GCS:
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)
    with serve_gcs("bucket") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.mark.slow
def test_a_cache_is_read_from_google_cloud_storage(gcs, tmp_path):
    pytest.importorskip("gcsfs")
    near = make_cache(tmp_path / "near", n=12, shards=3, seed=4)
    for path in near.rglob("*.*"):
        gcs.generation += 1
        gcs.objects["bucket", f"some/cache/{path.relative_to(near)}"] = (gcs.generation, path.read_bytes())
    url = "gs://bucket/some/cache"
    local, far = Cache.open(near), Cache.open(url)
    rows = []
    for batch in FeatureStream([far], SamplerConfig(batch_size=4, window_shards=2), 5, epochs=1):
        rows += batch.rows
        for row, features, frames in zip(batch.rows, batch.features, batch.lengths, strict=True):
            assert np.array_equal(features[:frames].numpy(), local.features(row))
    assert sorted(rows) == list(range(12))
    assert verify(url, deep=True) == []
    with pytest.raises(UserError, match=r"'gs://bucket/other/CACHE.json' does not exist"):
        Cache.open("gs://bucket/other")


def test_writes_keep_to_their_conditions(gcs):
    objects = connect_objects("gs://bucket/folder")
    assert objects.sizes("") == {}
    assert objects.read("x") is objects.version("x") is None
    first = objects.put("x", b"1", None)
    assert first is not None
    assert objects.put("x", b"2", None) is None
    second = objects.put("x", b"2", first)
    assert objects.put("x", b"3", first) is None
    found = objects.read("x")
    assert (found.data, found.version, objects.version("x")) == (b"2", second, second)
    assert objects.sizes("") == {"x": 1}
    for i in range(9):
        objects.put(f"shards/{i}", b"x" * i, None)
    assert objects.sizes("shards") == {str(i): i for i in range(9)}


def test_of_many_who_create_at_once_one_does(gcs):
    objects = [connect_objects("gs://bucket/folder") for _ in range(4)]
    written = []
    threads = [
        threading.Thread(target=lambda o=o, i=i: written.append(o.put("x", b"%d" % i, None)))
        for i, o in enumerate(objects)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version for version in written if version is not None] == [objects[0].version("x")]


def test_a_write_whose_answer_was_lost_recognizes_itself(gcs, tmp_path):
    objects = connect_objects("gs://bucket/folder")
    gcs.loses = 1
    first = objects.put("x", b"1", None)
    (tmp_path / "file").write_bytes(b"2")
    second = objects.put("x", tmp_path / "file", first)
    assert (objects.read("x").data, objects.version("x")) == (b"2", second)
    assert objects.put("x", b"3", first) is None
    assert gcs.puts[-2:] == ["folder/x"] * 2


@pytest.mark.parametrize("loses", [0, 3])
def test_two_makers_share_a_bucket(gcs, loses):
    url = "gs://bucket/made"
    a, b = BucketStore(url), BucketStore(url)
    gcs.loses = loses
    plan = a.write_plan(0, [plan_table()])
    with a.hold_leases("a"), b.hold_leases("b"):
        assert a.acquire(0)
        assert not b.acquire(0)
        a.release(0)
        make(a, plan)
        assert b.acquire(None)
        b.release(None)
        finish(b, plan)
        growth = b.write_plan(1, [plan_table(1, first=3)])
        make(b, growth)
        finish(b, growth, 1)
    assert a.lists_plan(SPEC.feature_id, plan.id)
    assert a.lists_plan(SPEC.feature_id, growth.id)
    shards = [f"shards/{i:06d}.{kind}" for i in range(4) for kind in ("tar", "parquet", "json")]
    tables = [f"{kind}/{i:03d}.parquet" for kind in ("plans", "manifests", "failures") for i in range(2)]
    labels = ["LABELS.json", a.labels().current("source").file.name]
    wanted = {"CACHE.json", "finish.claim", *tables, *shards, *(f"labels/{name}" for name in labels)}
    assert {name.removeprefix("made/") for _, name in gcs.objects} == wanted
    assert [name for name in gcs.puts if name.endswith(".tar")] == [f"made/shards/{i:06d}.tar" for i in range(4)]


@pytest.mark.slow
def test_what_was_made_in_google_cloud_storage_is_a_sound_cache(gcs):
    pytest.importorskip("gcsfs")
    url = "gs://bucket/made"
    store = BucketStore(url)
    plans = [store.write_plan(0, [plan_table()]), store.write_plan(1, [plan_table(1, first=3)])]
    with store.hold_leases("a"):
        for generation, plan in enumerate(plans):
            make(store, plan)
            finish(store, plan, generation)
    assert len(Cache.open(url)) == 8
    assert verify(url, deep=True) == []


def test_a_bucket_that_is_not_there_is_reported(gcs):
    with pytest.raises(UserError, match="bucket 'nobody' does not exist: create it"):
        connect_objects("gs://nobody/cache")
