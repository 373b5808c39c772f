from __future__ import annotations

import io
import json
import re
import sys

import pytest
from tiny_step import step_metrics

from train.runs.metrics_log import MetricsLogger, read_jsonl


def test_lines_are_on_disk_at_once_and_floats_come_back_to_the_last_bit(tmp_path):
    with MetricsLogger(tmp_path, 3) as logger:
        logger.log_step(step_metrics(1), 10.0)
        assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 1 / 3


def test_a_resumed_logger_drops_what_came_after_the_checkpoint(tmp_path):
    record = {"val_loss": 1.0, "val_loss_shuffled": None, "audio_gain": None}
    with MetricsLogger(tmp_path, 9) as logger:
        for number in range(1, 6):
            logger.log_step(step_metrics(number), 10.0)
        logger.log_evaluation(2, record)
        logger.log_evaluation(4, record)
    with MetricsLogger(tmp_path, 9, step=4, evaluated=2) as logger:
        logger.log_step(step_metrics(5), 10.0)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_jsonl(tmp_path / "evaluations.jsonl")] == [2]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step_metrics(1).record()) + "\n" + json.dumps(step_metrics(2).record())[:-5])
    assert [line["step"] for line in read_jsonl(path)] == [1]


RUINS = [
    b"",
    b"{",
    b'{"step"',
    b"\0" * 4096,
    b"\xff\xfe\x80",
    b"7",
    b"[1]",
    b"null",
    b'{"step": true}',
    b'{"step": "3"}',
    b"[" * 9000,
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("ruin", [*RUINS, b'{"step": 2}', b"x" * 200])
def test_no_last_line_stops_a_resume(tmp_path, monkeypatch, name, ruin):
    monkeypatch.setattr("train.runs.metrics_log.MAX_LINE", 150)  # of the lines of this test, only the last is longer
    (tmp_path / name).write_bytes(json.dumps({"step": 1, "audio_gain": 0.5}).encode() + b"\n" + ruin)
    with MetricsLogger(tmp_path, 9, step=4, evaluated=4):
        pass
    kept = [line["step"] for line in read_jsonl(tmp_path / name)]
    assert kept == ([1, 2] if ruin == b'{"step": 2}' else [1])


def test_a_log_gets_lines_and_no_bar(tmp_path, capsys):
    with MetricsLogger(tmp_path, 2) as logger:
        logger.log_step(step_metrics(1), 1234.0)
        logger.log_step(step_metrics(2), 1234.0)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == [
        "step",
        "1/2",
        "loss",
        "0.3333",
        "lr",
        "1.00e-01",
        "1234",
        "frames/s",
        "0",
        "s",
        "left",
    ]
    assert err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_loss_gain_frames_and_time_left_also_after_a_resume(tmp_path, monkeypatch):
    record = {"val_loss": 1.0, "val_loss_shuffled": 1.5, "audio_gain": 0.5}
    for start in (0, 2):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with MetricsLogger(tmp_path, 9, step=start, evaluated=2) as logger:
            for number in (start + 1, start + 2):
                logger.log_step(step_metrics(number), 1234.0)
            if start == 0:
                logger.log_evaluation(2, record)
            else:
                logger._bar.refresh()
        last = terminal.getvalue().split("\r")[-1]
    assert "4/9" in last
    assert "loss=0.333, gain=0.50, frames/s=1234" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", last)  # elapsed < left
