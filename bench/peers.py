"""Peers of the reader on the same rows: how each stores them, streams them, pads them, and resumes.

In: rows of float16 features [frames, 512] in a cache. Out: one :class:`Peer` a library, as its documentation has it.
``bench/read.py`` and ``bench/resume.py`` time them; a library that is not installed is listed. Payload is counted as
the float16 bytes of valid frames, whatever a library makes of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHANNELS, BATCH, SHARD_MB = 512, 16, 64


def write_cache(folder: Path, megabytes: int) -> Path:
    """A cache of random features of 100 to 800 frames, by the real writer; LibriSpeech-like lengths."""
    import pyarrow as pa

    from shards.claims import new_owner
    from shards.manifest import UTTERANCE_SCHEMA, Layout, finalise, write_plan
    from shards.spec import FeatureSpec
    from shards.writer import ShardWriter

    spec = FeatureSpec(
        family="whisper", tensors="0" * 64, frontend={"n_mels": 80}, layer=6, channels=CHANNELS, hop=320,
        sampling_rate=16000, window="full30", overlap=0.0, trim="valid", dtype="float32", codec="f16",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    count = megabytes * 1_000_000 // (2 * CHANNELS * 620)
    frames = ((2 + 14 * rng.beta(2.5, 0.9, count)) * 50).astype(int)
    shards = np.cumsum(frames) * 2 * CHANNELS // (SHARD_MB * 1_000_000)
    rows = [
        {"key": f"utterance-{i:06d}", "id": f"{i}", "audio": f"{i}.flac", "samples": int(frames[i]) * 320,
         "speaker": "", "text": "a sentence of about the usual length that nobody reads", "split": "",
         "shard": int(shards[i]),
         "row": int(i - np.searchsorted(shards, shards[i]))}
        for i in range(count)
    ]  # fmt: skip
    layout, owner = Layout(folder), new_owner()
    plan = write_plan(layout, pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA), owner)
    noise = rng.standard_normal((1000, CHANNELS), dtype=np.float32)
    for shard in range(plan.shards):
        with ShardWriter(layout, shard, spec, plan.id, owner) as writer:
            for row in plan.shard(shard):
                digest = hashlib.sha256(row["key"].encode()).hexdigest()
                writer.add(row, noise[: row["samples"] // 320], samples=row["samples"], audio_sha256=digest)
            writer.commit({"seconds": 0.0})
    finalise(layout, spec, plan, owner, {})
    return folder


def pad(arrays: list[Any]) -> torch.Tensor:
    tensors = [torch.as_tensor(array) for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def _pad_counted(arrays: list[Any]) -> tuple[torch.Tensor, int]:
    return pad(arrays), payload(arrays)


def payload(arrays: list[Any]) -> int:
    return sum(len(array) for array in arrays) * CHANNELS * 2


def batched(arrays: Iterator[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    while part := list(islice(arrays, BATCH)):
        yield pad(part), payload(part)


class Peer:
    """A library: ``prepare`` stores the rows, ``tensors`` gives each, ``batches`` (padded tensor, payload bytes)."""

    label = ""
    package = ""  # the distribution that must be installed
    exact: str = "yes"  # does a resume give the batches that the uninterrupted run gives?

    def __init__(self, cache: Path, folder: Path) -> None:
        self.cache, self.folder = cache, folder

    @classmethod
    def version(cls) -> str | None:
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def prepare(self) -> None:
        """Store the rows of the cache as the library wants them."""

    def tensors(self) -> Iterator[Any]:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        return batched(self.tensors())

    def resumed(self, batch: int) -> Iterator[Any]:
        """An iterator whose first item is batch ``batch`` of the epoch."""
        raise NotImplementedError

    def opened(self) -> Any:
        from shards.reader import Cache

        return Cache.open(self.cache)

    def rows(self) -> Iterator[np.ndarray]:
        cache = self.opened()
        return (cache.features(i) for i in range(len(cache)))

    def urls(self) -> list[str]:
        return [str(path) for path in sorted((self.cache / "shards").glob("*.tar"))]


class Earshard(Peer):
    """As in the second and later epochs: mappings stand and checksums are compared (the warm-up run did both)."""

    label, package = "earshard", "earshard"
    threads, window, prefetch = 2, 8, 4
    _open: Any = None
    _running: Any = None

    def opened(self) -> Any:
        self._open = self._open or super().opened()
        return self._open

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(row) for row in self.rows())

    def stream(self, epochs: int | None = 1) -> Any:
        from shards.order import Rules
        from shards.stream import FeatureStream

        rules = Rules(batch_size=BATCH, window_shards=self.window)
        return FeatureStream([self.opened()], rules, 1, epochs=epochs, threads=self.threads, prefetch=self.prefetch)

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        """As many batches as an epoch has, of a stream that goes on."""
        if self._running is None:
            stream = self.stream(None)
            self._epoch = sum(1 for _ in stream.order.walk(stream._at, 1))
            self._running = iter(stream)
        for batch in islice(self._running, self._epoch):
            yield batch.features, int(batch.lengths.sum()) * CHANNELS * 2

    def resumed(self, batch: int) -> Iterator[Any]:
        stream = self.stream()
        stream.load_state_dict(self.states[batch])
        return iter(stream)

    def remember(self, batches: list[int]) -> None:
        """The states at these batches, as a checkpoint would hold them: found without reading."""
        stream = self.stream()
        steps = list(stream.order.walk(stream._at, 1))
        self.states = {batch: stream._state(steps[batch][1]) for batch in batches}


class OneThread(Earshard):
    label, threads = "earshard, 1 thread", 1


class FirstEpoch(Earshard):
    """Opened anew each time: manifest, mappings and every row's checksum are part of the time."""

    label = "earshard, first epoch"

    def opened(self) -> Any:
        return Peer.opened(self)

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        for batch in self.stream():
            yield batch.features, int(batch.lengths.sum()) * CHANNELS * 2


