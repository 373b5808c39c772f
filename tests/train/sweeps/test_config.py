from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.errors import UserError
from train.__main__ import command
from train.sweeps.config import SweepConfig, experiments, load_sweep
from train.sweeps.group import group_experiments

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BASE = {"caches": ["some/cache"], "steps": 10}


def sweep(**keys: Any) -> SweepConfig:
    return SweepConfig.model_validate({"base": BASE, "name": "s", **keys})


def test_a_list_times_a_grid_gives_every_combination_in_order():
    found = experiments(
        sweep(
            experiments=[{"projector": {"kind": "linear", "stack": 4}}, {"projector.stack": 2, "name": "two"}],
            grid={"steps": [5]},
        )
    )
    assert [(each.name, each.projector.kind, each.steps) for each in found] == [
        ("linear-stack4-steps5", "linear", 5),
        ("two", "mlp", 5),
    ]
    found = experiments(sweep(grid={"lr": [1e-3, 2e-3], "projector": {"stack": [1, 2]}}, change={"seed": 4}))
    assert [each.name for each in found] == ["lr0.001-stack1", "lr0.001-stack2", "lr0.002-stack1", "lr0.002-stack2"]
    assert {each.seed for each in found} == {4}
    assert {each.runs for each in found} == {"runs/s"}


def test_names_are_filled_from_keys_and_defaults():
    found = experiments(sweep(grid={"lr": [1e-3, 2e-3]}, name_template="{projector.kind}-{batch.shuffle}-{lr}"))
    assert [each.name for each in found] == ["mlp-window-0.001", "mlp-window-0.002"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": {"lr": [1e-3, 2e-3]}, "name_template": "x"}, r"have the same name \(x\): set name_template"),
        ({"grid": {"lr": [1e-3]}, "name_template": "{speed}"}, r"uses 'speed'"),
        ({"grid": {"speed": [1, 2]}}, r"unknown key 'speed'"),
        ({"grid": {"lr": [-1]}}, r"key 'lr' in experiment 'number-1' of 's' is -1"),
        ({"grid": {"steps.more": [1]}}, r"sets a key below 'steps'"),
    ],
)
def test_a_bad_experiment_is_refused_by_name(keys, said):
    with pytest.raises(UserError, match=said):
        experiments(sweep(**keys))


def test_experiments_are_named_by_the_keys_as_typed_old_or_new():
    found = experiments(
        sweep(grid={"clip": [1, 2]}, experiments=[{"projector": {"routing": "top2", "kind": "moe", "jitter": 0.5}}])
    )
    assert [each.name for each in found] == ["top2-moe-jitter0.5-clip1", "top2-moe-jitter0.5-clip2"]
    assert [(each.max_grad_norm, each.projector.router_jitter_noise) for each in found] == [(1, 0.5), (2, 0.5)]
    found = experiments(sweep(grid={"max_grad_norm": [1, 2]}, name_template="{clip}"))
    assert [each.name for each in found] == ["1", "2"]


def test_a_sweep_of_old_names_is_the_same_sweep():
    old = sweep(base={**BASE, "clip": 2}, change={"lm.checkpointing": True}, list=[{"ema": 0.5}], names="a", together=3)
    new = sweep(
        base={**BASE, "max_grad_norm": 2},
        change={"lm.gradient_checkpointing": True},
        experiments=[{"ema": 0.5}],
        name_template="a",
        max_group_size=3,
    )
    assert old == new
    assert experiments(old) == experiments(sweep(**{**new.model_dump(), "experiments": [{"ema_decay": 0.5}]}))


def test_the_later_of_base_change_list_and_grid_wins_whatever_name_it_uses():
    keys = {"base": {**BASE, "clip": 1}, "change": {"max_grad_norm": 2}, "experiments": [{"clip": 3}]}
    assert experiments(sweep(**keys))[0].max_grad_norm == 3
    assert experiments(sweep(**keys, grid={"max_grad_norm": [4]}, name_template="x"))[0].max_grad_norm == 4
    with pytest.raises(ValueError, match="'max_grad_norm' is set under its old and its new name"):
        sweep(grid={"clip": [1], "max_grad_norm": [1]})


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("change: {stepz: 5}", [], r"unknown key 'stepz' in .*try.yaml:2: did you mean 'steps'\?$"),
        ("grid: {lr: [1]}", ["change.stepz=5"], r"unknown key 'stepz' in the argument 'change.stepz=5': did you mean"),
        ("grid: {lr: [1]}", ["base.stepz=5"], r"'stepz' in the argument 'base.stepz=5': did you mean 'steps'"),
        ("list:\n- {lr: 1}\n- lr: 2\n  projector.stak: 3", [], r"'projector.stak' in .*try.yaml:5: did you mean"),
        ("grid:\n  seed: [0]\n  lr: [1, -2]", [], r"key 'lr' in .*try.yaml:4 is -2: "),
        ("change: {clip: x}", [], r"key 'max_grad_norm' in .*try.yaml:2 is 'x'"),
        ("grid: {ema: [2]}", [], r"key 'ema_decay' in .*try.yaml:2 is 2"),
        (
            "grid: {lr: [1]}",
            ["change.schedule=cosin"],
            r"in the argument 'change.schedule=cosin' is 'cosin': .*'cosine'",
        ),
        ("grid: {lr: [1]}", ["change.clip=1", "change.max_grad_norm=2"], "which name the same key"),
        ("grid: {lr: [1]}", ["grd.lr=1"], r"unknown key 'grd' in the argument 'grd.lr=1': did you mean 'grid'"),
    ],
)
def test_a_wrong_key_of_an_experiment_is_reported_where_it_was_set(tmp_path, text, words, said):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "try.yaml").write_text(f"base: {tmp_path / 'run.yaml'}\n{text}\n")
    with pytest.raises(UserError, match=said):
        experiments(load_sweep(str(tmp_path / "try.yaml"), words))


