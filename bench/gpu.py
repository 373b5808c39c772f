"""Extraction on a GPU: the same features, no more waits than needed, and how fast. One command, at most 12 minutes.

    python bench/gpu.py --json gpu.json                            # base, small and large-v3 on the first GPU
    python bench/gpu.py --sizes base --clips 2000 --online 16
    python bench/gpu.py --device cpu --sizes tiny --clips 8        # only tests the code; the results mean nothing

The encoders have the sizes of OpenAI's Whisper and random weights, which do not affect speed. The steps:

* ``ceiling``: TFLOP/s of the best of a few large square matrix products in the encoder's dtype;
* ``fidelity``: relative RMS by dtype and layer against transformers in float32 without TF32;
* ``companions``: whether a clip has the same bytes alone, at other places and among other clips;
* ``waits``: how often torch.cuda.set_sync_debug_mode warns while a batch is launched;
* ``memory``: peak bytes of a batch beside the estimate;
* ``pass``: ms per window of log-mel and of the forward pass, plain and compiled, beside transformers' own with SDPA,
  and the share of the ceiling; a pass computes whole windows, so that its FLOP count is known;
* ``end to end``: audio-seconds per second of ``python -m pipeline extract`` over 12 s FLAC clips of noise, as the slope
  between half of the clips and all of them;
* ``resume``: whether an extraction that is killed and resumed has the tars of one that is not;
* ``training``: ``bench/online.py`` for ``--online`` steps (requires the weight wheels).

Each step's result is printed and written to ``--json`` as soon as it is there; a step that fails leaves its error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from pipeline.encoders.base import DTYPES
from pipeline.encoders.compile import CompiledForward, has_compiler
from pipeline.encoders.load import auto_dtype, describe_gpu, load_encoder
from pipeline.encoders.whisper import WhisperEncoder
from pipeline.weights.resolve import Weights
from shards.format.codec import encode, relative_rms

SIZES = {  # layers, width, heads, mels (Radford et al., 2022, table 1; large-v3's model card)
    "tiny": (4, 384, 6, 80),
    "base": (6, 512, 8, 80),
    "small": (12, 768, 12, 80),
    "large-v3": (32, 1280, 20, 128),
}
SECONDS = 12


def write_whisper(size: str, folder: Path) -> Weights:
    """Write a Whisper encoder of the given size with random weights, as a transformers folder."""
    from safetensors.torch import save_file
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Module

    layers, width, heads, mels = SIZES[size]
    config = WhisperConfig(
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
    )
    torch.manual_seed(0)
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {f"model.encoder.{name}": x.half().contiguous() for name, x in Module(config).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_size": mels}))
    return Weights(folder, f"path:{folder}", "")


def seconds(step: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of ``step``, including its work on the device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(rounds + 2):  # the first two allocate, choose kernels, capture graphs
        wait()
        since = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - since)
    return statistics.median(times[2:])


def ceiling(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...], rounds: int) -> float:
    """Return the TFLOP/s of the fastest large square matrix product."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * n**3 / seconds(lambda a=a, b=b: a @ b, device, rounds) / 1e12)
    return best


def measure(weights: Weights, device: str, batch: int | None, rounds: int, top: object) -> dict[str, float]:
    """Return ms per window of log-mel and of the forward pass, plain and compiled, and the TFLOP/s of the best pass.

    ``top`` is the result of :func:`ceiling`.
    """
    encoder = load_encoder(weights, device=device, batch_size=batch)
    assert isinstance(encoder, WhisperEncoder)
    where, size = torch.device(device), encoder.batch_size
    audio = torch.randn(size, 16000 * 30, device=where) * 0.1
    found: dict[str, float] = {"batch": size}
    with torch.inference_mode():
        found["mel ms"] = 1000 * seconds(lambda: encoder._log_mel(audio), where, rounds) / size
        mel = encoder._log_mel(audio)
        layers, keep = [encoder.n_layers], encoder.positions
        passes = {"plain": encoder._forward}
        if where.type == "cuda" and has_compiler():
            passes["compiled"] = CompiledForward(encoder._forward, mode="reduce-overhead")
        for name, forward in passes.items():
            found[f"{name} ms"] = 1000 * seconds(lambda f=forward: f(mel, layers, keep), where, rounds) / size
    found["TFLOP/s"] = encoder.flop_per_window / 1e9 / min(found[f"{name} ms"] for name in passes)
    if isinstance(top, float):
        found["of ceiling"] = found["TFLOP/s"] / top
    return found


