"""Write a cache of a few rows into a bucket."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from tiny_cache import make_spec

from shards.commit.bucket.store import BucketStore
from shards.commit.writer import ShardWriter
from shards.format.layout import UTTERANCE_SCHEMA


def plan_table(shards: int = 3) -> pa.Table:
    rows = [
        {"key": f"utt-{i}", "id": f"utt-{i}", "audio": f"{i}.wav", "samples": 640, "text": f"text {i}"}
        | {"speaker": "s", "split": "train", "shard": i // 2, "row": i % 2}
        for i in range(2 * shards)
    ]
    return pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA)


SPEC = make_spec(4)


def write(store: BucketStore, shard: int, plan, fail: str | None = None, shift: float = 0.0) -> None:
    with ShardWriter(store.layout, shard, SPEC, plan.id, "owner") as writer:
        for row in plan.shard_rows(shard):
            if row["key"] == fail:
                writer.add_failure(fail, "decode", "no audio")
                continue
            x = np.full((2, 4), shard + row["row"] / 4 + shift, np.float32)
            writer.add(row, x, samples=640, audio_sha256="ab" * 32)
        writer.commit({"seconds": 0.0})


def make(store: BucketStore, plan, **more) -> None:
    for shard in range(plan.num_shards):
        if store.commit_record(shard, SPEC.feature_id, plan.id) is None:
            assert store.acquire(shard)
            write(store, shard, plan, **more)
            store.publish(shard)


def finish(store: BucketStore, plan) -> None:
    assert store.acquire(None)
    store.finalize(SPEC, plan, {"source": {"name": "small"}})
