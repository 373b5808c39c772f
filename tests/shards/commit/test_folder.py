"""Label sets and cleaning in a cache folder that several processes share."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_cache import make_cache

from shards.commit import folder as module
from shards.commit.claims import Claims, process_identity
from shards.commit.folder import FolderStore, add_labels
from shards.errors import UserError
from shards.files import TEMPORARY_INFIX
from shards.format.layout import Layout
from shards.labels.store import read_index
from shards.read.cache import Cache

CHANGING = ("open", "write", "fsync", "replace", "rename", "unlink", "link")


class Crash(BaseException):
    """The process ends here: nothing is cleaned up."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("folder") / "cache", n=4, shards=2)


@pytest.fixture
def layout(whole, tmp_path):
    return Layout(Path(shutil.copytree(whole, tmp_path / "cache")))


def labels(text: str) -> pa.Table:
    return pa.table({"key": ["utt-00000", "utt-00002"], "text": [text, text]})


def texts(path: Path, name: str) -> list[str]:
    return Cache.open(path, name).strings("text", [0, 1])


def dead_claim(path: Path) -> None:
    path.write_text(json.dumps({"owner": "1-dead", **process_identity(), "started": "1"}))


def test_two_sets_of_one_name_at_once_are_both_kept_and_one_is_current(layout, monkeypatch):
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.01)
    together, entries = threading.Barrier(4), []

    def run(text: str) -> None:
        together.wait()
        entries.append(add_labels(layout, labels(text), "mine", "test"))

    threads = [threading.Thread(target=run, args=(f"text {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = read_index(layout.path)
    assert {entry.id for entry in index.sets if entry.name == "mine"} == {entry.id for entry in entries}
    assert len({entry.id for entry in entries}) == 4
    assert {texts(layout.path, entry.id)[0] for entry in entries} == {f"text {i}" for i in range(4)}
    assert texts(layout.path, "mine") == texts(layout.path, index.sets[-1].id)
    assert not layout.labels_claim.exists()


def test_a_kill_at_any_step_of_adding_a_set_loses_nothing_and_the_next_one_cleans_up(layout, tmp_path, monkeypatch):
    add_labels(layout, labels("old"), "mine", "test")
    seen, k = set(), 0
    while True:
        k += 1
        path = Path(shutil.copytree(layout.path, tmp_path / f"try-{k}"))
        calls, crashed = 0, False

        def step(real, k=k):
            def call(*args, **more):
                nonlocal calls, crashed
                if threading.current_thread() is not threading.main_thread():
                    return real(*args, **more)  # heartbeats of the claim
                calls += 1
                crashed |= calls >= k
                if crashed:
                    raise Crash
                return real(*args, **more)

            return call

        with monkeypatch.context() as broken:
            for name in CHANGING:
                broken.setattr(os, name, step(getattr(os, name)))
            try:
                add_labels(Layout(path), labels("new"), "mine", "test")
            except Crash:
                pass
            else:
                if not crashed:
                    break
        found = texts(path, "mine")
        seen.add(found[0])
        assert found in (["old"] * 2, ["new"] * 2)
        assert texts(path, read_index(layout.path).current("mine").id) == ["old"] * 2
        if (claim := Layout(path).labels_claim).exists():
            dead_claim(claim)
        add_labels(Layout(path), labels("next"), "mine", "test")
        assert texts(path, "mine") == ["next"] * 2
        assert not [file for file in path.rglob("*") if TEMPORARY_INFIX in file.name or file.suffix == ".claim"]
    assert seen == {"old", "new"}
    assert k > 10


def test_a_set_that_is_being_written_survives_the_cleaning_of_an_extraction(layout):
    writing, stray = layout.labels / f"mine.parquet{TEMPORARY_INFIX}1-live", layout.path / f"x{TEMPORARY_INFIX}1-dead"
    store = FolderStore(layout.path)
    with store.hold_leases("2-me"), Claims("1-live") as live:
        assert live.acquire(layout.labels_claim)
        for path in (writing, stray):
            path.touch()
        store.cleanup()
        assert (writing.exists(), stray.exists()) == (True, False)
        live.release(layout.labels_claim)
        store.cleanup()
        assert not writing.exists()
    assert not layout.labels_claim.exists()


def test_a_dead_process_that_was_adding_a_set_leaves_no_claim_after_the_next_extraction(layout):
    dead_claim(layout.labels_claim)
    store = FolderStore(layout.path)
    with store.hold_leases("2-me"):
        store.cleanup()
    assert not layout.labels_claim.exists()


def test_the_store_of_a_folder_adds_the_labels_of_the_source_and_opens_them(layout):
    store = FolderStore(layout.path)
    entry = store.add_labels(labels("new"), "source", "test")
    assert store.add_labels(labels("new"), "source", "test") == entry
    assert store.labels().current("source") == entry
    assert store.open_labels("source").table["text"].to_pylist() == ["new"] * 2
    with pytest.raises(UserError, match="the name 'source' belongs to"):
        add_labels(layout, labels("mine"), "source", "test")


def test_the_claim_of_a_set_is_waited_for(layout, monkeypatch):
    naps = []
    with Claims("1-live") as live:
        assert live.acquire(layout.labels_claim)

        def nap(seconds: float) -> None:
            naps.append(seconds)
            live.release(layout.labels_claim)

        monkeypatch.setattr(module.time, "sleep", nap)
        add_labels(layout, labels("new"), "mine", "test")
    assert naps == [module.POLL_INTERVAL]
