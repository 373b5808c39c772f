"""A cache as a map-style torch dataset and as a webdataset pipeline, for use in other training loops.

Takes a cache, its folder or its URL; yields dictionaries of a float32 tensor and the metadata of the utterance. Both
read the cache directly. Neither has the global order, the length grouping or the resume state of
``shards/stream/iterable_dataset.py``.
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
from shards.format.codec import check_codes, decode, decoded_dtype
from shards.format.layout import Layout
from shards.format.npy import parse_npy_header
from shards.labels.table import LabelSet
from shards.read.cache import Cache

SAMPLE_FIELDS = ["key", "id", "text", "speaker", "split", "frames"]  # of every item, with the other label columns
FIRST_LABELS = dict.fromkeys(("text", "speaker", "split"), "")  # a shard's JSON has those of its extraction


class FeatureDataset(Dataset[dict[str, Any]]):
    """A map-style torch dataset over a cache, its folder or its URL; ``shards.open`` is this class.

    Item i is a dictionary: ``features`` is a float32 tensor [frames, channels], or for codes an int32 tensor
    [frames, codebooks], that owns its memory; ``key``, ``id``, ``frames``, ``duration`` (seconds) and the columns of
    the label set, such as ``text``, ``speaker`` and ``split``.
    :func:`collate` pads a list of items.

    Args:
        labels: name or id of a label set, or a file of labels, see :meth:`shards.Cache.open`.
        variants: whether the variants of utterances (``KEY~1``) are items, too, with the labels of their utterance.

    Raises:
        UserError: ``cache`` is not a complete cache, or there are no such labels.
    """

    def __init__(
        self, cache: str | Path | Cache, labels: str | Path | LabelSet | None = None, *, variants: bool = False
    ) -> None:
        self.cache = _open_cache(cache, labels, variants)
        self._fields = [*SAMPLE_FIELDS, *(n for n in self.cache.labels.table.column_names if n not in SAMPLE_FIELDS)]
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if os.getpid() != self._process:  # a forked DataLoader worker
            self.cache.detach()
            self._process = os.getpid()
        row = self.cache.row(index)
        features = np.empty((row["frames"], self.cache.spec.channels), decoded_dtype(self.cache.spec.codec))
        self.cache.read_into(index, features)
        metadata = {name: row[name] for name in self._fields}
        duration = row["samples"] / self.cache.spec.sampling_rate
        return {"features": torch.from_numpy(features), **metadata, "duration": duration}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad items to ``features`` [B, T, C] (zero-padded), ``lengths`` int64 [B] and lists of other fields."""
    features = torch.nn.utils.rnn.pad_sequence([sample["features"] for sample in samples], batch_first=True)
    lengths = torch.tensor([len(sample["features"]) for sample in samples])
    others = {name: [sample[name] for sample in samples] for name in samples[0] if name != "features"}
    return {"features": features, "lengths": lengths, **others}


def as_webdataset(
    cache: str | Path | Cache,
    *,
    labels: str | Path | LabelSet | None = None,
    seed: int | None = None,
    variants: bool = False,
) -> Any:
    """Return a webdataset pipeline over a cache, its folder or its URL: one decoded sample per item.

    Shards are split by node, then by DataLoader worker; every item occurs once per epoch. A sample holds
    ``__key__``, ``features`` (float32 tensor [frames, channels]; int32 for codes), the fields of the shard's JSON
    such as ``duration``, and the columns of the label set; ``text``, ``speaker`` and ``split`` are "" if it does not
    have them. The result chains like any webdataset pipeline: ``.shuffle(1000)``,
    ``.batched(8, collation_fn=shards.collate)``.

    Args:
        labels: name or id of a label set, or a file of labels, see :meth:`shards.Cache.open`.
        seed: shuffles the order of shards, differently in each epoch and equally on every node; ``None`` keeps the
            stored order.
        variants: whether the variants of utterances (``KEY~1``) are items, too, with the labels of their utterance.

    Raises:
        UserError: ``cache`` is not a complete cache, there are no such labels, or (while iterating) a sample is
            corrupt.
    """
    import webdataset as wds

    class Pipeline(wds.DataPipeline, wds.FluidInterface):  # type: ignore[misc]  # webdataset has no types
        """A pipeline with the chaining methods of webdataset.WebDataset."""

    source = _open_cache(cache, labels, variants)
    numbers = sorted({source.shard_of(int(first)) for first in source.bounds[:-1]})
    return Pipeline(
        wds.SimpleShardList([str(number) for number in numbers]),
        # Shuffle before the split: if each node shuffled separately, the nodes would not partition the shards.
        *([] if seed is None else [wds.detshuffle(bufsize=len(numbers), initial=len(numbers), seed=seed)]),
        wds.split_by_node,
        wds.split_by_worker,
        _OpenShards(source),
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        _DecodeSamples(source),
    )


def _open_cache(cache: str | Path | Cache, labels: str | Path | LabelSet | None, variants: bool) -> Cache:
    if not isinstance(cache, Cache):
        return Cache.open(cache, labels, variants=variants)
    if labels is not None or variants:
        name = "variants" if labels is None else "labels"
        raise UserError(f"'{cache.location}' is already open: pass {name} to Cache.open")
    return cache


class _OpenShards:
    """Map shard numbers to open tars. A remote shard is fetched here, in the process that reads it."""

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
    """Map samples of bytes to samples of a tensor and its labels: one per item; superseded rows have none."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._shard, self._items = -1, dict[str, list[dict[str, Any]]]()

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            try:
                labels = self._labels(int(Path(sample["__url__"]).stem)).get(sample["__key__"])
                if labels is None:
                    continue
                scale = _array(sample["scale.npy"]) if "scale.npy" in sample else None
                stored, size = _array(sample["npy"]), self.cache.spec.codebook_size
                if size:
                    check_codes(stored, size)
                features = decode(self.cache.spec.codec, stored, scale)
                metadata = json.loads(sample["json"])
            except (KeyError, ValueError) as error:
                name = f"'{sample.get('__key__')}' in '{sample.get('__url__')}'"
                raise UserError(f"utterance {name} is corrupt ({error}): run `python -m shards verify`") from None
            names = {"__key__": sample["__key__"], "__url__": sample["__url__"]}
            for row in labels:
                yield {**names, **metadata, **FIRST_LABELS, **row, "features": torch.from_numpy(features.copy())}

    def _labels(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the label set of the items of a shard, by key."""
        if shard != self._shard:
            shards = self.cache.item_shards
            begin, end = np.searchsorted(shards, [shard, shard + 1]).tolist()
            self._shard, self._items = shard, {}
            items = np.arange(begin, end)
            for key, row in zip(
                self.cache.strings("key", items), self.cache.label_rows(items).to_pylist(), strict=True
            ):
                self._items.setdefault(key, []).append(row | {"key": key})
        return self._items


def _array(data: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    dtype, shape, start = parse_npy_header(memoryview(data))
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)
