"""Caches made by a stranger who means harm: what a pull fetches, writes and leaves."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import make_cache
from tiny_disk import small_disk
from tiny_faults import reseal
from tiny_server import serve

from shards.errors import UserError, WorkFailed
from shards.format.layout import Layout
from shards.inspect.verify import verify
from shards.labels.store import read_index
from shards.read.cache import Cache
from shards.remote import client as storage
from shards.remote.mirror import Mirror
from shards.share.transfer import pull

OWN = re.compile(
    r"CACHE\.json|labels/LABELS\.json|labels/[\w.-]+-[0-9a-f]{8,64}\.parquet|(plans|manifests|failures)/\d{3}\.parquet"
    r"|shards/\d{6}\.(tar|parquet|json)"
)
EVIL = "../../../evil"


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=12, shards=4, seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 2)
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))


def _everywhere(tree, name="name"):
    """Add a name of a stranger's choice to every mapping of a tree."""
    for value in list(tree.values() if isinstance(tree, dict) else tree):
        if isinstance(value, dict | list):
            _everywhere(value, name)
    if isinstance(tree, dict):
        tree[name] = EVIL


def _files(tree):
    entry = dict(tree["generations"][0]["files"]["plan"])
    tree["files"] = {EVIL: entry, "shards/../../evil": entry, "/tmp/evil": entry}
    tree["generations"][0]["files"] |= tree["files"]


def _label_file(name):
    return lambda tree: tree["sets"][0]["file"].update(name=name)


