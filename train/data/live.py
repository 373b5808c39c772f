"""live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.encoders.base import Encoder
from pipeline.encoders.recording import encode_recording
from shards.errors import UserError
from shards.format import codec
from shards.format.spec import FeatureSpec

Features = npt.NDArray[Any]


def feature_specs(cache_info: dict[str, Any]) -> list[FeatureSpec]:
    """The features that a run hears, one spec a layer; ``about`` is its ``caches.json``."""
    return [FeatureSpec.parse(each, "caches.json") for each in cache_info.get("layers", [])] or [cache_info["spec"]]


def require_one_encoder(specs: Sequence[FeatureSpec]) -> None:
    """UserError unless ``specs`` are of layers of one encoder, which one pass of it gives."""
    for other in specs:
        same = other.model_copy(update={"layer": specs[0].layer, "codec": specs[0].codec})
        if same != specs[0]:
            raise UserError(
                f"the run hears several encoders ({'; '.join(same.differences(specs[0]))}) and one pass of one encoder "
                "is all there is for audio: extract features of it and use python -m train evaluate --cache"
            )


def encode_features(audio: npt.NDArray[np.float32], encoder: Encoder, specs: Sequence[FeatureSpec]) -> Features:
    """float32 [samples] at 16 kHz to the frames that extraction would have stored and read back, by one encoder pass.

    [frames, channels] of one spec, [frames, layers · channels] of several.
    """
    spec = specs[0]
    frames = encode_recording(audio, encoder, [each.layer for each in specs], overlap=spec.overlap, trim=spec.trim)
    parts = []
    for each in specs:
        stored = codec.encode(each.codec, frames[each.layer])
        parts.append(codec.decode(each.codec, stored.payload, stored.scale))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
