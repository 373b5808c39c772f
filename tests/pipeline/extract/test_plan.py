"""The plan: every utterance in exactly one shard, the same plan for the same corpus."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import split_into_windows
from pipeline.extract.plan import corpus_fingerprint, count_windows, make_plan
from pipeline.sources import Utterance


def corpus(lengths: list[int]) -> list[Utterance]:
    return [Utterance(f"k{i:04d}", f"id{i}", f"a/{i}.flac", "text", f"s{i % 3}", "", n) for i, n in enumerate(lengths)]


def plan(utterances: list[Utterance], shard_mb: float = 0.5, shuffle: bool = True, seed: int = 0):
    return make_plan(
        utterances, shuffle=shuffle, seed=seed, frame_bytes=1024, hop=320, padded_frames=None, shard_mb=shard_mb
    ).to_pylist()


@given(st.lists(st.integers(0, 16000 * 40), min_size=1, max_size=200), st.floats(0.01, 20))
def test_every_utterance_is_in_exactly_one_row_and_shards_are_numbered_without_gaps(lengths, shard_mb):
    rows = plan(corpus(lengths), shard_mb)
    assert sorted(row["key"] for row in rows) == sorted(u.key for u in corpus(lengths))
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
    assert plan(utterances) == plan(utterances[::-1])


def test_a_source_that_is_slow_out_of_order_keeps_its_order():
    rows = plan(corpus([16000] * 50), shuffle=False)
    assert [row["key"] for row in rows] == [f"k{i:04d}" for i in range(50)]


def test_the_seed_decides_the_shuffle():
    utterances = corpus([16000] * 50)
    assert plan(utterances, seed=1) != plan(utterances, seed=2)


def test_the_fingerprint_depends_on_the_text_and_not_on_the_folder():
    utterances = corpus([16000] * 5)
    moved = [Utterance(u.key, u.id, "elsewhere/" + u.audio, u.text, u.speaker, u.split, u.samples) for u in utterances]
    edited = [*utterances[:-1], Utterance("k0004", "id4", "a/4.flac", "other text", "s1", "", 16000)]
    assert corpus_fingerprint(moved, "") == corpus_fingerprint(utterances, "")
    assert corpus_fingerprint(edited, "") != corpus_fingerprint(utterances, "")
    assert corpus_fingerprint(utterances, "espeak 1.52") != corpus_fingerprint(utterances, "")


def test_windows_are_counted_as_long_audio_is_cut():
    encoder = SimpleNamespace(sampling_rate=16000, window_samples=480_000)
    for samples in (1, 480_000, 480_001, 16000 * 56, 16000 * 57, 16000 * 300):
        table = make_plan(
            corpus([samples]), shuffle=True, seed=0, frame_bytes=2, hop=320, padded_frames=None, shard_mb=1
        )
        assert count_windows(table, encoder, 4.0) == len(split_into_windows(samples, 480_000, 64_000))
