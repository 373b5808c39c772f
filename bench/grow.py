"""What a second extraction costs: one text changed, 100 clips added to 10,000, and features copied from another cache.

    python bench/grow.py                            # 10,000 clips, then 2 GB of features: 10 minutes, 7 GB of disk
    python bench/grow.py --part grow --clips 1000   # a small run
    python bench/grow.py --part copy --megabytes 200

grow: the whole command ``python -m pipeline extract`` over FLAC files of half a second, as a process of its own, with a
tiny Whisper of random weights, since the encoder's time is not what is measured. ``torch`` says whether the command
imported it; without it, no encoder was loaded. ``beside`` is what is left without the encoder's passes; it includes
starting Python, importing torch and loading the encoder.

copy: another source over the same audio, whose features (float16, 512 channels, about 620 frames each, written by the
real writer) are copied with every crc32 checked, hashed, synced and read back. Compared with ``cp`` of the same cache
followed by ``sync`` of every file, in turn, with a warm page cache. ``copying`` is the time from the first shard to the
finished cache; ``whole command`` adds starting Python, listing the source and hashing its audio.

The best of ``--repeats`` counts. There is no peer: lhotse and webdataset store features, but neither knows which of
them are up to date, so a second run encodes everything again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from gpu import SIZES, write_whisper
from ours import plan_table, write_features

from pipeline.config import ExtractConfig
from pipeline.extract.job import prepare
from shards.config.base import validate_config

SIZES |= {"narrow": (2, 32, 4, 80), "wide": (1, 512, 8, 80)}  # layers, width, heads, mels
RATE, ADDED = 16_000, 100
COMMAND = """
import atexit, runpy, sys
atexit.register(lambda: print("torch:", "torch" in sys.modules, file=sys.stderr))
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def write_clip(path: Path, number: int, frames: int) -> None:
    """Write a FLAC file that begins with noise, different for each number, and is silent after half a second."""
    samples = np.zeros(frames * 320, np.int16)
    noise = np.random.default_rng(number).normal(0, 3000, min(len(samples), RATE // 2))
    samples[: len(noise)] = noise.astype(np.int16)
    soundfile.write(path, samples, RATE, subtype="PCM_16")


def extract(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the command; return its ``--json`` result, with ``wall``, ``cpu``, ``torch``, and ``copying`` if any."""
    words = [f"{name}={json.dumps(value)}" for name, value in flat(config).items()]
    result, profile = folder / "result.json", folder / "profile.json"
    profile.unlink(missing_ok=True)
    command = [sys.executable, "-c", COMMAND, "extract", *words, "--json", str(result), "--profile", str(profile)]
    since, used = time.perf_counter(), os.times()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wall, cpu = time.perf_counter() - since, sum(os.times()[2:4]) - sum(used[2:4])
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(result.read_text())
    found |= {"wall": wall, "cpu": cpu, "torch": "torch: True" in done.stderr}
    if profile.exists():
        found["copying"] = json.loads(profile.read_text())["wall"]
    return found


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return the settings of a configuration as ``section.key``."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def settings(root: Path, encoder: Path, manifest: Path, name: str) -> dict[str, Any]:
    return {
        "root": str(root), "codec": "f16", "window": "tight", "shard_mb": 64,
        "encoder": {"model": f"path:{encoder}", "dtype": "float32", "device": "cpu"},
        "source": {"kind": "manifest", "path": str(manifest), "name": name},
    }  # fmt: skip


def write_manifest(path: Path, texts: list[str]) -> None:
    lines = [f"audio/{i:06d}.flac,{text}\n" for i, text in enumerate(texts)]
    path.write_text("audio,text\n" + "".join(lines), encoding="utf-8")


def measure_growth(folder: Path, clips: int, repeats: int) -> None:
    encoder, manifest, audio = folder / "narrow", folder / "clips.csv", folder / "audio"
    write_whisper("narrow", encoder)
    audio.mkdir()
    texts = [f"the text of clip number {i}" for i in range(clips)]
    for i in range(clips):
        write_clip(audio / f"{i:06d}.flac", i, 25)
    write_manifest(manifest, texts)
    config = settings(folder / "caches", encoder, manifest, "grown")
    first = extract(config, folder)
    assert (first["encoded"], first["torch"]) == (clips, True)
    print(f"{clips:,} clips encoded in {first['wall']:.1f} s")

    runs = []
    for i in range(repeats):
        texts[i] += " corrected"
        write_manifest(manifest, texts)
        runs.append(extract(config, folder))
        assert (runs[-1]["relabelled"], runs[-1]["planned"]) == (True, 0)
    best = min(runs, key=lambda run: float(run["wall"]))
    print(f"one text changed: {best['wall']:.2f} s, {best['cpu']:.2f} CPU s, {best['encoded']} encoded, "
          f"torch imported: {any(run['torch'] for run in runs)} (target: no encoder, below 5 s)")  # fmt: skip
    again = min((extract(config, folder) for _ in range(repeats)), key=lambda run: float(run["wall"]))
    print(f"nothing changed:  {again['wall']:.2f} s, {again['cpu']:.2f} CPU s, torch imported: {again['torch']}")

    runs = []
    for _ in range(repeats):
        for i in range(len(texts), len(texts) + ADDED):
            write_clip(audio / f"{i:06d}.flac", i, 25)
            texts.append(f"the text of clip number {i}")
        write_manifest(manifest, texts)
        run = extract(config, folder)
        info = json.loads((Path(run["cache"]) / "CACHE.json").read_text())
        run["beside"] = run["wall"] - info["generations"][-1]["encode_seconds"]
        assert run["encoded"] == run["planned"] == ADDED
        runs.append(run)
    best = min(runs, key=lambda run: float(run["beside"]))
    print(f"{ADDED} added: {best['wall']:.2f} s, {best['cpu']:.2f} CPU s, {best['encoded']} encoded, "
          f"{best['beside']:.2f} s beside the encoder's passes (target: below 10 s)")  # fmt: skip


def measure_copying(folder: Path, megabytes: int, repeats: int) -> None:
    encoder, manifest, audio = folder / "wide", folder / "clips.csv", folder / "audio"
    write_whisper("wide", encoder)
    audio.mkdir()
    rng = np.random.default_rng(0)
    frames = ((2 + 14 * rng.beta(2.5, 0.9, megabytes * 1_000_000 // (2 * 512 * 620))) * 50).astype(int)
    for i, count in enumerate(frames.tolist()):
        write_clip(audio / f"{i:06d}.flac", i, count)
    write_manifest(manifest, ["a sentence of about the usual length that nobody reads"] * len(frames))
    (target,) = prepare(load(settings(folder / "caches", encoder, manifest, "first")), relabel=False).targets
    names = [f"{i:06d}.flac" for i in range(len(frames))]
    digests = [hashlib.sha256((audio / name).read_bytes()).digest() for name in names]
    shards = np.cumsum(frames) * 1024 // 64_000_000
    first = target.layout.path
    write_features(first, plan_table([name[:-5] for name in names], names, digests, frames, shards), target.spec)
    files = sorted(path for path in first.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{size:,.0f} MB of features of {len(frames):,} utterances in {len(set(shards.tolist()))} shards")

    config, cp, copying, whole, used = settings(folder / "caches", encoder, manifest, "second"), [], [], [], []
    for _ in range(repeats):
        warm(files)
        since = time.perf_counter()
        subprocess.run(["cp", "-r", str(first), str(folder / "cp")], check=True)
        made = [str(path) for path in (folder / "cp").rglob("*")]
        subprocess.run(["sync", *made], check=True)
        cp.append(time.perf_counter() - since)
        shutil.rmtree(folder / "cp")
        warm(files)
        run = extract(config, folder)
        assert (run["reused"], run["encoded"], run["torch"]) == (len(frames), 0, False), run
        copying.append(run["copying"])
        whole.append(run["wall"])
        used.append(run["cpu"])
        shutil.rmtree(Path(run["cache"]).parent)
        os.sync()
    for name, found in (("cp, sync", cp), ("copying", copying), ("whole command", whole)):
        print(f"{name:<14} {size / min(found):7,.0f} MB/s, {min(found):6.2f} s, {min(cp) / min(found):.2f} of cp")
    print(f"(target: copying at 0.6 of cp; the command took {min(used):.2f} CPU s)")


def load(config: dict[str, Any]) -> ExtractConfig:
    return validate_config(ExtractConfig, config, "bench/grow.py")


def warm(files: list[Path]) -> None:
    """Read all files once."""
    subprocess.run(["cat", *map(str, files)], check=True, stdout=subprocess.DEVNULL)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("grow", "copy"), help="only one of the two")
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="folder for temporary data")
    args = parser.parse_args()
    import pyarrow as pa
    import torch

    print(f"Python {platform.python_version()}, pyarrow {pa.__version__}, torch {torch.__version__}, {os.cpu_count()} "
          f"CPUs, load {os.getloadavg()[0]:.1f}, best of {args.repeats}")  # fmt: skip
    for part in ("grow", "copy"):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            if part == "grow" and args.part != "copy":
                measure_growth(Path(name), args.clips, args.repeats)
            if part == "copy" and args.part != "grow":
                measure_copying(Path(name), args.megabytes, args.repeats)


if __name__ == "__main__":
    main()
