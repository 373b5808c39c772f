from __future__ import annotations

import pytest
import yaml

from shards.config.base import load_config, validate_config
from shards.errors import UserError
from train.config.train import TrainConfig
from train.runs.folder import run_config


def load(**keys):
    return validate_config(TrainConfig, {"caches": ["a"], **keys}, "the test")


def test_an_unknown_key_is_rejected_with_the_allowed_ones():
    with pytest.raises(UserError, match=r"unknown key 'val\.fractoin' in the test: did you mean 'val\.fraction'"):
        load(val={"fractoin": 0.1})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch_size", "batch.size"),
        ("rank", "lm.lora.rank"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("accumulat", "gradient_accumulation_steps"),
        ("eval_batchsize", "eval_batch_size"),
        ("weightdecay", "weight_decay"),
        ("grad_norm", "max_grad_norm"),
    ],
)
def test_a_misspelled_key_suggests_the_correct_one(typed, meant):
    with pytest.raises(UserError, match=rf"unknown key '{typed}' in the test: did you mean '{meant}'\?"):
        load(**{typed: 1})


def test_caches_must_be_named(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3\n")
    with pytest.raises(UserError, match="key 'caches' is missing"):
        load_config(TrainConfig, tmp_path / "c.yaml")


def test_a_single_cache_needs_no_list(tmp_path):
    (tmp_path / "c.yaml").write_text("caches: some/folder\nlr: 1e-3\n")
    config = load_config(TrainConfig, tmp_path / "c.yaml", ["val.caches=other"])
    assert (config.caches, config.val.caches, config.lr) == (["some/folder"], ["other"], 1e-3)


@pytest.mark.parametrize(("warmup", "steps"), [(0.03, 6), (0.5, 100), (7, 7), (0, 0)])
def test_warmup_is_a_fraction_below_one_and_steps_from_one_on(warmup, steps):
    assert load(steps=200, warmup=warmup).warmup_steps == steps


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup": 2.5}, "neither a whole number of steps nor a fraction"),
        ({"min_lr": 1.0}, "is above lr"),
        ({"patience": 2}, "set eval_every"),
        ({"name": "latest"}, "choose another name"),
        ({"name": "../up"}, "pattern"),
        ({"betas": [0.9, 1.0]}, "must lie in"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_invalid_values_are_rejected(keys, said):
    with pytest.raises(UserError, match=said):
        load(**keys)


def test_a_batch_without_limits_has_eight_utterances():
    assert load().batch.sampler_config().batch_size == 8
    assert load(batch={"max_frames": 500}).batch.sampler_config().batch_size is None


def test_differences_list_exactly_the_keys_that_affect_losses():
    one = load(lr=1e-3, projector={"kind": "mlp", "stack": 2})
    assert one.differences(load(lr=1e-3, projector={"kind": "mlp", "stack": 2}, name="b", eval_every=7)) == []
    changed = one.differences(load(lr=2e-3, projector={"kind": "mlp", "stack": 4}))
    assert changed == ["lr: 0.001, not 0.002", "projector.stack: 2, not 4"]
    kinds = one.differences(load(lr=1e-3, projector={"kind": "residual"}))
    assert any(line.startswith("projector.kind: mlp, not residual") for line in kinds)


OLD = {
    "accumulate": 2,
    "clip": 0.5,
    "ema": 0.9,
    "eval_batch": 3,
    "mask_frames": 0.1,
    "noise": 0.2,
    "projector": {"kind": "moe", "routing": "top2", "balance": 0.3, "router_z": 0.4, "jitter": 0.5},
    "lm": {"audio_value": "bos", "checkpointing": True, "lora": {"targets": ["q_proj"]}},
}
NEW = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "ema_decay": 0.9,
    "eval_batch_size": 3,
    "frame_mask_prob": 0.1,
    "noise_std": 0.2,
    "projector": {
        "kind": "moe",
        "routing": "top2",
        "router_aux_loss_coef": 0.3,
        "router_z_loss_coef": 0.4,
        "router_jitter_noise": 0.5,
    },
    "lm": {
        "audio_value_embedding": "bos",
        "gradient_checkpointing": True,
        "lora": {"target_modules": ["q_proj"]},
    },
}


def test_a_config_with_old_key_names_loads_under_the_new_names(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"caches": ["a"], **OLD}))
    old = run_config(tmp_path)
    assert old == load(**NEW)
    assert old.differences(load(**NEW)) == []
    assert TrainConfig.model_validate(old.model_dump(mode="json")) == old


def test_both_names_of_a_key_are_rejected():
    with pytest.raises(UserError, match="'checkpointing' is the old name of 'gradient_checkpointing'"):
        load(lm={"checkpointing": True, "gradient_checkpointing": True})