def transformers_encoder(weights: Weights) -> Any:
    """Return transformers' own encoder in float32 on the CPU, with SDPA."""
    from safetensors.torch import load_file
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Module

    config = WhisperConfig.from_pretrained(weights.folder)
    config._attn_implementation = "sdpa"
    model = Module(config)
    tensors = load_file(weights.folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model.encoder."): x.float() for name, x in tensors.items()})
    return model.eval()


def transformers_pass(weights: Weights, device: str, batch: int, rounds: int) -> float:
    """Return the ms per window of transformers' encoder in the dtype and batch of ours."""
    where = torch.device(device)
    model = transformers_encoder(weights).to(where, getattr(torch, auto_dtype(device)))
    mel = torch.randn(batch, model.config.num_mel_bins, 3000, device=where, dtype=model.dtype)
    with torch.inference_mode():
        return 1000 * seconds(lambda: model(mel), where, rounds) / batch


def noise(seconds_of_clips: Sequence[float]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, round(16000 * each)).astype(np.float32) for each in seconds_of_clips]


def fidelity(weights: Weights, device: str) -> dict[str, list[float]]:
    """Return the relative RMS of each layer in each dtype against transformers in float32 on the CPU."""
    from transformers import WhisperFeatureExtractor

    clips, model = noise([30, 7.3, 0.4]), transformers_encoder(weights)
    extractor = WhisperFeatureExtractor.from_pretrained(weights.folder)
    with torch.inference_mode():
        mel = extractor(clips, sampling_rate=16000, return_tensors="pt").input_features
        output = model(mel, output_hidden_states=True)
    hidden = [*output.hidden_states[:-1], output.last_hidden_state]
    found = {}
    for dtype in DTYPES:
        encoder = load_encoder(weights, device=device, dtype=dtype, batch_size=4)
        ours = encoder.encode(clips, range(encoder.n_layers + 1))
        found[dtype] = [
            max(relative_rms(each[layer], states[i, : len(each[layer])].numpy()) for i, each in enumerate(ours))
            for layer, states in enumerate(hidden)
        ]
    return found


def stored(encoder: Any, clips: Sequence[np.ndarray]) -> list[bytes]:
    """Return the int8 payload of the last layer of each clip, as an extraction stores it."""
    layer = encoder.n_layers
    if encoder.device == "cpu":
        return [encode("int8", each[layer]).payload.tobytes() for each in encoder.encode(clips, [layer])]
    windows = [encoder.prepare(clip) for clip in clips]
    return [each[layer].payload.tobytes() for each in encoder.launch(windows, [layer], "valid", "int8").result()]


