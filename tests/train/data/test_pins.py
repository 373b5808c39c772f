from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pytest
from tiny_cache import grow, make_cache
from tiny_labels import write_labels, write_two_tasks
from tiny_lm import save_tiny_lm
from tiny_run import forget_after, losses, make_config

from shards.commit.folder import add_labels
from shards.errors import UserError
from shards.format.layout import Layout
from shards.read.cache import Cache
from train.config.train import TrainConfig
from train.data.caches import open_data
from train.evaluation.run import evaluate_run
from train.evaluation.utterance_table import read_utterances
from train.runs.folder import read_pins
from train.trainer.fit import fit


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> str:
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('lm') / 'lm')}"


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", 24, val_every=6)


def relabel(cache, name: str, text: str) -> None:
    """Add a label set in which every row has ``text`` and another third of the rows is held out."""
    keys = Cache.open(cache, generation=0).manifest["key"].to_pylist()
    splits = ["val" if i % 3 == 1 else "train" for i in range(len(keys))]
    table = pa.table({"key": keys, "text": [text] * len(keys), "split": splits})
    add_labels(Layout(cache), table, name, "test", reserved=True)


def test_a_run_resumes_to_the_same_losses_after_its_cache_grew_and_its_labels_were_corrected(
    tmp_path, cache, lm, capsys
):
    config = make_config(tmp_path, cache, lm, checkpoint_every=3)
    run = fit(config)
    whole, evaluated = losses(run), read_utterances(run)
    forget_after(run, 6)
    grow(cache)
    relabel(cache, "source", "corrected")
    capsys.readouterr()
    fit(config, run)
    assert losses(run) == whole
    assert read_utterances(run).equals(evaluated)
    labels = json.loads((run / "caches.json").read_text())["caches"][0]["labels"]
    note = (
        f"note: '{cache}' has grown: this run keeps generation 0 (24 utterances) and labels source-{labels['id'][:8]}; "
        "a new run would see 24\n"  # the corrected labels have no row for the new utterances
    )
    assert capsys.readouterr().err.count(note) == 1


def test_a_finished_run_is_evaluated_on_its_own_rows_after_growth_also_by_the_name_of_its_cache(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, val={"fraction": 0.3})
    run = fit(config)
    keys = read_utterances(run)["key"].to_pylist()
    grow(cache, 30)
    assert evaluate_run(run, config)["n_val"] == len(keys)
    assert read_utterances(run)["key"].to_pylist() == keys
    assert evaluate_run(run, config, str(cache))["n_val"] == len(keys)
    assert len(open_data(config).held_out) > len(keys)  # what a new run would hold out


def test_a_run_is_evaluated_with_other_labels_on_the_utterances_that_it_did_not_train_on(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=1, val={"fraction": 0.3})
    run = fit(config)
    held = read_utterances(run)["key"].to_pylist()
    grow(cache, 30)
    labels = write_two_tasks(cache, tmp_path / "two.csv")
    evaluate_run(run, config, str(cache), labels=labels)
    (folder,) = (run / "judged").iterdir()
    assert sorted(read_utterances(folder)["key"].to_pylist()) == sorted(held * 2)
    with pytest.raises(UserError, match="--labels belongs to --cache"):
        evaluate_run(run, config, labels=labels)


def test_newer_labels_alone_are_noted(tmp_path, cache):
    config = make_config(tmp_path, cache, "")
    data = open_data(config)
    (pin,) = read_pins(_folder(tmp_path, config, data))[0]
    assert open_data(config, [pin]).notes == ()
    relabel(cache, "other", "another set")
    assert open_data(config, [pin]).notes == ()
    relabel(cache, "source", "corrected")
    (note,) = open_data(config, [pin]).notes
    assert f"'{cache}' has newer labels: this run keeps generation 0 (24 utterances)" in note
    assert open_data(config, [pin]).identity() == data.identity()
    assert open_data(config).identity()["label ids"] != data.identity()["label ids"]


def _folder(tmp_path, config, data):
    from train.runs.folder import create_run_folder

    create_run_folder(tmp_path / "runs" / "run", config, data)
    return tmp_path / "runs" / "run"


def test_a_run_on_a_label_file_needs_that_file_again_wherever_it_is(tmp_path, cache, lm):
    file = write_labels(tmp_path / "mine.csv", Cache.open(cache).labels.table.to_pylist())
    config = make_config(tmp_path, cache, lm, checkpoint_every=3, labels=file)
    run = fit(config)
    whole = losses(run)
    forget_after(run, 6)
    moved = shutil.move(file, tmp_path / "moved.csv")
    again = config.model_copy(update={"labels": str(moved)})
    fit(again, run)
    assert losses(run) == whole
    forget_after(run, 6)
    write_two_tasks(cache, tmp_path / "moved.csv")
    with pytest.raises(UserError, match=r"the labels '.*moved.csv' have changed since the run was trained"):
        fit(again, run)
    with pytest.raises(UserError, match=r"cannot resume with changed settings \(labels: "):
        fit(config.model_copy(update={"labels": "source"}), run)


def test_all_layers_use_the_labels_of_the_first_cache_and_keep_their_generations(tmp_path, cache):
    other = make_cache(tmp_path / "L4", 24, val_every=6, layer=4)
    labels = write_two_tasks(cache, tmp_path / "two.csv")
    config = TrainConfig.model_validate({"caches": [[str(cache), str(other)]], "labels": labels})
    data = open_data(config)
    assert len(data.train_rows) + len(data.held_out) == 48
    assert {len(each) for each in data.layers.joined[0].caches} == {48}
    pins, _ = read_pins(_folder(tmp_path, config.model_copy(update={"runs": str(tmp_path)}), data))
    grow(cache)
    grow(other)
    again = open_data(config, pins)
    assert again.identity() == data.identity()
    assert open_data(config).identity() != data.identity()
