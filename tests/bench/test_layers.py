"""The smaller forms of ``bench/layers.py`` are caches that the project reads, with the frames that they declare."""

from __future__ import annotations

import numpy as np
import pytest
from scripts import load_script
from tiny_cache import make_cache

from shards.read.cache import Cache

layers = load_script("bench/layers.py")


def test_means_of_neighbouring_frames_end_with_the_mean_of_those_that_are_left():
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_allclose(layers.smaller(x, 2, None), [[1, 2], [5, 6], [8, 9]])


def test_all_components_together_lose_nothing_of_the_distances_between_frames(tmp_path):
    cache = Cache.open(make_cache(tmp_path / "cache", 8))
    x = np.asarray(cache.features(0), np.float32)
    found = layers.smaller(x, 1, layers.principal_components([cache], cache.spec.channels))
    np.testing.assert_allclose(np.linalg.norm(found[0] - found[1]), np.linalg.norm(x[0] - x[1]), rtol=1e-3)


@pytest.mark.parametrize("form", ["int8, mean of 2", "int8, mean of 4"])
def test_a_smaller_form_opens_with_the_frames_of_its_samples_and_another_identity(tmp_path, form):
    cache = Cache.open(make_cache(tmp_path / "cache", 8))
    made = Cache.open(layers.write(tmp_path, cache, form, None))
    pool = layers.FORMS[form][1]
    assert made.spec.hop == pool * cache.spec.hop
    assert made.feature_id != cache.feature_id
    for row in range(len(cache)):
        x = layers.smaller(cache.features(row), pool, None)
        assert made.features(row).shape == x.shape
        assert np.abs(np.asarray(made.features(row), np.float32) - x).max() <= np.abs(x).max() / 127
