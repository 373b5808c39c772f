"""Streams over utterances with variants: one version of each per epoch, drawn by seed, epoch and row."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
from tiny_cache import make_cache
from tiny_variants import make_varied, varied_features
from torch.utils.data import DataLoader

from shards.errors import UserError
from shards.format.variants import variant_key
from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.join import join
from shards.stream.sampler import SamplerConfig

RULES = SamplerConfig(batch_size=4, max_frames=100, window_shards=2)
N = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache.open(make_varied(tmp_path_factory.mktemp("varied") / "cache", N, 3, failed={"utt-00004~1"}))


def stream(cache, **more) -> FeatureStream:
    return FeatureStream([cache], RULES, 5, **{"epochs": 4, "prefetch": 0, **more})


def reads(batches) -> list[tuple]:
    return [(b.epoch, k, v, n) for b in batches for k, v, n in zip(b.keys, b.variants, b.lengths.tolist(), strict=True)]


def test_an_epoch_reads_each_utterance_once_in_one_of_its_versions(cache):
    found = reads(stream(cache, epochs=12))
    assert len(found) == 12 * N
    for epoch in range(12):
        mine = [each for each in found if each[0] == epoch]
        assert sorted(key for _, key, _, _ in mine) == sorted(cache.column("key").to_pylist())
        assert {variant for *_, variant, _ in mine} == {0, 1, 2}
    by_key = {key: {v for _, k, v, _ in found if k == key} for _, key, _, _ in found}
    assert by_key.pop("utt-00004") == {0, 2}  # its variant 1 failed
    assert all(versions == {0, 1, 2} for versions in by_key.values())


def test_versions_are_equally_likely(cache):
    counts = np.bincount([v for _, key, v, _ in reads(stream(cache, epochs=50)) if key != "utt-00004"])
    assert np.all(np.abs(counts / counts.sum() - 1 / 3) < 0.05)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_batch_has_the_features_of_the_drawn_variants_and_the_labels_of_their_utterances(tmp_path, encoded):
    cache = Cache.open(make_varied(tmp_path / "cache", 12, 3, codec="int8"))
    every = Cache.open(cache.path, variants=True)
    place = {key: i for i, key in enumerate(every.column("key").to_pylist())}
    for batch in stream(cache, encoded=encoded):
        decoded = batch.decoded()
        for i, (key, variant, text) in enumerate(zip(batch.keys, batch.variants, batch.texts, strict=True)):
            x = every.features(place[variant_key(key, variant)])
            length = int(batch.lengths[i])
            assert np.array_equal(decoded.features[i, :length].numpy(), x)
            assert not decoded.features[i, length:].any()
            assert text == f"text {int(key[-5:])}"
            wanted = varied_features()(variant_key(key, variant), length)
            assert np.abs(x - wanted).max() < 0.1


def test_batches_are_grouped_by_the_length_of_what_is_read(cache):
    batches = list(stream(cache, epochs=8))
    assert all(b.features.shape[0] * b.features.shape[1] <= 100 for b in batches)
    with pytest.raises(UserError, match="23 frames, but a batch is limited to 20"):
        FeatureStream([cache], SamplerConfig(max_frames=20), 0)
    FeatureStream([cache], SamplerConfig(max_frames=20), 0, variants=2)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_the_versions_that_one_process_reads(cache, world):
    parts = [stream(cache, rank=rank, world_size=world) for rank in range(world)]
    together = sorted(itertools.chain.from_iterable(map(reads, parts)))
    assert together == sorted(reads(stream(cache)))


@pytest.mark.parametrize("at", [1, 9, 17])
def test_a_stream_that_is_resumed_goes_on_with_the_same_versions(cache, at):
    whole = list(stream(cache))
    state = json.loads(json.dumps(whole[at - 1].state))
    rest = stream(cache, rank=0)
    rest.load_state_dict(state)
    assert reads(rest) == reads(whole[at:])


def test_dataloader_workers_read_the_same_versions(cache):
    found = reads(DataLoader(stream(cache), batch_size=None, num_workers=2))
    assert found == reads(pickle.loads(pickle.dumps(stream(cache))))


def test_without_variants_the_batches_are_those_of_a_cache_that_has_none(tmp_path):
    plain, varied = (Cache.open(make_varied(tmp_path / str(n), N, n)) for n in (1, 3))
    one, two = list(stream(plain)), list(stream(varied, variants=1))
    assert reads(one) == reads(two)
    assert all(np.array_equal(a.features, b.features) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("saved", "loaded"), [({}, {"variants": 1}), ({"variants": 1}, {}), ({"variants": 2}, {})])
def test_a_state_of_other_versions_is_refused(cache, saved, loaded):
    state = next(iter(stream(cache, **saved))).state
    with pytest.raises(UserError, match=r"rows is all.* in the state and all"):
        stream(cache, **loaded).load_state_dict(state)


def test_a_state_of_variants_as_items_is_refused(cache):
    state = next(iter(stream(Cache.open(cache.path, variants=True)))).state
    with pytest.raises(UserError, match="all, with variants in the state"):
        stream(cache, variants=1).load_state_dict(state)


def test_caches_with_and_without_variants_are_read_together(cache, tmp_path):
    other = Cache.open(make_cache(tmp_path / "other", 10, prefix="other"))
    both = FeatureStream([other, cache], SamplerConfig(batch_size=4), 5, epochs=3, prefetch=0)
    found = reads(both)
    assert len(found) == 3 * (N + 10)
    assert {v for _, key, v, _ in found if key.startswith("other")} == {0}
    assert {v for _, key, v, _ in found if key.startswith("utt")} == {0, 1, 2}


def test_layers_side_by_side_read_the_same_versions(tmp_path):
    caches = [Cache.open(make_varied(tmp_path / f"L{n}", layer=n, channels=n)) for n in (4, 6)]
    joined = join(caches)
    for batch in FeatureStream(caches[:1], RULES, 0, rows=joined.rows[:, 0], epochs=2):
        _, y = joined.layers(batch)
        for i, (key, number) in enumerate(zip(batch.keys, batch.variants, strict=True)):
            length = int(batch.lengths[i])
            wanted = varied_features(6)(variant_key(key, number), length).astype(np.float16)
            assert np.array_equal(y[i, :length].numpy(), wanted)


def test_layers_with_other_variants_are_not_joined(tmp_path):
    caches = [Cache.open(make_varied(tmp_path / f"L{n}", layer=n, variants=n)) for n in (3, 2)]
    with pytest.raises(UserError, match=r"has other variants than .*: extract both with the same augment"):
        join(caches)
