"""Extract speech features once, train many audio projectors into a frozen language model.

What user code needs, under one name::

    (cache,) = earshard.extract("speech", limit=200)       # folders of features, as `earshard extract` makes them
    data = earshard.open(cache)                            # data[i]["features"], float32 [frames, channels]
    run = earshard.fit("demo", caches=str(cache), steps=50)  # a run folder, as `earshard train fit` makes it
    texts = earshard.transcribe(run, ["hello.wav"])

``Cache``, ``FeatureStream``, ``SamplerConfig``, ``open``, ``as_webdataset`` and ``collate`` are those of ``shards``,
``OwnEncoder`` is that of ``pipeline``, ``Projector`` and ``load_projector`` are those of ``train``. A configuration is
a YAML file, or the name of a built-in one (the files in ``configs/``, which are part of the package).

Names are imported on first use: ``import earshard`` loads neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shards import VERSION as __version__

if TYPE_CHECKING:
    from earshard.api import extract, fit, transcribe
    from pipeline import OwnEncoder
    from shards import Cache, FeatureStream, SamplerConfig, as_webdataset, collate, open
    from train import Projector, load_projector

__all__ = [
    "Cache",
    "FeatureStream",
    "OwnEncoder",
    "Projector",
    "SamplerConfig",
    "__version__",
    "as_webdataset",
    "collate",
    "extract",
    "fit",
    "load_projector",
    "open",
    "transcribe",
]

_PACKAGES = {
    "shards": ("Cache", "FeatureStream", "SamplerConfig", "as_webdataset", "collate", "open"),
    "pipeline": ("OwnEncoder",),
    "train": ("Projector", "load_projector"),
    "earshard.api": ("extract", "fit", "transcribe"),
}
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
