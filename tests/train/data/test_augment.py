from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_cache import make_cache

from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig
from train.data.loader import augment


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment") / "cache"
    return Cache.open(make_cache(folder, 8, channels=16, min_frames=150, max_frames=300))


def utterances(cache: Cache, world: int = 1, seed: int = 3, **keys: float) -> dict[tuple[int, int], np.ndarray]:
    """(batch, row) -> features [T, C] of two epochs after augmentation; padding must stay zero."""
    found = {}
    for rank in range(world):
        for batch in FeatureStream([cache], SamplerConfig(batch_size=3), 0, rank=rank, world_size=world, epochs=2):
            stored = batch.features.clone()
            batch, given = augment(batch, seed, **{"frame_mask_prob": 0.0, "noise_std": 0.0, **keys}), batch
            assert torch.equal(given.features, stored)
            assert not batch.features[~batch.mask()].any()
            for i, row in enumerate(batch.rows):
                found[batch.index, row] = batch.features[i, : batch.lengths[i]].numpy().copy()
    return found


def test_without_settings_nothing_changes(cache):
    for (_, row), features in utterances(cache).items():
        assert np.array_equal(features, cache.features(row))


def test_a_tenth_of_the_frames_is_zero_and_the_others_are_untouched(cache):
    zero = total = 0
    for (_, row), features in utterances(cache, frame_mask_prob=0.1).items():
        silent = ~features.any(1)
        assert np.array_equal(features[~silent], cache.features(row)[~silent])
        zero, total = zero + silent.sum(), total + len(silent)
    assert zero / total == pytest.approx(0.1, abs=0.02)


def test_noise_has_the_given_standard_deviation_relative_to_each_channel(cache):
    for (_, row), features in utterances(cache, noise_std=0.2).items():
        clean = cache.features(row).astype(np.float32)
        ratio = (features - clean).std(0) / clean.std(0)
        assert ratio.mean() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("keys", [{"frame_mask_prob": 0.3}, {"noise_std": 0.1}])
def test_augmentation_is_the_same_for_any_world_size_and_differs_between_epochs(cache, keys):
    one, three = utterances(cache, **keys), utterances(cache, world=3, **keys)
    assert one.keys() == three.keys()
    assert all(np.array_equal(one[place], three[place]) for place in one)
    epochs: dict[int, list[np.ndarray]] = {}
    for (_, row), features in one.items():
        epochs.setdefault(row, []).append(features)
    assert all(len(both) == 2 and not np.array_equal(*both) for both in epochs.values())
    other = utterances(cache, seed=4, **keys)
    assert not any(np.array_equal(one[place], other[place]) for place in one)


def test_noise_on_an_utterance_of_one_frame_is_not_nan(tmp_path):
    short = Cache.open(make_cache(tmp_path / "cache", 3, min_frames=1, max_frames=1))
    assert all(np.isfinite(features).all() for features in utterances(short, noise_std=0.5).values())
