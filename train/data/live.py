"""Features of audio without a cache: encode it as an extraction would, with the settings of a run's caches."""

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
    """Return the specs of the features that a run reads, one per layer; ``cache_info`` is its ``caches.json``."""
    return [FeatureSpec.parse(each, "caches.json") for each in cache_info.get("layers", [])] or [cache_info["spec"]]


def require_one_encoder(specs: Sequence[FeatureSpec]) -> None:
    """Check that ``specs`` are layers of one encoder, so that one pass computes them all.

    Raises:
        UserError: they differ in more than layer and codec.
    """
    for other in specs:
        same = other.model_copy(update={"layer": specs[0].layer, "codec": specs[0].codec})
        if same != specs[0]:
            raise UserError(
                f"the run reads features of several encoders ({'; '.join(same.differences(specs[0]))}), and audio can "
                "be encoded with only one: extract features of the audio and run python -m train evaluate --cache"
            )


def encode_features(audio: npt.NDArray[np.float32], encoder: Encoder, specs: Sequence[FeatureSpec]) -> Features:
    """Encode ``audio``, float32 [samples] at the encoder's rate, in one pass to the frames that a cache would return.

    Returns:
        [frames, channels] for one spec, [frames, layers · channels] for several, in the dtype of the codec; codes are
        int32 [frames, codebooks].
    """
    spec = specs[0]
    frames = encode_recording(audio, encoder, [each.layer for each in specs], overlap=spec.overlap, trim=spec.trim)
    parts = []
    for each in specs:
        stored = codec.encode(each.codec, frames[each.layer])
        parts.append(codec.decode(each.codec, stored.payload, stored.scale))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
