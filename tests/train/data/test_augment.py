from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_cache import make_cache
from tiny_run import make_config

from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig
from train.config.model import AugmentConfig
from train.data.caches import open_data
from train.data.loader import augment, open_stream
from train.distributed.group import ProcessGroup


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment") / "cache"
    return Cache.open(make_cache(folder, 8, channels=16, min_frames=150, max_frames=300))


def utterances(cache: Cache, world: int = 1, seed: int = 3, **keys: float) -> dict[tuple[int, int], np.ndarray]:
    """(batch, row) -> features [T, C] of two epochs after augmentation; padding must stay zero."""
    found = {}
    changes = AugmentConfig(**{key: keys.pop(key) for key in list(keys) if key in AugmentConfig.model_fields})
    for rank in range(world):
        for batch in FeatureStream([cache], SamplerConfig(batch_size=3), 0, rank=rank, world_size=world, epochs=2):
            stored = batch.features.clone()
            batch, given = (
                augment(batch, seed, **{"frame_mask_prob": 0.0, "noise_std": 0.0, **keys}, changes=changes),
                batch,
            )
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


def test_spans_and_bands_become_the_mean_of_their_channel(cache):
    keys = {"time_masks": 2, "time_mask_frames": 20, "channel_masks": 1, "channel_mask_size": 3}
    for (_, row), features in utterances(cache, **keys).items():
        stored = torch.from_numpy(cache.features(row).copy())
        mean = stored.float().mean(0).to(stored.dtype).numpy()
        changed = features != stored.numpy()
        assert np.array_equal(features[changed], np.broadcast_to(mean, features.shape)[changed])
        frames, channels = changed.all(1), changed.all(0)
        assert channels.sum() == 3
        assert 1 <= frames.sum() <= 40
        assert not changed[~frames][:, ~channels].any()


def test_speed_changes_the_length_by_at_most_its_share_and_keeps_the_shape_of_a_channel(cache):
    lengths = []
    for (_, row), features in utterances(cache, speed=0.2).items():
        stored = cache.features(row).astype(np.float32)
        lengths.append(len(features) / len(stored))
        assert 1 / 1.21 < lengths[-1] < 1 / 0.79
        places = np.linspace(0, 1, len(features)), np.linspace(0, 1, len(stored))
        assert np.corrcoef(features[:, 0], np.interp(places[0], places[1], stored[:, 0]))[0, 1] > 0.5
    assert np.std(lengths) > 0.05


def test_a_share_of_the_utterances_becomes_silence_with_an_empty_text(cache):
    silent = kept = 0
    for batch in FeatureStream([cache], SamplerConfig(batch_size=3), 0, epochs=40):
        changed = augment(batch, 3, 0.0, 0.0, AugmentConfig(silence=0.3))
        for i, text in enumerate(changed.texts):
            frames = changed.features[i, : changed.lengths[i]]
            stored = batch.features[i, : batch.lengths[i]]
            assert text in ("", batch.texts[i])
            assert torch.equal(frames, stored) == bool(text)
            assert (torch.cdist(frames.float(), stored.float()).min(1).values < 0.01).all()
            silent, kept = silent + (not text), kept + bool(text)
    assert silent / (silent + kept) == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(
    "keys",
    [{"frame_mask_prob": 0.3}, {"noise_std": 0.1}, {"time_masks": 3}, {"speed": 0.2}, {"silence": 0.9}],
    ids=lambda keys: next(iter(keys)),
)
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


@pytest.mark.parametrize("codec", ["bf16", "int8", "fp8"])
def test_an_encoded_batch_changes_as_a_decoded_one(tmp_path, codec):
    caches = [Cache.open(make_cache(tmp_path, codec=codec))]
    batches = [
        next(iter(FeatureStream(caches, SamplerConfig(batch_size=4), 0, encoded=encoded))) for encoded in (False, True)
    ]
    plain, encoded = (augment(batch, 1, 0.3, 0.1, AugmentConfig(speed=0.1)) for batch in batches)
    assert torch.equal(plain.features, encoded.features)
    assert encoded.scales is None


@pytest.mark.parametrize(
    ("keys", "device", "encoded"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"noise_std": 0.1}, "cuda", False),
        ({"augment": {"speed": 0.1}}, "cuda", False),
    ],
)
def test_features_for_a_gpu_stay_encoded_unless_the_host_changes_them(tmp_path, monkeypatch, keys, device, encoded):
    monkeypatch.setattr("train.data.loader.choose_device", lambda name: torch.device(device))
    config = make_config(tmp_path, make_cache(tmp_path / "cache"), "none", eval_every=0, **keys)
    stream = open_stream(config, open_data(config), ProcessGroup())
    assert isinstance(stream, FeatureStream)
    assert stream.encoded == encoded
