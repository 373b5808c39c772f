"""Caches of random features, written by the real writer, for tests that need a cache but no audio."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.commit.claims import new_owner
from shards.commit.finalize import finalize, write_plan
from shards.commit.writer import ShardWriter
from shards.format.layout import UTTERANCE_SCHEMA, Layout, read_plan
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache

WORDS = ["red", "green", "blue", "one", "two", "three", "turn", "stop", "left", "right"]


def make_spec(channels: int = 8, codec: str = "f16", layer: int = 2, tensors: str = "weights") -> FeatureSpec:
    return FeatureSpec(
        family="whisper",
        tensors=hashlib.sha256(tensors.encode()).hexdigest(),
        frontend={"n_mels": 80},
        layer=layer,
        channels=channels,
        hop=320,
        sampling_rate=16000,
        window="full30",
        overlap=0.0,
        trim="valid",
        dtype="float32",
        codec=codec,  # type: ignore[arg-type]
    )


def make_cache(
    folder: Path,
    n: int = 20,
    channels: int = 8,
    seed: int = 0,
    *,
    codec: str = "f16",
    layer: int = 2,
    tensors: str = "weights",
    shards: int = 3,
    min_frames: int = 3,
    max_frames: int = 40,
    val_every: int = 0,
    prefix: str = "utt",
    spell: Callable[[str], str] = str,
) -> Path:
    """Write a complete cache of ``n`` utterances to ``folder``; features are standard normal, float32 before the codec.

    ``val_every=5`` puts every fifth utterance into split ``val``. The features of utterance i depend only on the seed.
    ``spell`` changes each text.
    """
    rng = np.random.default_rng(seed)
    frames = rng.integers(min_frames, max_frames + 1, n)
    edges = np.linspace(0, n, shards + 1).astype(int)
    rows = []
    for shard in range(shards):
        for row, i in enumerate(range(edges[shard], edges[shard + 1])):
            text = spell(" ".join(rng.choice(WORDS, size=int(rng.integers(1, 6)))))
            split = "val" if val_every and i % val_every == 0 else "train"
            rows.append(
                {
                    "key": f"{prefix}-{i:05d}",
                    "id": f"{prefix}/{i:05d}.wav",
                    "audio": f"{prefix}/{i:05d}.wav",
                    "samples": int(frames[i]) * 320,
                    "text": text,
                    "speaker": f"speaker-{i % 7}",
                    "split": split,
                    "shard": shard,
                    "row": row,
                }
            )
    layout, spec, owner = Layout(Path(folder)), make_spec(channels, codec, layer, tensors), new_owner()
    plan = write_plan(layout, pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA), owner)
    for shard in range(shards):
        with ShardWriter(layout, shard, spec, plan.id, owner) as writer:
            for utterance in plan.shard_rows(shard):
                features = np.random.default_rng([seed, int(utterance["key"][-5:])]).standard_normal(
                    (utterance["samples"] // 320, channels), dtype=np.float32
                )
                digest = hashlib.sha256(utterance["key"].encode()).hexdigest()
                writer.add(utterance, features, samples=utterance["samples"], audio_sha256=digest)
            writer.commit({"seconds": 0.0})
    finalize(layout, spec, plan, owner, {"source": {"name": prefix}, "encoder": {"reference": "path:none"}})
    return Path(folder)


def without(path, key: str) -> Cache:
    """Rewrite the cache at ``path`` with the utterance ``key`` as a failure, and open it."""
    old, layout = Cache.open(path), Layout(path)
    plan, stored = read_plan(layout), {old.row(i)["key"]: i for i in range(len(old))}
    for shard in range(plan.num_shards):
        with ShardWriter(layout, shard, old.spec, plan.id, "other") as writer:
            for row in plan.shard_rows(shard):
                if row["key"] == key:
                    writer.add_failure(key, "encode", "NaN")
                    continue
                about = old.row(stored[row["key"]])
                x = old.features(stored[row["key"]]).astype(np.float32)
                writer.add(row, x, samples=about["samples"], audio_sha256=about["audio_sha256"])
            writer.commit({"seconds": 0.0})
    finalize(layout, old.spec, plan, "other", {})
    return Cache.open(path)


def original(seed: int, i: int, frames: int, channels: int = 8) -> np.ndarray:
    """Return the features of utterance ``i`` from ``make_cache``, before the codec."""
    return np.random.default_rng([seed, i]).standard_normal((frames, channels), dtype=np.float32)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
