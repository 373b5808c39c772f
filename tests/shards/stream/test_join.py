from __future__ import annotations

import numpy as np
import pytest
import torch
from extraction import run, words, write_corpus
from tiny_cache import append, make_cache, plan_row, without
from tiny_labels import write_two_tasks
from tiny_whisper import write_tiny_whisper

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.join import join
from shards.stream.sampler import SamplerConfig

TEXT = {"key": "utt-00000", "text": "one"}


def zeros(key: str, frames: int) -> np.ndarray:
    return np.zeros((frames, 4), np.float32)


@pytest.fixture
def layers(tmp_path) -> list[Cache]:
    """Two layers of one corpus: other channels, another codec, and an utterance that failed in the second."""
    first = make_cache(tmp_path / "L2", n=20, channels=8, layer=2)
    second = make_cache(tmp_path / "L4", n=20, channels=6, layer=4, codec="int8")
    return [Cache.open(first), without(second, "utt-00007")]


def test_utterances_that_all_caches_hold_stand_side_by_side(layers):
    joined = join(layers)
    assert len(joined) == 19
    assert joined.num_missing == 1
    for index, (one, two) in enumerate(joined.rows.tolist()):
        assert layers[0].row(one)["key"] == layers[1].row(two)["key"] != "utt-00007"
        x, y = joined.features(index)
        assert np.array_equal(x, layers[0].features(one))
        assert np.array_equal(y, layers[1].features(two))
        assert len(x) == len(y)


def test_a_stream_over_the_first_cache_has_the_others_features_in_the_same_places(layers):
    joined = join(layers)
    seen = []
    for batch in FeatureStream([layers[0]], SamplerConfig(batch_size=4), 0, rows=joined.rows[:, 0], epochs=1):
        x, y = joined.layers(batch)
        assert x is batch.features
        assert y.shape == (*x.shape[:2], 6)
        assert y.dtype == torch.float32
        for row, key, frames, features in zip(batch.rows, batch.keys, batch.lengths.tolist(), y, strict=True):
            place = joined.rows[:, 0].tolist().index(row)
            assert np.array_equal(features[:frames].numpy(), joined.features(place)[1])
            assert not features[frames:].any()
            seen.append(key)
    assert sorted(seen) == sorted({f"utt-{i:05d}" for i in range(20)} - {"utt-00007"})


def test_layers_of_one_extraction_join_completely(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus, 4)
    root, whisper = tmp_path / "root", write_tiny_whisper(tmp_path / "whisper")
    assert run(words(root, corpus, whisper, "encoder.layers=[0,1,2]")) == 0
    caches = [Cache.open(path.parent) for path in sorted(root.glob("*/*/CACHE.json"))]
    joined = join(caches)
    assert (len(joined), joined.num_missing, len(joined.caches)) == (4, 0, 3)
    assert np.array_equal(joined.rows, np.repeat(np.arange(4)[:, None], 3, axis=1))


def test_what_does_not_belong_together_is_refused(layers, tmp_path):
    for caches, message in [
        ([], "no caches to join"),
        ([layers[0], layers[0]], "occurs twice"),
        ([layers[0], Cache.open(make_cache(tmp_path / "a", n=5, prefix="other"))], "no utterance in common"),
        ([layers[0], Cache.open(make_cache(tmp_path / "b", n=20, seed=1))], "frames in"),
    ]:
        with pytest.raises(UserError, match=message):
            join(caches)


def test_a_key_with_other_audio_is_refused(layers, tmp_path):
    path = make_cache(tmp_path / "changed", n=20, channels=4)
    append(path, Cache.open(path).spec, [plan_row("utt-00000", 9 * 320, 3, 0, "another.wav")], [TEXT], zeros)
    with pytest.raises(UserError, match="'utt-00000' has other audio"):
        join([layers[0], Cache.open(path)])


def test_rows_of_a_label_set_share_the_features_of_their_key_in_every_cache(layers, tmp_path):
    labels = write_two_tasks(layers[0].path, tmp_path / "two.csv")
    joined = join([Cache.open(layers[0].path, labels, max_label_problems=1), layers[1]])
    assert len(joined) == 38
    first, second = joined.caches
    for one, two in joined.rows.tolist():
        assert first.row(one)["key"] == second.row(two)["key"]
    batches = FeatureStream([first], SamplerConfig(batch_size=8), 0, rows=joined.rows[:, 0], epochs=1)
    for batch in batches:
        for key, frames, features in zip(batch.keys, batch.lengths.tolist(), joined.layers(batch)[1], strict=True):
            index = second.manifest["key"].to_pylist().index(key)
            assert np.array_equal(features[:frames].numpy(), second.features(index))
