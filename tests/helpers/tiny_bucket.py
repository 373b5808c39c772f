"""Write a cache of a few rows into a bucket."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from tiny_cache import make_spec, plan_row

from shards.commit.bucket.store import BucketStore
from shards.commit.writer import ShardWriter
from shards.format.layout import Plan
from shards.format.schemas import PLAN_SCHEMA

SPEC = make_spec(4)


def plan_table(shards: int = 3, first: int = 0) -> pa.Table:
    """Return the plan of the two utterances of each shard from ``first`` on: utt-0 and utt-1 of shard 0, …"""
    rows = [plan_row(f"utt-{i}", 640, i // 2, i % 2) for i in range(2 * first, 2 * (first + shards))]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def label_table(count: int = 8, text: str = "text") -> pa.Table:
    return pa.table({"key": [f"utt-{i}" for i in range(count)], "text": [f"{text} {i}" for i in range(count)]})


def write(store: BucketStore, shard: int, plan: Plan, fail: str | None = None, shift: float = 0.0) -> None:
    with ShardWriter(store.layout, shard, SPEC, plan.id, "owner") as writer:
        for row in plan.shard_rows(shard):
            if row["key"] == fail:
                writer.add_failure(fail, "decode", "no audio")
                continue
            x = np.full((2, 4), shard + row["row"] / 4 + shift, np.float32)
            writer.add(row, x, samples=640, audio_id=row["audio_id"])
        writer.commit({"seconds": 0.0})


def make(store: BucketStore, plan: Plan, **more) -> None:
    for shard in plan.shards:
        if store.commit_record(shard, SPEC.feature_id, plan.id) is None:
            assert store.acquire(shard)
            write(store, shard, plan, **more)
            store.publish(shard)


def finish(store: BucketStore, plan: Plan, generation: int = 0) -> None:
    assert store.acquire(None)
    store.add_labels(label_table(), "source", "test")
    store.finalize(SPEC, generation, plan, {"source": {"name": "small"}})
    store.release(None)
