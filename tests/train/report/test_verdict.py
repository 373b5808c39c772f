from __future__ import annotations

import pytest

from train.report.page import setting
from train.report.verdict import listens, verdict, warnings


def metrics(gain, interval=None, **others):
    return {"val_loss": 2.0, "audio_gain": gain, "intervals": {"audio_gain": interval}, **others}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "Not evaluated yet."),
        (metrics(1.5, [1.2, 1.8]), "The matching audio lowers the loss by 1.50 nats"),
        (metrics(0.4, [-0.1, 0.9]), "There is no evidence that it listens"),
        (metrics(0.05, [0.01, 0.09]), "It hardly listens"),
        (metrics(-0.4, [-0.6, -0.2]), "It does not listen: the matching audio raises the loss"),
        (metrics(0.0), "There is no evidence that it listens: audio gain +0.00 nats per token."),
        (metrics(1.5, [1.2, 1.8], val_loss_text_only=1.9), "Text alone is better than text with audio"),
    ],
)
def test_the_interval_decides_what_is_said_first(found, said):
    assert verdict(found).startswith(said)


def test_a_mean_gain_whose_interval_includes_zero_is_not_called_listening():
    assert listens(metrics(0.4, [0.1, 0.7]))
    assert not listens(metrics(0.4, [-0.1, 0.9]))


def test_bad_figures_have_a_warning_each_and_good_ones_none():
    good = metrics(1.5, [1.2, 1.8], wer=0.3, cer=0.1, hallucination_rate=0.0, val_loss_text_only=3.0)
    bad = metrics(0.0, [-1, 1], wer=1.2, cer=1.0, hallucination_rate=0.9, val_loss_text_only=1.0)
    assert warnings(good) == {}
    assert sorted(warnings(bad)) == ["audio_gain", "cer", "hallucination_rate", "val_loss", "wer"]


def test_settings_are_shown_without_the_brackets_of_a_programming_language():
    assert setting([["a-L2", "a-L4"], "b"]) == "a-L2 + a-L4, b"
    assert setting({"steps": 3, "on": True, "name": None}) == "steps: 3, on: true, name: –"
    assert setting([]) == setting({}) == setting("") == setting(None) == "–"
