from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_cache import grow, make_cache
from tiny_server import serve
from torch.utils.data import DataLoader

import shards
from shards.errors import UserError
from shards.format.layout import Layout
from shards.read.cache import Cache
from shards.read.map_dataset import collate


@pytest.fixture(scope="module", params=["f16", "int8"])
def cache(request, tmp_path_factory):
    path = make_cache(tmp_path_factory.mktemp(request.param) / "cache", n=18, shards=5, codec=request.param, seed=2)
    return Cache.open(path)


def keys(samples) -> list[str]:
    return sorted(sample["__key__"] for sample in samples)


def test_shards_are_opened_map_style(cache):
    data = shards.open(cache.path)
    assert len(data) == 18
    for i in range(18):
        sample, row = data[i], cache.row(i)
        assert sample["features"].dtype == torch.float32
        assert np.array_equal(sample["features"].numpy(), np.asarray(cache.features(i), dtype=np.float32))
        assert {name: sample[name] for name in ("key", "text", "speaker", "split", "frames")} == {
            name: row[name] for name in ("key", "text", "speaker", "split", "frames")
        }
        assert sample["duration"] == row["samples"] / 16000
    assert data[-1]["key"] == data[17]["key"]
    with pytest.raises(IndexError):
        data[18]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_dataset_goes_through_a_dataloader(cache, workers):
    data = shards.open(cache)
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers, collate_fn=collate)
    seen = []
    for batch in loader:
        assert batch["features"].shape == (len(batch["key"]), int(batch["lengths"].max()), 8)
        for i, key in enumerate(batch["key"]):
            row = int(key[-5:])
            features = np.asarray(cache.features(row), dtype=np.float32)
            assert np.array_equal(batch["features"][i, : batch["lengths"][i]].numpy(), features)
        seen += batch["key"]
    assert sorted(seen) == sorted(cache.strings("key", range(18)))


def test_a_webdataset_pipeline_returns_every_utterance_decoded(cache):
    samples = list(shards.as_webdataset(cache.path))
    assert [sample["__key__"] for sample in samples] == cache.strings("key", range(18))
    for i, sample in enumerate(samples):
        assert sample["features"].dtype == torch.float32
        assert np.array_equal(sample["features"].numpy(), np.asarray(cache.features(i), dtype=np.float32))
        assert sample["text"] == cache.row(i)["text"]
        assert sample["speaker"] == cache.row(i)["speaker"]


@pytest.mark.parametrize("workers", [1, 6])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_webdataset_pipeline_divides_the_shards_among_workers(cache, workers):
    loader = DataLoader(shards.as_webdataset(cache, seed=1), batch_size=None, num_workers=workers)
    assert keys(loader) == sorted(cache.strings("key", range(18)))


def test_a_webdataset_pipeline_divides_shuffled_shards_among_nodes(cache, monkeypatch):
    pipelines = [shards.as_webdataset(cache, seed=3) for _ in range(3)]
    orders = []
    for _ in range(2):
        epoch = []
        for rank, pipeline in enumerate(pipelines):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            epoch += [sample["__key__"] for sample in pipeline]
        assert sorted(epoch) == sorted(cache.strings("key", range(18)))
        orders.append(epoch)
    assert orders[0] != orders[1]


def test_a_webdataset_pipeline_chains(cache):
    (batch, *_) = shards.as_webdataset(cache).shuffle(10).batched(4, collation_fn=collate)
    assert batch["features"].shape == (4, int(batch["lengths"].max()), 8)
    assert len(batch["text"]) == 4


def test_remote_caches_are_read_both_ways(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path))
    with serve(cache.path) as server:
        pipeline = shards.as_webdataset(server.url)
        assert keys(DataLoader(pipeline, batch_size=None, num_workers=2)) == sorted(cache.strings("key", range(18)))
        assert shards.open(server.url)[3]["features"].equal(shards.open(cache)[3]["features"])


def test_a_corrupt_member_is_reported_with_its_utterance(tmp_path):
    path = make_cache(tmp_path / "cache", n=4, shards=1)
    tar = Layout(path).tar(0)
    data = bytearray(tar.read_bytes())
    data[512:518] = b"NOARRY"
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"utterance 'utt-00000' in .*000000.tar' is corrupt"):
        list(shards.as_webdataset(path))


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, shards; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'webdataset')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_both_kinds_of_dataset_yield_one_sample_per_item_and_none_of_a_superseded_row(tmp_path):
    cache = grow(make_cache(tmp_path / "cache", n=4, shards=1), 1, utt_00002="other audio")
    keys = ["utt-00000", "utt-00001", "utt-00003", "new-00000", "utt-00002"]
    assert [sample["__key__"] for sample in shards.as_webdataset(cache)] == keys
    assert [sample["key"] for sample in shards.open(cache)] == keys


def test_both_kinds_of_dataset_take_labels_with_several_rows_a_key(tmp_path):
    path, file = make_cache(tmp_path / "cache", n=4, shards=2), tmp_path / "tasks.jsonl"
    rows = [
        ("utt-00003", "drei", "translate"),
        ("utt-00003", "three", "transcribe"),
        ("utt-00001", "one", "transcribe"),
    ]
    file.write_text("".join(json.dumps(dict(zip(("key", "text", "task"), row, strict=True))) + "\n" for row in rows))
    for data in (shards.open(path, file), shards.as_webdataset(path, labels=file)):
        samples = list(data)
        assert [(sample["text"], sample["task"]) for sample in samples] == [
            ("one", "transcribe"),
            ("three", "transcribe"),
            ("drei", "translate"),
        ]
        assert [sample["speaker"] for sample in samples] == ["", "", ""]  # not that of the extraction
        assert samples[1]["features"].equal(samples[2]["features"])
        samples[1]["features"][:] = 0  # each owns its memory
        assert samples[2]["features"].any()
    with pytest.raises(UserError, match=r"is already open: pass labels to Cache\.open"):
        shards.open(Cache.open(path), file)
