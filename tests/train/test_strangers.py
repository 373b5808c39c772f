"""Run and sweep folders that somebody else made: nothing that they name is imported."""

from __future__ import annotations

import sys

import pytest
import yaml
from tiny_cache import make_cache
from tiny_run import make_config, write_config

from shards.config.base import validate_config
from shards.errors import run_command
from train.__main__ import command
from train.sweeps.config import SweepConfig
from train.trainer.fit import fit

EVIL = """
from pathlib import Path
from torch import nn
from train import Projector

Path("imported").touch()

class Mine(Projector):
    def __init__(self, channels, width, embedding_rms):
        super().__init__()
        self.linear = nn.Linear(channels, width)

    def soft_frames(self, frames):
        return frames

    def forward(self, features, mask):
        return self.linear(features), mask
"""
KIND = "stranger:Mine"


def run(*words: object) -> int:
    return run_command(command, [str(word) for word in words])


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A run of another person, with its module where the command is typed; True once that module was imported."""
    (tmp_path / "stranger.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cache = make_cache(tmp_path / "cache", 12, val_every=4)
    keys = {"steps": 2, "val": {"limit": 2}, "decode_limit": 1, "projector": {"kind": KIND}, "checkpoint_every": 1}
    config = make_config(tmp_path, cache, "nanochat:d1", **keys)
    folder = fit(config)

    def imported() -> bool:
        done = (tmp_path / "imported").exists()
        (tmp_path / "imported").unlink(missing_ok=True)
        sys.modules.pop("stranger", None)
        return done

    assert imported()
    return folder, config, imported


@pytest.mark.parametrize("name", ["fit", "fit of its file", "evaluate", "transcribe", "export", "report", "lr-range"])
def test_no_command_imports_the_class_that_a_run_folder_names(stranger, tmp_path, capsys, name):
    folder, _, imported = stranger
    words: list[object] = {
        "fit": ["fit", "--resume", folder],
        "fit of its file": ["fit", "--config", folder / "config.yaml", "name=new"],
        "evaluate": ["evaluate", folder],
        "transcribe": ["transcribe", folder, "a.wav"],
        "export": ["export", folder, tmp_path / "exported"],
        "report": ["report", folder],
        "lr-range": ["lr-range", "--config", folder / "config.yaml"],
    }[name]
    assert run(*words) == (0 if name == "report" else 2)
    assert not imported()
    if name != "report":
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"the class {KIND}, which is not part of earshard" in told
        assert f"projector.kind={KIND}" in told


def test_the_class_of_a_run_is_imported_if_the_command_names_it(stranger, tmp_path, capsys):
    folder, config, imported = stranger
    assert run("evaluate", folder, f"projector.kind={KIND}") == 0
    assert imported()
    assert run("evaluate", folder, "--config", write_config(tmp_path / "mine.yaml", config)) == 0
    assert imported()
    assert run("export", folder, tmp_path / "other", "--projector", "json:JSONDecoder") == 2
    assert not imported()
    assert run("export", folder, tmp_path / "exported", "--projector", KIND) == 0
    assert imported()
    (folder / "summary.json").unlink()
    assert run("fit", "--resume", folder, f"projector={{kind: {KIND}}}") == 0
    assert imported()


@pytest.mark.parametrize("place", ["base", "list", "search"])
def test_a_sweep_folder_imports_no_class_either(tmp_path, capsys, place):
    tree = {"base": {"caches": ["c"]}, "experiments": [{"lr": 0.1}], "runs": str(tmp_path), "name": "sweep"}
    if place == "base":
        tree["base"]["projector"] = {"kind": KIND}
    elif place == "list":
        tree["experiments"].append({"projector.kind": KIND})
    else:
        del tree["experiments"]
        tree["search"] = {"space": {"projector.kind": {"choices": ["mlp", KIND]}}, "trials": 2}
    config = validate_config(SweepConfig, tree, "the test")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert run("sweep", "--resume", tmp_path / "sweep") == 2
    assert f"the class {KIND}" in capsys.readouterr().err
