"""The plan: every utterance in exactly one shard, the same plan for the same corpus."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import split_into_windows
from pipeline.extract.plan import count_windows, find_new, make_plan

NAMES = ("key", "id", "audio", "samples")


def corpus(lengths: list[int]) -> pa.Table:
    rows = [(f"k{i:04d}", f"id{i}", f"a/{i}.flac", n) for i, n in enumerate(lengths)]
    return pa.table({name: [row[at] for row in rows] for at, name in enumerate(NAMES)})


def audio_ids(count: int, first: int = 1) -> pa.Array:
    return pa.array([bytes([(first + i) % 251] * 32) for i in range(count)], pa.binary(32))


def plan(listing: pa.Table, shard_mb: float = 0.5, shuffle: bool = True, seed: int = 0, first_shard: int = 0):
    parts = make_plan(
        listing, np.arange(len(listing)), audio_ids(len(listing)), shuffle=shuffle, seed=seed, frame_bytes=1024,
        hop=320, padded_frames=None, shard_mb=shard_mb, first_shard=first_shard,
    )  # fmt: skip
    return pa.concat_tables(parts).to_pylist()


@given(st.lists(st.integers(0, 16000 * 40), min_size=1, max_size=200), st.floats(0.01, 20))
def test_every_utterance_is_in_exactly_one_row_and_shards_are_numbered_without_gaps(lengths, shard_mb):
    rows = plan(corpus(lengths), shard_mb)
    assert sorted(row["key"] for row in rows) == corpus(lengths)["key"].to_pylist()
    positions = [(row["shard"], row["row"]) for row in rows]
    assert positions == sorted(positions)
    for shard in range(max(s for s, _ in positions) + 1):
        inside = [r for s, r in positions if s == shard]
        assert inside == list(range(len(inside)))
        assert inside


def test_shards_have_about_the_requested_size():
    rows = plan(corpus([16000 * 8] * 400), shard_mb=10)
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row["shard"]] = sizes.get(row["shard"], 0) + 400 * 1024
    assert all(9e6 < size < 11.5e6 for size in sizes.values())


def test_the_plan_does_not_depend_on_the_order_in_which_a_folder_was_listed():
    utterances = corpus(list(range(1, 100)))
    assert [row["key"] for row in plan(utterances)] == [row["key"] for row in plan(utterances[::-1])]


def test_a_source_that_is_slow_out_of_order_keeps_its_order():
    rows = plan(corpus([16000] * 50), shuffle=False)
    assert [row["key"] for row in rows] == [f"k{i:04d}" for i in range(50)]


def test_the_seed_decides_the_shuffle():
    utterances = corpus([16000] * 50)
    assert plan(utterances, seed=1) != plan(utterances, seed=2)


def test_a_later_generation_continues_the_numbers_of_its_shards():
    assert {row["shard"] for row in plan(corpus([16000] * 50), shard_mb=0.5, first_shard=7)} >= {7, 8}


def test_new_utterances_are_other_keys_and_known_keys_with_other_audio():
    listing = corpus([16000] * 5)
    ids = audio_ids(5).to_pylist()
    held = pa.table(
        {
            "key": ["k0000", "k0001", "k0003", "gone"],
            "audio_id": pa.array([*ids[:2], b"x" * 32, b"y" * 32], pa.binary(32)),
        }
    )
    ids[1] = bytes(32)  # cannot be read any more: it counts as unchanged
    new, changed = find_new(listing["key"], pa.array(ids, pa.binary(32)), held)
    assert new.tolist() == [False, False, True, True, True]
    assert changed == 1


def test_windows_are_counted_as_long_audio_is_cut():
    encoder = SimpleNamespace(sampling_rate=16000, window_samples=480_000)
    for samples in (1, 480_000, 480_001, 16000 * 56, 16000 * 57, 16000 * 300):
        assert count_windows(np.array([samples]), encoder, 4.0) == len(split_into_windows(samples, 480_000, 64_000))
