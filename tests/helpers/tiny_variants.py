"""Caches of random features whose utterances have variants, written by the real writer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from tiny_cache import append, make_spec, original, plan_row

from shards.format.variants import split_key, variant_key


def make_varied(
    folder: Path,
    n: int = 12,
    variants: int = 3,
    *,
    shards: int = 3,
    layer: int = 2,
    channels: int = 8,
    codec: str = "f16",
    val_every: int = 0,
    failed: Collection[str] = (),
) -> Path:
    """Write a cache of ``n`` utterances with ``variants`` rows each; variant v is 3 v frames longer than variant 0."""
    rows, labels = [], []
    for i in range(n):
        key, frames = f"utt-{i:05d}", 5 + 3 * (i % 5)
        shard = i * shards // n
        for number in range(variants):
            at = sum(row["shard"] == shard for row in rows)
            name = variant_key(key, number)
            rows.append(plan_row(name, (frames + 3 * number) * 320, shard, at) | {"id": key, "audio": key})
        split = "val" if val_every and i % val_every == 0 else "train"
        labels.append({"key": key, "text": f"text {i}", "speaker": f"s{i % 4}", "split": split})
    append(Path(folder), make_spec(channels, codec, layer), rows, labels, varied_features(channels), failed=failed)
    return Path(folder)


def varied_features(channels: int = 8):
    """Return the function that gives the features of a key before the codec."""

    def features(key: str, count: int) -> np.ndarray:
        base, number = split_key(key)
        return original(number, int(base[-5:]), count, channels)

    return features