def companions(weights: Weights, device: str) -> dict[str, bool]:
    """Return for each place and choice of companions whether a clip has the bytes that it has alone."""
    encoder = load_encoder(weights, device=device, batch_size=8 if device == "cpu" else 32)
    size = 4 if device == "cpu" else 32
    clip, *others = noise([9.7, *np.linspace(0.3, 30, size)])
    (alone,) = stored(encoder, [clip])
    found = {}
    for place in (0, size // 2 - 1, size - 1):
        for name, chosen in (("some", others), ("others", others[::-1])):
            found[f"{place} among {name}"] = (
                stored(encoder, [*chosen[:place], clip, *chosen[place + 1 :]])[place] == alone
            )
    return found


def waits(weights: Weights, device: str) -> int:
    """Return how often torch warns of a wait while three batches of three layers are launched."""
    encoder: Any = load_encoder(weights, device=device, batch_size=8)
    clips = noise([5] * 8)
    stored(encoder, clips)  # allocates
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            windows = [encoder.prepare(clip) for clip in clips]
            launched = [encoder.launch(windows, [0, 1, encoder.n_layers], "valid", "f16") for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for each in launched:
            each.result()
    return sum("synchroniz" in str(each.message) for each in seen)


def memory(weights: Weights, device: str) -> dict[str, float]:
    """Return peak and estimated GB of a batch with two layers."""
    encoder: Any = load_encoder(weights, device=device)
    encoder.fit_batch(2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    windows = [encoder.prepare(clip) for clip in noise([30] * encoder.batch_size)]
    for _ in range(4):
        encoder.launch(windows, [0, encoder.n_layers], "valid", "f16").result()
    return {
        "batch": encoder.batch_size,
        "peak": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "estimate": encoder.batch_size * encoder.window_bytes(2) / 1e9,
    }


def extraction(weights: Weights, device: str, manifest: Path, root: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "pipeline", "extract", f"root={root}", "source.kind=manifest"]
    argv += [f"source.path={manifest}", f"encoder.model={weights.reference}", f"encoder.device={device}"]
    return [*argv, "processes=1", *more]


def resume(weights: Weights, device: str, manifest: Path, folder: Path) -> dict[str, Any]:
    """Kill an extraction after its first shard and resume it; return whether it has the tars of an undisturbed one."""
    whole, killed = folder / "whole", folder / "killed"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    small = ("shard_mb=4", "lease_seconds=3")
    subprocess.run(extraction(weights, device, manifest, whole, *small), check=True, **quiet)
    process = subprocess.Popen(extraction(weights, device, manifest, killed, *small), **quiet)
    while process.poll() is None and not list(killed.rglob("shards/*.json")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = len(list(killed.rglob("shards/*.json")))
    subprocess.run(extraction(weights, device, manifest, killed, *small), check=True, **quiet)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.tar")}
        for root in (whole, killed)
    ]
    return {"committed before the kill": before, "shards": len(digests[0]), "equal": digests[0] == digests[1]}


def write_clips(folder: Path, clips: int) -> Path:
    """Write FLAC clips of noise and return their manifest."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(clips):
        soundfile.write(folder / f"{i:06d}.flac", rng.normal(0, 0.1, 16000 * SECONDS), 16000)
    manifest = folder / "clips.csv"
    manifest.write_text("audio,text\n" + "".join(f"{i:06d}.flac,noise\n" for i in range(clips)))
    return manifest


def end_to_end(weights: Weights, device: str, manifest: Path, clips: int, folder: Path) -> dict[str, Any]:
    """Return audio-seconds per second, by the slope between half of the clips and all, and how busy each stage was."""
    walls, profile = [], folder / "profile.json"
    for limit in (clips // 2, clips):
        root = folder / f"caches-{weights.folder.name}-{limit}"
        argv = extraction(weights, device, manifest, root, f"source.limit={limit}", "--profile", str(profile))
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times = json.loads(profile.read_text())
        walls.append(times["wall"])
    slope = (clips - clips // 2) * SECONDS / max(walls[1] - walls[0], 1e-9)
    return {"audio-s/s": slope, "seconds": walls, "busy": times["shares"]}


class Report:
    """Results of the steps, written to ``path`` after each."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self._results = path, {**about, "steps": dict[str, Any]()}

    def step(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure one step; its error takes the place of a result."""
        since = time.perf_counter()
        try:
            result = measure()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        self._results["steps"][name] = {"result": result, "seconds": round(time.perf_counter() - since, 1)}
        print(f"{name}: {json.dumps(result)}", flush=True)
        if self._path:
            self._path.write_text(json.dumps(self._results, indent=1) + "\n", encoding="utf-8")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["base", "small", "large-v3"])
    parser.add_argument("--batch", type=int, help="windows per pass (default: as many as fit, at most 32)")
    parser.add_argument("--clips", type=int, default=4000, help="clips of the end-to-end extraction")
    parser.add_argument("--online", type=int, default=0, metavar="STEPS", help="steps of bench/online.py; 0: none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE, after every step")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch finds no GPU: run this benchmark on a machine with a GPU, or test its code with "
              "--device cpu --sizes tiny", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    on_gpu = args.device.startswith("cuda")
    device, dtype = torch.device(args.device), getattr(torch, auto_dtype(args.device))
    rounds = args.rounds if on_gpu else 1
    about = describe_gpu(args.device) if on_gpu else {"name": "CPU (the results mean nothing)"}
    report = Report(args.json, {"date": str(date.today()), "torch": torch.__version__, "dtype": str(dtype), **about})
    sizes = (4096, 8192, 16384) if on_gpu else (512,)
    top = report.step("ceiling", lambda: ceiling(dtype, device, sizes, rounds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_clips(folder / "clips", args.clips)
        weights = {size: write_whisper(size, folder / f"whisper-{size}") for size in args.sizes}
        first = weights[args.sizes[0]]
        report.step("fidelity", lambda: fidelity(first, args.device))
        report.step("companions", lambda: companions(first, args.device))
        if on_gpu:
            report.step("waits", lambda: waits(first, args.device))
        report.step("resume", lambda: resume(first, args.device, manifest, folder))
        for size, each in weights.items():
            if on_gpu:
                report.step(f"memory {size}", lambda each=each: memory(each, args.device))
            found = report.step(f"pass {size}", lambda each=each: measure(each, args.device, args.batch, rounds, top))
            batch = int(found.get("batch", 8))
            report.step(
                f"pass {size} of transformers, ms",
                lambda each=each, batch=batch: transformers_pass(each, args.device, batch, rounds),
            )
            report.step(
                f"end to end {size}",
                lambda each=each: end_to_end(each, args.device, manifest, args.clips, folder),
            )
    if args.online:
        script = str(Path(__file__).with_name("online.py"))
        argv = [sys.executable, script, "--steps", str(args.online), "--device", args.device]
        report.step("training", lambda: subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
