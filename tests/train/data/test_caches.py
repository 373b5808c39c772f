from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from tiny_cache import make_cache
from tiny_server import serve

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from train.config.train import TrainConfig, ValConfig
from train.data.caches import (
    MissingCache,
    Utterances,
    find_cache,
    held_out_mask,
    missing_extractions,
    open_corpora,
    open_data,
)
from train.data.padding import pad
from train.evaluation.run import evaluation_utterances
from train.runs.folder import describe_caches


def config(*caches, **keys):
    return TrainConfig.model_validate({"caches": [str(cache) for cache in caches], **keys})


@pytest.fixture
def marked(tmp_path):
    """20 utterances of 7 speakers, every fifth marked ``val``."""
    return make_cache(tmp_path / "speech-1a2b" / "whisper-L2-f16-0001", 20, val_every=5)


@pytest.fixture
def plain(tmp_path):
    return make_cache(tmp_path / "plain", 40)


def test_a_pattern_finds_the_one_cache_it_matches(marked, tmp_path):
    assert find_cache(f"{tmp_path}/speech-*/whisper-L2-f16-*") == str(marked)
    assert find_cache(str(marked)) == str(marked)


def test_the_name_of_a_corpus_finds_its_one_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = make_cache(tmp_path / "caches" / "clips" / "whisper-L2-f16-0001", 5)
    assert find_cache("clips") == str(cache.relative_to(tmp_path))
    assert find_cache("others") is None
    (tmp_path / "clips").mkdir()  # a folder of that name is meant first
    assert find_cache("clips") is None


def test_an_ambiguous_pattern_is_rejected_with_what_it_matches(marked, tmp_path):
    other = make_cache(tmp_path / "speech-3c4d" / "whisper-L2-f16-0001", 5)
    with pytest.raises(UserError, match="matches 2 caches") as error:
        find_cache(f"{tmp_path}/speech-*/*")
    assert str(marked) in str(error.value)
    assert str(other) in str(error.value)


def test_an_unfinished_cache_counts_as_missing(marked):
    (marked / "CACHE.json").unlink()
    assert find_cache(str(marked)) is None


def test_the_error_for_a_missing_cache_names_its_extraction(marked, tmp_path):
    with pytest.raises(MissingCache, match=r"run `make extract CONFIG=b\.yaml`") as error:
        open_data(config(marked, tmp_path / "gone", extract=["a.yaml", "b.yaml"]))
    assert "a.yaml" not in str(error.value)
    with pytest.raises(MissingCache, match="make extract"):
        open_data(config(tmp_path / "gone"))


def test_missing_extractions_lists_only_those_of_missing_caches(marked, tmp_path):
    gone = tmp_path / "gone"
    assert missing_extractions(config(marked, extract=["a.yaml"])) == []
    assert missing_extractions(config(marked, gone, extract=["a.yaml", "b.yaml"])) == ["b.yaml"]
    assert missing_extractions(config(gone, gone, extract=["a.yaml", "a.yaml"])) == ["a.yaml"]
    assert missing_extractions(config(gone, tmp_path / "gone too", extract=["a.yaml"])) == ["a.yaml"]
    assert missing_extractions(config(marked, val={"caches": [str(gone)]}, extract=["a.yaml"])) == ["a.yaml"]
    with pytest.raises(MissingCache, match="correct the path"):
        missing_extractions(config(gone))


def test_rows_marked_val_are_held_out_and_the_others_trained_on(marked):
    data = open_data(config(marked))
    assert data.held_out.rows.tolist() == [0, 5, 10, 15]
    assert sorted([*data.train_rows, *data.held_out.rows]) == list(range(20))


def test_a_filter_applies_to_training_rows_and_not_to_evaluation(marked, plain):
    whole = open_data(config(marked, plain))
    frames = np.concatenate([cache.frames for cache in whole.caches])
    data = open_data(config(marked, plain, filter="frames > 20 and speaker != 'speaker-1'"))
    assert data.held_out.rows.tolist() == whole.held_out.rows.tolist()
    speakers = [speaker for cache in whole.caches for speaker in cache.manifest["speaker"].to_pylist()]
    assert data.train_rows.tolist() == [
        row for row in whole.train_rows if frames[row] > 20 and speakers[row] != "speaker-1"
    ]
    with pytest.raises(UserError, match="matches the filter 'frames > 9999': relax filter"):
        open_data(config(marked, filter="frames > 9999"))


def test_weights_and_filters_reach_the_stream(marked, plain):
    settings = config(marked, plain, batch={"size": 4, "weights": [2, 0.5]})
    data = open_data(settings)
    stream = FeatureStream(data.caches, settings.batch.sampler_config(), 0, rows=data.train_rows, epochs=1, prefetch=0)
    rows = [row for batch in stream for row in batch.rows]
    assert sum(row < 20 for row in rows) == 2 * (data.train_rows < 20).sum()
    assert abs(sum(row >= 20 for row in rows) - 20) <= 3
    short = config(marked, plain, batch={"weights": [2]}).batch.sampler_config()
    with pytest.raises(UserError, match="weights has 1 numbers for 2 caches"):
        FeatureStream(data.caches, short, 0)


