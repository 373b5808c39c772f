"""Trackers: wandb offline, TensorBoard, MLflow and Trackio, checked with the files that the libraries write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_cache import make_cache
from tiny_run import forget_after, losses, make_config, write_config

from shards.errors import UserError
from train.config.train import TrainConfig
from train.runs import trackers
from train.runs.trackers import Trackers, require_trackers, wandb_project
from train.trainer.fit import fit

KEYS = {"checkpoint_every": 4, "eval_every": 4, "decode_samples": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("trackers") / "cache", 12, val_every=4)


def test_tensorboard_has_every_step_once_also_after_a_resume(tmp_path, cache):
    pytest.importorskip("tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(tmp_path, cache, "nanochat:d1", **KEYS, trackers=["tensorboard"])
    run = fit(config)
    forget_after(run, 4)
    fit(config, run)
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 9))
    assert [event.value for event in scalars] == pytest.approx(losses(run), rel=1e-6)
    held_out = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    gains = {event.step: event.value for event in events.Scalars("held_out/audio_gain")}
    assert gains == pytest.approx({line["step"]: line["audio_gain"] for line in held_out}, rel=1e-5)


def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(tmp_path, cache, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(tmp_path, cache, "nanochat:d1", **KEYS, trackers=["wandb"])
    run = fit(config)
    identity = (run / "wandb-id").read_text()
    (first,) = (run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    written = first.read_bytes()
    for name in (b"nanochat-omni-audio", b"train/loss", b"held_out/val_loss", b"lm.model"):
        assert name in written
    shutil.rmtree(run / "wandb")
    forget_after(run, 4)
    fit(config, run)
    (second,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert second.name == f"run-{identity}.wandb"
    assert "note:" not in capsys.readouterr().err


def test_mlflow_has_settings_and_metrics_and_a_resumed_run_continues_the_same_one(tmp_path, cache, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs all of mlflow
    config = make_config(tmp_path, cache, "nanochat:d1", **KEYS, trackers=["mlflow"])
    run = fit(config)
    forget_after(run, 4)
    fit(config, run)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("nanochat-omni-audio")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (run / "mlflow-id").read_text()
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.params["lm.model"] == "nanochat:d1"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {entry.step: entry.value for entry in history} == pytest.approx(dict(enumerate(losses(run), 1)), rel=1e-6)
    assert "held_out/audio_gain" in found.data.metrics
    assert "note:" not in capsys.readouterr().err


def test_trackio_has_every_step_and_a_resumed_run_continues_the_same_one(tmp_path, cache):
    pytest.importorskip("trackio")
    config = make_config(tmp_path, cache, "nanochat:d1", **KEYS, trackers=["trackio"])
    code = (  # a process of its own: trackio reads TRACKIO_DIR when it is imported
        "import sys\nfrom pathlib import Path\nfrom shards.config.base import load_config\n"
        "from tiny_run import forget_after\nfrom train.config.train import TrainConfig\n"
        "from train.trainer.fit import fit\n"
        "config = load_config(TrainConfig, sys.argv[1])\nrun = fit(config)\nforget_after(run, 4)\nfit(config, run)\n"
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "(name,) = SQLiteStorage.get_runs('nanochat-omni-audio')\n"
        "rows = SQLiteStorage.get_logs('nanochat-omni-audio', name)\n"
        "print(json.dumps([name, [[row['step'], row['train/loss']] for row in rows if 'train/loss' in row]]))\n"
    )
    file = write_config(tmp_path / "config.yaml", config)
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("run*")
    name, steps = json.loads(done.stdout.splitlines()[-1])
    assert name == (run / "trackio-id").read_text()
    assert dict(steps) == pytest.approx(dict(enumerate(losses(run), 1)), rel=1e-6)
    assert "note:" not in done.stderr


def test_a_tracker_that_fails_is_reported_and_the_run_and_the_others_continue(tmp_path, cache, monkeypatch, capsys):
    class Fake:
        def __init__(self, name, breaks):
            self.name, self.breaks, self.steps = name, breaks, []

        def log(self, metrics, step):
            if step == self.breaks:
                raise ConnectionError("the network\nis gone")
            self.steps.append((step, sorted(metrics)))

        def close(self):
            self.steps.append("closed")

    bad, good = Fake("wandb", 3), Fake("tensorboard", None)
    monkeypatch.setattr(trackers, "require_trackers", lambda config: None)
    monkeypatch.setattr("train.trainer.fit.require_trackers", lambda config: None)
    monkeypatch.setattr("train.trainer.trainer.open_trackers", lambda *_: Trackers([bad, good]))
    run = fit(make_config(tmp_path, cache, "nanochat:d1", eval_every=0, trackers=["wandb", "tensorboard"]))
    assert len(losses(run)) == 8
    assert [step for step, _ in bad.steps] == [1, 2]
    assert [step for step, _ in good.steps[:-1]] == list(range(1, 9))
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(good.steps[0][1])
    assert "train/step" not in good.steps[0][1]
    assert good.steps[-1] == "closed"
    printed = capsys.readouterr().err
    assert printed.count("note: wandb failed (ConnectionError: the network is gone)") == 1


def test_a_missing_library_is_reported_before_a_folder_is_created(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in trackers.NAMES:
        config = make_config(tmp_path, cache, "nanochat:d1", trackers=[name])
        with pytest.raises(
            UserError, match=rf"package {name}, which is not installed: run `.* 'earshard\[trackers\]'`"
        ):
            fit(config)
    assert not (tmp_path / "runs").exists()
    require_trackers(make_config(tmp_path, cache, "nanochat:d1"))


def test_a_tracker_that_fails_to_start_says_how_to_resume(tmp_path, cache, monkeypatch):
    def fails(*_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackers, "require_trackers", lambda config: None)
    monkeypatch.setattr("train.trainer.fit.require_trackers", lambda config: None)
    monkeypatch.setattr(trackers, "Wandb", fails)
    config = make_config(tmp_path, cache, "nanochat:d1", eval_every=0, trackers=["wandb"])
    with pytest.raises(UserError, match=r"no API key.*WANDB_MODE=offline.*--resume .* 'trackers=\[\]'"):
        fit(config)
    run = tmp_path / "runs" / "run"
    assert len(losses(fit(config.model_copy(update={"trackers": []}), run))) == 8


def test_the_project_of_a_nanochat_run_is_the_nanochat_omni_audio_one():
    def project(**keys):
        return wandb_project(TrainConfig.model_validate({"caches": "a", **keys}))

    assert project(lm={"model": "nanochat:d6"}) == "nanochat-omni-audio"
    assert project() == "earshard"
    assert project(wandb_project="mine", lm={"model": "nanochat:d6"}) == "mine"
