"""``python -m train probe`` on caches in which something is planted: it is found there, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from page import Page
from tiny_cache import append, make_spec, plan_row
from tiny_labels import write_labels

from shards.read.cache import Cache
from train.__main__ import command
from train.probes.data import make_folds
from train.probes.linear import interval
from train.probes.words import character_errors, pooled

SPEAKERS, CHANNELS = 8, 12


def planted_cache(folder, layer, plant=None, n=96, skip=()):
    """Write ``n`` utterances of 8 speakers; ``plant(i, x)`` changes the noise [frames, 12] of utterance i in place."""
    numbers = [i for i in range(n) if i not in skip]
    rows = [plan_row(f"utt-{i:05d}", 320 * (10 + i % 5), 0, row) for row, i in enumerate(numbers)]
    labels = [{"key": row["key"], "text": "yes no"[i % 3 :], "speaker": f"s{i % SPEAKERS}", "split": "train"}
              for row, i in zip(rows, numbers, strict=True)]  # fmt: skip

    def features(key, count):
        x = np.random.default_rng([layer, int(key[-5:])]).standard_normal((count, CHANNELS)).astype(np.float32)
        if plant is not None:
            plant(int(key[-5:]), x)
        return x

    append(folder, make_spec(CHANNELS, layer=layer), rows, labels, features)
    return str(folder)


def plant_speaker(i, x):
    x[:, i % SPEAKERS] += 3


def run(tmp_path, *arguments, out="out"):
    assert command(["probe", *arguments, "--out", str(tmp_path / out)]) == 0
    found = json.loads((tmp_path / out / "probe.json").read_text())
    return found, {(each["layer"], each["probe"]): each for each in found["results"]}


def test_the_layer_that_carries_the_speaker_is_found(tmp_path):
    caches = [planted_cache(tmp_path / "a", 1), planted_cache(tmp_path / "b", 2, plant_speaker)]
    _, scores = run(tmp_path, *caches, "--no-words")
    assert scores["L2", "speaker"]["value"] > 0.9
    assert scores["L1", "speaker"]["low"] < scores["L1", "speaker"]["chance"] == 1 / SPEAKERS


def label_file(cache, file, **columns):
    table = Cache.open(cache).manifest.select(["key", "text", "speaker"]).to_pylist()
    return write_labels(file, [{**row, **{name: make(int(row["key"][-5:])) for name, make in columns.items()}}
                               for row in table])  # fmt: skip


def test_columns_of_a_file_are_classes_or_numbers_and_shuffled_ones_are_at_chance(tmp_path):
    values = np.random.default_rng(0).standard_normal(96).round(3)
    classes = np.random.default_rng(1).integers(0, 2, 96)

    def plant(i, x):
        x[:, 0] += 4 * values[i]
        x[:, 1] += 4 * classes[i]

    cache = planted_cache(tmp_path / "a", 1, plant)
    order = np.random.default_rng(2).permutation(96)
    file = label_file(
        cache, tmp_path / "mine.csv", pitch=lambda i: values[i], mood=lambda i: "ab"[classes[i]],
        shuffled=lambda i: "ab"[classes[order[i]]], noise=lambda i: values[order[i]],
    )  # fmt: skip
    _, scores = run(tmp_path, cache, "--labels", file, "--no-words")
    assert (scores["L1", "pitch"]["score"], scores["L1", "mood"]["score"]) == ("R²", "accuracy")
    assert scores["L1", "pitch"]["value"] > 0.9
    assert scores["L1", "mood"]["value"] > 0.95
    assert scores["L1", "shuffled"]["low"] < scores["L1", "shuffled"]["chance"]
    assert scores["L1", "noise"]["low"] < 0.05


def test_a_label_is_not_read_off_the_speaker(tmp_path):
    cache = planted_cache(tmp_path / "a", 1, plant_speaker)
    mood = "abbabaab"  # of the speaker; the features tell the speaker alone
    file = label_file(cache, tmp_path / "mine.csv", mood=lambda i: mood[i % SPEAKERS])
    _, held = run(tmp_path, cache, "--labels", file, "--columns", "mood", "--no-words")
    _, seen = run(tmp_path, cache, "--labels", file, "--columns", "mood", "--no-words", "--by", "utterance", out="two")
    assert seen["L1", "mood"]["value"] > 0.9
    assert held["L1", "mood"]["low"] < 0.5


def test_a_name_of_the_speaker_is_held_out_by_utterance_and_said(tmp_path):
    cache = planted_cache(tmp_path / "a", 1, plant_speaker)
    file = label_file(cache, tmp_path / "mine.csv", voice=lambda i: f"v{i % SPEAKERS}")
    found, scores = run(tmp_path, cache, "--labels", file, "--columns", "voice", "--no-words")
    assert scores["L1", "voice"]["value"] > 0.9
    assert "each value of 'voice' is of one speaker, so it is held out by utterance" in found["notes"]


def test_what_another_layer_lacks_is_left_out_and_counted(tmp_path, capsys):
    caches = [planted_cache(tmp_path / "a", 1), planted_cache(tmp_path / "b", 2, skip=(3, 5))]
    found, scores = run(tmp_path, *caches, "--no-words")
    assert found["utterances"] == scores["L1", "speaker"]["rows"] == 94
    assert (
        f"note: 2 utterances of '{caches[0]}' are left out: another cache does not have them" in capsys.readouterr().err
    )


def test_the_same_seed_gives_the_same_bytes_and_the_page_loads_nothing(tmp_path):
    cache = planted_cache(tmp_path / "a", 1, plant_speaker)
    for out in ("one/probe", "two/probe"):
        run(tmp_path, cache, "--steps", "3", out=out)
    for name in ("probe.json", "probe.html"):
        assert (tmp_path / "one/probe" / name).read_bytes() == (tmp_path / "two/probe" / name).read_bytes()
    page = Page((tmp_path / "one/probe/probe.html").read_text())
    assert page.fetched == []
    assert "script" not in page.tags
    assert "speaker: highest accuracy in L1" in page.shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "mood"], "the labels have no column 'mood'"),
        (["--columns", "split"], "'split' has 1 different values"),
        (["--steps", "0"], "--steps 0: give a number of at least 1"),
    ],
)
def test_what_cannot_be_probed_is_one_sentence(tmp_path, capsys, arguments, message):
    from shards.errors import run_command

    cache = planted_cache(tmp_path / "a", 1)
    argv = ["probe", cache, *arguments, "--out", str(tmp_path / "out")]
    assert run_command(lambda _: command(argv)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_probe_is_not_overwritten(tmp_path, capsys):
    from shards.errors import UserError

    cache = planted_cache(tmp_path / "a", 1)
    run(tmp_path, cache, "--no-words")
    with pytest.raises(UserError, match="already holds a probe"):
        command(["probe", cache, "--out", str(tmp_path / "out")])


def test_characters_that_single_frames_carry_are_read_and_noise_is_not():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), size=6)) for _ in range(40)]
    spelled = [np.repeat(np.eye(6, dtype=np.float32)[["abcd".index(c) for c in text]], 2, axis=0) for text in texts]
    spelled = [np.insert(x, range(0, 13, 2), np.eye(6, dtype=np.float32)[5], axis=0) for x in spelled]
    noise = [rng.standard_normal(x.shape).astype(np.float32) for x in spelled]
    train, test = range(30), range(30, 40)
    assert character_errors(spelled.__getitem__, texts, train, test).sum() == 0
    assert character_errors(noise.__getitem__, texts, train, test).sum() > 30


def test_pooling_averages_neighbours():
    assert pooled(torch.tensor([[1.0], [3.0], [8.0]]), 2).tolist() == [[2.0], [8.0]]


def test_folds_hold_whole_groups_and_the_interval_is_over_groups():
    groups = [f"g{i // 10}" for i in range(100)]
    folds = make_folds(groups, 0)
    assert all(len({fold for fold, own in zip(folds, groups, strict=True) if own == each}) == 1 for each in groups)
    assert np.bincount(folds).tolist() == [20] * 5
    parts = np.repeat([0.0, 1.0], 50)  # half of the groups are wholly right
    value, low, high = interval(parts, np.ones(100), groups, 0)
    _, narrow_low, narrow_high = interval(parts, np.ones(100), list(map(str, range(100))), 0)
    assert value == 0.5
    assert high - low > 2 * (narrow_high - narrow_low)
