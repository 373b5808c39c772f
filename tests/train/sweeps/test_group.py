from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses
from tiny_sweep import DROPOUT, LIST, make_sweep, same_run

from shards.errors import WorkFailed
from train.__main__ import command
from train.evaluation.bootstrap import paired_difference
from train.evaluation.run import evaluate_run
from train.evaluation.utterance_table import read_utterances
from train.runs.folder import read_json, run_config
from train.runs.metrics_log import read_jsonl
from train.sweeps.config import SweepConfig, experiments
from train.sweeps.group import group_experiments
from train.sweeps.sweep import run_sweep
from train.trainer.fit import fit
from train.trainer.trainer import Interrupted


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("sweeps") / "cache", 24, val_every=6)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('sweeps') / 'lm')}"


def run_alone(config: SweepConfig, folder: Path) -> dict[str, Path]:
    """Each experiment by itself, by name."""
    return {str(c.name): fit(c.model_copy(update={"runs": str(folder / "alone")})) for c in experiments(config)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, lm):
    """A sweep that ran undisturbed with separate passes, and its experiments alone."""
    folder = tmp_path_factory.mktemp("whole")
    config = make_sweep(folder, cache, lm)
    return config, run_sweep(config), run_alone(config, folder)


def test_with_separate_passes_every_experiment_equals_its_run_alone_bit_for_bit(whole):
    config, folder, alone = whole
    assert len(group_experiments(experiments(config), None)) == 1
    for name, run in alone.items():
        same_run(folder / name, run)
    assert len(losses(folder / "short")) == 4
    assert len(losses(folder / "mlp")) == 8


def test_in_one_batch_every_experiment_equals_its_run_alone_within_tolerance(tmp_path, whole, cache, lm):
    _, _, alone = whole
    folder = run_sweep(make_sweep(tmp_path, cache, lm, lockstep="batched"))
    for name, run in alone.items():
        assert losses(folder / name) == pytest.approx(losses(run), rel=1e-4)
        ours, theirs = (read_json(each / "summary.json") for each in (folder / name, run))
        for key in () if name == "distilled" else ("val_loss", "val_loss_shuffled", "projector_rms_ratio"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        ours, theirs = (load_file(each / "projector.safetensors") for each in (folder / name, run))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=1e-4)


def test_with_several_batches_in_a_step_every_experiment_draws_the_dropout_of_its_run_alone(tmp_path, cache, lm):
    listed = [{"name": name, "seed": seed, "projector": DROPOUT} for seed, name in enumerate(("one", "two"))]
    config = make_sweep(
        tmp_path,
        cache,
        lm,
        {"gradient_accumulation_steps": 3, "steps": 3, "eval_every": 0},
        experiments=listed,
        lockstep="batched",
    )
    folder = run_sweep(config)
    for name, run in run_alone(config, tmp_path).items():
        assert losses(folder / name) == pytest.approx(losses(run), rel=1e-5)


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_router_losses_and_expert_use_are_logged_as_by_a_run_alone(tmp_path, cache, lm, mode, capsys):
    top2 = {"name": "top2", "projector": {"kind": "moe", "routing": "top2"}, "prompt": {"template": "slam"}}
    dense = {"name": "dense", "projector": {"kind": "moe", "hidden": 8}}
    base = {"steps": 3, "eval_every": 0}
    config = make_sweep(tmp_path, cache, lm, base, experiments=[top2, dense, {"name": "mlp"}], lockstep=mode)
    folder = run_sweep(config)
    assert re.search(
        r"step +3/3  top2 [\d.]+ \(balance \S+, router_z \S+\)  dense [\d.]+  mlp", capsys.readouterr().out
    )
    for name, run in run_alone(config, tmp_path).items():
        ours, theirs = (read_jsonl(each / "metrics.jsonl") for each in (folder / name, run))
        told = {key for key in theirs[0] if key in ("balance", "router_z") or key.startswith("expert_use_")}
        assert len(told) == {"top2": 6, "dense": 4, "mlp": 0}[name]
        for mine, alone in zip(ours, theirs, strict=True):
            wanted = {key: alone[key] for key in told}
            assert {key: mine[key] for key in told} == (
                wanted if mode == "separate" else pytest.approx(wanted, rel=1e-3)
            )


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_an_experiment_that_diverges_leaves_and_the_others_keep_their_bytes(tmp_path, cache, lm, mode):
    bad = {"name": "bad", "lr": 3e37, "warmup": 0, "projector": {"kind": "mlp"}}
    others = [LIST[0], LIST[1]]
    with_it = run_sweep(make_sweep(tmp_path, cache, lm, experiments=[*others, bad], lockstep=mode))
    dropped = read_json(with_it / "bad" / "dropped.json")
    assert dropped["state"] == "failed"
    assert "is not finite: lower lr" in dropped["reason"]
    assert not (with_it / "bad" / "summary.json").exists()
    state = {each["name"]: each["state"] for each in read_json(with_it / "sweep.json")["experiments"]}
    assert state == {"mlp": "finished", "dropout": "finished", "bad": "failed"}
    without = run_sweep(make_sweep(tmp_path, cache, lm, experiments=others, lockstep=mode, name="without"))
    for each in others:
        if mode == "separate":
            same_run(with_it / each["name"], without / each["name"])
        else:
            assert losses(with_it / each["name"]) == pytest.approx(losses(without / each["name"]), rel=1e-4)


