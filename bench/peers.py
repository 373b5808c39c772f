"""Peers of the reader: how each library stores, streams, pads and resumes the same rows.

One :class:`~ours.Peer` per library, written as its documentation recommends. Rows are float16 features [frames, 512].
``bench/read.py`` and ``bench/resume.py`` time them; libraries that are not installed are listed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from ours import (
    BATCH,
    CHANNELS,
    Earshard,
    FirstEpoch,
    FirstEpochUnchecked,
    OneThread,
    Peer,
    batched,
    pad,
    payload,
)


def _pad_counted(arrays: list[Any]) -> tuple[torch.Tensor, int]:
    return pad(arrays), payload(arrays)


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
        return islice(self.batches(), batch, None)  # no saved state: reads from the start and skips


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
        """Yield the batches of earshard's sampler, read by LitData's random access, so with the same padding."""
        stream, data = Earshard(self.cache, self.folder).stream(), self.data()
        for rows, _, _ in stream.batch_sampler.iter_batches(stream._sampler_state, 1):
            part = [data[int(row)]["x"] for row in rows]
            yield pad(part), payload(part)


class Mosaic(Peer):
    label, package = "Mosaic streaming", "mosaicml-streaming"

    def import_(self) -> Any:
        import transformers  # noqa: F401  (imports torchvision if it can, so before the stubs below)

        # torchvision from PyPI is a CUDA build that does not work with a CPU build of torch; streaming needs it only
        # for images.
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
