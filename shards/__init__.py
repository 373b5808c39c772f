"""The contract between extraction and training: the cache format, its writer and its readers. Contains no model code.

To read a cache in your own training loop::

    data = shards.open("caches/…")           # map-style torch dataset: data[i]["features"], data[i]["text"]
    data = shards.as_webdataset("caches/…")  # webdataset pipeline: for sample in data, data.shuffle(…)
    data = shards.FeatureStream(             # length-grouped batches with an exact resume state
        [shards.Cache.open("caches/…")], shards.SamplerConfig(max_frames=8000), seed=0)

Names are imported on first use: ``import shards`` loads neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.read.cache import Cache
    from shards.read.map_dataset import FeatureDataset, as_webdataset, collate
    from shards.read.map_dataset import FeatureDataset as open
    from shards.stream.iterable_dataset import FeatureStream
    from shards.stream.sampler import SamplerConfig

VERSION = "0.1.0"

__all__ = [
    "VERSION",
    "Cache",
    "FeatureDataset",
    "FeatureStream",
    "SamplerConfig",
    "as_webdataset",
    "collate",
    "open",
]

_MODULES = {
    "Cache": "shards.read.cache",
    "FeatureDataset": "shards.read.map_dataset",
    "FeatureStream": "shards.stream.iterable_dataset",
    "SamplerConfig": "shards.stream.sampler",
    "as_webdataset": "shards.read.map_dataset",
    "collate": "shards.read.map_dataset",
    "open": "shards.read.map_dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), "FeatureDataset" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
