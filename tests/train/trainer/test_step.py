from __future__ import annotations

import sys

import pytest
import torch
from soft_tokens import make_batch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses, make_config
from tiny_step import one_step

from train.config.model import MoeConfig, PromptConfig
from train.lms.load import load_lm
from train.model.audio_lm import AudioLM
from train.model.build import load_model
from train.model.prompt import Prompt
from train.projectors import build_projector
from train.runs.folder import run_config
from train.runs.metrics_log import read_jsonl
from train.trainer.fit import fit
from train.trainer.step import sum_by_name


def router_gradient(batches, **keys):
    lm = load_lm("nanochat:d1", device="cpu", dtype=torch.float32)
    projector = build_projector(MoeConfig(routing="top2", stack=2, router_jitter_noise=0, **keys), 6, lm.width, 1.0)
    model = AudioLM(projector, lm, Prompt(PromptConfig(template="<|audio|><|bos|>"), lm.tokenizer))
    parameters = list(projector.parameters())
    metrics = one_step(model, parameters, batches)
    assert projector.take_losses() == {}
    return projector, projector.router.weight.grad, metrics


def test_a_projectors_own_losses_weigh_as_much_as_their_batch_does():
    batches = [make_batch([8, 4], ["six", "a"], 0), make_batch([6], ["seven"], 1)]
    _, without, metrics = router_gradient(batches, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    projector, grad, weighted_metrics = router_gradient(batches, router_aux_loss_coef=3.0, router_z_loss_coef=0.5)
    assert metrics.loss == weighted_metrics.loss
    assert metrics.auxiliary_losses == {"balance": 0.0, "router_z": 0.0}
    assert (grad - without).abs().max() > 1e-4
    projector.router.weight.grad = None
    expected = dict.fromkeys(weighted_metrics.auxiliary_losses, 0.0)
    for batch, tokens in zip(batches, (6, 6), strict=True):
        projector(batch.features, batch.mask())
        own = projector.take_losses()
        (sum(own.values()) * tokens / 12).backward()
        expected = {name: total + float(own[name].detach()) * tokens / 12 for name, total in expected.items()}
    assert weighted_metrics.auxiliary_losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grad - without, projector.router.weight.grad, rtol=1e-4, atol=1e-6)


def test_projector_metrics_are_summed_over_ranks_and_a_rank_without_a_batch_adds_nothing():
    assert sum_by_name([{"a": 1.0, "b": 2.0}, {}, {"b": 0.5}]) == {"a": 1.0, "b": 2.5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("step") / "cache", 12, val_every=4)


def test_a_run_logs_router_losses_and_expert_use_beside_its_loss(tmp_path, cache, capsys):
    routed = {"kind": "moe", "routing": "top2", "router_aux_loss_coef": 1.0}
    lines = read_jsonl(fit(make_config(tmp_path, cache, "nanochat:d1", projector=routed, steps=3)) / "metrics.jsonl")
    assert len(lines) == 3
    for line in lines:
        assert line["router_z"] > 0
        assert line["balance"] > 0
        assert sum(line[f"expert_use_{e}"] for e in range(4)) == pytest.approx(1)
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step      1/3"))
    assert f"loss {lines[0]['loss']:.4f} (balance {lines[0]['balance']:.3g}, router_z " in first


OWN = """
from torch import nn
from train.projectors import Projector

class Mine(Projector):
    def __init__(self, channels, width, embedding_rms, *, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def soft_frames(self, frames):
        return frames

    def forward(self, features, mask):
        return self.layers(features), mask
"""


def test_a_run_with_a_projector_of_the_users_is_named_after_it_and_comes_back(tmp_path, cache, monkeypatch):
    (tmp_path / "run_projectors.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"kind": "run_projectors:Mine", "settings": {"hidden": 8}}
    run = fit(make_config(tmp_path, cache, "nanochat:d1", projector=own, name=None))
    assert run.name.endswith("-run_projectors.Mine")
    assert len(losses(run)) == 8
    config = run_config(run, projector="run_projectors:Mine")
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    assert model.projector.layers[0].out_features == 8
    sys.modules.pop("run_projectors")


def test_a_run_with_adapters_resumes_to_the_very_losses_and_comes_back(tmp_path, cache):
    pytest.importorskip("peft")
    lm = {"model": f"path:{save_tiny_lm(tmp_path / 'tiny')}", "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    keys = {"lm": lm, "checkpoint_every": 3, "eval_every": 0}
    whole = fit(make_config(tmp_path / "a", cache, "", **keys))
    again = fit(make_config(tmp_path / "b", cache, "", **keys))
    (again / "summary.json").unlink()
    sorted((again / "checkpoints").iterdir())[-1].unlink()
    assert losses(fit(run_config(again), again)) == losses(whole)
    model = load_model(whole, run_config(whole), torch.device("cpu"), torch.float32)
    adapters = {name: p for name, p in model.lm.named_parameters() if "lora_B" in name}
    assert adapters
    assert all(p.any() for p in adapters.values())


@pytest.mark.parametrize("projector", [{"kind": "moe", "routing": "top2"}, {"kind": "qformer", "norm": "rms"}])
def test_runs_of_other_projectors_resume_to_the_very_losses(tmp_path, cache, projector):
    keys = {"projector": projector, "checkpoint_every": 3, "eval_every": 0}
    whole = fit(make_config(tmp_path / "a", cache, "nanochat:d1", **keys))
    again = fit(make_config(tmp_path / "b", cache, "nanochat:d1", **keys))
    (again / "summary.json").unlink()
    checkpoints = sorted((again / "checkpoints").iterdir())
    checkpoints[-1].unlink()
    resumed = fit(run_config(again), again)
    assert losses(resumed) == losses(whole)
