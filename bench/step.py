"""Seconds per training step, beside its arithmetic bound and beside a plain loop with transformers.

    python bench/step.py                            # SmolLM2-135M, batch 8: the demo's shape and LibriSpeech's; minutes
    python bench/step.py --steps 3 --json step.json
    python bench/step.py --padding-free --shortest 0.2   # lengths as in random order, also without padding
    python bench/step.py --slam-llm ../SLAM-LLM          # also the step of a checkout of SLAM-LLM, beside its packages

Both loops train the same projector (two linear layers over 5 frames) in front of the same frozen language model on the
same batch in memory, in one dtype, and their first losses must agree. The plain loop is the one that transformers
documents: ``inputs_embeds``, an attention mask and ``labels`` per padded batch, the model's own loss, AdamW. Steps of
both loops alternate; the median of each is reported.

SLAM-LLM's step is that of its own model class and projector. Its encoder costs nothing here, and as its data set pads
audio to 30 s, its language model reads 300 soft tokens of each utterance.

The bound is the FLOP of the products and attentions of a step without padding, at the rate at which this machine
multiplies two large matrices in the same dtype. The last table tells where the time of our step goes: a profile of one
step, and what the profiler does not see is Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from shards.config.base import load_config
from shards.stream.batch import Batch
from train.config.train import TrainConfig
from train.distributed.device import choose_device, choose_dtype
from train.distributed.group import ProcessGroup
from train.lms.base import SeparatePasses
from train.lms.load import resolve_lm
from train.model.audio_lm import AudioLM
from train.model.build import build_model
from train.trainer.step import TrainStep, optimizer_step

CHANNELS, LR = 512, 1e-4  # channels of whisper-base
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "that",
    "he",
    "was",
    "it",
    "his",
    "with",
    "as",
    "had",
    "for",
    "she",
    "her",
]
KINDS = {  # of the operations of a profile, by a part of their names
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "convolution", "bmm"),
    "optimizer": ("adam", "foreach"),
}


@dataclass(frozen=True)
class Shape:
    """The settings of a run, whose prompt is read, and the length of its utterances."""

    config: str
    seconds: float  # of the longest of a batch
    words_per_second: float


SHAPES = {
    "demo": Shape("configs/train/demo.yaml", 3.5, 2.5),
    "librispeech": Shape("configs/train/librispeech.yaml", 12.4, 2.7),
}


def make_batch(shape: Shape, size: int, shortest: float) -> Batch:
    """Return a batch of random frames at 50 a second; its shortest utterance has ``shortest`` of the longest's."""
    rng = np.random.default_rng(0)
    frames = [int(50 * shape.seconds * rng.uniform(shortest, 1)) for _ in range(size)]
    features = [torch.from_numpy(rng.standard_normal((n, CHANNELS), np.float32)).half() for n in frames]
    texts = [" ".join(rng.choice(WORDS, max(1, int(n / 50 * shape.words_per_second)))) for n in frames]
    padded, blank = pad_sequence(features, batch_first=True), [""] * size
    return Batch(padded, torch.tensor(frames), blank, texts, blank, blank, list(range(size)), 0, 0, {})


