"""Distillation from the LM that reads the transcript, and the contrastive loss, against direct computations."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from launch import finish, torchrun
from soft_tokens import AFTER, BEFORE, TARGETS, make_batch, soft_batch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses, make_config, write_config
from tiny_step import one_step

from train.config.model import ContrastiveConfig, DistillConfig, MlpConfig, PromptConfig
from train.config.train import TrainConfig
from train.distributed.group import ProcessGroup
from train.lms.distill import distillation_losses
from train.lms.load import load_lm
from train.model.audio_lm import AudioLM
from train.model.prompt import Prompt
from train.projectors import build_projector
from train.trainer.fit import fit
from train.trainer.losses import contrastive_loss

BOTH = {"distill": {"weight": 0.5}, "contrastive": {"weight": 0.3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("objectives") / "lm")


@pytest.fixture(scope="module")
def lm(folder):
    return load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)


def rows_of(lm, soft, mask, temperature):
    """One row at a time through the model's own forward: (nats, divergence), every logit computed."""
    embed = lm.model.get_input_embeddings()
    found = []
    for i, ids in enumerate(TARGETS):
        side = [embed(torch.tensor(part).long()) for part in (BEFORE[i], ids[:-1], [*AFTER[i], *ids])]
        heard, read = (
            lm.model(inputs_embeds=torch.cat([side[0], middle, side[2]])[None]).logits[0, -len(ids) - 1 : -1]
            for middle in (soft[i][mask[i]], side[1])
        )
        p, q = (F.softmax(logits / temperature, -1) for logits in (read, heard))
        divergence = (p * (p.log() - q.log())).sum()
        found.append((F.cross_entropy(heard, torch.tensor(ids), reduction="sum"), divergence))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def test_the_divergence_is_that_of_the_model_that_reads_the_transcript(lm):
    soft, mask = soft_batch()
    soft.requires_grad_()
    expected = rows_of(lm, soft, mask, 2.0)
    (wanted,) = torch.autograd.grad(expected[1].sum(), soft)
    found = distillation_losses(lm, soft, mask, BEFORE, AFTER, TARGETS, temperature=2.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(found[1].sum(), soft)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0], lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS))
    assert (found[1] > 0.01).all()
    assert not any(p.grad is not None for p in lm.parameters())


