"""Run and sweep folders with any values in their files: a page, or one sentence and exit status 2.

EARSHARD_FUZZ=3000 python -m pytest tests/train/report/test_damaged_run.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from damaged_json import VALUES, damage
from page import Page

from shards.errors import run_command
from train.__main__ import command
from train.evaluation.utterance_table import utterance_table, write_utterances

CASES = int(os.environ.get("EARSHARD_FUZZ", "120"))
NUMBERS = [float("nan"), float("inf"), -float("inf"), 10**400, -1, "3", "nan", [1.0], {"x": 1}, None, 1e308, 2**64]
FILES = ["metrics.jsonl", "evaluations.jsonl", "summary.json", "figures.json", "caches.json", "space.json",
         "config.yaml", "judged/other/figures.json", "utterances.parquet"]  # fmt: skip


def write_run(folder: Path) -> None:
    """A finished run with every value that a page shows."""
    counts = {"insertions": 1, "deletions": 2, "substitutions": 3, "length": 9}
    losses = ("val_loss", "val_loss_shuffled", "val_loss_silent", "val_loss_text_only")
    gains = ("audio_gain", "silent_gain", "text_only_gain")
    rates = ("wer", "cer", "hallucination_rate", "frames_per_second", "data_wait_fraction", "padding_fraction")
    figures = {
        **dict.fromkeys((*losses, *gains, *rates, "train_loss_first", "train_loss_last"), 0.5),
        "intervals": {name: [0.5, 1.5] for name in (*losses, *gains, "wer", "cer")},
        "retrieval": {"by_likelihood": 0.5, "audio_by_likelihood": 0.5, "by_embedding": 0.5, "chance": 0.1,
                      "candidates": 10, "utterances": 20},
        "word_edits": counts,
        "character_edits": counts,
        "hallucination": {"inputs": 4, "words": 2.0, "texts": ["a", ""]},
        "silence": "zeros",
        "samples": [{"key": "k", "reference": "a b", "hypothesis": "a", "wer": 0.25, "task": "t"}],
        "tasks": {"t": {"n_val": 4, "val_loss": 0.5, "audio_gain": 0.1, "intervals": {"audio_gain": [0, 1]}}},
        "n_val": 9, "steps": 9, "seconds": 4.0, "device": "cpu", "dtype": "float32", "language_model": "x",
        "trained_parameters": 1000,
    }  # fmt: skip
    space = {
        "tokens": [{"key": "k", "reference": "a b", "nearest": [["a", 0.5], ["b", 0.1]]}],
        "plane": {"explained": [0.5, 0.25], "vocabulary": [[0.0, 1.0, "x"], [0.5, 1.0, "y"]],
                  "utterances": [{"key": "k", "reference": "a", "frames": 9, "points": [[1.0, 0.0], [2.0, 0.5]]}]},
    }  # fmt: skip
    spec = {"layer": 1, "channels": 8, "window": "tight", "trim": "valid", "dtype": "f16", "codec": "raw", "hop": 320,
            "sampling_rate": 16000}  # fmt: skip
    cache = {"path": str(folder / "none"), "manifest_id": "f" * 64, "utterances": 12, "generation": "g",
             "labels": {"name": "source", "id": "x"}}  # fmt: skip
    step = {"loss": 5.0, "seconds": 0.5, "frames": 100, "data_wait": 0.1, "projector_rms_ratio": 1.0}
    trees = {
        "metrics.jsonl": {"step": 1, **step},
        "evaluations.jsonl": {"step": 9, **figures},
        "summary.json": figures,
        "figures.json": figures,
        "caches.json": {"spec": spec, "feature_id": "e", "encoder": "wheel:x", "caches": [cache]},
        "space.json": space,
        "config.yaml": {"caches": ["x"], "name": "run", "lr": 0.1, "val": {"caches": ["y"]}},
        "judged/other/figures.json": {"judged_on": ["z"], **figures},
    }
    (folder / "judged" / "other").mkdir(parents=True)
    for name, tree in trees.items():
        (folder / name).write_text(json.dumps(tree))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **step}) + "\n" for i in range(1, 5)))
    counted = ("nats", "tokens", "words", "word_insertions", "word_deletions", "word_substitutions")
    write_utterances(
        folder, utterance_table({"key": ["a", "b"], "cache": ["c", "c"], **{name: [1, 2] for name in counted}})
    )


def damage_file(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".parquet":
        if rng.random() < 0.5:
            nats = [rng.choice((float("nan"), float("inf"), 1e308, -1.0, None)) for _ in "ab"]
            table = {
                "key": ["a", "b"],
                "cache": ["c", "c"],
                "nats": nats,
                "tokens": [rng.choice((0, 1, -1)) for _ in "ab"],
            }
            write_utterances(path.parent, utterance_table(table))
        else:
            place = rng.randrange(len(data))
            path.write_bytes(data[:place] + rng.randbytes(4) + data[place + rng.choice((0, 4)) :])
    elif rng.random() < 0.9:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        trees = [json.loads(line) for line in lines]
        number = rng.randrange(len(trees))
        trees[number] = damage(trees[number], rng, [*VALUES, *NUMBERS * 2])
        path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    else:
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + rng.randbytes(2) + data[place + 1 :])


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_damaged_run_or_sweep_has_a_page_or_is_refused_in_one_sentence(tmp_path, capsys, kind):
    rng, good = random.Random(kind), tmp_path / "good"
    for name in ("one", "two"):
        write_run(good / name)
    (good / "two" / "summary.json").unlink()
    experiments = [{"name": "two", "state": "failed", "reason": "x"}, {"name": "one"}]
    (good / "sweep.json").write_text(json.dumps({"baseline": "two", "experiments": experiments}))
    outcomes = []
    for case in range(CASES):
        folder = shutil.copytree(good, tmp_path / "bad")
        target = folder if kind == "sweep" else folder / "one"
        name = rng.choice(FILES)
        path = folder / "sweep.json" if kind == "sweep" and rng.random() < 0.2 else folder / "one" / name
        damage_file(path, rng)
        capsys.readouterr()
        status = run_command(command, ["report", str(target)])
        captured = capsys.readouterr()
        shown = f"case {case}, {path.name}: {path.read_bytes()[:300]!r}\n{captured.err}"
        assert status in (0, 2), shown
        assert (target / "report.html").exists() == (status == 0), shown
        if status == 2:
            assert captured.err.count("\n") == 1, shown
            assert len(captured.err) < 1000, shown
        outcomes.append(status)
        shutil.rmtree(folder)
    assert {0, 2} == set(outcomes)


def test_the_undamaged_run_shows_everything(tmp_path):
    write_run(tmp_path / "one")
    assert run_command(command, ["report", str(tmp_path / "one")]) == 0
    assert len(Page((tmp_path / "one" / "report.html").read_text()).shown) > 2000
