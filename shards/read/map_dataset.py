"""A cache as other people's loops want it: a map-style torch dataset, and a webdataset pipeline.

In: a cache, its folder or its URL. Out: dictionaries of a float32 tensor and what is known of the utterance. Both read
the cache itself; neither has the global order, the buckets or the state of ``shards/stream/iterable_dataset.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shards.errors import UserError
from shards.files import open_file
from shards.format.codec import decode
from shards.format.layout import Layout
from shards.format.npy import parse_npy_header
from shards.read.cache import Cache

SAMPLE_FIELDS = ["key", "id", "text", "speaker", "split", "frames"]


class FeatureDataset(Dataset[dict[str, Any]]):
    """A map-style torch dataset over a cache, its folder or its URL; ``shards.open`` is this class.

    Item i is a dictionary: ``features`` is a float32 tensor [frames, channels] that owns its memory; ``key``, ``id``,
    ``text``, ``speaker``, ``split``, ``frames`` and ``duration`` (seconds) come from the manifest. :func:`collate`
    pads a list of items.

    Raises:
        UserError: there is no complete cache there.
    """

    def __init__(self, cache: str | Path | Cache) -> None:
        self.cache = cache if isinstance(cache, Cache) else Cache.open(cache)
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if os.getpid() != self._process:  # a forked DataLoader worker
            self.cache.detach()
            self._process = os.getpid()
        row = self.cache.row(index)
        features = np.empty((row["frames"], self.cache.spec.channels), dtype=np.float32)
        self.cache.read_into(index, features)
        about = {name: row[name] for name in SAMPLE_FIELDS}
        duration = row["samples"] / self.cache.spec.sampling_rate
        return {"features": torch.from_numpy(features), **about, "duration": duration}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """``features`` [B, T, C] with zeros behind, ``lengths`` int64 [B], and a list of every other field."""
    features = torch.nn.utils.rnn.pad_sequence([sample["features"] for sample in samples], batch_first=True)
    lengths = torch.tensor([len(sample["features"]) for sample in samples])
    others = {name: [sample[name] for sample in samples] for name in samples[0] if name != "features"}
    return {"features": features, "lengths": lengths, **others}


def as_webdataset(cache: str | Path | Cache, *, seed: int | None = None) -> Any:
    """A webdataset pipeline over a cache, its folder or its URL: one sample per utterance, codecs decoded.

    Shards are split by node, then by DataLoader worker; every utterance comes once an epoch. A sample holds
    ``__key__``, ``features`` (float32 tensor [frames, channels]) and the fields of the shard's JSON: ``text``,
    ``speaker``, ``split``, ``duration`` and so on. The result chains like any webdataset pipeline:
    ``.shuffle(1000)``, ``.batched(8, collation_fn=shards.collate)``.

    Args:
        seed: shuffles the order of shards, differently each epoch and equally on every node; ``None`` keeps it.

    Raises:
        UserError: there is no complete cache there, or (while iterating) a sample is corrupt.
    """
    import webdataset as wds

    class Pipeline(wds.DataPipeline, wds.FluidInterface):  # type: ignore[misc]  # webdataset has no types
        """As webdataset.WebDataset is one: stages, and methods that add stages."""

    source = cache if isinstance(cache, Cache) else Cache.open(cache)
    numbers = sorted({source.shard_of(int(first)) for first in source.bounds[:-1]})
    return Pipeline(
        wds.SimpleShardList([str(number) for number in numbers]),
        # Before the split: nodes that shuffled for themselves would not divide the shards.
        *([] if seed is None else [wds.detshuffle(bufsize=len(numbers), initial=len(numbers), seed=seed)]),
        wds.split_by_node,
        wds.split_by_worker,
        _OpenShards(source),
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        _DecodeSamples(source.spec.codec),
    )


class _OpenShards:
    """Shard numbers to open tars; a far shard is fetched here, in the process that reads it."""

    def __init__(self, cache: Cache) -> None:
        self.layout, self.mirror = Layout(cache.path), cache.mirror

    def __call__(self, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        if self.mirror is not None:
            self.mirror.detach()
        for shard in shards:
            number = int(shard["url"])
            path = self.layout.tar(number)
            with open_file(path) if self.mirror is None else self.mirror.open_shard(number) as stream:
                yield {"url": str(path), "stream": stream}


class _DecodeSamples:
    """Samples of bytes to samples of a tensor and its metadata."""

    def __init__(self, codec: str) -> None:
        self.codec = codec

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            try:
                scale = _array(sample["scale.npy"]) if "scale.npy" in sample else None
                features = torch.from_numpy(decode(self.codec, _array(sample["npy"]), scale))
                about = json.loads(sample["json"])
            except (KeyError, ValueError) as error:
                name = f"'{sample.get('__key__')}' in '{sample.get('__url__')}'"
                raise UserError(f"utterance {name} is not sound ({error}): run `python -m shards verify`") from None
            yield {"__key__": sample["__key__"], "__url__": sample["__url__"], **about, "features": features}


def _array(data: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    dtype, shape, start = parse_npy_header(memoryview(data))
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)
