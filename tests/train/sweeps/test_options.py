"""Sweeps with the libraries that only `make test-all` sets up: Ray and Optuna."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses
from tiny_sweep import make_sweep, same_run

from train.runs.folder import read_json
from train.sweeps.sweep import run_sweep

pytestmark = pytest.mark.slow
LIST = [{"name": "one"}, {"name": "two", "lr": 2e-2}, {"name": "three", "lr": 5e-3}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("options") / "cache", 24, val_every=6)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('options') / 'lm')}"


def test_groups_on_a_ray_cluster_write_and_print_what_one_process_does(tmp_path, cache, lm, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = run_sweep(make_sweep(tmp_path, cache, lm, experiments=LIST, name="here"))
    capsys.readouterr()
    there = run_sweep(make_sweep(tmp_path, cache, lm, experiments=LIST, name="there", engine="ray", max_group_size=2))
    lines = capsys.readouterr().out.splitlines()
    for number, names in ((1, ("one", "two")), (2, ("three",))):
        printed = [
            line.removeprefix(f"group {number} of 2  ") for line in lines if line.startswith(f"group {number} of 2")
        ]
        assert printed[0] == f"started: {', '.join(names)}"
        steps = [line for line in printed if re.match(r"step +\d+/8 ", line)]
        assert [int(re.findall(r"\d+", line)[0]) for line in steps] == list(range(1, 9))
        last = [f"{name} {losses(there / name)[-1]:.4f}" for name in names]
        assert steps[-1] == "  ".join(["step      8/8", *last])
        assert any(line.startswith("step      4  ") and "audio gain" in line for line in printed)
        assert printed[-len(names) :] == [f"{name} finished after 8 steps" for name in names]
        assert f"finished: {', '.join(names)}" in lines
    for each in LIST:
        same_run(here / each["name"], there / each["name"])
    assert {each["state"] for each in read_json(there / "sweep.json")["experiments"]} == {"finished"}


SEARCH = {
    "trials": 5,
    "max_concurrent_trials": 2,
    "pruner": "halving",
    "space": {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "projector.stack": {"low": 2, "high": 4},
        "projector.norm": {"choices": ["rms", "none"]},
    },
}


def values(folder: Path) -> dict[str, float | None]:
    return {each["name"]: each.get("val_loss") for each in read_json(folder / "sweep.json")["experiments"]}


def test_a_search_draws_evaluates_and_prunes_trials_and_resumes_after_a_loss(tmp_path, cache, lm):
    pytest.importorskip("optuna")
    config = make_sweep(tmp_path, cache, lm, {"eval_every": 2}, experiments=[], search=SEARCH)
    folder = run_sweep(config)
    drawn = read_json(folder / "search.json")["trials"]
    assert len(drawn) == 5
    assert len({json.dumps(each) for each in drawn}) == 5
    states = {each["name"]: each["state"] for each in read_json(folder / "sweep.json")["experiments"]}
    assert list(states) == [f"trial-00{number}" for number in range(5)]
    assert set(states.values()) <= {"finished", "pruned"}
    assert "finished" in states.values()
    for number, each in enumerate(drawn):
        run = read_json(folder / f"trial-00{number}" / "caches.json")
        assert run["feature_id"]
        assert 2 <= each["projector.stack"] <= 4
    whole = values(folder)
    shutil.rmtree(folder / "trial-003")  # as if the session had ended in its round
    run_sweep(config, resume=True)
    assert read_json(folder / "search.json")["trials"] == drawn
    again = values(folder)
    assert again["trial-000"] == whole["trial-000"]
    assert list(again) == list(whole)