def test_soft_tokens_that_are_the_transcript_are_no_divergence(lm):
    texts = [torch.tensor(ids[:-1], dtype=torch.int64) for ids in TARGETS]
    mask = torch.arange(2) < torch.tensor([len(ids) for ids in texts])[:, None]
    soft = torch.nn.utils.rnn.pad_sequence([lm.embed(ids) for ids in texts], batch_first=True)
    found = distillation_losses(lm, soft, mask[:, : soft.shape[1]], BEFORE, AFTER, TARGETS, temperature=2.0)[1]
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_in_pieces_no_more_logits_exist_than_the_limit_and_the_results_stay(lm, kind, monkeypatch):
    lm = lm if kind == "hf" else load_lm("nanochat:d1", device="cpu", dtype=torch.float32)
    soft, mask = soft_batch(lm.width)
    soft.requires_grad_()

    def costs():
        nats, divergence = distillation_losses(lm, soft, mask, BEFORE, AFTER, TARGETS, temperature=2.0)
        return nats.detach(), divergence.detach(), torch.autograd.grad(nats.sum() + divergence.sum(), soft)[0]

    whole, sizes, logits = costs(), [], lm.logits
    monkeypatch.setattr(lm, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr(lm, "max_logits", 4 * 2 * lm.vocab_size)
    for ours, theirs in zip(costs(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert max(sizes) == 2


@pytest.fixture(scope="module")
def model(lm):
    projector = build_projector(MlpConfig(stack=2, norm="rms"), 6, lm.width, lm.embedding_rms)
    return AudioLM(projector, lm, Prompt(PromptConfig(), lm.tokenizer))


def test_the_contrastive_term_is_info_nce_over_the_texts_of_the_batch(model):
    soft, mask = soft_batch()
    soft.requires_grad_()
    texts = ["one", "two", "one"]
    found = contrastive_loss(model, soft, mask, texts, ["three", *texts], 0.07)
    ids = {text: torch.tensor(model.prompt.target_ids(text)[:-1]) for text in ("one", "two", "three")}
    text = {name: model.lm.embed(each).mean(0) for name, each in ids.items()}
    for i, own in enumerate(texts):
        audio = soft[i][mask[i]].mean(0)
        near = {name: F.cosine_similarity(audio, each, 0) / 0.07 for name, each in text.items()}
        expected = -near[own] + torch.stack(list(near.values())).logsumexp(0)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), soft)
    assert torch.equal(grad.abs().sum(-1) > 0, mask)


class Half(ProcessGroup):
    """One of two ranks whose other one has ``texts``."""

    def __init__(self, texts):
        self.texts = texts

    def all_gather(self, tree):
        return [tree, [self.texts] if isinstance(tree, list) else ({}, {})]  # batches' texts, or a projector's own


def test_the_texts_of_other_ranks_are_negatives_too_and_each_term_has_its_own_mean(model):
    batch = make_batch([8, 6, 4], ["six", "a", "one"], 0)
    weights = {"distill": DistillConfig(weight=0.25), "contrastive": ContrastiveConfig(weight=2.0)}
    parameters = list(model.projector.parameters())
    metrics = one_step(model, parameters, [batch], Half(["far"]), **weights)
    grads = [p.grad.clone() for p in parameters]
    rows = model.request(batch.features, batch.mask(), batch.texts)
    around = rows.prefix, rows.suffix, rows.targets
    nats, divergence = distillation_losses(model.lm, rows.soft, rows.soft_mask, *around, temperature=2.0)
    apart = contrastive_loss(model, rows.soft, rows.soft_mask, batch.texts, ["far"], 0.07)
    assert metrics.tokens == sum(len(model.prompt.target_ids(text)) for text in batch.texts)
    assert metrics.loss == pytest.approx(float(nats.detach().sum()) / metrics.tokens, rel=1e-5)
    expected = {
        "distill": float(divergence.detach().sum()) / metrics.tokens,
        "contrastive": float(apart.detach().sum()) / 3,
    }
    assert metrics.auxiliary_losses == pytest.approx(expected, rel=1e-4)
    loss = (0.75 * nats.sum() + 0.25 * divergence.sum()) / metrics.tokens + 2 * apart.sum() / 3
    for mine, wanted in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("objectives") / "cache", 12, val_every=4)


def auxiliary_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["distill"], line["contrastive"]) for line in lines]


def test_a_run_logs_its_auxiliary_losses_and_they_fall(tmp_path, cache, folder):
    keys = {"lm": {"model": f"path:{folder}"}, "eval_every": 0, "steps": 20, "lr": 3e-2, **BOTH}
    run = fit(make_config(tmp_path, cache, "", **keys))
    metrics = auxiliary_losses(run)
    assert len(metrics) == 20
    assert sum(line[0] for line in metrics[-5:]) < sum(line[0] for line in metrics[:5])
    assert sum(line[1] for line in metrics[-5:]) < sum(line[1] for line in metrics[:5])
    plain = fit(make_config(tmp_path / "plain", cache, "", **{**keys, "distill": {}, "contrastive": {}, "steps": 2}))
    assert "distill" not in (plain / "metrics.jsonl").read_text()
    assert losses(plain)[0] == pytest.approx(losses(run)[0], rel=1e-6)


@pytest.mark.slow
def test_two_processes_log_the_auxiliary_losses_of_one(tmp_path, cache, folder):
    keys = {"lm": {"model": f"path:{folder}"}, "eval_every": 0, "batch": {"size": 2}, **BOTH}
    alone = fit(make_config(tmp_path / "alone", cache, "", **keys))
    config = make_config(tmp_path, cache, "", **keys)
    finish(torchrun(2, "--config", write_config(tmp_path / "c.yaml", config)))
    run = tmp_path / "runs" / "run"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert sum(auxiliary_losses(run), ()) == pytest.approx(sum(auxiliary_losses(alone), ()), rel=1e-4)


@pytest.mark.parametrize("lm", [{"model": "nanochat:d1", "train": True}, {"lora": {"rank": 2}}])
def test_a_model_that_changes_is_no_teacher(lm):
    with pytest.raises(ValueError, match="needs a frozen LM"):
        TrainConfig.model_validate({"caches": "a", "lm": lm, "distill": {"weight": 1}})