def test_a_cache_may_be_a_url(marked, tmp_path, monkeypatch):
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))
    with serve(marked) as server:
        assert missing_extractions(config(server.url)) == []
        data = open_data(config(server.url))
        assert data.train_rows.tolist() == open_data(config(marked)).train_rows.tolist()
        assert describe_caches(data.caches)["caches"][0]["path"] == server.url
        with pytest.raises(UserError, match="twice"):
            open_corpora([server.url, f"{server.url}/"])


def test_a_fraction_holds_out_whole_speakers_on_top_of_marked_rows(plain):
    cache = Cache.open(plain)
    mask = held_out_mask(cache, ValConfig(fraction=0.3))
    speakers = np.array(cache.manifest["speaker"].to_pylist())
    assert 0.2 * 40 <= mask.sum() <= 0.3 * 40
    assert not set(speakers[mask]) & set(speakers[~mask])
    assert mask.tolist() == held_out_mask(cache, ValConfig(fraction=0.3)).tolist()
    assert mask.tolist() != held_out_mask(cache, ValConfig(fraction=0.3, seed=1)).tolist()


def test_a_small_fraction_holds_out_at_least_one_speaker(plain):
    mask = held_out_mask(Cache.open(plain), ValConfig(fraction=0.02))
    assert 1 <= mask.sum() <= 6


def test_a_fraction_never_trains_on_a_marked_row(marked):
    mask = held_out_mask(Cache.open(marked), ValConfig(fraction=0.5))
    assert mask[[0, 5, 10, 15]].all()
    assert 4 < mask.sum() <= 10


@pytest.mark.parametrize("speaker", ["", "one"])
def test_without_two_speakers_keys_are_held_out(speaker):
    columns = {"key": [f"k{i}" for i in range(1000)], "speaker": [speaker] * 1000, "split": ["train"] * 1000}
    mask = held_out_mask(SimpleNamespace(column=pa.table(columns).column), ValConfig(fraction=0.1))  # type: ignore[arg-type]
    assert mask.sum() == 100


def test_an_empty_held_out_set_is_rejected_unless_the_run_never_evaluates(plain):
    with pytest.raises(UserError, match=r"val\.fraction=0\.1"):
        open_data(config(plain))
    assert len(open_data(config(plain, eval_every=0)).train_rows) == 40


def test_a_run_can_be_evaluated_on_its_training_cache(plain):
    data = open_data(config(plain, val={"caches": [str(plain)]}))
    assert len(data.train_rows) == len(data.held_out) == 40


def test_caches_join_end_to_end(marked, plain):
    data = open_data(config(marked, plain))
    assert len(data.train_rows) + len(data.held_out) == 60
    both = Utterances(data.caches, np.array([1, 21]))
    frames = [len(both.features(0)), len(both.features(1))]
    assert both.columns("key", "frames") == {"key": ["utt-00001", "utt-00001"], "frames": frames}
    assert np.array_equal(both.features(1), Cache.open(plain).features(1))


def test_caches_of_other_features_are_rejected_with_the_field(plain, tmp_path):
    other = make_cache(tmp_path / "other", 4, layer=3)
    with pytest.raises(UserError, match="layer: 3, not 2"):
        open_corpora([str(plain), str(other)])
    with pytest.raises(UserError, match="layer: 3, not 2"):
        open_data(config(plain, val={"caches": [str(other)]}))


def test_a_cache_named_twice_is_rejected(plain):
    with pytest.raises(UserError, match="twice"):
        open_corpora([str(plain), f"{plain}/"])


def test_a_limit_takes_the_same_part_each_time_in_row_order(plain):
    data = open_data(config(plain, val={"caches": [str(plain)], "limit": 7}))
    rows = data.held_out.rows.tolist()
    assert len(rows) == 7
    assert rows == sorted(rows)
    assert rows != list(range(7))
    assert set(data.held_out.subset(3).rows) < set(rows)


def test_evaluation_uses_held_out_rows_of_a_training_cache_and_all_rows_of_another(marked, plain):
    settings = config(marked)
    mine, other = ({**describe_caches([Cache.open(path)]), "spec": Cache.open(path).spec} for path in (marked, plain))
    assert evaluation_utterances(str(marked), settings, mine).rows.tolist() == [0, 5, 10, 15]
    assert len(evaluation_utterances(str(plain), settings, mine)) == 40
    with pytest.raises(UserError, match="trained on every utterance"):
        evaluation_utterances(str(plain), config(plain, eval_every=0), other)


def test_pad_puts_zeros_behind_and_masks_them():
    features, mask = pad([np.ones((2, 3), np.float16), np.ones((4, 3), np.float16)])
    assert features.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert features[0, 2:].abs().sum() == 0


def test_more_held_out_than_asked_is_told_with_the_reason(marked, tmp_path):
    two = make_cache(tmp_path / "two", 40)  # 40 utterances of 7 speakers
    assert open_data(config(two, val={"fraction": 0.2})).notes == ()
    (by_speaker,) = open_data(config(two, val={"fraction": 0.05})).notes
    assert "5 of 40 utterances" in by_speaker
    assert by_speaker.endswith("because speakers are held out whole")
    (by_label,) = open_data(config(marked, val={"fraction": 0.05})).notes
    assert "4 of 20 utterances" in by_label
    assert "the labels put them into split 'val'" in by_label
