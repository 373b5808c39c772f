"""Benefit and cost of ``window: tight`` relative to ``full30``: speed, similarity of features, a trained projector.

    python bench/tight.py                                                        # 400 sentences, no training: 4 minutes
    python bench/tight.py --steps 300 --margins 0,2,8                            # one projector each: 25 minutes
    python bench/tight.py --extract configs/extract/librispeech.yaml --set source.path=/data/LibriSpeech limit=500

Extracts one cache with full30 and one per margin (seconds of silence in a tight window); ``--root`` keeps them for the
next run. Prints for each the encoder's time on the same ``--clips`` clips (in turn, best of five), and the cosine
similarity and relative RMS error of all stored features relative to full30. With ``--steps``, also prints what
``python -m train fit`` reports for a projector trained with the same seed: held-out loss, audio gain, word error rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audio import decode
from pipeline.encoders.recording import open_encoder
from pipeline.maintain.check import recorded_config
from pipeline.sources import open_source
from shards.format.codec import relative_rms
from shards.read.cache import Cache


def extract(config: str, words: list[str], root: Path, window: list[str]) -> Cache:
    """Return the cache of ``config`` under ``root``; extract it if it does not exist."""
    argv = [sys.executable, "-m", "pipeline", "extract", "--config", config, f"root={root}", *words, *window]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    caches = [path.parent for path in root.glob("*/*/CACHE.json")]
    return Cache.open(max(caches, key=lambda path: path.stat().st_mtime))


def encode_times(caches: dict[str, Cache], clips: int) -> dict[str, float]:
    """Return the seconds of each variant's encoder on the same clips, in turn, best of five."""
    first = next(iter(caches.values()))
    config = recorded_config(first.provenance, first.path)
    reference = first.provenance["encoder"]["reference"]
    uris = first.manifest["audio"].to_pylist()[:clips]
    audio = [decode(data) for _, data in open_source(config.source).read(uris) if isinstance(data, bytes)]
    encoders = {name: open_encoder(cache.spec, reference) for name, cache in caches.items()}
    audio = [clip[: encoders["full30"].window_samples] for clip in audio]
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(5):
        for name, encoder in encoders.items():
            since = time.perf_counter()
            encoder.encode(audio, [caches[name].spec.layer])
            times[name].append(time.perf_counter() - since)
    return {name: min(found) for name, found in times.items()}


def likeness(cache: Cache, reference: Cache) -> tuple[float, float, float]:
    """Return the mean and lowest cosine over utterances, and the relative RMS error, relative to ``reference``."""
    at = {key: i for i, key in enumerate(reference.manifest["key"].to_pylist())}
    cosines, gaps, norms = [], 0.0, 0.0
    for i, key in enumerate(cache.manifest["key"].to_pylist()):
        ours, theirs = (np.asarray(x, np.float64) for x in (cache.features(i), reference.features(at[key])))
        norm = np.linalg.norm(theirs)
        cosines.append(float((ours * theirs).sum() / np.linalg.norm(ours) / norm))
        gaps, norms = gaps + (relative_rms(ours, theirs) * norm) ** 2, norms + norm**2
    return statistics.mean(cosines), min(cosines), float(np.sqrt(gaps / norms))


def train(config: str, cache: Cache, name: str, steps: int, root: Path) -> dict[str, Any]:
    """Train ``config`` on ``cache``; return its ``summary.json``."""
    words = [f"caches=[{cache.path}]", "extract=[]", f"runs={root / 'runs'}", f"name={name}", f"steps={steps}"]
    argv = [
        sys.executable,
        "-m",
        "train",
        "fit",
        "--config",
        config,
        *words,
        "eval_every=null",
        "checkpoint_every=null",
    ]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    tree: dict[str, Any] = json.loads((root / "runs" / name / "summary.json").read_text())
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", default="configs/extract/speech.yaml", metavar="FILE")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override settings of the extraction")
    parser.add_argument("--margins", default="0,2,8", help="comma-separated seconds (default: 0,2,8)")
    parser.add_argument("--clips", type=int, default=16, help="clips for timing the encoder")
    parser.add_argument("--train", default="configs/train/demo.yaml", metavar="FILE")
    parser.add_argument("--steps", type=int, default=0, help="training steps per variant; 0: no training")
    parser.add_argument("--root", type=Path, default=Path("build/bench-tight"))
    args = parser.parse_args()

    variants = {"full30": ["window=full30"]}
    for margin in args.margins.split(","):
        variants[f"tight-{margin}"] = ["window=tight", f"margin={margin}"]
    caches = {name: extract(args.extract, args.set, args.root / name, words) for name, words in variants.items()}
    times = encode_times(caches, args.clips)
    hours = sum(caches["full30"].manifest["samples"].to_pylist()) / 16000 / 3600
    print(f"{len(caches['full30'])} utterances, {hours:.2f} h, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(f"{'window':<10} {'ms/clip':>8} {'faster':>7} {'cosine':>8} {'lowest':>8} {'rel.err':>8}", end="")
    print(f" {'loss':>6} {'gain':>6} {'WER':>6}" if args.steps else "", flush=True)
    for name, cache in caches.items():
        mean, low, error = likeness(cache, caches["full30"])
        speed = times["full30"] / times[name]
        line = (
            f"{name:<10} {1000 * times[name] / args.clips:>8.1f} {speed:>6.2f}x {mean:>8.4f} {low:>8.4f} {error:>8.4f}"
        )
        print(line, end="", flush=True)
        if args.steps:
            found = train(args.train, cache, f"{name}-{args.steps}-{os.getpid()}", args.steps, args.root)
            wer = found.get("wer")
            cells = f"{found['val_loss']:>6.3f} {found['audio_gain']:>6.3f} {'-' if wer is None else f'{wer:.3f}':>6}"
            print(f" {cells}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
