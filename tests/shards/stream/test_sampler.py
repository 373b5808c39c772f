from __future__ import annotations

import hashlib
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.config.base import validate_config
from shards.errors import UserError
from shards.stream.sampler import BATCHES, ROWS, BatchSampler, SamplerConfig, SamplerState, random_words

SHUFFLES = ["none", "shard", "window", "global"]


@st.composite
def orders(draw, may_drop=False):
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any))
    total = sum(sizes)
    frames = np.array(draw(st.lists(st.integers(1, 60), min_size=total, max_size=total)))
    some = draw(st.none() | st.sets(st.integers(0, total - 1), min_size=1))
    rules = SamplerConfig(
        batch_size=draw(st.none() | st.integers(1, 9)),
        max_frames=draw(st.integers(60, 400)),
        window_shards=draw(st.integers(1, 5)),
        shuffle=draw(st.sampled_from(SHUFFLES)),
        drop_last=may_drop and draw(st.booleans()),
    )
    rows = None if some is None else list(some)
    return BatchSampler(frames, np.cumsum([0, *sizes]), rules, draw(st.integers(0, 2**64 - 1)), rows)


def epoch_of(order: BatchSampler, epoch: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch, _, _ in order.iter_batches(SamplerState(epoch), epochs=epoch + 1)]


def durations(count: int) -> np.ndarray:
    """Frames of read speech: 2 to 17 s, most near 15 s."""
    rng = np.random.default_rng(0)
    return ((2 + 15 * rng.beta(2.5, 0.9, count)) * 50).astype(np.int32)


def padding(order: BatchSampler, batches: list[list[int]]) -> float:
    frames = order.frames
    return 1 - sum(frames[b].sum() for b in batches) / sum(len(b) * frames[b].max() for b in batches)


@given(orders(), st.integers(0, 3))
def test_an_epoch_holds_every_eligible_row_exactly_once(order, epoch):
    seen = [row for batch in epoch_of(order, epoch) for row in batch]
    wanted = range(len(order.frames)) if order.rows is None else order.rows.tolist()
    assert sorted(seen) == list(wanted)


@given(orders(may_drop=True))
def test_no_batch_exceeds_its_bounds_or_is_empty(order):
    rules = order.config
    for batch in (window[i] for window in [order.window(0, 0)] for i in range(len(window))):
        lengths = order.frames[batch].tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert 1 <= len(batch) <= (rules.batch_size or len(batch))
        assert len(batch) * max(lengths) <= rules.max_frames
        assert len(set(batch)) == len(batch)


@given(orders(), st.data())
def test_a_walk_from_any_position_is_the_rest_of_the_walk(order, data):
    whole = list(islice(order.iter_batches(SamplerState()), 40))
    cut = data.draw(st.integers(0, len(whole) - 1))
    rest = list(islice(order.iter_batches(whole[cut][2]), len(whole) - cut - 1))
    assert [(b.tolist(), here, after) for b, here, after in rest] == [
        (b.tolist(), here, after) for b, here, after in whole[cut + 1 :]
    ]
    assert [here.count for _, here, _ in whole] == list(range(len(whole)))
    assert all(after == here for (_, _, after), (_, here, _) in pairwise(whole))


