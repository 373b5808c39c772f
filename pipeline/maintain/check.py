"""Check stored features against the encoder: re-encode a sample of utterances and compare.

    python -m pipeline check CACHE --n 32

For each of n random utterances, reports the relative RMS error and the cosine similarity of the stored and the new
features. An utterance whose error exceeds the tolerance of the spec's dtype and codec fails the check. The error of
codes is the share of them that differ, and their cosine similarity the share that are equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audio import AudioError, decode
from pipeline.config import ExtractConfig
from pipeline.encoders.recording import encode_recording, open_encoder
from pipeline.sources import open_source
from shards.config.base import validate_config
from shards.errors import UserError
from shards.format.codec import CODES, decoded_dtype, relative_rms
from shards.read.cache import Cache

# Relative RMS error allowed for arithmetic differences between two machines, and for the codec (measured on real
# whisper-base features with bench/codecs.py).
DTYPE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.035, "float16": 5e-3}
CODEC_TOLERANCE = {"f16": 1e-3, "bf16": 4e-3, "int8": 0.02, "fp8": 0.05, "u16": 0.02}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result for one utterance; ``problem`` is empty when the error is within the tolerance."""

    key: str
    frames: int
    relative_error: float
    cosine: float
    problem: str


def tolerance(cache: Cache) -> float:
    """Return the largest relative RMS error that passes."""
    return DTYPE_TOLERANCE[cache.spec.dtype] + CODEC_TOLERANCE[cache.spec.codec]


def check(
    cache: Cache, n: int, *, seed: int = 0, source: str | None = None, encoder: str | None = None
) -> Iterator[Comparison]:
    """Compare ``n`` random utterances; yield one result per utterance, in cache order.

    Args:
        cache: the cache to check.
        n: number of utterances; all if the cache has fewer.
        seed: seed that selects the utterances.
        source: location of the audio, instead of the recorded one.
        encoder: reference to the encoder, instead of the recorded one.

    Raises:
        UserError: the source or the encoder is not available, or the encoder computes other features.
    """
    config = recorded_config(cache.provenance, cache.path, source)
    audio = open_source(config.source)
    recorded = cache.provenance["encoder"].get("reference")
    model = open_encoder(cache.spec, recorded, config.encoder.device, typed=encoder)
    indices = sorted(random.Random(seed).sample(range(len(cache)), min(n, len(cache))))
    rows = [cache.row(index) for index in indices]
    limit = tolerance(cache)
    for index, row, (_, data) in zip(indices, rows, audio.read([row["audio"] for row in rows]), strict=True):
        if isinstance(data, Exception):
            yield Comparison(row["key"], row["frames"], float("nan"), float("nan"), f"no audio: {data}")
            continue
        try:
            samples = decode(data, config.source.max_hours, cache.spec.sampling_rate)
        except AudioError as reason:
            yield Comparison(row["key"], row["frames"], float("nan"), float("nan"), f"audio changed: {reason}")
            continue
        spec = cache.spec
        fresh = encode_recording(samples, model, [spec.layer], overlap=spec.overlap, trim=spec.trim)[spec.layer]
        stored = np.empty(fresh.shape, decoded_dtype(spec.codec))
        if len(fresh) != row["frames"]:
            yield Comparison(row["key"], row["frames"], float("nan"), float("nan"), f"{len(fresh)} frames now")
            continue
        cache.read_into(index, stored)
        if spec.codec == CODES:
            cosine = float(np.mean(stored == fresh))
            error = 1 - cosine
        else:
            error, cosine = relative_rms(stored, fresh), _cosine(stored, fresh)
        problem = "" if error <= limit else f"relative error above {limit:.3g}"
        yield Comparison(row["key"], row["frames"], error, cosine, problem)


def recorded_config(provenance: dict[str, Any], path: Path, source: str | None = None) -> ExtractConfig:
    """Return the configuration that a generation of the cache at ``path`` was extracted with.

    Args:
        provenance: of the generation, from ``CACHE.json``.
        source: location of the audio, instead of the recorded one.

    Raises:
        UserError: the cache does not record its configuration.
    """
    try:
        tree = dict(provenance["config"])
    except (KeyError, TypeError):
        raise UserError(f"'{path}' does not record how it was extracted, so its audio cannot be found") from None
    if source is not None:
        tree["source"] = {**tree["source"], "path": source}
    tree["root"] = str(path.resolve().parent.parent)
    return validate_config(ExtractConfig, tree, f"'{path}/CACHE.json'")


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine similarity of two arrays, each flattened to one vector, in float64."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 1.0
