"""Other people's readers get every utterance of a cache, byte for byte."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_cache import make_cache

from shards.read.cache import Cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("interop") / "cache", n=13, channels=4, shards=4)


@pytest.fixture(scope="module")
def ours(path) -> dict[str, tuple[bytes, str]]:
    cache = Cache.open(path)
    rows = range(len(cache))
    both = zip(cache.strings("key", rows), cache.strings("text", rows), strict=True)
    return {key: (cache.features(i).tobytes(), text) for i, (key, text) in enumerate(both)}


@pytest.fixture
def webdataset():
    """The package; it leaves the closing of its tars to the collector, which therefore runs before the next test."""
    import webdataset

    yield webdataset
    gc.collect()


UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed file <_io.*tar:ResourceWarning")


def tars(path: Path) -> list[str]:
    return [str(tar) for tar in sorted((path / "shards").glob("*.tar"))]


def array(data: bytes) -> bytes:
    return np.load(io.BytesIO(data), allow_pickle=False).tobytes()


@UNCLOSED
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_with_dataloader_workers_reads_every_utterance(webdataset, path, ours, workers):
    from torch.utils.data import DataLoader

    dataset = webdataset.WebDataset(tars(path), shardshuffle=False, empty_check=False)
    samples = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    found = {sample["__key__"]: (array(sample["npy"]), json.loads(sample["json"])["text"]) for sample in samples}
    assert len(samples) == 13
    assert found == ours


@UNCLOSED
def test_webdataset_decodes_arrays_and_json_by_itself(webdataset, path, ours):
    dataset = webdataset.WebDataset(tars(path), shardshuffle=False).decode()
    found = {sample["__key__"]: (sample["npy"].tobytes(), sample["json"]["text"]) for sample in dataset}
    assert found == ours


@UNCLOSED
def test_webdataset_returns_the_scale_of_a_codec_next_to_its_array(webdataset, tmp_path):
    path = make_cache(tmp_path / "int8", n=3, channels=4, codec="int8", shards=1)
    cache = Cache.open(path)
    for index, sample in enumerate(webdataset.WebDataset(tars(path), shardshuffle=False).decode()):
        decoded = sample["npy"] * sample["scale.npy"]
        np.testing.assert_array_equal(decoded, cache.features(index))


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_every_utterance(path, ours, streaming, tmp_path, monkeypatch):
    import datasets

    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars(path)}, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = list(loaded)
    found = {row["__key__"]: (np.asarray(row["npy"], np.float16).tobytes(), row["json"]["text"]) for row in rows}
    assert len(rows) == 13
    assert found == ours


def test_tarfile_reads_every_utterance(path, ours):
    found = {}
    for tar in tars(path):
        with tarfile.open(tar) as archive:
            members = {info.name: archive.extractfile(info).read() for info in archive}
        for name, data in members.items():
            if name.endswith(".npy"):
                key = name.removesuffix(".npy")
                found[key] = (array(data), json.loads(members[f"{key}.json"])["text"])
    assert found == ours


def test_the_tar_program_reads_every_utterance(path, ours, tmp_path):
    for tar in tars(path):
        subprocess.run(["tar", "-xf", tar, "-C", tmp_path], check=True)
    found = {
        file.stem: (array(file.read_bytes()), json.loads(file.with_suffix(".json").read_text())["text"])
        for file in tmp_path.glob("*.npy")
    }
    assert found == ours


def test_members_of_an_utterance_stand_side_by_side(path):
    for tar in tars(path):
        with tarfile.open(tar) as archive:
            names = archive.getnames()
        assert [name.split(".")[0] for name in names[::2]] == [name.split(".")[0] for name in names[1::2]]
