from __future__ import annotations

import json

import pytest
from page import Page
from tiny_cache import make_spec

from train.report import write_report


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


def test_a_run_that_just_began_has_a_page(run):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    assert "Not evaluated yet" in Page(write_report(run).read_text()).shown