def test_a_sweep_without_a_finished_experiment_fails(tmp_path, cache, lm):
    bad = {"lr": 3e37, "warmup": 0, "projector": {"kind": "mlp"}}
    with pytest.raises(WorkFailed, match=r"no experiment of .* finished"):
        run_sweep(make_sweep(tmp_path, cache, lm, experiments=[{"name": "bad", **bad}]))


def test_every_experiment_is_a_run_that_the_other_commands_take(whole, capsys):
    _, folder, _ = whole
    run = folder / "dropout"
    metrics = evaluate_run(run, run_config(run))
    assert metrics["val_loss"] == read_json(run / "summary.json")["val_loss"]
    assert command(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


def test_the_table_is_sorted_by_held_out_loss_with_paired_differences_to_the_first(whole):
    from train.sweeps.results import format_table

    _, folder, _ = whole
    state = read_json(folder / "sweep.json")
    lines = format_table(state).splitlines()
    losses_shown = [float(line.split()[1]) for line in lines[1:-1]]
    assert lines[-1].split()[:2] == ["distilled", "–"]  # was not evaluated
    assert losses_shown == sorted(losses_shown)
    for each in state["experiments"]:
        if each["name"] in ("mlp", "distilled"):
            assert "difference" not in each
            continue
        wanted = paired_difference(read_utterances(folder / each["name"]), read_utterances(folder / "mlp"))
        assert each["difference"] == list(wanted)
        assert wanted.low <= wanted.mean <= wanted.high
    assert state["baseline"] == "mlp"
    assert "baseline" in next(line for line in lines if line.startswith("mlp"))


def forget(folder: Path, name: str, step: int) -> None:
    """Leave an experiment as if it had been killed after ``step`` was saved."""
    run = folder / name
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    for each in ("summary.json", "projector.safetensors", "utterances.parquet"):
        (run / each).unlink(missing_ok=True)


def test_a_sweep_resumes_each_experiment_from_its_own_checkpoint(tmp_path, whole):
    config, undisturbed, _ = whole
    folder = tmp_path / "runs" / "sweep"
    shutil.copytree(undisturbed, folder)
    (folder / "sweep.json").unlink()
    forget(folder, "mlp", 6)  # ahead of the next one, as when killed between two saves
    forget(folder, "pool", 7)
    shutil.rmtree(folder / "dropout")  # not even begun
    forget(folder, "distilled", 4)
    assert command(["fit", "--resume", str(folder / "distilled")]) == 0  # one of them by itself
    before = (folder / "short" / "summary.json").stat().st_mtime_ns
    moved = config.model_copy(update={"runs": str(tmp_path / "runs")})
    run_sweep(moved, resume=True)
    for name in ("mlp", "dropout", "short", "distilled", "pool"):
        same_run(folder / name, undisturbed / name)
    assert (folder / "short" / "summary.json").stat().st_mtime_ns == before


def write_sweep(path: Path, config: SweepConfig) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_results_of_an_uninterrupted_one(tmp_path, cache, lm):
    base = {"steps": 60, "eval_every": 0, "checkpoint_every": 5}
    shortened = [{**LIST[0]}, {**LIST[1]}]
    config = make_sweep(tmp_path, cache, lm, base, experiments=shortened, name="killed")
    file = write_sweep(tmp_path / "sweep.yaml", config)
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "sweep", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step     12/60"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "".join(seen)
    folder = tmp_path / "runs" / "killed"
    assert not (folder / "mlp" / "summary.json").exists()
    assert command(["sweep", "--resume", str(folder)]) == 0
    undisturbed = run_sweep(make_sweep(tmp_path, cache, lm, base, experiments=shortened))
    for name in ("mlp", "dropout"):
        assert len(losses(folder / name)) == 60
        assert losses(folder / name) == losses(undisturbed / name)
        kept = "projector.safetensors"
        assert (folder / name / kept).read_bytes() == (undisturbed / name / kept).read_bytes()


def test_a_signal_saves_all_and_says_how_to_resume(tmp_path, cache, lm, monkeypatch):
    from train.sweeps import group as lockstep

    config = make_sweep(tmp_path, cache, lm, {"eval_every": 0}, experiments=LIST[:2])
    taken = []

    def next_and_stop(batches, count):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batches, count)

    real = lockstep.next_batches
    monkeypatch.setattr(lockstep, "next_batches", next_and_stop)
    with pytest.raises(Interrupted, match=r"Interrupted at step 3; .* Resume with: python -m train sweep --resume"):
        run_sweep(config)
    for name in ("mlp", "dropout"):
        assert (config.folder / name / "checkpoints" / "step-000003.safetensors").is_file()
    assert read_json(config.folder / "sweep.json")["state"] == "stopped"
