from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from page import Page
from tiny_cache import make_spec

from train.report import write_report, write_sweep_report
from train.report.page import render


@pytest.fixture
def run(tmp_path):
    evil = "<script>alert('&')</script>"
    steps = [
        {"step": i, "loss": 5 - i / 10, "seconds": 0.5, "frames": 100, "data_wait": 0.1, "projector_rms_ratio": 1.0}
        for i in range(1, 30)
    ]
    sample = {"key": "utt-1", "reference": evil, "hypothesis": "turn left", "wer": 0.25}
    evaluation = {"step": 29, "val_loss": 2.0, "val_loss_shuffled": 4.5, "audio_gain": 2.5, "samples": [sample]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    settings = {"caches": ["/data"], "lr": 5e-4, "prompt": {"instruction": evil}, "projector": {"kind": "conv"}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    cache = {"path": f"/data/{evil}", "manifest_id": "f" * 64, "utterances": 1234}
    about = {"spec": make_spec().model_dump(), "feature_id": "e" * 64, "encoder": "wheel:x", "caches": [cache]}
    (tmp_path / "caches.json").write_text(json.dumps(about))
    return tmp_path


def test_the_page_shows_gain_samples_settings_and_identity(run):
    page = Page(write_report(run).read_text())
    assert page.open == []
    for text in ("2.50", "turn left", "25.0 %", "<script>alert('&')</script>", "1,234 utterances", "e" * 64, "wheel:x"):
        assert text in page.shown, text
    assert page.tags.count("polyline") == 7


def test_nothing_is_fetched_and_nothing_from_data_is_markup(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_has_a_dark_mode_and_fits_a_phone(run):
    text = write_report(run).read_text()
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text
    assert "max-width:40rem" in text


def test_a_run_that_has_just_started_has_a_page(run):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    assert "Not evaluated yet" in Page(write_report(run).read_text()).shown


def test_the_content_security_policy_allows_only_the_style_of_the_page(run):
    text = write_report(run).read_text()
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; media-src data:;" in text


MARKUP = st.text(st.characters(), max_size=8).map(lambda text: f"<i onload='x'>{text}\"&amp;</i>")
NAME = "<i onload='x'>\"&amp;"  # a folder's name has no slash


def write_everything(folder, text):
    """Write a finished run with everything that a page can show; every string that comes from data is ``text``."""
    counts = {"insertions": 1, "deletions": 2, "substitutions": 3, "length": 9}
    figures = {
        **dict.fromkeys(("val_loss", "val_loss_silent", "val_loss_text_only", "wer", "cer", "hallucination_rate"), 0.5),
        **dict.fromkeys(("val_loss_shuffled", "audio_gain", "silent_gain", "text_only_gain"), 1.0),
        "intervals": {"audio_gain": [0.5, 1.5]},
        "retrieval": {"by_likelihood": 0.5, "audio_by_likelihood": 0.5, "by_embedding": 0.5, "chance": 0.1,
                      "candidates": 10, "utterances": 20},
        "word_edits": counts,
        "character_edits": counts,
        "hallucination": {"inputs": 4, "words": 2.0, "texts": [text, ""]},
        "silence": text,
        "samples": [{"key": text, "reference": text, "hypothesis": text, "wer": 0.25}],
    }  # fmt: skip
    about = {**figures, "steps": 9, "seconds": 4.0, "device": text, "dtype": text, "language_model": text}
    cache = {"path": text, "manifest_id": text, "utterances": 1234}
    spec = dict.fromkeys(("layer", "channels", "window", "trim", "dtype", "codec"), text)
    space = {
        "tokens": [{"key": text, "reference": text, "nearest": [[text, 0.5]]}],
        "plane": {"explained": [0.5, 0.25], "vocabulary": [[0.0, 1.0, text]],
                  "utterances": [{"key": text, "reference": text, "frames": 9, "points": [[1.0, 0.0]]}]},
    }  # fmt: skip
    step = {"loss": 5.0, "seconds": 0.5, "frames": 100, "data_wait": 0.1, "projector_rms_ratio": 1.0}
    other = {"judged_on": [text], "n_val": 5, **figures}
    config = {"caches": [text], "name": text, "prompt": {"instruction": text}, "lm": {"model": text}}
    (folder / "judged" / "other").mkdir(parents=True)
    caches = {"spec": spec, "feature_id": text, "encoder": text, "caches": [cache]}
    files = {"summary.json": about, "caches.json": caches, "space.json": space,
             "judged/other/figures.json": other, "config.yaml": config,
             "evaluations.jsonl": {"step": 9, **figures}}  # fmt: skip
    for name, tree in files.items():
        (folder / name).write_text(json.dumps(tree))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **step}) + "\n" for i in (1, 2)))


@settings(max_examples=25, deadline=None)
@example("<i onload='x'>\x00\ud800</i>")
@given(MARKUP)
def test_no_string_of_a_run_or_of_a_sweep_becomes_markup(text):
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / NAME
        for name in (NAME, "second"):
            write_everything(sweep / name, text)
        (sweep / "second" / "summary.json").unlink()
        state = {"baseline": "second", "experiments": [{"name": "second", "state": text, "reason": text}]}
        (sweep / "sweep.json").write_text(json.dumps(state))
        for path, least in ((write_report(sweep / NAME), 30), (write_sweep_report(sweep), 30)):
            page = Page(path.read_text())
            assert page.shown.count("onload='x'") >= least
            assert not {"i", "script"} & set(page.tags)
            assert page.fetched == []


def test_an_undefined_template_variable_is_an_error():
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("page.html.j2")


@pytest.mark.parametrize(("rates", "shown"), [({"wer": 0.5, "cer": 0.2}, True), ({"cer": 0.2}, False), ({}, True)])
def test_where_words_are_not_spaced_only_the_character_error_rate_is_shown(run, rates, shown):
    evaluation = {"step": 29, "val_loss": 2.0, "audio_gain": 2.5, **rates}
    (run / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    text = write_report(run).read_text(encoding="utf-8")
    assert ("word error rate" in text) == shown
    assert "character error rate" in text


def test_equal_hallucinations_are_folded_with_their_number(run):
    silence = {"inputs": 5, "words": 1.0, "texts": ["the end", "the end", "", "no"]}
    evaluation = {"step": 29, "val_loss": 2.0, "audio_gain": 2.5, "hallucination": silence, "hallucination_rate": 0.8}
    (run / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    assert "“the end” × 2; “no”" in Page(write_report(run).read_text()).shown


def test_samples_and_curves_come_before_pictures_and_contents_link_to_every_section(run):
    write_everything(run, "text")
    text = write_report(run).read_text(encoding="utf-8")
    headings = re.findall(r'<section id="([^"]*)"><h2>', text)
    assert headings[:2] == ["decoded-held-out-utterances", "loss"]
    assert headings.index("soft-tokens-and-vocabulary-embeddings") > headings.index("errors-and-hallucinations")
    assert re.findall(r'<a href="#([^"]*)">', text) == headings


def test_there_are_no_empty_charts(run):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    assert "svg" not in Page(write_report(run).read_text()).tags
