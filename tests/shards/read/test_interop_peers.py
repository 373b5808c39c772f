"""Two heavy readers get every utterance with equal bytes and text: Ray Data and Megatron-Energon.

`make test-all` installs them beside the project's own environment (requirements-test-all.lock).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_cache import make_cache

from shards.format.layout import Layout
from shards.read.cache import Cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache.open(make_cache(tmp_path_factory.mktemp("peers") / "cache", n=24, shards=3))


@pytest.fixture
def tars(cache) -> list[Path]:
    return sorted(Layout(cache.path).shards.glob("*.tar"))


def assert_every_utterance(samples: Iterable[Mapping[str, Any]], cache: Cache) -> None:
    """``samples``: ``__key__``, and the members ``npy`` and ``json`` as bytes."""
    found = {sample["__key__"]: sample for sample in samples}
    assert len(found) == len(cache)
    for index in range(len(cache)):
        row = cache.row(index)
        sample = found[row["key"]]
        tar = Layout(cache.path).tar(row["shard"]).read_bytes()
        assert sample["npy"] == tar[row["offset"] : row["offset"] + row["length"]]
        assert json.loads(sample["json"])["text"] == row["text"]


@pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning:ray\.data\.context")  # its own defaults
def test_ray_data_reads_every_utterance(cache, tars):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        samples = ray.data.read_webdataset([str(tar) for tar in tars], decoder=None).take_all()
    finally:
        ray.shutdown()
    assert len(samples) == len(cache)
    assert_every_utterance(samples, cache)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")  # it always sets it
def test_megatron_energon_prepares_the_shards_and_reads_every_utterance(cache, tars, tmp_path):
    energon = pytest.importorskip("megatron.energon")
    folder = tmp_path / "energon"
    folder.mkdir()
    for tar in tars:
        shutil.copy(tar, folder)  # prepare leaves its index beside them
    prepare = "from megatron.energon.cli.main import main; main()"
    words = ["prepare", "--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--num-workers", "1"]
    subprocess.run(
        [sys.executable, "-c", prepare, *words, "--sample-type", "CrudeWebdataset", str(folder)],
        check=True,
        capture_output=True,
    )

    @energon.stateless
    def cook(sample):
        return {**energon.basic_sample_keys(sample), "npy": sample["npy"], "json": sample["json"]}

    class AsStored(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)
        decoder = None

        @energon.stateless
        def encode_sample(self, sample):
            return sample

        @energon.stateless
        def batch(self, samples):
            return samples

    dataset = energon.get_train_dataset(
        str(folder),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=AsStored(),
    )
    samples = [sample for batch in energon.get_loader(dataset) for sample in batch]
    assert len(samples) == len(cache)
    assert_every_utterance(samples, cache)
