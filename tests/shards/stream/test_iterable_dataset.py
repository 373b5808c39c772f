from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_cache import flip, grow, make_cache, original
from tiny_labels import write_labels, write_two_tasks
from torch.utils.data import DataLoader

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream import prefetch as ahead
from shards.stream.batch import Batch, decode_stored, pad_stored
from shards.stream.iterable_dataset import STATE_VERSION, FeatureStream
from shards.stream.prefetch import BufferPool
from shards.stream.sampler import SamplerConfig

RULES = SamplerConfig(max_frames=160, batch_size=6, window_shards=2)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [
        Cache.open(make_cache(folder / "a", n=40, seed=1, shards=5)),
        Cache.open(make_cache(folder / "b", n=23, seed=2, shards=3, prefix="other")),
    ]


def stream(caches, sampler=RULES, seed=7, **more) -> FeatureStream:
    return FeatureStream(caches, sampler, seed, **{"epochs": 2, "prefetch": 0, **more})


def rows_of(batches) -> list[list[int]]:
    return [batch.rows for batch in batches]


def flat(lists) -> list[int]:
    return sorted(chain.from_iterable(lists))


def global_rows(parts: list[FeatureStream], count: int | None = None) -> list[list[int]]:
    """The global batches, put together from every rank's slice, each sorted."""
    return [flat(batch.rows for batch in step) for step in islice(zip(*parts, strict=True), count)]


def test_a_batch_holds_the_stored_features_padded_with_zeros(caches):
    for batch in stream(caches, epochs=1):
        size, longest, channels = batch.features.shape
        assert (size, channels) == (len(batch.rows), 8)
        assert batch.features.dtype == torch.float16
        assert batch.lengths.dtype == torch.int64
        assert longest == batch.lengths.max()
        assert batch.mask().sum(1).equal(batch.lengths)
        assert not batch.features[~batch.mask()].any()
        for i, row in enumerate(batch.rows):
            cache, index = (caches[0], row) if row < 40 else (caches[1], row - 40)
            frames = int(batch.lengths[i])
            stored = original(1 if row < 40 else 2, index, frames).astype(np.float16)
            assert np.array_equal(batch.features[i, :frames].numpy(), stored)
            assert cache.row(index)["key"] == batch.keys[i]
            assert cache.row(index)["text"] == batch.texts[i]
            assert cache.row(index)["frames"] == frames


def test_several_caches_joined_end_to_end_are_read_once_an_epoch(caches):
    batches = list(stream(caches, epochs=2))
    for epoch in range(2):
        assert flat(b.rows for b in batches if b.epoch == epoch) == list(range(63))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    with_threads = list(stream(caches, epochs=2, prefetch=4, threads=3))
    assert rows_of(with_threads) == rows_of(batches)
    assert all(a.features.equal(b.features) for a, b in zip(batches, with_threads, strict=True))


def test_chosen_rows_alone_are_read(caches):
    chosen = np.arange(1, 63, 3)
    assert flat(rows_of(stream(caches, epochs=1, rows=chosen))) == chosen.tolist()


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_an_encoded_batch_holds_what_is_stored_and_decodes_to_the_features_of_a_plain_one(tmp_path, codec):
    caches = [Cache.open(make_cache(tmp_path, codec=codec))]
    streams = [
        FeatureStream(caches, SamplerConfig(batch_size=4), 0, epochs=1, encoded=encoded) for encoded in (False, True)
    ]
    for plain, batch in zip(*streams, strict=True):
        assert batch.features.element_size() == {"f16": 2, "bf16": 2, "int8": 1, "fp8": 1}[codec]
        assert (batch.scales is None) == (codec in ("f16", "bf16"))
        assert torch.equal(batch.decoded().features, plain.features)
        assert batch.decoded().scales is None


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_stored_rows_are_padded_and_decode_to_the_bits_of_the_features(tmp_path, codec):
    cache = Cache.open(make_cache(tmp_path, codec=codec))
    decoded = decode_stored(*pad_stored(cache.read_stored(np.array([3, 0, 7])), codec))
    assert decoded.shape[1] == cache.frames[[3, 0, 7]].max()
    for row, index in zip(decoded, (3, 0, 7), strict=True):
        features = cache.features(index)
        assert row[: len(features)].numpy().tobytes() == features.tobytes()
        assert not row[len(features) :].any()