ATTACKS = {
    "files of CACHE.json": ("CACHE.json", _files),
    "names in generations": ("CACHE.json", lambda tree: _everywhere(tree["generations"][0]["files"])),
    "path in generations": ("CACHE.json", lambda tree: _everywhere(tree["generations"][0]["files"], "path")),
    "names in records": ("shards/000001.json", _everywhere),
    "shard that is a path": ("shards/000001.json", lambda tree: tree.update(shard=EVIL)),
    "shard of another": ("shards/000001.json", lambda tree: tree.update(shard=2)),
    "first shard below 0": ("CACHE.json", lambda tree: tree["generations"][0].update(first_shard=-1)),
    **{
        f"label file {name}": ("labels/LABELS.json", _label_file(name))
        for name in (
            EVIL,
            "/tmp/evil",
            "..",
            "evil",
            "evil.py",
            "LABELS.json",
            "source-0.parquet",
            "other-00000000.parquet",
            "source-00000000.parquet.tmp-1",
            "labels.claim",
        )
    },
    "name of a set": ("labels/LABELS.json", lambda tree: tree["sets"][0].update(name=EVIL)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pull_fetches_and_writes_files_of_the_format_alone(near, tmp_path, attack):
    served = Path(shutil.copytree(near, tmp_path / "served" / "some" / "cache"))
    file, change = ATTACKS[attack]
    entry = read_index(near).sets[0].file.name
    for place in ("evil", "some/evil", "some/cache/evil", "some/cache/labels/evil", "some/cache/labels/evil.py"):
        shutil.copyfile(near / "labels" / entry, tmp_path / "served" / place)
    reseal(served / file, change)
    target, written = tmp_path / "a" / "b" / "c" / "back", 0
    with serve(tmp_path / "served") as server:
        with suppress(UserError, WorkFailed):  # what is ignored may stand there
            pull(f"{server.url}/some/cache", target)
            written = sum(path.is_file() for path in target.rglob("*"))
            assert written == sum(path.is_file() for path in near.rglob("*"))
        asked = {name.partition("some/cache/")[2] for name, _ in server.asked}
    assert asked <= {name for name in asked if OWN.fullmatch(name)}
    left = [path for path in (tmp_path / "a").rglob("*") if not path.is_dir()]
    assert all(OWN.fullmatch(str(path.relative_to(target))) for path in left if path.is_relative_to(target)), left
    assert all(path.is_relative_to(target) for path in left)
    assert not Path("/tmp/evil").exists()
    if not written:
        assert not Layout(target).cache.exists()


def _tar_of(size):
    return lambda tree: tree["tar"].update(bytes=size)


@pytest.mark.parametrize("size", [2**62, 10**12, 40_960, 0])
def test_a_size_that_the_server_does_not_have_is_refused_before_anything_is_removed_or_created(near, tmp_path, size):
    served = Path(shutil.copytree(near, tmp_path / "served"))
    with serve(served) as server:
        kept = Mirror.open(server.url, budget=10**6)
        for shard in range(4):
            kept.fetch(shard)
        reseal(Layout(served).record(1), _tar_of(size))
        kept.layout.record(1).unlink()
        kept.layout.tar(1).unlink()
        with pytest.raises(
            UserError, match=rf"takes {re.escape(f'{size / 1e9:.3g}')} GB|has \d+ bytes, not {size} as the cache says"
        ):
            kept.fetch(1)
        assert [kept.layout.tar(shard).exists() for shard in range(4)] == [True, False, True, True]
        with pytest.raises(UserError, match=rf"shards/000001.tar' has \d+ bytes, not {size} as the cache says"):
            pull(server.url, tmp_path / "back")
    assert not any(path.stat().st_size > 10**6 for path in (tmp_path / "back").rglob("*"))


def test_a_shard_larger_than_the_whole_mirror_removes_none_even_if_the_server_confirms_its_size(near, tmp_path):
    served = Path(shutil.copytree(near, tmp_path / "served"))
    with serve(served) as server:
        mirror = Mirror.open(server.url, budget=10**6)
        mirror.fetch(0)
        reseal(Layout(served).record(1), _tar_of(10**6 + 1))
        with Layout(served).tar(1).open("r+b") as file:
            file.truncate(10**6 + 1)
        with pytest.raises(UserError, match=r"the local folder is limited to 0\.001 GB: set EARSHARD_CACHE_GB"):
            mirror.fetch(1)
    assert mirror.layout.tar(0).exists()


@pytest.mark.parametrize(
    ("file", "key"), [("plan", "bytes"), ("manifest", "bytes"), ("failures", "bytes"), ("label", "bytes")]
)
def test_a_table_of_a_size_that_the_server_does_not_have_is_not_created(near, tmp_path, file, key):
    served = Path(shutil.copytree(near, tmp_path / "served"))
    if file == "label":
        reseal(served / "labels" / "LABELS.json", lambda tree: tree["sets"][0]["file"].update(bytes=2**62))
    else:
        reseal(Layout(served).cache, lambda tree: tree["generations"][0]["files"][file].update(bytes=2**62))
    with serve(served) as server, pytest.raises(UserError, match=r"has \d+ bytes, not 4611686018427387904"):
        pull(server.url, tmp_path / "back")
    assert not Layout(tmp_path / "back").cache.exists()


@pytest.mark.parametrize("counts", [{"utterances": 10**15}, {"bytes": 2**61}, {"frames": 10**18}, {"shards": 10**9}])
def test_counts_that_lie_cost_no_memory_and_are_named(near, tmp_path, counts):
    lying = Path(shutil.copytree(near, tmp_path / "lying"))

    def lie(tree):
        tree["generations"][0]["counts"].update(counts)
        tree["counts"].update(counts)
        if "shards" in counts:
            tree["generations"][0].update(counts)

    reseal(Layout(lying).cache, lie)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    assert verify(lying, deep=True)
    with suppress(UserError):
        Cache.open(lying).read_stored(np.arange(3))
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_what_a_killed_pull_left_is_removed_by_the_next_and_nothing_else(near, tmp_path):
    target = tmp_path / "back"
    program = "import sys, pathlib, shards.share.transfer as t; t.pull(sys.argv[1], pathlib.Path(sys.argv[2]))"
    with serve(near) as server:
        server.always["000002.tar"] = "hang"
        killed = subprocess.Popen([sys.executable, "-c", program, server.url, target])
        assert server.waiting.wait(60)
        with pytest.raises(UserError, match="another process pulls a cache into"):
            pull(server.url, target)
        killed.kill()
        killed.wait()
        server.always.clear()
        server.go_on.set()
        left = [path.name for path in target.rglob("*.tmp-*")]
        assert any(name.startswith("000002.tar.tmp-pull-") for name in left)
        (target / "shards" / "000001.tar.tmp-12-others").touch()
        pull(server.url, target)
    assert [path.name for path in target.rglob("*.tmp-*")] == ["000001.tar.tmp-12-others"]
    assert not list(target.glob("*.lock"))


def test_a_full_temporary_disk_is_no_damage_of_a_remote_cache(near, tmp_path, monkeypatch):
    big = make_cache(tmp_path / "big", n=40, channels=256, shards=1, min_frames=30)
    with small_disk(tmp_path / "disk", 256) as disk, serve(big) as server:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        for _ in range(2):
            with pytest.raises(UserError, match="the disk is full; free space"):
                verify(server.url, deep=True)
        assert list(disk.path.iterdir()) == []
        disk.set("size=64m")
        assert verify(server.url, deep=True) == []
