"""GPU performance: encoder TFLOP/s relative to the matmul ceiling, log-mel, extraction end to end, a training step.

    python bench/gpu.py                                            # base, small and large-v3 on the first GPU
    python bench/gpu.py --sizes base --clips 2000 --online 16
    python bench/gpu.py --device cpu --sizes tiny --clips 8        # only tests the code; the results mean nothing

The encoders have the sizes of OpenAI's Whisper and random weights, which do not affect speed. ``ceiling`` is the best
of a few large square matrix products in the encoder's dtype, measured first. A pass computes whole windows (nothing is
trimmed), so that its FLOP count is known; ``compiled`` uses torch.compile with CUDA graphs, if a compiler is available.
End to end is ``python -m pipeline extract`` over 12 s FLAC clips of noise. ``--online N`` runs ``bench/online.py`` for
N steps: the same training step with cached features and with the encoder in the loop (requires the weight wheels).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import torch

from pipeline.encoders.compile import CompiledForward, has_compiler
from pipeline.encoders.load import auto_dtype, load_encoder
from pipeline.encoders.whisper import WhisperEncoder
from pipeline.weights.resolve import Weights

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


def measure(weights: Weights, device: str, batch: int | None, rounds: int) -> dict[str, float]:
    """Return ms per window of log-mel and of the forward pass, plain and compiled, and the TFLOP/s of the best pass."""
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
    return found


def end_to_end(weights: Weights, device: str, clips: int, folder: Path) -> tuple[float, dict[str, float]]:
    """Return the audio-hours per hour of ``pipeline extract``, and the fraction of time that each stage was busy."""
    corpus = folder / "clips"
    corpus.mkdir(exist_ok=True)
    manifest = corpus / "clips.csv"
    if not manifest.exists():
        rng = np.random.default_rng(0)
        for i in range(clips):
            soundfile.write(corpus / f"{i:06d}.flac", rng.normal(0, 0.1, 16000 * SECONDS), 16000)
        manifest.write_text("audio,text\n" + "".join(f"{i:06d}.flac,noise\n" for i in range(clips)))
    root, profile = folder / f"caches-{weights.folder.name}", folder / "profile.json"
    argv = [
        sys.executable,
        "-m",
        "pipeline",
        "extract",
        f"root={root}",
        "source.kind=manifest",
        f"source.path={manifest}",
    ]
    argv += [f"encoder.model={weights.reference}", f"encoder.device={device}", "processes=1", "--profile", str(profile)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    times = json.loads(profile.read_text())
    return clips * SECONDS / times["wall"], times["shares"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["base", "small", "large-v3"])
    parser.add_argument("--batch", type=int, help="windows per pass (default: as many as fit, at most 32)")
    parser.add_argument("--clips", type=int, default=4000, help="clips of the end-to-end extraction")
    parser.add_argument("--online", type=int, default=0, metavar="STEPS", help="steps of bench/online.py; 0: none")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch finds no GPU: run this benchmark on a machine with a GPU, or test its code with "
              "--device cpu --sizes tiny", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    on_gpu = args.device.startswith("cuda")
    device, dtype = torch.device(args.device), getattr(torch, auto_dtype(args.device))
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU (the results mean nothing)"
    rounds = args.rounds if on_gpu else 1
    top = ceiling(dtype, device, (4096, 8192, 16384) if on_gpu else (512,), rounds)
    print(f"{date.today()}, {name}, torch {torch.__version__}, {dtype}: ceiling {top:.1f} TFLOP/s", flush=True)
    columns = ("batch", "mel ms", "plain ms", "compiled ms", "TFLOP/s")
    print(f"{'whisper':<10}" + "".join(f"{column:>12}" for column in columns) + f"{'of ceiling':>12}{'audio-h/h':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            weights = write_whisper(size, Path(folder) / f"whisper-{size}")
            found = measure(weights, args.device, args.batch, rounds)
            rate, shares = end_to_end(weights, args.device, args.clips, Path(folder))
            line = "".join(f"{found[column]:>12.3g}" if column in found else f"{'-':>12}" for column in columns)
            print(f"{size:<10}{line}{found['TFLOP/s'] / top:>12.0%}{rate:>12.0f}", flush=True)
            print("          busy end to end: " + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()))
    if args.online:
        script = str(Path(__file__).with_name("online.py"))
        subprocess.run([sys.executable, script, "--steps", str(args.online), "--device", args.device], check=True)


if __name__ == "__main__":
    main()