def our_step(config: TrainConfig, model: AudioLM) -> Callable[[int, Batch], float]:
    """Return a step of this project: its loss in nats per target token."""
    parameters = list(model.projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    passes, group = SeparatePasses(model.lm), ProcessGroup()

    def step(number: int, batch: Batch) -> float:
        one = TrainStep(config, model, optimizer, parameters, [batch], step=number, lr=LR, group=group)
        return optimizer_step([one], passes)[0].loss

    return step


def plain_step(model: AudioLM, reference: str, dtype: torch.dtype) -> Callable[[int, Batch], float]:
    """Return a step as transformers documents training, with the projector and the prompt of ``model``."""
    from transformers import AutoModelForCausalLM

    projector, prompt, device = model.projector, model.prompt, model.lm.device
    lm: Any = AutoModelForCausalLM.from_pretrained(resolve_lm(reference), dtype=dtype).to(device)
    lm.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LR)
    embed = lm.get_input_embeddings()

    def row(soft: Tensor, text: str) -> tuple[Tensor, Tensor]:
        answer = prompt.target_ids(text)
        before, after = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (prompt.prefix, prompt.suffix))
        targets = torch.tensor(answer, device=device)
        inputs = torch.cat([embed(before), soft, embed(after), embed(targets)])
        labels = torch.full((len(inputs),), -100, device=device)
        labels[-len(answer) :] = targets
        return inputs, labels

    def step(number: int, batch: Batch) -> float:
        features, mask = batch.features.to(device, dtype), batch.mask().to(device)
        soft, soft_mask = projector(features, mask)
        rows = [row(own[valid], text) for own, valid, text in zip(soft, soft_mask, batch.texts, strict=True)]
        inputs = pad_sequence([inputs for inputs, _ in rows], batch_first=True)
        labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=-100)
        valid = pad_sequence([torch.ones(len(labels), dtype=torch.int64) for _, labels in rows], batch_first=True)
        loss = lm(inputs_embeds=inputs, attention_mask=valid.to(device), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


class Settings(dict[str, Any]):
    """A mapping whose keys are attributes, too."""

    __getattr__ = dict.__getitem__


class GivenFeatures(torch.nn.Module):
    """Stands for SLAM-LLM's encoder, which costs nothing here: returns the features that it is given as log-mel."""

    def extract_variable_length_features(self, mel: Tensor) -> Tensor:
        return mel.permute(0, 2, 1)


def slam_llm_step(folder: Path, model: AudioLM, reference: str, dtype: torch.dtype) -> Callable[[int, Batch], float]:
    """Return a step of SLAM-LLM's model and projector with the prompt of ``model``, as its data set lays out a batch.

    It pads audio to 30 s, so that each row has 300 soft tokens. ``folder`` is a checkout of SLAM-LLM.
    """
    sys.path.insert(0, str(folder / "src"))
    from slam_llm.models.projector import EncoderProjectorConcat
    from slam_llm.models.slam_model import slam_model
    from transformers import AutoModelForCausalLM

    prompt, device = model.prompt, model.lm.device
    lm: Any = AutoModelForCausalLM.from_pretrained(resolve_lm(reference), dtype=dtype).to(device)
    lm.requires_grad_(False).eval()
    settings = Settings(
        encoder_projector_ds_rate=5, encoder_dim=CHANNELS, llm_dim=lm.config.hidden_size, encoder_name="whisper",
        encoder_projector="linear",
    )  # fmt: skip
    projector = EncoderProjectorConcat(settings).to(device, dtype)
    whole = slam_model(GivenFeatures(), lm, projector, None, Settings(freeze_encoder=True), settings)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LR)
    frames, soft = 1500, 300

    def step(number: int, batch: Batch) -> float:
        before, answers = [*prompt.prefix, *prompt.suffix], [list(prompt.target_ids(text)) for text in batch.texts]
        longest = max(map(len, answers))
        features = torch.zeros(len(answers), frames, CHANNELS, dtype=dtype, device=device)
        features[:, : batch.features.shape[1]] = batch.features.to(device, dtype)
        rows = [[0] * soft + before + answer + [0] * (longest - len(answer)) for answer in answers]
        ids = torch.tensor(rows, device=device)
        start = soft + len(before)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
        for row, answer in enumerate(answers):
            labels[row, start : start + len(answer)] = ids[row, start : start + len(answer)]
            mask[row, : start + len(answer)] = True
        audio = torch.zeros_like(mask)
        audio[:, :soft] = True
        out, _ = whole(input_ids=ids, attention_mask=mask, labels=labels, audio_mel=features, modality_mask=audio)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP a second of a product of two square matrices: the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, until the device is done."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def counted_flop(step: Callable[[int, Batch], float], batch: Batch) -> float:
    """Return the FLOP of the products and attentions of a step, each row alone: without padding."""
    total = 0
    for i, frames in enumerate(batch.lengths.tolist()):
        alone = Batch(
            batch.features[i : i + 1, :frames], batch.lengths[i : i + 1], [""], batch.texts[i : i + 1], [""], [""],
            [i], 0, 0, {},
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            step(0, alone)
        total += counter.get_total_flops()
    return float(total)


def shares(step: Callable[[int, Batch], float], batch: Batch, device: torch.device) -> dict[str, float]:
    """Return the share of each kind of operation in the time of a step, by a profile."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        seconds = timed(lambda: step(0, batch), device)
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operations")
        found[kind] += own / 1e6 / seconds
    return {**{kind: found[kind] for kind in (*KINDS, "other operations")}, "Python": max(0.0, 1 - found.total())}


def measure(name: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure one shape."""
    shape = SHAPES[name]
    changed = [f"lm.model={arguments.lm}", "contrastive.weight=0", "ctc.weight=0", "pretrain.steps=0"]
    changed += ["decode.ctc_weight=0", "caches=none"]
    read = load_config(TrainConfig, shape.config, changed)
    tree = {**read.model_dump(mode="json"), "projector": {"kind": "linear", "stack": 5, "norm": "rms"}, "augment": {}}
    config = TrainConfig.model_validate(tree)
    batch = make_batch(shape, arguments.batch, arguments.shortest)
    models = [build_model(config, CHANNELS, device, dtype)]
    models.append(build_model(config, CHANNELS, device, dtype, models[0].lm))  # each loop trains its own projector
    loops = {"earshard": our_step(config, models[0]), "plain loop": plain_step(models[1], arguments.lm, dtype)}
    if arguments.padding_free:
        tree["lm"]["padding_free"] = True
        loops["no padding"] = our_step(config, build_model(TrainConfig.model_validate(tree), CHANNELS, device, dtype))
    first, second, *others = (step(0, batch) for step in loops.values())
    if arguments.slam_llm:
        loops["SLAM-LLM"] = slam_llm_step(arguments.slam_llm, models[1], arguments.lm, dtype)
        loops["SLAM-LLM"](0, batch)  # has a projector of its own, and therefore another loss
    if max(abs(loss - second) for loss in (first, *others)) > 0.02 * second:
        raise SystemExit(f"error: the loops do not compute the same loss: {first:.4f}, {second:.4f}, {others}")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, arguments.steps + 1):
        for loop, step in loops.items():
            seconds[loop].append(timed(partial(step, number, batch), device))
    rate = matrix_rate(device, dtype)
    bound = counted_flop(loops["earshard"], batch) / rate
    medians = {loop: statistics.median(values) for loop, values in seconds.items()}
    parts = shares(loops["earshard"], batch, device)
    mean = int(batch.lengths.sum()) / arguments.batch
    print(f"\n{name}: {arguments.batch} utterances of {mean:.0f} frames on average, {arguments.steps} steps")
    print(f"first losses {first:.4f} and {second:.4f}; products at {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':12}{'s/step':>10}")
    for label, value in {"bound": bound, **medians}.items():
        print(f"{label:12}{value:>10.3f}")
    of_bound, speedup = bound / medians["earshard"], medians["plain loop"] / medians["earshard"]
    print(f"{of_bound:.0%} of the bound; {speedup:.2f} x the plain loop")
    if arguments.slam_llm:
        ratio = medians["SLAM-LLM"] / medians["earshard"]
        print(f"{ratio:.2f} x as fast as the step of SLAM-LLM, whose encoder is not counted")
    if arguments.padding_free:
        print(f"without padding {medians['no padding'] / medians['earshard']:.2f} x the time of our step with it")
    print("where our step goes: " + ", ".join(f"{kind} {share:.0%}" for kind, share in parts.items()))
    found = {"seconds": medians, "bound": bound, "of_bound": of_bound, "speedup": speedup}
    return {"shape": name, **found, "gflops": rate / 1e9, "shares": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="wheel:smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--shortest", type=float, default=0.9, help="length of the shortest of the longest")
    parser.add_argument("--padding-free", action="store_true", help="also measure our step with lm.padding_free")
    parser.add_argument("--slam-llm", type=Path, metavar="FOLDER", help="a checkout of SLAM-LLM: also measure its step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    arguments = parser.parse_args()
    import transformers

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}; "
          f"{dtype} on {device}, {torch.get_num_threads()} threads, {arguments.lm}")  # fmt: skip
    results = [measure(name, arguments, device, dtype) for name in arguments.shapes]
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
