"""Label sets in the data of a run: texts, tasks, prompts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_cache import make_cache
from tiny_labels import write_labels, write_two_tasks

from shards.config.base import validate_config
from shards.errors import UserError
from shards.read.cache import Cache
from train.config.train import TrainConfig, ValConfig
from train.data.caches import held_out_mask, open_data


def config(cache, **keys) -> TrainConfig:
    return validate_config(TrainConfig, {"caches": [str(cache)], **keys}, "the test")


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", 40, val_every=5)


def rows_of(cache, **columns):
    return [{"key": row["key"], "text": row["text"], **columns} for row in Cache.open(cache).manifest.to_pylist()]


@pytest.mark.parametrize("val", [{}, {"fraction": 0.4}, {"fraction": 0.4, "seed": 3}])
def test_all_rows_of_a_key_are_on_the_same_side(cache, tmp_path, val):
    data = open_data(config(cache, labels=write_two_tasks(cache, tmp_path / "two.csv"), val=val))
    keys = np.array(data.caches[0].manifest["key"].to_pylist())
    train, held = set(keys[data.train_rows]), set(keys[data.held_out.rows])
    assert not train & held
    assert len(data.train_rows) + len(data.held_out) == 80
    alone = open_data(config(cache, val=val))
    assert held == set(alone.held_out.columns("key")["key"])
    assert data.tasks == ("count", "transcribe")
    assert alone.tasks == ("",)


def test_a_key_with_one_row_marked_val_is_held_out_with_all_its_rows(cache, tmp_path):
    rows = [*rows_of(cache, task="a", split="train"), {"key": "utt-00003", "text": "x", "task": "b", "split": "val"}]
    labels = write_labels(tmp_path / "a.csv", rows)
    opened = Cache.open(cache, labels)
    held = held_out_mask(opened, ValConfig())
    assert [key for key, mine in zip(opened.manifest["key"].to_pylist(), held, strict=True) if mine] == [
        "utt-00003"
    ] * 2


def test_rows_without_a_text_are_left_out_of_both_sides_and_counted(cache, tmp_path):
    rows = rows_of(cache, split="train")
    for at, text in ((3, ""), (5, "  "), (7, "")):
        rows[at]["text"] = text
    for row in rows[:10]:
        row["split"] = "val"
    file = write_labels(tmp_path / "a.csv", rows)
    data = open_data(config(cache, labels=file, max_label_problems=0.1))
    assert data.held_out.rows.tolist() == [0, 1, 2, 4, 6, 8, 9]
    assert data.train_rows.tolist() == list(range(10, 40))
    assert any(f"3 rows of '{cache}' have no text and are left out" in note for note in data.notes)
    with pytest.raises(UserError, match=r"3 unusable rows among 40 .* raise max_label_problems \(now 0.01\)"):
        open_data(config(cache, labels=file))


def test_labels_without_any_text_cannot_be_trained_on(cache, tmp_path):
    file = write_labels(tmp_path / "a.csv", [{"key": row["key"], "speaker": "x"} for row in rows_of(cache)])
    with pytest.raises(UserError, match=r"none of the 40 utterances of '.*' has a text: set labels to"):
        open_data(config(cache, labels=file))


def test_utterances_without_labels_and_labels_without_features_are_noted_once(cache, tmp_path):
    rows = [*rows_of(cache, split="val")[:30], {"key": "gone", "text": "x", "split": "val"}]
    for row in rows[:20]:
        row["split"] = "train"
    data = open_data(config(cache, labels=write_labels(tmp_path / "a.csv", rows), max_label_problems=1))
    (note,) = data.notes
    assert "1 row without features" in note
    assert "10 utterances without labels" in note
    assert open_data(config(cache)).notes == ()


def test_prompts_that_the_template_cannot_show_are_refused_and_others_shown(cache, tmp_path):
    labels = write_two_tasks(cache, tmp_path / "two.csv", prompt="What is said?")
    with pytest.raises(UserError, match=r"have prompts, and prompt.template 'plain' has no \{instruction\}"):
        open_data(config(cache, labels=labels))
    open_data(config(cache, labels=labels, prompt={"template": "Q: {instruction} <|audio|>"}))
    labels = write_two_tasks(cache, tmp_path / "two.csv", prompt="What is <|audio|>?")
    with pytest.raises(UserError, match=r"a prompt in the labels of .* contains <\|audio\|>"):
        open_data(config(cache, labels=labels, prompt={"template": "chat"}))


def test_a_filter_names_any_column_of_the_labels(cache, tmp_path):
    rows = [{**row, "quality": i} for i, row in enumerate(rows_of(cache, split="train"))]
    settings = {"labels": write_labels(tmp_path / "a.csv", rows), "eval_every": 0, "filter": "quality >= 38"}
    assert open_data(config(cache, **settings)).train_rows.tolist() == [38, 39]


def test_a_list_has_labels_for_each_cache_and_one_entry_is_for_all(cache, tmp_path):
    other = make_cache(tmp_path / "other", 10, prefix="other")
    file = write_two_tasks(cache, tmp_path / "two.csv")
    settings = {"caches": [str(cache), str(other)], "labels": [file, "source"]}
    assert [len(each) for each in open_data(TrainConfig.model_validate(settings)).caches] == [80, 10]
    settings["labels"] = "source"
    assert [each.labels.name for each in open_data(TrainConfig.model_validate(settings)).caches] == ["source"] * 2
    with pytest.raises(UserError, match="labels has 1 entries for 2 caches"):
        validate_config(TrainConfig, {**settings, "labels": [file]}, "the test")


def test_the_evaluation_caches_have_labels_of_their_own(cache, tmp_path):
    other = make_cache(tmp_path / "other", 10, prefix="other")
    file = write_two_tasks(other, tmp_path / "two.csv")
    data = open_data(config(cache, val={"caches": [str(other)], "labels": file}))
    assert len(data.held_out) == 20
    assert len(data.train_rows) == 32
