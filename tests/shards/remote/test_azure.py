"""az:// by obstore against a server of Azure Blob Storage on the loopback interface."""

from __future__ import annotations

import pytest
from tiny_azure import Azure, serve_azure
from tiny_bucket import SPEC, finish, make, plan_table

from shards.commit.bucket.store import BucketStore, connect_objects
from shards.errors import UserError
from shards.remote import client as storage


@pytest.fixture
def azure(monkeypatch) -> Azure:
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)
    with serve_azure("container") as server:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
        yield server


@pytest.mark.parametrize("scheme", ["az", "abfs"])
def test_writes_keep_to_their_conditions(azure, scheme):
    objects = connect_objects(f"{scheme}://container/a folder")
    assert objects.sizes("") == {}
    assert objects.read("x") is objects.version("x") is None
    first = objects.put("x", b"1", None)
    assert objects.put("x", b"2", None) is None
    second = objects.put("x", b"2", first)
    assert objects.put("x", b"3", first) is None
    found = objects.read("x")
    assert (found.data, found.version, objects.version("x")) == (b"2", second, second)
    assert objects.sizes("") == {"x": 1}
    azure.loses = 1
    assert objects.put("x", b"4", second) == objects.version("x")
    assert objects.put("x", b"5", second) is None


@pytest.mark.parametrize("loses", [0, 3])
def test_a_cache_is_made_in_a_container(azure, loses):
    store = BucketStore("az://container/made")
    azure.loses = loses
    plans = [store.write_plan(0, [plan_table()]), store.write_plan(1, [plan_table(1, first=3)])]
    with store.hold_leases("a"):
        assert store.acquire(0)
        store.release(0)
        for generation, plan in enumerate(plans):
            make(store, plan)
            finish(store, plan, generation)
    assert all(store.lists_plan(SPEC.feature_id, plan.id) for plan in plans)
    shards = [f"shards/{i:06d}.{kind}" for i in range(4) for kind in ("tar", "parquet", "json")]
    tables = [f"{kind}/{i:03d}.parquet" for kind in ("plans", "manifests", "failures") for i in range(2)]
    labels = [f"labels/{name}" for name in ("LABELS.json", store.labels().sets[0].file.name)]
    names = {"CACHE.json", "finish.claim", *tables, *shards, *labels}
    assert {name.removeprefix("made/") for name in azure.blobs} == names


def test_a_container_that_is_not_there_is_reported(azure):
    with pytest.raises(UserError, match="bucket 'nobody' does not exist: create it"):
        connect_objects("az://nobody/cache")