class FirstEpochUnchecked(FirstEpoch):
    """As ``Cache.open(path, verify=False)``: what the checksums cost is the difference."""

    label = "earshard, first, unchecked"

    def opened(self) -> Any:
        from shards.reader import Cache

        return Cache.open(self.cache, verify=False)


class Webdataset(Peer):
    label, package, workers = "webdataset", "webdataset", 0

    def pipeline(self, batches: bool) -> Any:
        import webdataset as wds

        data = wds.WebDataset(self.urls(), shardshuffle=False, empty_check=False).decode().map(_npy)
        return data.batched(BATCH, collation_fn=_pad_counted) if batches else data

    def load(self, batches: bool) -> Any:
        import webdataset as wds

        return wds.WebLoader(self.pipeline(batches), batch_size=None, num_workers=self.workers)

    def tensors(self) -> Iterator[Any]:
        return iter(self.load(False) if self.workers else self.pipeline(False))

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        return iter(self.load(True) if self.workers else self.pipeline(True))

    def resumed(self, batch: int) -> Iterator[Any]:
        return islice(self.batches(), batch, None)  # it has no state: read again and skip


def _npy(sample: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(sample["npy"])


class WebdatasetWorkers(Webdataset):
    label, workers = "webdataset, 2 workers", 2


class DatasetsArrow(Peer):
    label, package = "datasets (Arrow)", "datasets"

    def prepare(self) -> None:
        import datasets
        import pyarrow as pa

        with datasets.arrow_writer.ArrowWriter(
            path=str(self.folder / "data.arrow"),
            features=datasets.Features(
                {"x": datasets.List(datasets.Value("float16")), "frames": datasets.Value("int32")}
            ),
            writer_batch_size=64,
        ) as writer:
            for row in self.rows():
                values = pa.array(np.asarray(row).ravel())
                offsets = pa.array([0, len(values)], pa.int32())
                writer.write_table(
                    pa.table(
                        {"x": pa.ListArray.from_arrays(offsets, values), "frames": pa.array([len(row)], pa.int32())}
                    )
                )
            writer.finalize()

    def data(self) -> Any:
        import datasets

        return datasets.Dataset.from_file(str(self.folder / "data.arrow")).with_format("numpy")

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(row["x"].reshape(-1, CHANNELS)) for row in self.data())

    def resumed(self, batch: int) -> Iterator[Any]:
        data = self.data()
        rows = (data[i]["x"].reshape(-1, CHANNELS) for i in range(batch * BATCH, len(data)))
        return batched(rows)


