from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page import Page
from tiny_cache import make_cache, make_spec

from shards.errors import UserError
from train.__main__ import command
from train.evaluation.utterance_table import utterance_table, write_utterances
from train.report import experiment_folders, is_sweep, write_report, write_sweep_report
from train.report.audio import recordings
from train.report.page import mark_differences
from train.report.run_files import RunFiles


def make_run(folder, losses, lr=1e-3, finished=True, gain=2.0):
    """Make a run folder; ``losses`` are nats per token, and a loss of 1 also means 2 wrong words of 4."""
    folder.mkdir(parents=True)
    keys = [f"utt-{i}" for i in range(len(losses))]
    counts = {"key": keys, "cache": ["c"] * len(keys), "tokens": [10] * len(keys), "nats": [10 * x for x in losses]}
    zeros = [0] * len(keys)
    words = {"words": [4] * len(keys), "word_insertions": zeros, "word_deletions": zeros}
    errors = [round(2 * x) for x in losses]
    write_utterances(folder, utterance_table({**counts, **words, "word_substitutions": errors}))
    loss = sum(losses) / len(losses)
    sample = {"key": "utt-0", "reference": "turn left now", "hypothesis": f"turn {folder.name} now", "wer": 1 / 3}
    figures = {
        "val_loss": loss,
        "val_loss_shuffled": None if gain is None else loss + gain,
        "audio_gain": gain,
        "wer": sum(errors) / 4 / len(losses),
    }
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": 9, **figures, "samples": [sample]}))
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.yaml").write_text(json.dumps({"caches": ["/gone"], "lr": lr, "name": folder.name}))
    about = {"spec": make_spec().model_dump(), "feature_id": "e" * 64, "encoder": "wheel:x", "caches": []}
    (folder / "caches.json").write_text(json.dumps(about))
    if finished:
        (folder / "summary.json").write_text(json.dumps({**figures, "steps": 9, "seconds": 1.0}))
    return folder


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "six"
    make_run(folder / "beta", [1.0, 1.2, 1.4, 1.1], lr=1e-3)
    make_run(folder / "alpha", [2.0, 2.2, 2.4, 2.1], lr=5e-3)
    make_run(folder / "gamma", [1.1, 1.1, 1.4, 1.1], lr=5e-3, finished=False)
    return folder


def test_experiments_are_compared_with_the_best_over_the_same_utterances(sweep):
    page = Page(write_sweep_report(sweep).read_text())
    assert "beta has the lowest held-out loss: 1.175 nats per token." in page.shown
    assert "+1.000 [+1.000, +1.000]" in page.shown  # alpha is worse by exactly 1 everywhere
    assert "+0.000 [" in page.shown  # gamma is even
    assert "WER minus beta" in page.shown
    assert "2 of 3 experiments finished" in page.shown


def test_a_best_experiment_that_does_not_listen_is_marked_as_such(sweep):
    assert "no evidence" not in Page(write_sweep_report(sweep).read_text()).shown
    make_run(sweep / "deaf", [0.5, 0.5, 0.5, 0.5], gain=0.01)
    shown = Page(write_sweep_report(sweep).read_text()).shown
    assert "deaf has the lowest held-out loss: 0.500 nats per token. There is no evidence that it listens" in shown
    make_run(sweep / "lone", [0.4], gain=None)  # one held-out utterance alone has no shuffled loss
    assert (
        "lone has the lowest held-out loss: 0.400 nats per token." in Page(write_sweep_report(sweep).read_text()).shown
    )


def test_experiments_are_compared_with_the_baseline_of_the_sweep(sweep):
    listed = [{"name": "alpha"}, {"name": "gamma", "state": "failed", "reason": "the loss of step 7 is not finite"}]
    (sweep / "sweep.json").write_text(json.dumps({"baseline": "alpha", "experiments": listed}))
    page = Page(write_sweep_report(sweep).read_text())
    assert "1.000 below the baseline alpha (the 95 % interval excludes 0)" in page.shown
    assert "-1.000 [-1.000, -1.000]" in page.shown
    assert "the loss of step 7 is not finite" in page.shown


def test_a_sweep_shows_what_differs_and_the_same_utterance_decoded_by_each(sweep):
    text = write_sweep_report(sweep).read_text()
    page = Page(text)
    assert page.shown.count("0.005") >= 2
    assert text.count("<ins>") == 3
    assert text.count("turn left now") == 1
    assert page.shown.count("e" * 64) == 1  # one identity for all


def test_the_order_is_that_of_sweep_json(sweep):
    assert [path.name for path in experiment_folders(sweep)] == ["alpha", "beta", "gamma"]
    (sweep / "sweep.json").write_text(json.dumps({"experiments": [{"name": "gamma"}, {"name": "beta"}]}))
    assert [path.name for path in experiment_folders(sweep)] == ["gamma", "beta", "alpha"]


def test_the_command_distinguishes_a_sweep_from_a_run(sweep, tmp_path, capsys):
    assert is_sweep(sweep)
    assert not is_sweep(sweep / "beta")
    assert command(["report", str(sweep)]) == 0
    assert (sweep / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no runs"):
        write_sweep_report(tmp_path / "empty")


def test_settings_that_differ_from_their_defaults_are_shown(sweep):
    changed = RunFiles(sweep / "alpha").changed_settings()
    assert changed == [("caches", ["/gone"], None), ("lr", 5e-3, 1e-3)]


def test_a_run_of_another_version_of_earshard_is_shown_without_the_unreadable_files(sweep):
    (sweep / "alpha" / "config.yaml").write_text("a_key_of_tomorrow: 1\n")
    (sweep / "alpha" / "utterances.parquet").unlink()
    page = Page(write_report(sweep / "alpha").read_text())
    assert "a_key_of_tomorrow" in page.shown
    Page(write_sweep_report(sweep).read_text())


def test_a_missing_source_is_reported_in_one_sentence(tmp_path):
    sounds, reason = recordings([str(tmp_path / "nowhere")], ["utt-00000"])
    assert sounds == {}
    assert reason.startswith("No audio: ")
    sounds, reason = recordings([str(make_cache(tmp_path / "cache", 3))], ["utt-00000"])
    assert sounds == {}
    assert "does not record how it was extracted" in reason


def test_words_that_differ_are_marked_on_both_sides():
    assert mark_differences("Turn left, now", "turn right now please") == (
        "Turn <del>left,</del> now",
        "turn <ins>right</ins> now <ins>please</ins>",
    )
    assert mark_differences("a <b>", "") == ("<del>a &lt;b&gt;</del>", "–")


@given(st.text(max_size=30), st.text(max_size=30))
def test_marking_differences_neither_adds_nor_removes_words(reference, hypothesis):
    from html import unescape

    for text, found in zip((reference, hypothesis), mark_differences(reference, hypothesis), strict=True):
        plain = str(found).replace("<del>", "").replace("</del>", "").replace("<ins>", "").replace("</ins>", "")
        if text.split():
            assert unescape(plain).split() == text.split()


def test_the_headline_says_when_lowest_loss_and_lowest_error_rate_disagree(sweep):
    assert "disagree" not in Page(write_sweep_report(sweep).read_text()).shown
    for name, loss, wer in (("quiet", 0.2, 0.9), ("wordy", 0.3, 0.1)):
        make_run(sweep / name, [loss] * 4)
        path = sweep / name / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "wer": wer}))
    shown = Page(write_sweep_report(sweep).read_text()).shown
    assert "Loss and errors disagree: wordy has the lowest word error rate, 10.0 % against 90.0 %." in shown