def test_a_wrong_key_of_the_base_is_reported_in_the_file_of_the_base(tmp_path):
    (tmp_path / "run.yaml").write_text("caches: [x]\nstepz: 3\n")
    (tmp_path / "try.yaml").write_text(f"base: {tmp_path / 'run.yaml'}\n")
    with pytest.raises(UserError, match=r"unknown key 'stepz' in .*run.yaml:2: did you mean 'steps'"):
        experiments(load_sweep(str(tmp_path / "try.yaml")))
    (tmp_path / "try.yaml").write_text("base: {}\n")
    with pytest.raises(UserError, match=r"unknown key 'stepz' in .*run.yaml:2"):
        experiments(load_sweep(str(tmp_path / "try.yaml"), [f"base={tmp_path / 'run.yaml'}"]))


def test_the_base_may_be_a_file_whose_keys_the_command_line_changes(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**BASE, "runs": "elsewhere", "name": "one"}))
    (tmp_path / "try.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "run.yaml"), "grid": {"lr": [1, 2]}}))
    config = load_sweep(str(tmp_path / "try.yaml"), ["base.steps=3", "grid.seed=[5]"])
    assert str(config.folder) == "runs/try"
    assert [(each.steps, each.seed) for each in experiments(config)] == [(3, 5), (3, 5)]


def test_experiments_that_share_data_order_and_language_model_form_a_group():
    def count(**grid: list[Any]) -> list[int]:
        return [len(part) for part in group_experiments(experiments(sweep(grid=grid)), None)]

    assert count(lr=[1, 2], projector=[{"kind": "mlp"}, {"kind": "pool"}], steps=[1, 2], ema_decay=[0, 0.5]) == [16]
    assert count(seed=[1, 2]) == [1, 1]
    assert count(seed=[1, 2], data_seed=[0]) == [2]
    assert count(**{"batch.size": [2, 4]}, lr=[1, 2]) == [2, 2]
    assert count(caches=["a", "b"], lr=[1, 2]) == [2, 2]
    assert count(**{"lm.train": [True]}, lr=[1, 2]) == [1, 1]
    assert count(**{"lm.model": ["nanochat:d1"]}, seed=[1, 2], data_seed=[0]) == [1, 1]
    assert [len(part) for part in group_experiments(experiments(sweep(grid={"lr": [1, 2, 3]})), 2)] == [2, 1]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_sweeps_are_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_sweep(str(file))
    if config.search is None:
        found = experiments(config)
        assert len(group_experiments(found, None)) == 1
        assert len(found) >= 6


def fails(capsys, *words: str) -> str:
    from shards.errors import run_command

    assert run_command(command, ["sweep", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    return said


def test_command_line_errors_are_one_sentence(tmp_path, capsys, monkeypatch):
    file = tmp_path / "s.yaml"
    tree = {"base": BASE, "runs": str(tmp_path), "name": "there", "grid": {"lr": [1, 2]}}
    file.write_text(yaml.safe_dump(tree))
    assert "--config" in fails(capsys)
    assert "is not a sweep: it has no sweep.yaml" in fails(capsys, "--resume", str(tmp_path / "none"))
    assert "is not a sweep: it has no sweep.yaml" in fails(capsys, "--config", str(file), "--resume")
    assert "unknown key 'grids'" in fails(capsys, "--config", str(file), "grids=1")
    assert "base or change sets name" in fails(capsys, "--config", str(file), "base.name=x")
    assert "remove experiments, grid" in fails(
        capsys, "--config", str(file), "search={trials: 1, space: {lr: {choices: [1]}}}"
    )
    (tmp_path / "there").mkdir()
    assert "already exists: choose another name=…" in fails(capsys, "--config", str(file))
    (tmp_path / "there" / "sweep.yaml").write_text(yaml.safe_dump(tree))
    assert "cannot resume with changed settings (grid)" in fails(
        capsys, "--config", str(file), "--resume", "grid.lr=[1,3]"
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "needs the Python package ray, which is not installed" in fails(
        capsys, "--resume", str(tmp_path / "there"), "--engine", "ray"
    )
    assert "needs the Python package ray, which is not installed" in fails(
        capsys, "--config", str(file), "name=far", "--engine", "ray", "grid.lr=[1,3]"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a sweep runs in one process" in fails(capsys, "--config", str(file))


@pytest.mark.parametrize(("library", "keys"), [
    ("optuna", {"search": {"trials": 1, "space": {"lr": {"choices": [1]}}}}),
    ("ray", {"engine": "ray", "grid": {"lr": [1]}}),
])  # fmt: skip
def test_an_option_without_its_library_says_what_to_install(tmp_path, monkeypatch, library, keys):
    from train.sweeps.sweep import run_sweep

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"package {library}, which is not installed: run `python -m pip install"):
        run_sweep(sweep(runs=str(tmp_path), **keys))
