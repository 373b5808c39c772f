from __future__ import annotations

import json

import numpy as np
import pytest

from train.runs.emergence import EmergenceDetector
from train.runs.metrics_log import Tracker


def events(losses):
    detector = EmergenceDetector()
    found = (detector.take(step, float(loss)) for step, loss in enumerate(losses, 1))
    return [event for event in found if event is not None]


def noisy(curve, spread=0.08, seed=0):
    """Losses of small batches: each within ``spread`` of the curve, relatively."""
    return np.asarray(curve) * (1 + spread * np.random.default_rng(seed).standard_normal(len(curve)))


FALL = np.concatenate([np.full(300, 5.0), np.linspace(5, 3, 30), np.full(200, 3.0)])


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.08])
@pytest.mark.parametrize("seed", range(5))
def test_a_drop_after_a_plateau_is_told_once(spread, seed):
    (event,) = events(noisy(FALL, spread, seed))
    assert 300 < event.step <= 345
    assert event.before == pytest.approx(5, rel=0.1)
    assert event.after < 0.85 * event.before
    assert event.steps <= 50


def test_a_second_drop_after_a_second_plateau_is_told_again():
    curve = np.concatenate([FALL, np.linspace(3, 1.5, 30), np.full(100, 1.5)])
    assert [event.step > 500 for event in events(noisy(curve, 0.03))] == [False, True]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "curve",
    [
        np.full(1000, 5.0),
        2 + 4 * np.exp(-np.arange(1000) / 150),  # the usual course: fast at first, then ever slower
        np.linspace(8, 3, 1000),
        np.concatenate([np.full(300, 3.0), np.linspace(3, 5, 20), np.full(100, 5.0)]),
        np.concatenate([np.full(300, 5.0), np.linspace(5, 4, 400)]),  # too slow for a drop
    ],
    ids=["flat", "exponential", "steady", "rise", "slow"],
)
def test_noise_and_the_usual_course_are_no_emergence(curve, seed):
    assert events(noisy(curve, 0.04, seed)) == []


def test_a_run_tells_it_in_its_log_and_in_metrics_and_after_a_resume_as_without(tmp_path, capsys):
    losses = noisy(FALL, 0.02).tolist()

    def run(folder, start, stop):
        with Tracker(folder, len(losses), start) as tracker:
            for step in range(start, stop):
                figures = {"step": step + 1, "loss": losses[step], "lr": 1e-3, "seconds": 0.1}
                tracker.step(figures, 1.0)

    for folder in ("whole", "halved"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", 0, len(losses))
    assert capsys.readouterr().out.count("emergence? The loss fell from") == 1
    run(tmp_path / "halved", 0, 312)
    run(tmp_path / "halved", 290, len(losses))  # as after a crash: the lines past the checkpoint go
    whole, halved = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halved")
    )
    assert whole == halved
    (line,) = [line for line in whole if "emergence" in line]
    assert line["emergence"]["before"] == pytest.approx(5, rel=0.02)
