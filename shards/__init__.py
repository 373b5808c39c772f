"""The contract between the two stages: the cache format, its writer, its readers. Knows no model.

For loops that are not ours, in three lines each::

    data = shards.open("caches/…")                     # map-style: len(data), data[i]["features"], data[i]["text"]
    data = shards.as_webdataset("caches/…")            # a webdataset pipeline: for sample in data, data.shuffle(…)
    data = FeatureStream([Cache.open("caches/…")], …)  # batches with a state: shards/stream/iterable_dataset.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `import shards` stays light: torch and webdataset are imported by whoever calls
    from shards.read.cache import Cache
    from shards.read.map_dataset import FeatureDataset

VERSION = "0.1.0"


def open(cache: str | Path | Cache) -> FeatureDataset:
    """A map-style torch dataset over a cache, its folder or its URL."""
    from shards.read.map_dataset import FeatureDataset

    return FeatureDataset(cache)


def as_webdataset(cache: str | Path | Cache, *, seed: int | None = None) -> Any:
    """A webdataset pipeline over a cache, its folder or its URL: one sample an utterance, codecs undone.

    Shards are split by node, then by DataLoader worker; every utterance comes once an epoch. A sample holds
    ``__key__``, ``features`` (float32 tensor [frames, channels]) and the fields of the shard's JSON: ``text``,
    ``speaker``, ``split``, ``duration`` …. The result chains as webdataset's do: ``.shuffle(1000)``,
    ``.batched(8, collation_fn=shards.read.map_dataset.collate)``.

    Args:
        seed: shuffles the order of shards, anew each epoch, the same on every node; ``None`` keeps it.
    """
    from shards.read.map_dataset import as_webdataset as build

    return build(cache, seed=seed)
