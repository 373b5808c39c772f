"""Training on a pretended CUDA device: the losses of the CPU, and one wait of the host a step.

``training_waits.json`` lists the waits of a final evaluation, and those of a step that has more than one. Each lets the
GPU idle: take waits off the list, put none on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import losses, make_config
from transformers import Gemma2Config, Gemma2ForCausalLM

from train.distributed.signals import StopRequest
from train.sweeps.group import LmCache, LockstepTrainer
from train.trainer.fit import fit

WAITS = json.loads(Path(__file__).with_name("training_waits.json").read_text())
ONE_WAIT = {"event.synchronize | train.trainer.deferred:DeferredValues.read": 1}
STEPS = {"steps": 4, "eval_every": 0}
PROJECTORS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "norm": "rms"},
    "residual": {"kind": "residual"},
    "linear": {"kind": "linear"},
    "conv": {"kind": "conv"},
    "conv-mosa": {"kind": "conv", "variant": "mosa"},
    "swiglu": {"kind": "swiglu"},
    "qformer": {"kind": "qformer", "heads": 2, "dropout": 0},
    "moe": {"kind": "moe"},
    "moe-top2": {"kind": "moe", "routing": "top2", "router_jitter_noise": 0},
    "pool": {"kind": "pool"},
    "transformer": {"kind": "transformer", "hidden": 32, "heads": 2, "dropout": 0},
    "posterior": {"kind": "posterior", "dropout": 0},
    "posterior-spelling": {"kind": "posterior", "dropout": 0, "read_spelling": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "distill-contrastive": {"distill": {"weight": 0.5}, "contrastive": {"weight": 0.1}},
    "ctc": {"ctc": {"weight": 0.1}, "projector": {"kind": "mlp", "stack": 1, "norm": "rms"}},
    "stage-one": {"pretrain": {"steps": 3}, "projector": {"kind": "mlp", "stack": 1, "norm": "rms"}},
    "augment": {"frame_mask_prob": 0.1, "noise_std": 0.1, "augment": {"speed": 0.1, "time_masks": 1}},
    "accumulate-ema": {"gradient_accumulation_steps": 2, "ema_decay": 0.9},
    "checkpointing": {"lm": {"checkpointing": True}},
    "padding-free": {"lm": {"padding_free": True}},
    "lm-train": {"lm": {"train": True}},
    "lora": {"lm": {"lora": {"rank": 2}}},
    "nanochat": {"lm": {"model": "nanochat:d2"}},
    "nanochat-bos": {"lm": {"model": "nanochat:d2", "audio_value_embedding": "bos"}},
    "nanochat-zero": {"lm": {"model": "nanochat:d2", "audio_value_embedding": "zero"}},
}
QUICK = [
    *("mlp", "moe-top2", "transformer", "posterior"),
    *("distill-contrastive", "ctc", "accumulate-ema", "nanochat-zero", "stored-int8"),
]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"projector": keys} for name, keys in PROJECTORS.items()},
    **OPTIONS,
    "bfloat16": {"dtype": "bfloat16"},
    "sliding-window": {},
    **{f"stored-{codec}": {"caches": codec} for codec in ("bf16", "int8", "fp8")},
}
OTHERS = [name for name in CASES if name not in QUICK]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    for codec in ("f16", "bf16", "int8", "fp8"):
        make_cache(folder / codec, n=24, channels=8, val_every=4, min_frames=30, max_frames=60, codec=codec)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    save_tiny_lm(folder / "gemma2", model=Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, pad_token_id=0)))
    return f"path:{save_tiny_lm(folder / 'lm')}", str(folder / "f16")


def settings(name: str, lm: str, cache: str) -> dict[str, Any]:
    keys = {"dtype": "float32", **STEPS, **CASES[name]}
    if "lm" in keys:
        keys["lm"] = {"model": lm, **keys["lm"]}
    if "sliding" in name:
        keys["lm"] = {"model": f"path:{Path(cache).with_name('gemma2')}"}
    if "caches" in keys:
        keys["caches"] = [str(Path(cache).with_name(keys["caches"]))]
    return keys


@pytest.fixture(scope="module")
def trained(pretended_cuda, inputs, tmp_path_factory):
    """Return what the device finds in the case ``name``; all quick cases, or all others, run in one process."""
    lm, cache = inputs
    found: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in found:
            names = QUICK if name in QUICK else OTHERS
            cases = {each: settings(each, lm, cache) for each in names}
            call = {"root": str(tmp_path_factory.mktemp("cuda")), "lm": lm, "cache": cache, "cases": cases}
            found.update(pretended_cuda("cuda_training:train_each", call))
        assert "error" not in found[name], found[name]["error"]
        return found[name]

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in CASES]
)
def test_a_run_has_the_losses_of_the_cpu_and_its_step_the_waits_of_the_list(trained, inputs, tmp_path, name):
    if name == "lora":
        pytest.importorskip("peft")
    lm, cache = inputs
    expected = losses(fit(make_config(tmp_path, cache, lm, **settings(name, lm, cache))))
    found = trained(name)
    assert found["losses"] == pytest.approx(expected, rel=0.01 if name == "bfloat16" else 1e-5)
    assert found["waits"] == WAITS.get(name, ONE_WAIT)


def test_recomputed_layers_and_joined_rows_change_neither_losses_nor_gradients_nor_waits(pretended_cuda, inputs):
    changes = {"recomputed": {"gradient_checkpointing": True}, "joined": {"padding_free": True}}
    cases = {"plain": {}, **changes, "both": changes["recomputed"] | changes["joined"]}
    found = pretended_cuda("cuda_training:gradients", {"lm": inputs[0], "cases": cases})
    plain = found["cpu: plain"]
    for name in cases:
        torch.testing.assert_close(torch.tensor(found[name]["nats"]), torch.tensor(plain["nats"]))
        torch.testing.assert_close(torch.tensor(found[name]["grad"]), torch.tensor(plain["grad"]))
        assert found[name]["waits"] == found["plain"]["waits"]
    assert found["recomputed"]["grad"] == found["plain"]["grad"]
    assert found["both"]["grad"] == found["joined"]["grad"]


def test_joined_rows_in_bfloat16_take_one_call_of_the_kernel_a_layer_without_a_wait(pretended_cuda, inputs):
    cases = {"plain": {}, "joined": {"padding_free": True}}
    found = pretended_cuda("cuda_training:gradients", {"lm": inputs[0], "cases": cases, "dtype": "bfloat16"})
    joined, plain = found["joined"], found["cpu: plain"]
    assert joined["kernel calls"] == [4, 4]  # two layers, four rows
    assert found["plain"]["kernel calls"] == []
    assert joined["waits"] == found["plain"]["waits"] == {}
    assert joined["nats"] == pytest.approx(plain["nats"], rel=0.02)
    grads = torch.tensor(joined["grad"]).flatten(), torch.tensor(plain["grad"]).flatten()
    assert torch.cosine_similarity(*grads, 0) > 0.999


def test_a_resumed_run_has_the_losses_of_one_without_a_break_and_an_evaluation_the_waits_of_the_list(
    pretended_cuda, inputs, tmp_path
):
    lm, cache = inputs
    keys = {"dtype": "float32", "steps": 4, "eval_every": 2, "checkpoint_every": 2, "retrieval_limit": 6}
    run = fit(make_config(tmp_path / "cpu", cache, lm, **keys))
    expected = json.loads((run / "summary.json").read_text())
    call = {"root": str(tmp_path / "cuda"), "lm": lm, "cache": cache, "keys": keys, "forget": 2}
    found = pretended_cuda("cuda_training:train", call)
    assert found["resumed"] == found["losses"] == pytest.approx(losses(run), rel=1e-5)
    for name in ("val_loss", "val_loss_shuffled", "val_loss_silent", "val_loss_text_only", "projector_rms_ratio"):
        assert found["summary"][name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["evaluation"] == WAITS["evaluation"], json.dumps(found["evaluation"], indent=1)


def test_an_evaluation_sends_what_is_stored_and_decodes_it_on_the_device_to_the_bits_of_the_host(
    pretended_cuda, inputs
):
    crossed = {
        "f16": ["float16"],
        "bf16": ["bfloat16"],
        "int8": ["float32", "int8"],
        "fp8": ["float32", "float8_e4m3fn"],
    }
    caches = [str(Path(inputs[1]).with_name(codec)) for codec in crossed]
    found = pretended_cuda("cuda_training:evaluation_batches", {"caches": caches})
    for each, wanted in zip(found, crossed.values(), strict=True):
        assert each == {"waits": {}, "bits": True, "on": ["cuda", "cpu"], "crossed": wanted}


@pytest.mark.slow
def test_experiments_in_lockstep_train_as_on_the_cpu_with_one_wait_each(pretended_cuda, inputs, tmp_path):
    lm, cache = inputs
    keys = [{"dtype": "float32", **STEPS, "name": f"run-{i}", "lr": 10.0 ** (-2 - i)} for i in range(2)]
    configs = [make_config(tmp_path / "cpu", cache, lm, **own) for own in keys]
    LockstepTrainer(configs, LmCache(), "batched", StopRequest(), log=lambda line: None).run()
    call = {"root": str(tmp_path / "cuda"), "lm": lm, "cache": cache, "keys": keys}
    found = pretended_cuda("cuda_training:sweep", call)
    for own, got in zip(keys, found["losses"], strict=True):
        assert got == pytest.approx(losses(tmp_path / "cpu" / "runs" / own["name"]), rel=1e-5)
    assert found["waits"] == {name: 2 * count for name, count in ONE_WAIT.items()}


@pytest.mark.slow
def test_a_launched_process_trains_as_on_the_cpu_with_one_exchange_of_gradients_a_step(
    pretended_cuda, inputs, tmp_path
):
    lm, cache = inputs
    keys = {"dtype": "float32", **STEPS}
    expected = losses(fit(make_config(tmp_path / "cpu", cache, lm, **keys)))
    call = {"root": str(tmp_path / "cuda"), "lm": lm, "cache": cache, "keys": keys}
    found = pretended_cuda("cuda_training:launched", call)
    assert found["losses"] == pytest.approx(expected, rel=1e-5)
    assert found["waits"] == ONE_WAIT
    assert found["nccl"] == STEPS["steps"]


def test_a_sum_that_a_lost_rank_leaves_unfinished_is_aborted_and_changes_no_weight(pretended_cuda, inputs, tmp_path):
    lm, cache = inputs
    keys = {"dtype": "float32", "steps": 5, "eval_every": 0, "checkpoint_every": 100}
    expected = losses(fit(make_config(tmp_path / "cpu", cache, lm, **keys)))
    call = {"root": str(tmp_path / "cuda"), "lm": lm, "cache": cache, "keys": keys, "step": 3}
    found = pretended_cuda("cuda_training:lost_rank", call)
    assert len(found["aborted"]) == 1
    assert found["aborted"] != [found["main thread"]]  # that one waits for the GPU
    assert "rank 1 of 1 exited before the run finished; step 2 of 5 is saved" in found["error"]
    assert found["losses"] == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_changes_no_weight_though_the_host_learns_of_it_later(
    pretended_cuda, inputs, tmp_path
):
    lm, cache = inputs
    keys = {"dtype": "float32", "steps": 6, "eval_every": 0, "lr": 1e30, "warmup": 0}
    call = {"root": str(tmp_path), "lm": lm, "cache": cache, "keys": keys}
    found = pretended_cuda("cuda_training:diverge", call)
    assert "of step 2 is not finite" in found["error"]
    assert all(found["finite"])