class DatasetsWebdataset(Peer):
    label, package = "datasets (webdataset)", "datasets"

    def data(self) -> Any:
        import datasets

        return datasets.load_dataset("webdataset", data_files=self.urls(), split="train", streaming=True)

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(np.asarray(row["npy"], dtype=np.float16)) for row in self.data())

    def resumed(self, batch: int) -> Iterator[Any]:
        rows = (np.asarray(row["npy"], dtype=np.float16) for row in self.data().skip(batch * BATCH))
        return batched(rows)


class LitData(Peer):
    label, package = "LitData", "litdata"

    def prepare(self) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.folder), chunk_bytes="64MB")
        for index, row in enumerate(self.rows()):
            writer[index] = {"x": np.array(row)}
        writer.done()
        writer.merge()

    def data(self) -> Any:
        import litdata

        return litdata.StreamingDataset(str(self.folder), shuffle=False)

    def tensors(self) -> Iterator[Any]:
        return (torch.as_tensor(row["x"]) for row in self.data())

    def resumed(self, batch: int) -> Iterator[Any]:
        data = self.data()
        return batched(torch.as_tensor(data[i]["x"]) for i in range(batch * BATCH, len(data)))


class LitDataBucketed(LitData):
    label = "LitData, by length"

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The batches of our order by LitData's random access: padded as little."""
        stream, data = Earshard(self.cache, self.folder).stream(), self.data()
        for rows, _, _ in stream.order.walk(stream._at, 1):
            part = [data[int(row)]["x"] for row in rows]
            yield pad(part), payload(part)


class Mosaic(Peer):
    label, package = "Mosaic streaming", "mosaicml-streaming"

    def import_(self) -> Any:
        import transformers  # noqa: F401  (asks for torchvision, before the next line)

        # PyPI's torchvision is a CUDA build that fits no CPU torch; streaming wants it for pictures alone.
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            module = sys.modules.setdefault(name, types.ModuleType(name))
            for wanted in ("VisionDataset", "CIFAR10", "to_tensor"):
                setattr(module, wanted, object)
        import streaming

        return streaming

    def prepare(self) -> None:
        streaming = self.import_()
        with streaming.MDSWriter(out=str(self.folder), columns={"x": "ndarray:float16"}, size_limit="64mb") as writer:
            for row in self.rows():
                writer.write({"x": np.array(row)})

    def data(self) -> Any:
        streaming = self.import_()
        streaming.base.util.clean_stale_shared_memory()
        return streaming.StreamingDataset(local=str(self.folder), batch_size=BATCH, shuffle=False)

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(row["x"]) for row in self.data())

    def resumed(self, batch: int) -> Iterator[Any]:
        data = self.data()
        data.load_state_dict(
            {"epoch": 0, "sample_in_epoch": batch * BATCH, "num_canonical_nodes": 1, "shuffle_seed": 9176,
             "initial_physical_nodes": 1}
        )  # fmt: skip
        return batched(torch.from_numpy(row["x"]) for row in data)


class Lhotse(Peer):
    label, package = "lhotse Shar", "lhotse"

    def prepare(self) -> None:
        from lhotse import MonoCut
        from lhotse.shar import SharWriter

        with SharWriter(str(self.folder), fields={"enc": "numpy"}, shard_size=200) as writer:
            for index, row in enumerate(self.rows()):
                cut = MonoCut(id=f"{index:06d}", start=0.0, duration=len(row) * 0.02, channel=0)
                writer.write(cut.attach_tensor("enc", np.array(row), frame_shift=0.02, temporal_dim=0))

    def cuts(self) -> Any:
        from lhotse import CutSet

        return CutSet.from_shar(in_dir=str(self.folder))

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(cut.load_enc()) for cut in self.cuts())

    def resumed(self, batch: int) -> Iterator[Any]:
        return batched(islice(self.tensors(), batch * BATCH, None))


PEERS: list[Callable[[Path, Path], Peer]] = [
    Earshard, OneThread, FirstEpoch, FirstEpochUnchecked, Webdataset, WebdatasetWorkers, DatasetsArrow,
    DatasetsWebdataset, LitData, LitDataBucketed, Mosaic, Lhotse,
]  # fmt: skip
