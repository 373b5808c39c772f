"""Seconds per training step with cached features, compared with the same step with the encoder in the loop.

    python bench/online.py                          # whisper-base + SmolLM2-135M, 16 steps of 8; minutes
    python bench/online.py --window tight --steps 8

Both variants train on the same batches in the same order from the same initial state: projector, frozen language model,
AdamW. The cached variant reads features that an extraction stored. The other decodes the audio, computes log-mel and
runs the frozen encoder, as trainers without a cache do, and casts the frames to float16, the dtype of the cache.

Both therefore train on the same features, and the losses must agree. On a CPU, the encoder processes each clip alone on
one thread, so features and losses must be bit-identical. On a GPU, the other clips of a batch change the order of
summation in the encoder: features may differ by rounding in the encoder's dtype, and AdamW amplifies these differences
in the losses (its first steps depend almost only on the signs of the gradients).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Relative limits on a GPU, for the RMS error of the features and the loss of a step; bfloat16 rounds by 2^-9 per
# operation.
MAX_FEATURE_ERROR, MAX_LOSS_ERROR = 0.02, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", choices=["full30", "tight"], default="full30", help="context of the encoder")
    parser.add_argument("--utterances", type=int, default=128)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        words = [f"root={folder}", f"source.num_sentences={arguments.utterances}", "source.val_fraction=0"]
        words += [f"window={arguments.window}", f"encoder.device={arguments.device}"]
        command = [sys.executable, "-m", "pipeline", "extract", "--config", "configs/extract/speech.yaml", *words]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        extraction = time.perf_counter() - begin
        (cache,) = (str(path.parent) for path in Path(folder).glob("*/*/CACHE.json"))
        measure(cache, arguments, extraction)


def measure(path: str, arguments: argparse.Namespace, extraction: float) -> None:
    import torch
    import transformers

    from pipeline.audio import decode
    from pipeline.encoders.recording import open_encoder
    from pipeline.maintain.check import recorded_config
    from pipeline.sources import open_source
    from shards.config.base import load_config
    from shards.format.codec import relative_rms
    from shards.read.cache import Cache
    from shards.stream.batch import Batch
    from shards.stream.iterable_dataset import FeatureStream
    from shards.stream.sampler import SamplerConfig
    from train.config.train import TrainConfig
    from train.data.padding import pad
    from train.distributed.device import choose_device, choose_dtype
    from train.model.build import build_model

    cache = Cache.open(path)
    config = load_config(TrainConfig, "configs/train/demo.yaml", [f"caches={path}"])
    device = choose_device(arguments.device)
    dtype = choose_dtype(config.dtype, device)
    source = open_source(recorded_config(cache.provenance, cache.path).source)
    encoder = open_encoder(cache.spec, cache.provenance["encoder"]["reference"], arguments.device)
    layer = cache.spec.layer

    def cached(batch: Batch) -> tuple[Any, Any]:
        return batch.features, batch.mask()

    def online(batch: Batch) -> tuple[Any, Any]:
        uris = [cache.row(row)["audio"] for row in batch.rows]
        clips = [decode(data) for _, data in source.read(uris) if isinstance(data, bytes)]
        return pad([frames[layer].astype(np.float16) for frames in encoder.encode(clips, [layer], cache.spec.trim)])

    def run(features_of: Callable[[Batch], tuple[Any, Any]]) -> tuple[list[float], list[float], float]:
        model = build_model(config, cache.spec.channels, device, dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batches = iter(FeatureStream([cache], SamplerConfig(batch_size=arguments.batch), seed=1))
        losses, seconds, apart = [], [], 0.0
        for _ in range(arguments.steps):
            begin = time.perf_counter()
            batch = next(batches)
            features, mask = features_of(batch)
            out = model.nll(features, mask, batch.texts)
            loss = out.nll.sum() / out.tokens.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # also waits for the device
            seconds.append(time.perf_counter() - begin)
            apart = max(apart, relative_rms(features.numpy(), batch.features.numpy()))
        return losses, seconds[1:] or seconds, apart  # the first step warms up

    a, with_cache, _ = run(cached)
    b, with_encoder, apart = run(online)
    gap = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    slow, fast = statistics.median(with_encoder), statistics.median(with_cache)
    hours = np.sum(cache.frames) / 50 / 3600
    print(f"{cache.provenance['encoder']['reference']} (window {cache.spec.window}, {cache.spec.dtype}) + "
          f"{config.lm.model} ({str(dtype).removeprefix('torch.')}) on {device}, batches of {arguments.batch}, "
          f"{arguments.steps} steps, {hours * 3600:.0f} s of audio; torch {torch.__version__}, "
          f"transformers {transformers.__version__}, Python {platform.python_version()}")  # fmt: skip
    print(f"encoder in the loop   {slow:8.3f} s per step (median)")
    print(f"cached features       {fast:8.3f} s per step (median)")
    print(f"ratio                 {slow / fast:8.2f}")
    print(f"extraction            {extraction:8.1f} s once, for {len(cache)} utterances, process start included")
    print(f"features              {apart:8.5f} relative RMS error of the worst batch")
    print(f"losses                first {a[0]:.4f} and {b[0]:.4f}, last {a[-1]:.4f} and {b[-1]:.4f}, "
          f"largest difference {gap:.3%}")  # fmt: skip
    features, loss = (0.0, 0.0) if device.type == "cpu" else (MAX_FEATURE_ERROR, MAX_LOSS_ERROR)
    if apart > features or gap > loss:
        raise SystemExit(
            f"failed: on {device.type}, features may differ by at most {features:.1%} and losses by at most {loss:.1%}"
        )


if __name__ == "__main__":
    main()