@given(orders(may_drop=True), st.integers(1, 9))
def test_rank_slices_of_any_world_make_up_the_global_batch_in_even_parts(order, world):
    for batch in (window[i] for window in [order.window(0, 0)] for i in range(len(window))):
        parts = [batch[rank::world] for rank in range(world)]
        assert sorted(np.concatenate(parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        longest = [order.frames[part].max() for part in parts if len(part)]
        assert longest == sorted(longest, reverse=True)


def test_drop_last_with_a_batch_size_returns_full_batches_only_and_drops_other_rows_each_epoch():
    order = BatchSampler(durations(110), [0, 50, 110], SamplerConfig(batch_size=16, drop_last=True), seed=3)
    epochs = [epoch_of(order, epoch) for epoch in range(2)]
    assert all(len(batch) == 16 for batches in epochs for batch in batches)
    assert [len(batches) for batches in epochs] == [6, 6]
    dropped = [set(range(110)) - {row for batch in batches for row in batch} for batches in epochs]
    assert dropped[0] != dropped[1]


def test_an_epoch_without_a_full_batch_is_an_error_and_not_an_endless_loop():
    order = BatchSampler([5, 5, 5], [0, 1, 3], SamplerConfig(batch_size=4, window_shards=1, drop_last=True), seed=0)
    for epochs in (None, 1):
        with pytest.raises(UserError, match="drop_last leaves no batch"):
            next(order.iter_batches(SamplerState(), epochs))


def test_without_drop_last_the_last_batches_of_a_window_share_evenly():
    order = BatchSampler(durations(65), [0, 65], SamplerConfig(batch_size=16), seed=0)
    assert sorted(map(len, epoch_of(order))) == [13] * 5


def test_the_modes_of_shuffle_shuffle_what_they_say():
    frames, bounds = durations(300), np.arange(0, 301, 50)

    def two(shuffle):
        order = BatchSampler(frames, bounds, SamplerConfig(batch_size=8, window_shards=1, shuffle=shuffle), seed=1)
        return order, epoch_of(order, 0), epoch_of(order, 1)

    _, first, second = two("none")
    assert first == second
    assert [min(batch) // 50 for batch in first] == sorted(min(batch) // 50 for batch in first)
    _, first, second = two("shard")
    assert first != second
    assert sorted(first) == sorted(second)  # the same batches, the shards in another order
    _, first, second = two("window")
    assert sorted(first) != sorted(second)
    assert all(len({row // 50 for row in batch}) == 1 for batch in first)
    order, first, second = two("global")
    assert order.num_windows == 1
    assert any(len({row // 50 for row in batch}) > 4 for batch in first)


def test_another_seed_yields_another_order():
    first, second = (BatchSampler(durations(200), [0, 100, 200], SamplerConfig(batch_size=8), seed) for seed in (0, 1))
    assert epoch_of(first) != epoch_of(second)


@pytest.mark.parametrize(("size", "window"), [(8, 4), (16, 4), (16, 8), (32, 4)])
def test_padding_stays_under_two_percent_where_random_batches_pad_a_fifth(size, window):
    frames, bounds = durations(12_000), np.arange(0, 12_001, 400)  # 256 MB of whisper-base features is about 400 rows
    order = BatchSampler(frames, bounds, SamplerConfig(batch_size=size, window_shards=window), seed=0)
    batches = epoch_of(order)
    assert padding(order, batches) < 0.02
    assert min(map(len, batches)) >= size - 2
    shuffled = np.random.default_rng(0).permutation(12_000).reshape(-1, 16)
    assert padding(order, shuffled.tolist()) > 0.2


def test_a_frame_budget_is_well_used_and_leaves_no_tiny_batch():
    order = BatchSampler(durations(12_000), np.arange(0, 12_001, 400), SamplerConfig(max_frames=12_000), seed=0)
    batches = epoch_of(order)
    used = [len(batch) * order.frames[batch].max() / 12_000 for batch in batches]
    assert np.mean(used) > 0.95
    assert min(map(len, batches)) >= 12
    assert padding(order, batches) < 0.02


@pytest.mark.parametrize("rows", [64, 256])
def test_a_small_cache_groups_other_rows_together_in_each_epoch(rows):
    order = BatchSampler(durations(rows), [0, rows], SamplerConfig(batch_size=8), seed=0)
    pairs = [
        {frozenset((a, b)) for batch in epoch_of(order, epoch) for a in batch for b in batch if a < b}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.75 * len(pairs[0])  # 0.88 of 64 rows if ranks did not move


def test_a_large_window_groups_other_rows_together_in_each_epoch_where_many_are_of_one_length():
    order = BatchSampler(
        durations(12_000), np.arange(0, 12_001, 400), SamplerConfig(batch_size=16, shuffle="global"), seed=0
    )
    pairs = [
        {(a, b) for batch in epoch_of(order, epoch) for a in sorted(batch) for b in sorted(batch) if a < b}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.2 * len(pairs[0])  # 0.10; by exact length it would be 0.38


def test_a_filter_that_thins_the_shards_does_not_shrink_the_batches():
    rows = np.arange(0, 10_000, 50)  # two rows of every shard
    order = BatchSampler(
        durations(10_000), np.arange(0, 10_001, 100), SamplerConfig(batch_size=16, window_shards=2), 0, rows
    )
    assert min(map(len, epoch_of(order))) >= 14


def test_the_order_never_changes_between_versions():
    assert random_words(1, 2, 3, ROWS, 2).tolist() == GOLDEN_WORDS
    frames = np.arange(500) * 7919 % 750 + 100
    order = BatchSampler(frames, np.arange(0, 501, 50), SamplerConfig(max_frames=6000, window_shards=3), seed=2024)
    text = repr([epoch_of(order, epoch) for epoch in range(2)])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_ORDER


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=20)
def test_neighbouring_positions_draw_different_words(seed, epoch, window):
    words = [
        random_words(seed, *at, 4).tolist()
        for at in [
            (epoch, window, ROWS),
            (epoch + 1, window, ROWS),
            (epoch, window + 1, ROWS),
            (epoch, window, BATCHES),
        ]
    ]
    assert len({word for four in words for word in four}) == 16


def test_a_row_longer_than_the_frame_budget_is_named_with_the_setting_before_anything_is_read():
    with pytest.raises(UserError, match=r"row 2 has 90 frames.* \(max_frames\): set max_frames to 90"):
        BatchSampler([10, 20, 90, 30], [0, 4], SamplerConfig(max_frames=80), seed=0)
    BatchSampler([10, 20, 90, 30], [0, 4], SamplerConfig(max_frames=80), seed=0, rows=[0, 1, 3])


def test_bad_arguments_are_reported():
    rules = SamplerConfig(batch_size=2)
    with pytest.raises(UserError, match="no utterance is left"):
        BatchSampler([1, 2], [0, 2], rules, seed=0, rows=[])
    with pytest.raises(UserError, match="seed -1"):
        BatchSampler([1, 2], [0, 2], rules, seed=-1)
    for bounds, rows in [([0, 1], None), ([1, 2], None), ([0, 2, 1, 2], None), ([0, 2], [2]), ([0, 2], [0, 0])]:
        with pytest.raises(ValueError, match="rows"):
            BatchSampler([1, 2], bounds, rules, seed=0, rows=rows)
    with pytest.raises(UserError, match="set batch_size, max_frames or both"):
        validate_config(SamplerConfig, {"shuffle": "none"}, "test.yaml")


def test_a_position_that_the_order_does_not_have_is_refused():
    order = BatchSampler(durations(64), [0, 64], SamplerConfig(batch_size=8), seed=0)
    for at in [SamplerState(window=1), SamplerState(batch=8), SamplerState(epoch=-1), SamplerState(count=-1)]:
        with pytest.raises(UserError, match="not a state of this sampler"):
            next(order.iter_batches(at))


GOLDEN_WORDS = [12219508911059832398, 17188035296609076471]
GOLDEN_ORDER = "2e1dac9b9cf09c503926dffb2ce9fc2d6a4bc93775e2846bae71aa5f76233573"


def groups_of(caches) -> np.ndarray:
    """Return the cache of each row, where cache c holds the rows ``caches[c]:caches[c + 1]``."""
    return np.repeat(np.arange(len(caches) - 1), np.diff(caches))


@st.composite
def weighted(draw):
    frames = np.asarray(draw(st.lists(st.integers(1, 50), min_size=4, max_size=60)))
    edges = sorted({0, len(frames), *draw(st.lists(st.integers(0, len(frames)), max_size=8))})
    caches = sorted({0, len(frames), *draw(st.lists(st.sampled_from(edges), max_size=2))})
    weight = st.one_of(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), st.floats(0.05, 3.0))
    rules = SamplerConfig(
        batch_size=draw(st.integers(1, 8)),
        window_shards=draw(st.integers(1, 4)),
        shuffle=draw(st.sampled_from(["none", "shard", "window", "global"])),
        weights=tuple(draw(weight) for _ in caches[1:]),
    )
    return BatchSampler(frames, edges, rules, draw(st.integers(0, 9)), groups=groups_of(caches)), caches


@given(weighted(), st.integers(1, 12))
def test_weights_take_every_row_of_a_cache_as_often_as_any_other_up_to_once(given_, epochs):
    order, caches = given_
    times = np.zeros(len(order.frames), dtype=int)
    for epoch in range(epochs):
        before = times.copy()
        for batch in epoch_of(order, epoch):
            np.add.at(times, batch, 1)
        for cache, weight in enumerate(order.config.weights):
            mine = slice(caches[cache], caches[cache + 1])
            taken = (times - before)[mine]
            assert taken.min() >= np.floor(weight)
            assert taken.max() <= np.ceil(weight)
    for cache, weight in enumerate(order.config.weights):
        mine = times[caches[cache] : caches[cache + 1]]
        assert np.floor(epochs * weight - 1e-9) <= mine.min()
        assert mine.max() <= np.ceil(epochs * weight + 1e-9)


def test_an_epoch_holds_the_weighted_part_of_each_cache_up_to_one_row_a_shard():
    rules = SamplerConfig(batch_size=8, window_shards=2, weights=(0.3, 1.0, 2.5))
    order = BatchSampler(
        durations(3000), np.arange(0, 3001, 100), rules, seed=4, groups=groups_of([0, 1000, 2000, 3000])
    )
    for epoch in range(4):
        rows = np.concatenate(epoch_of(order, epoch))
        for cache, weight in enumerate(rules.weights):
            assert abs((rows // 1000 == cache).sum() - weight * 1000) <= 10


@given(weighted(), st.data())
def test_a_weighted_walk_from_any_position_is_the_rest_of_the_walk(given_, data):
    order, _ = given_
    steps = list(order.iter_batches(SamplerState(), epochs=3))
    if steps:
        at = data.draw(st.integers(0, len(steps) - 1))
        rest = [rows.tolist() for rows, _, _ in order.iter_batches(steps[at][1], epochs=3)]
        assert rest == [rows.tolist() for rows, _, _ in steps[at:]]


@given(orders(), st.integers(0, 3))
def test_the_shards_a_window_is_said_to_read_are_those_of_its_rows(order, epoch):
    for number in range(order.num_windows):
        window = order.window(epoch, number)
        rows = np.concatenate([window[i] for i in range(len(window))]) if len(window) else np.array([], dtype=int)
        said = order.one_row_per_shard(epoch, number)
        assert len(set(said.tolist())) == len(said)
        assert len(said) <= max(len(rows), 1)
        if not order.config.drop_last:
            assert set(said.tolist()) <= set(rows.tolist())


def test_weights_of_one_are_the_order_without_weights():
    arguments = (durations(300), [0, 100, 200, 300])
    plain = BatchSampler(*arguments, SamplerConfig(batch_size=8, window_shards=2), 5)
    same = BatchSampler(
        *arguments, SamplerConfig(batch_size=8, window_shards=2, weights=(1.0, 1.0)), 5, groups=groups_of([0, 100, 300])
    )
    assert epoch_of(plain, 1) == epoch_of(same, 1)


def test_the_weighted_order_never_changes_between_versions():
    frames = np.arange(500) * 7919 % 750 + 100
    rules = SamplerConfig(max_frames=6000, window_shards=3, weights=(0.4, 1.5))
    order = BatchSampler(frames, np.arange(0, 501, 50), rules, seed=2024, groups=groups_of([0, 150, 500]))
    text = repr([epoch_of(order, epoch) for epoch in range(2)])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_WEIGHTED_ORDER


GOLDEN_WEIGHTED_ORDER = "083c1e9279a7f2d4c4f10294c25dff220f62c2f46053876d8d12939b4bef14a9"


def times_read(order: BatchSampler, epoch: int) -> np.ndarray:
    return np.bincount(np.concatenate(epoch_of(order, epoch)), minlength=len(order.frames))


def test_groups_that_share_shards_are_each_mixed_exactly_up_to_one_row_a_shard_and_epoch():
    groups = np.random.default_rng(0).choice(3, 3000, p=[0.6, 0.39, 0.01])
    rules = SamplerConfig(batch_size=8, window_shards=2, weights={"a": 1.0, "b": 0.25, "c": 2.5})
    order = BatchSampler(durations(3000), np.arange(0, 3001, 300), rules, seed=4, groups=groups)
    total = np.zeros(3000)
    for epoch in range(4):
        times = times_read(order, epoch)
        total += times
        for group, weight in enumerate(rules.weights.values()):
            assert abs(times[groups == group].sum() - weight * (groups == group).sum()) <= 10
    assert set(total[groups == 1]) == {1}  # a quarter in each of four epochs
    assert set(total[groups == 2]) == {10}


def test_one_row_of_a_rare_group_in_each_shard_is_not_left_to_the_same_epoch_everywhere():
    groups = (np.arange(4000) % 20 == 0).astype(int)
    rules = SamplerConfig(batch_size=8, weights={"common": 1.0, "rare": 0.25})
    order = BatchSampler(durations(4000), np.arange(0, 4001, 20), rules, seed=0, groups=groups)
    for epoch in range(4):
        assert 30 <= times_read(order, epoch)[groups == 1].sum() <= 70  # 50 of 200


def test_the_weight_of_a_row_multiplies_that_of_its_group():
    own = np.random.default_rng(0).choice([0.0, 0.5, 1.0, 3.0], 600)
    rules = SamplerConfig(batch_size=8, weights=(0.5, 1.0))
    groups = np.arange(600) // 300
    order = BatchSampler(durations(600), np.arange(0, 601, 100), rules, 0, groups=groups, row_weights=own)
    total = sum(times_read(order, epoch) for epoch in range(4))
    assert (total == 4 * own * np.array(rules.weights)[groups]).all()


def test_equal_weights_of_rows_are_the_order_without_weights():
    arguments = (durations(300), [0, 100, 200, 300], SamplerConfig(batch_size=8, window_shards=2), 5)
    assert epoch_of(BatchSampler(*arguments)) == epoch_of(BatchSampler(*arguments, row_weights=np.ones(300)))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), 1001.0])
def test_a_row_whose_weight_cannot_be_used_is_named(weight):
    with pytest.raises(UserError, match=r"row 1 has the weight .*from 0 to 1000 in the column weight"):
        BatchSampler([1, 2], [0, 2], SamplerConfig(batch_size=2), 0, row_weights=[1.0, weight])
    with pytest.raises(UserError, match="all utterances have weight 0"):
        BatchSampler([1, 2], [0, 2], SamplerConfig(batch_size=2), 0, row_weights=[0.0, 0.0])
