"""A frozen language model divided among processes trains and is evaluated as one that each process holds whole."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import at_step, finish, popen, ranks_of, torchrun
from safetensors.torch import load_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses, make_config, write_config

from shards.config.base import load_config
from shards.errors import UserError
from train.config.model import LmConfig
from train.model.checkpoint import checkpoints
from train.trainer.fit import fit

COUNTS = Path(__file__).parent.parent.parent / "helpers/shard_counts.py"
# 9 training rows in batches of at most 2: in one batch of an epoch, one of two processes has nothing to do
KEYS: dict[str, Any] = {"batch": {"size": 2}, "eval_batch_size": 2, "eval_every": 4, "retrieval_limit": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return f"path:{save_tiny_lm(folder / 'lm')}", make_cache(folder / "cache", 12, val_every=4)


@pytest.mark.slow
def test_each_of_two_processes_keeps_half_of_the_layers_and_computes_the_same(inputs, tmp_path):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(popen([sys.executable, *ranks, str(COUNTS), inputs[0], str(tmp_path)]))
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        whole, divided = found["whole"], found["divided"]
        assert divided["kept"]["layers"] == pytest.approx(whole["kept"]["layers"] / 2, rel=0.01)
        assert divided["kept"]["rest"] == whole["kept"]["rest"]
        assert divided["nats"] == pytest.approx(whole["nats"], rel=1e-5)
        assert divided["grad"] == pytest.approx(whole["grad"], rel=1e-4, abs=1e-6)


def trained(inputs, folder, processes, **keys):
    lm, cache = inputs
    config = make_config(folder, cache, "", **{**KEYS, "lm": {"model": lm}, **keys})
    if processes == 1:
        return fit(config)
    folder.mkdir()
    finish(torchrun(processes, "--config", write_config(folder / "c.yaml", config)))
    return folder / "runs" / "run"


def assert_same_run(found, expected):
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    one, two = (json.loads((run / "summary.json").read_text()) for run in (expected, found))
    for name in ("val_loss", "val_loss_shuffled", "val_loss_text_only", "wer", "n_decoded"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["retrieval"] == one["retrieval"]
    assert load_file(found / "projector.safetensors").keys() == load_file(expected / "projector.safetensors").keys()


@pytest.mark.slow
def test_two_processes_that_share_a_model_give_the_run_of_one(inputs, tmp_path):
    lm = {"model": inputs[0], "shard": True}
    assert_same_run(trained(inputs, tmp_path / "two", 2, lm=lm), trained(inputs, tmp_path / "one", 1))


@pytest.mark.slow
def test_a_shared_model_is_distilled_recomputed_and_read_without_padding_as_a_whole_one(inputs, tmp_path):
    keys = {"distill": {"weight": 0.5}, "contrastive": {"weight": 0.1}}
    lm = {"model": inputs[0], "shard": True, "gradient_checkpointing": True, "padding_free": True}
    found = trained(inputs, tmp_path / "two", 2, lm=lm, **keys)
    assert_same_run(found, trained(inputs, tmp_path / "one", 1, **keys))


@pytest.mark.slow
def test_a_killed_rank_ends_a_run_with_a_shared_model_saved(inputs, tmp_path):
    lm, cache = inputs
    keys = {**KEYS, "eval_every": 0, "steps": 150, "lm": {"model": lm, "shard": True}}
    process = torchrun(2, "--config", write_config(tmp_path / "c.yaml", make_config(tmp_path, cache, "", **keys)))
    at_step(process, 15, 150)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    (sentence,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert "rank 1 of 2 exited before the run finished" in sentence
    assert int(checkpoints(tmp_path / "runs/run/checkpoints")[0].stem.split("-")[1]) >= 15


@pytest.mark.parametrize("other", ["bits=4", "lora.rank=4", "train=true", "compile=true"])
def test_a_model_that_is_not_frozen_in_full_precision_is_not_divided(other):
    with pytest.raises(UserError, match="shard=true divides a frozen LM among processes: remove train, lora, bits"):
        load_config(LmConfig, None, ["shard=true", other])
