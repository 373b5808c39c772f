"""The encoder compared with common alternatives: ms per clip, audio-seconds per second, error relative to float32.

    python bench/encoder.py                                                     # 64 spoken sentences, whisper-base
    python bench/encoder.py --clips 8 --rounds 2                                # a small run
    python bench/encoder.py --config configs/extract/librispeech.yaml --set source.path=/data/LibriSpeech

All encode the same clips, each padded to 30 s, in turn; the best round is reported. Peers: transformers in a plain loop
(float32 and bfloat16, batch 1, sdpa), and CTranslate2, the engine of faster-whisper (float32 and int8), if
``ctranslate2`` is installed (requirements-bench.lock). All use the same number of threads and start from samples, so
log-mel is included.

``bound`` is the time of the arithmetic alone: linear layers at the rate at which this machine multiplies matrices of
their shapes, attention and convolutions at their own rates, all measured here with the same number of threads. The last
layer counts only the work for the frames that are kept. Its dtype is bfloat16 where the CPU has units for that, and
float32 elsewhere, where earshard's bfloat16 is computed in float32 and rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.audio import decode
from pipeline.config import ExtractConfig
from pipeline.cpu import has_bfloat16_units
from pipeline.encoders.load import load_encoder
from pipeline.encoders.whisper import self_attention
from pipeline.sources import open_source
from pipeline.threads import ThreadPool
from pipeline.weights.resolve import Weights, resolve_weights
from pipeline.weights.wheels import WHEELS
from shards.config.base import load_config

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
Encode = Callable[[np.ndarray], np.ndarray]  # float32 [samples] -> float32 [frames, channels]


def load_clips(config: ExtractConfig, n: int) -> list[np.ndarray]:
    """Return the first ``n`` clips of at most 30 s."""
    source = open_source(config.source)
    clips: list[np.ndarray] = []
    for utterance in source.utterances():
        ((_, data),) = source.read([utterance.audio])
        if isinstance(data, bytes) and len(audio := decode(data)) <= 480_000:
            clips.append(audio)
        if len(clips) == n:
            break
    return clips


def transformers_loop(folder: Path, dtype: torch.dtype) -> Encode:
    from transformers import WhisperFeatureExtractor, WhisperModel

    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    model = WhisperModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").encoder.eval()

    def encode(clip: np.ndarray) -> np.ndarray:
        mel = extractor(clip, sampling_rate=16000, return_tensors="pt").input_features.to(dtype)
        with torch.inference_mode():
            hidden: np.ndarray = model(mel).last_hidden_state[0].float().numpy()
        return hidden

    return encode


def ctranslate2_encoders(weights: Weights, threads: int, folder: Path) -> Iterator[tuple[str, Encode]]:
    """Yield CTranslate2's encoder in float32 and int8, if it is installed and ``weights`` come in its format."""
    try:
        import ctranslate2
    except ImportError:
        return
    from transformers import WhisperFeatureExtractor

    found = WHEELS.get(weights.reference.removeprefix("wheel:"))
    if found is None:
        return
    for distribution, path in found.files:
        data = Path(str(metadata.distribution(distribution).locate_file(path))).read_bytes()
        with open(folder / re.sub(r"\.part\d+$", "", Path(path).name), "ab") as file:
            file.write(data)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tokens = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    (folder / "vocabulary.json").write_text(json.dumps(sorted(tokens, key=lambda token: tokens[token])))
    extractor = WhisperFeatureExtractor.from_pretrained(weights.folder)
    for compute_type in ("float32", "int8"):
        model = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type=compute_type, intra_threads=threads)

        def encode(clip: np.ndarray, model: Any = model) -> np.ndarray:
            mel = extractor(clip, sampling_rate=16000, return_tensors="np").input_features
            hidden: np.ndarray = np.array(model.encode(ctranslate2.StorageView.from_array(mel)))[0]
            return hidden

        yield f"ctranslate2 {compute_type}", encode


