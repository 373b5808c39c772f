"""Caches of random features, written by the real writer, for tests that need a cache but no audio."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.commit.claims import new_owner
from shards.commit.finalize import finalize, read_info, write_plan
from shards.commit.folder import add_labels
from shards.commit.writer import ShardWriter
from shards.format.layout import Layout, read_plan
from shards.format.schemas import PLAN_SCHEMA
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache

CODEBOOK_SIZE = 300  # of codec u16: more than 8 bits
WORDS = ["red", "green", "blue", "one", "two", "three", "turn", "stop", "left", "right"]


def make_spec(channels: int = 8, codec: str = "f16", layer: int = 2, tensors: str = "weights") -> FeatureSpec:
    return FeatureSpec(
        family="whisper",
        tensors=hashlib.sha256(tensors.encode()).hexdigest(),
        frontend={"n_mels": 80} if codec != "u16" else {"type": "codes", "codebook_size": CODEBOOK_SIZE},
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
    rows, labels = [], []
    for shard in range(shards):
        for row, i in enumerate(range(edges[shard], edges[shard + 1])):
            text = spell(" ".join(rng.choice(WORDS, size=int(rng.integers(1, 6)))))
            split = "val" if val_every and i % val_every == 0 else "train"
            name = f"{prefix}/{i:05d}.wav"
            rows.append(plan_row(f"{prefix}-{i:05d}", int(frames[i]) * 320, shard, row) | {"id": name, "audio": name})
            labels.append({"key": rows[-1]["key"], "text": text, "speaker": f"speaker-{i % 7}", "split": split})
    spec = make_spec(channels, codec, layer, tensors)

    def features(key: str, count: int) -> np.ndarray:
        values = original(seed, int(key[-5:]), count, channels)
        return values if codec != "u16" else original_codes(values)

    append(Path(folder), spec, rows, labels, features, provenance={"source": {"name": prefix}})
    return Path(folder)


def plan_row(key: str, samples: int, shard: int, row: int, audio: str = "") -> dict[str, Any]:
    """Return a row of a plan whose audio is called ``audio`` (default: the key), and has the sha256 of that name."""
    audio = audio or key
    digest = hashlib.sha256(audio.encode()).digest()
    return {
        "key": key, "id": key, "audio": audio, "samples": samples, "audio_id": digest, "shard": shard, "row": row,
    }  # fmt: skip


def append(
    folder: Path,
    spec: FeatureSpec,
    rows: list[dict[str, Any]],
    labels: list[dict[str, Any]],
    features: Callable[[str, int], np.ndarray],
    *,
    failed: Collection[str] = (),
    provenance: dict[str, Any] | None = None,
) -> Layout:
    """Append a generation of the planned ``rows`` to the cache at ``folder``; ``labels`` become those of the source.

    ``features`` returns float32 [frames, channels] of a key and a number of frames. The keys in ``failed`` fail.
    """
    layout, owner = Layout(folder), new_owner()
    generation = len((read_info(layout) or {"generations": []})["generations"])
    plan = write_plan(layout, generation, [pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)], owner)
    add_labels(layout, pa.Table.from_pylist(labels), "source", "test", reserved=True)
    texts = {row["key"]: row for row in labels}
    for shard in plan.shards:
        with ShardWriter(layout, shard, spec, plan.id, owner) as writer:
            for utterance in plan.shard_rows(shard):
                if utterance["key"] in failed:
                    writer.add_failure(utterance["key"], "encode", "NaN")
                    continue
                writer.add(
                    utterance,
                    features(utterance["key"], utterance["samples"] // 320),
                    samples=utterance["samples"],
                    audio_id=utterance["audio_id"],
                    labels=texts.get(utterance["key"], {}),
                )
            writer.commit({"seconds": 0.0})
    finalize(layout, spec, generation, plan, owner, {"encoder": {"reference": "path:none"}, **(provenance or {})})
    return layout


def grow(path: Path, n: int = 6, shards: int = 1, seed: int = 1, prefix: str = "new", **changed: str) -> Cache:
    """Append ``n`` new utterances to the cache at ``path``; ``changed`` maps keys that get other audio to its name."""
    old = Cache.open(path)
    first = old.info.counts["shards"]
    edges = np.linspace(0, n, shards + 1).astype(int)
    rows = [
        plan_row(f"{prefix}-{i:05d}", int(5 + i) * 320, first + shard, row)
        for shard in range(shards)
        for row, i in enumerate(range(edges[shard], edges[shard + 1]))
    ]
    for key, audio in changed.items():
        rows.append(plan_row(key.replace("_", "-"), 9 * 320, first + shards - 1, len(rows) - edges[-2], audio))
    labels = [
        *old.labels.table.to_pylist(),
        *({"key": row["key"], "text": f"new {i}", "speaker": "", "split": "train"} for i, row in enumerate(rows[:n])),
    ]
    channels = old.spec.channels
    append(path, old.spec, rows, labels, lambda key, count: original(seed, int(key[-5:]), count, channels))
    return Cache.open(path)


def without(path: Path, key: str) -> Cache:
    """Rewrite the cache at ``path``, of one generation, with the utterance ``key`` as a failure, and open it."""
    old, layout = Cache.open(path), Layout(path)
    plan, stored = read_plan(layout.plan(0)), {old.row(i)["key"]: i for i in range(len(old))}
    for shard in plan.shards:
        with ShardWriter(layout, shard, old.spec, plan.id, "other") as writer:
            for row in plan.shard_rows(shard):
                if row["key"] == key:
                    writer.add_failure(key, "encode", "NaN")
                    continue
                about = old.row(stored[row["key"]])
                x = old.features(stored[row["key"]]).astype(np.float32)
                writer.add(row, x, samples=about["samples"], audio_id=about["audio_id"], labels=about)
            writer.commit({"seconds": 0.0})
    layout.cache.unlink()
    finalize(layout, old.spec, 0, plan, "other", {})
    return Cache.open(path)


def original(seed: int, i: int, frames: int, channels: int = 8) -> np.ndarray:
    """Return the features of utterance ``i`` from ``make_cache``, before the codec."""
    return np.random.default_rng([seed, i]).standard_normal((frames, channels), dtype=np.float32)


def original_codes(values: np.ndarray) -> np.ndarray:
    """Return the codes that ``make_cache`` makes of features with codec u16: int32, below ``CODEBOOK_SIZE``."""
    return (np.abs(values) * 1000).astype(np.int32) % CODEBOOK_SIZE


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
