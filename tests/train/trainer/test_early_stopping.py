from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses, make_config
from torch import nn

from train.runs.metrics_log import read_jsonl
from train.trainer.early_stopping import EarlyStopping
from train.trainer.fit import fit


def test_the_best_weights_are_kept_and_two_worse_evaluations_end_it():
    parameter = nn.Parameter(torch.zeros(1))
    stopping = EarlyStopping(2)
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.9, 2.0]):
        assert not stopping.should_stop
        parameter.data.fill_(step)
        stopping.update(loss, step, {"p": parameter})
    assert stopping.should_stop
    assert (stopping.best_loss, stopping.best_step, stopping.best_weights["p"].item()) == (1.9, 3, 3)


def test_without_patience_nothing_is_kept():
    stopping = EarlyStopping(None)
    for loss in (1.0, 2.0, 3.0):
        stopping.update(loss, 1, {"p": nn.Parameter(torch.zeros(1))})
    assert not stopping.should_stop
    assert not stopping.best_weights


def test_a_run_that_gets_worse_ends_early_with_its_best_weights_and_so_does_its_resumption(tmp_path):
    cache, lm = make_cache(tmp_path / "cache", 12, val_every=4), f"path:{save_tiny_lm(tmp_path / 'lm')}"
    keys = {"steps": 200, "lr": 0.3, "schedule": "constant", "eval_every": 2, "patience": 2, "checkpoint_every": 3}
    config = make_config(tmp_path, cache, lm, **keys, warmup=0, decode_limit=1, decode_samples=0)
    run = fit(config)
    summary = json.loads((run / "summary.json").read_text())
    steps, best = summary["steps"], summary["best_step"]
    assert steps == len(losses(run)) == best + 4 < 200
    val_loss = {line["step"]: line["val_loss"] for line in read_jsonl(run / "evaluations.jsonl")}
    assert val_loss[steps] == summary["val_loss"] == val_loss[best] == min(val_loss.values())

    resumed = tmp_path / "runs" / "resumed"
    shutil.copytree(run, resumed)
    (resumed / "checkpoints" / f"step-{steps:06d}.safetensors").unlink()
    (resumed / "summary.json").unlink()
    fit(config.model_copy(update={"name": "resumed"}), resumed)
    one, two = (load_file(each / "projector.safetensors") for each in (run, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(resumed) == losses(run)
