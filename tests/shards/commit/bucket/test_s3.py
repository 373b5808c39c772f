"""s3:// against a server on the loopback interface: a cache that grows, and label sets of two processes."""

from __future__ import annotations

import pytest
from tiny_bucket import SPEC, finish, label_table, make, plan_table
from tiny_s3 import s3_server

from shards.commit.bucket.store import BucketStore
from shards.read.cache import Cache

pytestmark = pytest.mark.slow


@pytest.fixture
def s3(monkeypatch, tmp_path):
    for package in ("boto3", "moto", "s3fs"):
        pytest.importorskip(package)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.setenv(f"AWS_{name}", "")  # so that monkeypatch restores it
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    with s3_server("bucket") as server:
        server.account()
        yield server


@pytest.mark.parametrize("loses", [0, 3])
def test_a_cache_in_s3_grows_and_gets_label_sets_of_two_processes(s3, loses):
    url = f"s3://bucket/made-{loses}"  # the server of a later test still has the objects of an earlier one
    a, b = BucketStore(url), BucketStore(url)
    s3.loses = loses
    plans = [a.write_plan(0, [plan_table()]), b.write_plan(1, [plan_table(1, first=3)])]
    with a.hold_leases("a"), b.hold_leases("b"):
        for generation, (store, plan) in enumerate(zip((a, b), plans, strict=True)):
            make(store, plan)
            finish(store, plan, generation)
            assert len(Cache.open(url)) == [6, 8][generation]
    for store, text in ((a, "one"), (b, "two")):
        store.add_labels(label_table(4, text), "mine", "test")
    assert all(a.lists_plan(SPEC.feature_id, plan.id) for plan in plans)
    assert [entry.name for entry in a.labels().sets] == ["source", "mine", "mine"]
    assert Cache.open(url, "mine").strings("text", [0]) == ["two 0"]
    assert len(Cache.open(url, generation=0)) == 6
    tars = [name for name, _ in s3.puts if name.endswith(".tar")]
    assert tars == [f"bucket/made-{loses}/shards/{i:06d}.tar" for i in range(4)]