@pytest.mark.parametrize("codec", ["bf16", "int8", "fp8"])
def test_other_codecs_come_as_float32(tmp_path, codec):
    cache = Cache.open(make_cache(tmp_path / "cache", n=6, codec=codec))
    for batch in stream([cache], epochs=1):
        assert batch.features.dtype == torch.float32
        for i, row in enumerate(batch.rows):
            assert np.array_equal(batch.features[i, : batch.lengths[i]].numpy(), cache.features(row))


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_worlds_may_change_at_any_number_of_restarts_and_the_global_batches_stay(caches, data):
    whole = [sorted(rows) for rows in rows_of(stream(caches))]
    seen, state = [], None
    for _ in range(3):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        ranks = [stream(caches, rank=rank, world_size=world, prefetch=rank % 3) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        seen += global_rows(ranks, data.draw(st.integers(0, len(whole) // 2)))
        states = {json.dumps(rank.state_dict()) for rank in ranks}
        assert len(states) == 1
        state = json.loads(states.pop())
    last = stream(caches)
    last.load_state_dict(state)
    assert seen + [sorted(batch.rows) for batch in last] == whole


def test_a_resume_at_the_first_and_last_batch_of_an_epoch_repeats_and_loses_nothing(caches):
    batches = list(stream(caches, epochs=3))
    per_epoch = [sum(batch.epoch == epoch for batch in batches) for epoch in range(3)]
    for cut in (0, 1, per_epoch[0] - 1, per_epoch[0], per_epoch[0] + 1, sum(per_epoch) - 1, sum(per_epoch)):
        first, second = stream(caches, epochs=3), stream(caches, epochs=3)
        seen = rows_of(islice(first, cut))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + rows_of(second) == rows_of(batches)


def test_the_state_counts_batches_taken_and_not_those_read_ahead(caches):
    ahead = stream(caches, prefetch=8)
    for taken, batch in enumerate(islice(ahead, 5), start=1):
        assert ahead.state_dict()["count"] == taken
        assert ahead.state_dict() == batch.state


def test_a_state_is_small_json_of_integers_and_ids(caches):
    state = next(iter(stream(caches))).state
    text = json.dumps(state)
    assert len(text) < 500
    assert json.loads(text) == state


def test_a_stream_continues_after_a_break_and_starts_again_after_its_end(caches):
    whole, part = rows_of(stream(caches)), stream(caches, prefetch=2)
    seen = []
    for batch in part:
        seen.append(batch.rows)
        if len(seen) == 4:
            break
    assert seen + rows_of(part) == whole
    end = part.state_dict()
    assert rows_of(part) == whole
    part.load_state_dict(end)
    assert rows_of(part) == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_dataloader_with_any_number_of_workers_returns_the_same_batches_in_the_same_order(caches, workers):
    whole = list(stream(caches))
    loader = DataLoader(stream(caches, prefetch=2), batch_size=None, num_workers=workers)
    batches = list(loader)
    assert rows_of(batches) == rows_of(whole)
    assert all(a.features.equal(b.features) and a.state == b.state for a, b in zip(whole, batches, strict=True))


def test_a_run_moves_between_worlds_and_numbers_of_workers_by_the_state_of_its_last_batch(caches):
    whole = rows_of(stream(caches))
    first = stream(caches)
    seen = []
    for batch in DataLoader(first, batch_size=None, num_workers=2):
        seen.append(batch.rows)
        first.consumed(batch)
        if len(seen) == 5:
            break
    assert first.state_dict() == batch.state
    second = stream(caches)
    second.load_state_dict(first.state_dict())
    loader = DataLoader(second, batch_size=None, num_workers=1)
    seen += rows_of(islice(loader, 4))
    third = stream(caches)
    third.load_state_dict(first.state_dict())
    assert rows_of(islice(third, 4)) == seen[5:]
    assert seen + rows_of(third) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_in_the_middle(caches, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    whole = rows_of(stream(caches))

    def load():
        return stateful.StatefulDataLoader(stream(caches, prefetch=2), batch_size=None, num_workers=workers)

    seen, state = [], None
    for count in (3, 4, len(whole)):  # a second resume must be as exact as the first
        loader = load()
        if state is not None:
            loader.load_state_dict(state)
        seen += rows_of(islice(loader, count))
        state = loader.state_dict()
    assert seen == whole


def test_a_rank_beyond_the_batch_gets_an_empty_part_and_as_many_batches(caches):
    small = SamplerConfig(batch_size=3)
    ranks = [list(stream(caches, small, epochs=1, rank=rank, world_size=8)) for rank in range(8)]
    assert len({len(batches) for batches in ranks}) == 1
    last: Batch = ranks[7][0]
    assert last.features.shape == (0, int(ranks[0][0].lengths.max()), 8)
    assert last.lengths.shape == (0,)
    assert last.mask().shape == last.features.shape[:2]
    assert last.keys == last.texts == last.rows == []
    assert last.to("cpu").features.shape == last.features.shape


def test_a_batch_that_is_kept_is_never_overwritten(caches):
    reader = stream(caches, prefetch=3)
    kept = [(batch.features[:1, 1:], batch.features[:1, 1:].clone()) for batch in reader]  # views alone keep memory
    assert all(view.equal(copy) for view, copy in kept)


def test_buffers_are_reused_once_their_batches_are_gone(caches):
    reader = stream(caches, SamplerConfig(batch_size=4), epochs=None, prefetch=2)
    places = set()
    for batch in islice(reader, 200):
        places.add(batch.features.data_ptr())
    assert len(places) < 30  # buffers grow to the longest batch first, then stay
    late = {batch.features.data_ptr() for batch in islice(reader, 100)}
    assert len(late) <= 12  # a hundred batches; how many are alive at once is up to the threads


def test_page_locked_buffers_are_few_and_used_again(caches, monkeypatch):
    made = []
    monkeypatch.setattr(ahead, "page_locked", lambda size: made.append(size) or np.empty(size, dtype=np.uint8))
    plain, pinned = (rows_and_sums(stream(caches, prefetch=2, pinned=flag)) for flag in (False, True))
    assert pinned == plain
    assert 1 <= len(made) < len(pinned) / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_stream_fills_page_locked_memory(caches):
    for batch in stream(caches, prefetch=2, pinned=True):
        assert batch.features.is_pinned()
        assert batch.to("cuda").features.cpu().equal(batch.features)


def test_memory_stays_flat_over_the_epochs(tmp_path):
    cache = Cache.open(make_cache(tmp_path / "cache", n=120, channels=256, shards=6, min_frames=100, max_frames=400))
    loop, held = iter(stream([cache], SamplerConfig(batch_size=8), epochs=None, prefetch=4)), []
    for _ in range(4):  # 15 MB an epoch
        for _ in range(15 * 8):
            next(loop)
        held.append(anonymous_bytes())
    assert max(held[1:]) - held[0] < 5e6


def rows_and_sums(batches) -> list[tuple[list[int], float]]:
    return [(batch.rows, float(batch.features.float().sum())) for batch in batches]


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_a_buffer_returns_only_when_every_view_of_its_tensor_is_gone():
    pool = BufferPool(max_free=2)
    tensor = torch.from_numpy(pool.acquire((4, 8), np.dtype(np.float16)))
    place, view, array = tensor.data_ptr(), tensor[2:].detach(), tensor.numpy()
    for name in ("tensor", "view", "array"):
        assert not pool._free
        if name == "tensor":
            del tensor
        elif name == "view":
            del view
        else:
            del array
        gc.collect()
    assert pool.acquire((4, 8), np.dtype(np.float16)).ctypes.data == place


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 8}, "seed is 7 in the state and 8"),
        (
            {"sampler": SamplerConfig(max_frames=150, batch_size=6, window_shards=2)},
            "rules.max_frames is 160 in the state and 150",
        ),
        ({"rows": np.arange(10)}, "rows is all in the state and"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_field(caches, change, field):
    state = stream(caches).state_dict()
    with pytest.raises(UserError, match=f"the state belongs to another stream: {field}"):
        stream(caches, **change).load_state_dict(state)


def test_a_state_of_other_caches_is_refused(caches, tmp_path):
    state = stream(caches).state_dict()
    with pytest.raises(UserError, match="another stream: manifests is"):
        stream(caches[:1]).load_state_dict(state)
    other = Cache.open(make_cache(tmp_path / "other", n=40, seed=1, shards=5, layer=3))
    with pytest.raises(UserError, match="another stream: feature_id is"):
        stream([other]).load_state_dict(stream(caches[:1]).state_dict())


@pytest.mark.parametrize(
    "change", [{"window": 99}, {"window": -1}, {"count": "many"}, {"epoch": None}, {"batch": [1]}, {"count": -5}]
)
def test_a_garbled_state_is_refused_in_one_sentence(caches, change):
    with pytest.raises(UserError, match=r"^not a "):
        stream(caches).load_state_dict({**stream(caches).state_dict(), **change})
    with pytest.raises(UserError, match="'feature_id' is missing"):
        stream(caches).load_state_dict({"version": STATE_VERSION})


def test_caches_of_other_features_are_refused_with_the_field_that_differs(caches, tmp_path):
    other = Cache.open(make_cache(tmp_path / "other", n=4, layer=3))
    with pytest.raises(UserError, match=r"hold different features \(layer: 2, not 3\)"):
        stream([caches[0], other])
    with pytest.raises(UserError, match="no caches: set caches"):
        stream([])


def test_an_utterance_longer_than_the_budget_is_named_before_anything_is_read(caches):
    longest = int(np.argmax(caches[1].frames))
    key, frames = caches[1].row(longest)["key"], int(caches[1].frames[longest])
    with pytest.raises(UserError, match=f"utterance '{key}' has {frames} frames"):
        stream(caches[1:], SamplerConfig(max_frames=frames - 1))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_corrupt_shard_ends_the_loop_with_its_sentence_after_the_batches_before_it(tmp_path, prefetch, workers):
    path = make_cache(tmp_path / "cache", n=20, shards=2)
    flip(path / "shards" / "000001.tar", Cache.open(path).row(19)["offset"] + 200)
    loader = DataLoader(
        stream([Cache.open(path)], SamplerConfig(batch_size=2), prefetch=prefetch), batch_size=None, num_workers=workers
    )
    taken = []
    with pytest.raises(UserError, match=r"'utt-00019' in shards/000001.tar does not match its checksum"):
        taken.extend(batch.index for batch in loader)
    assert taken == list(range(len(taken)))


def test_a_stream_survives_pickling_for_spawned_workers(caches):
    first = stream(caches, prefetch=2)
    seen = rows_of(islice(first, 3))
    second = pickle.loads(pickle.dumps(first))
    assert seen + rows_of(second) == rows_of(stream(caches))


def test_a_loop_left_standing_ends_with_its_process_and_says_nothing(tmp_path):
    cache = make_cache(tmp_path / "cache", n=40)
    script = (
        "from shards.stream.sampler import SamplerConfig; from shards.read.cache import Cache\n"
        "from shards.stream.iterable_dataset import FeatureStream\n"
        f"loop = iter(FeatureStream([Cache.open({str(cache)!r})], SamplerConfig(batch_size=2), 0)); next(loop)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""


def test_bad_ranks_and_rows_are_reported(caches):
    for bad in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"prefetch": -1}, {"threads": 0}):
        with pytest.raises(ValueError, match=r"rank|prefetch"):
            stream(caches, **bad)
    assert stream(caches).concat_cache.locate(40) == (caches[1], 0)
    with pytest.raises(IndexError):
        stream(caches).concat_cache.locate(63)


def test_a_batch_has_the_prompts_and_tasks_of_its_rows_and_none_without_such_columns(caches, tmp_path):
    assert all(batch.prompts == batch.tasks == [""] * len(batch.rows) for batch in stream(caches, epochs=1))
    path = caches[0].path
    rows = [{"key": f"utt-{i:05d}", "text": "yes", "prompt": f"Is it {i}?", "task": "ask"} for i in range(40)]
    asked = Cache.open(path, write_labels(tmp_path / "ask.csv", rows))
    seen = {}
    for batch in stream([asked, caches[1]], epochs=1):
        seen.update(zip(batch.keys, zip(batch.prompts, batch.tasks, strict=True), strict=True))
    assert seen["utt-00007"] == ("Is it 7?", "ask")
    assert seen["other-00007"] == ("", "")


def test_rows_that_share_features_are_read_once_each_with_their_own_texts(caches, tmp_path):
    both = Cache.open(caches[0].path, write_two_tasks(caches[0].path, tmp_path / "two.csv"))
    seen = [
        (key, task, text, features[0, 0].item())
        for batch in stream([both], epochs=1)
        for key, task, text, features in zip(batch.keys, batch.tasks, batch.texts, batch.features, strict=True)
    ]
    assert len(seen) == len(set(seen)) == 80
    table = both.manifest
    wanted = zip(*(table[name].to_pylist() for name in ("key", "task", "text")), strict=True)
    assert sorted(row[:3] for row in seen) == sorted(wanted)
    assert len({(key, value) for key, _, _, value in seen}) == 40  # the features belong to the key


def test_tasks_are_mixed_by_their_weights_from_one_cache(caches, tmp_path):
    both = Cache.open(caches[0].path, write_two_tasks(caches[0].path, tmp_path / "two.csv"))
    rules = SamplerConfig(batch_size=6, weights={"transcribe": 2, "count": 0.25})
    tasks = [task for batch in stream([both], rules, epochs=4) for task in batch.tasks]
    assert (tasks.count("transcribe"), tasks.count("count")) == (320, 40)
    for weights, message in [
        ({"transcribe": 1}, r"weights lack the task 'count': .* are 'count', 'transcribe'$"),
        ({"transcribe": 1, "count": 1, "tarnslate": 1}, "weights name a task 'tarnslate'"),
        ((1.0, 1.0), "weights has 2 numbers for 1 caches"),
    ]:
        with pytest.raises(UserError, match=message):
            stream([both], SamplerConfig(batch_size=6, weights=weights))
    counted = np.flatnonzero(np.array(both.manifest["task"].to_pylist()) == "count")
    stream([both], SamplerConfig(batch_size=6, weights={"count": 1}), rows=counted)  # of the rows that are read


def test_the_weight_of_a_row_says_how_often_an_epoch_reads_it(caches, tmp_path):
    rows = [{"key": f"utt-{i:05d}", "text": "a", "weight": [0.5, 1, 3][i % 3]} for i in range(40)]
    weighted = Cache.open(caches[0].path, write_labels(tmp_path / "weights.csv", rows))
    keys = [key for batch in stream([weighted, caches[1]], epochs=2) for key in batch.keys]
    assert all(keys.count(row["key"]) == 2 * row["weight"] for row in rows)
    assert keys.count("other-00000") == 2


@pytest.mark.parametrize("weights", [(0.5, 2.0), {"": 0.5}])
def test_a_weighted_stream_resumes_from_its_state_as_json(caches, weights):
    rules = SamplerConfig(batch_size=6, weights=weights)
    whole = list(stream(caches, rules))
    again = stream(caches, rules)
    again.load_state_dict(json.loads(json.dumps(whole[2].state)))
    assert rows_of(again) == rows_of(whole[3:])


def test_a_state_of_other_labels_is_refused(caches, tmp_path):
    state = stream(caches).state_dict()
    rows = [{"key": f"utt-{i:05d}", "text": "corrected"} for i in range(40)]
    other = Cache.open(caches[0].path, write_labels(tmp_path / "other.csv", rows))
    with pytest.raises(UserError, match=r"the state belongs to another stream: labels is \["):
        stream([other, caches[1]]).load_state_dict(state)


def test_a_stream_on_an_earlier_generation_of_a_grown_cache_is_the_stream_before_it_grew(tmp_path):
    before = Cache.open(make_cache(tmp_path / "cache", n=20))
    batches = list(stream([before]))
    grow(tmp_path / "cache")
    after = Cache.open(tmp_path / "cache", before.labels.id, generation=0)
    again = stream([after])
    again.load_state_dict(batches[1].state)
    assert rows_of(again) == rows_of(batches[2:])
    with pytest.raises(UserError, match="another stream: manifests is"):
        stream([Cache.open(tmp_path / "cache")]).load_state_dict(batches[1].state)


def test_the_length_is_the_number_of_batches_of_all_epochs_also_in_a_data_loader(caches):
    whole = stream(caches, epochs=2)
    assert len(whole) == len(list(stream(caches, epochs=2))) == len(DataLoader(whole, batch_size=None))
    before = len(whole)
    next(iter(whole))
    assert len(whole) == before


def test_a_stream_without_an_end_has_no_length(caches):
    with pytest.raises(TypeError, match="set epochs"):
        len(stream(caches, epochs=None))
    assert len(list(islice(stream(caches, epochs=None), 3))) == 3
    assert stream(caches, epochs=None)
