"""The training steps of ``bench/gpu.py``: ms a step, tokens a second and MFU, resumed runs, NCCL with one rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step import CHANNELS, SHAPES, counted_flop, make_batch, our_step, timed

from pipeline.weights.wheels import WHEELS
from shards.config.base import load_config, validate_config
from train.config.train import TrainConfig
from train.lms.hf.model import HfLanguageModel, HfTokenizer
from train.model.build import build_model
from train.trainer.fit import fit

LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = LLAMA_8B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SMOLLM2 = "smollm2-135m-instruct"
STEPS, SAVED = 8, 4  # of the run that is resumed


def random_llama(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> HfLanguageModel:
    """Return a frozen Llama of these sizes with random weights, made on ``device``; its tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), dtype=dtype)
    return HfLanguageModel(model.requires_grad_(False).eval(), HfTokenizer(fast, "random"), "random", "random", dtype)


def run_whole(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured output; ended early by a time limit, it leaves none of the command's children."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, start_new_session=True, **pipes, **options) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def require_smollm2() -> str:
    """Return the reference of SmolLM2-135M; its error says how it is installed."""
    from pipeline.weights.resolve import resolve_weights

    assert SMOLLM2 in WHEELS
    resolve_weights(f"wheel:{SMOLLM2}", role="lm")
    return f"wheel:{SMOLLM2}"


def training(
    lm: HfLanguageModel | str, device: torch.device, dtype: torch.dtype, size: int, rounds: int, tops: dict[str, float]
) -> dict[str, Any]:
    """Return ms a step, tokens a second and MFU of a batch of the shape of LibriSpeech, and the waits of a step.

    Args:
        lm: the language model, or its reference.
        size: utterances of the batch.
        tops: TFLOP/s of the device, by what they are the share of.
    """
    shape, reference = SHAPES["librispeech"], lm if isinstance(lm, str) else "nanochat:d2"
    changed = [f"lm.model={reference}", "caches=none", "prompt.template=slam", "contrastive.weight=0", "ctc.weight=0"]
    read = load_config(TrainConfig, shape.config, [*changed, "pretrain.steps=0", "decode.ctc_weight=0"])
    tree = {**read.model_dump(mode="json"), "projector": {"kind": "linear", "stack": 5, "norm": "rms"}, "augment": {}}
    config = TrainConfig.model_validate(tree)
    model = build_model(config, CHANNELS, device, dtype, None if isinstance(lm, str) else lm)
    batch, step = make_batch(shape, size, shortest=0.9), our_step(config, model)
    losses = [step(0, batch) for _ in range(2)]  # the first two allocate and choose kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(lambda: step(1, batch), device) for _ in range(rounds))
    flop = counted_flop(step, batch)
    soft = sum(model.projector.soft_frames(frames) for frames in batch.lengths.tolist())
    prompt = len(model.prompt.prefix) + len(model.prompt.suffix)
    tokens = soft + sum(prompt + len(model.prompt.target_ids(text)) for text in batch.texts)
    found = {"ms": 1000 * seconds, "tokens": tokens, "tokens/s": tokens / seconds, "TFLOP/s": flop / seconds / 1e12}
    found |= {f"of {name}": found["TFLOP/s"] / top for name, top in tops.items()}
    if device.type == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["waits"] = len(sync_warnings(lambda: step(2, batch)))
    return {**found, "losses": losses}


def sync_warnings(function: Any) -> list[str]:
    """Return the lines that torch.cuda.set_sync_debug_mode warns of while ``function`` runs."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)]


def run_config(folder: Path, cache: Path, device: str, dtype: str) -> TrainConfig:
    """Return the settings of a short run with a random nanochat, without evaluation during training."""
    tree = {
        "caches": [str(cache)],
        "runs": str(folder),
        "name": "run",
        "lm": {"model": "nanochat:d2"},
        "projector": {"kind": "mlp", "stack": 4, "norm": "rms"},
        "steps": STEPS,
        "checkpoint_every": SAVED,
        "eval_every": 0,
        "batch": {"size": 4},
        "decode_limit": 2,
        "max_new_tokens": 4,
        "device": device,
        "dtype": dtype,
    }
    return validate_config(TrainConfig, tree, "bench/gpu.py")


def losses_of(run: Path) -> list[float]:
    """Return the losses that a run recorded."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def forget_after(run: Path, step: int) -> None:
    """Leave ``run`` as if it was killed after ``step`` was saved."""
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    for name in ("summary.json", "projector.safetensors", "report.html"):
        (run / name).unlink(missing_ok=True)


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return whether two runs have the same losses, and their largest relative difference."""
    gap = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return {"steps": len(ours), "equal": list(ours) == list(theirs), "largest difference": gap}


def resumed(folder: Path, cache: Path, device: str) -> dict[str, Any]:
    """Train a run, resume it from its middle, and compare the losses: by dtype."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = run_config(folder / dtype, cache, device, dtype)
        run = fit(config)
        whole = losses_of(run)
        forget_after(run, SAVED)
        found[dtype] = compared(losses_of(fit(config, resume=run)), whole)
    return found


def one_rank(folder: Path, cache: Path, device: str) -> dict[str, Any]:
    """Train as the only process of a launcher (NCCL on a GPU, else gloo); compare the losses with a plain process."""
    files, losses = folder / "configs", []
    files.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, more in (("plain", {}), ("launched", launcher)):
        config = run_config(folder / name, cache, "auto" if device == "cuda" else device, "float32")
        (files / f"{name}.yaml").write_text(json.dumps(config.model_dump(mode="json")))
        argv = [sys.executable, "-m", "train", "fit", "--config", str(files / f"{name}.yaml")]
        done = run_whole(argv, env={**os.environ, **more})
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-800:]}")
        losses.append(losses_of(folder / name / "run"))
    return {"backend": "nccl" if device.startswith("cuda") else "gloo", **compared(losses[1], losses[0])}