def bound(weights: Weights, threads: int, kept: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Return the seconds of pure arithmetic per clip of ``kept`` frames, with ``threads`` clips at a time."""
    config = json.loads((weights.folder / "config.json").read_text())
    width, inner, heads = config["d_model"], config["encoder_ffn_dim"], config["encoder_attention_heads"]
    frames, mels, pool = config["max_source_positions"], config["num_mel_bins"], ThreadPool(threads)

    def seconds(step: Callable[[], Any]) -> float:
        def repeat() -> None:
            with torch.inference_mode():
                for _ in range(4):
                    step()

        times = []
        for _ in range(rounds):
            since = time.perf_counter()
            pool.run(repeat, [()] * threads)
            times.append((time.perf_counter() - since) / 4 / threads)
        return min(times)

    def product(rows: int, inside: int, columns: int) -> float:
        x, w = torch.randn(rows, inside, dtype=dtype), torch.randn(inside, columns, dtype=dtype)
        return seconds(lambda: torch.mm(x, w))

    qkv = torch.randn(1, frames, 3 * width, dtype=dtype)
    layer = sum(
        product(frames, *shape) for shape in ((width, 3 * width), (width, width), (width, inner), (inner, width))
    )
    layer += seconds(lambda: self_attention(qkv, heads))
    last = product(frames, width, 2 * width) + seconds(lambda: self_attention(qkv, heads, kept))
    last += sum(product(kept, *shape) for shape in ((width, width), (width, width), (width, inner), (inner, width)))
    stem = product(2 * frames, 3 * mels, width) + product(frames, 3 * width, width)
    return stem + (config["encoder_layers"] - 1) * layer + last


def compare(found: list[np.ndarray], exact: list[np.ndarray]) -> tuple[float, float]:
    """Return the relative RMS error and the cosine similarity over all frames that contain audio, in float64."""
    a, b = (np.concatenate([x.ravel() for x in part]).astype(np.float64) for part in (found, exact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def print_machine(threads: int) -> None:
    """Print the processor, its relevant flags, and package versions."""
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text())) if Path("/proc/cpuinfo").exists() else set()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {threads} threads, load {os.getloadavg()[0]:.1f}; "
          f"flags {' '.join(flag for flag in FLAGS if flag in flags) or 'unknown'}")  # fmt: skip
    print(", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "ctranslate2")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/extract/speech.yaml", metavar="FILE")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override settings of the extraction")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(ExtractConfig, args.config, args.set)
    weights = resolve_weights(config.encoder.model, role="encoder")
    clips = load_clips(config, args.clips)
    seconds = sum(map(len, clips)) / 16000

    def ours(dtype: str) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        encoder = load_encoder(weights, device="cpu", dtype=dtype)
        last = encoder.n_layers
        return lambda batch: [each[last] for each in encoder.encode(batch, [last])]

    def loop(encode: Encode) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        return lambda batch: [encode(clip) for clip in batch]

    with tempfile.TemporaryDirectory() as folder:
        runners = {
            "transformers float32": loop(transformers_loop(weights.folder, torch.float32)),
            "transformers bfloat16": loop(transformers_loop(weights.folder, torch.bfloat16)),
            **{name: loop(encode) for name, encode in ctranslate2_encoders(weights, args.threads, Path(folder))},
            "earshard float32": ours("float32"),
            "earshard bfloat16": ours("bfloat16"),
        }
        times: dict[str, list[float]] = {name: [] for name in runners}
        outputs: dict[str, list[np.ndarray]] = {}
        for run in runners.values():
            run(clips[:2])  # the first call allocates and chooses kernels
        for _ in range(args.rounds):
            for name, run in runners.items():
                since = time.perf_counter()
                outputs[name] = run(clips)
                times[name].append(time.perf_counter() - since)
    frames = [-(-len(clip) // 320) for clip in clips]
    dtype = "bfloat16" if has_bfloat16_units() else "float32"
    least = bound(weights, args.threads, round(sum(frames) / len(frames)), getattr(torch, dtype))

    print_machine(args.threads)
    print(f"{weights.reference}: {len(clips)} clips, {seconds:.0f} s of audio, each padded to 30 s\n")
    print(f"{'':<22} {'ms/clip':>8} {'audio-s/s':>9} {'x fp32':>7} {'rel.err':>8} {'cosine':>8}")
    kept = {name: [x[:n] for x, n in zip(found, frames, strict=True)] for name, found in outputs.items()}
    base = min(times["transformers float32"])
    for name, found in times.items():
        best = min(found)
        error, cosine = compare(kept[name], kept["transformers float32"])
        line = f"{name:<22} {1000 * best / len(clips):>8.1f} {seconds / best:>9.1f} {base / best:>6.2f}x"
        print(f"{line} {error:>8.4f} {cosine:>8.5f}")
    share = least * len(clips) / min(times[f"earshard {dtype}"])
    print(f"{f'bound ({dtype})':<22} {1000 * least:>8.1f} {seconds / least / len(clips):>9.1f}")
    print(f"\nearshard {dtype} runs at {share:.0%} of the arithmetic bound")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
