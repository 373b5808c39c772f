"""Effect of the codec on training: the same short run on the same features, stored in each codec.

    python bench/codec_training.py --out /tmp/codecs
    python bench/codec_training.py source.path=/data/LibriSpeech limit=400 \\
        --extract configs/extract/librispeech.yaml --out /tmp/codecs --steps 600 --seeds 0 1 2

One encoder pass writes its float32 features into one cache per codec, all with the same plan, so every run sees the
same batches. The same configuration is then trained on each cache, once per seed. Prints the held-out loss and the
audio gain of each codec, the change relative to f16, and the spread over seeds: a change below the spread is not
significant. Caches and runs that already exist under --out are reused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline.audio import decode
from pipeline.config import ExtractConfig
from pipeline.encoders.recording import encode_recording
from pipeline.extract.job import Job, prepare, provenance
from pipeline.extract.loop import finish_caches
from shards.commit.writer import ShardWriter
from shards.config.base import load_config
from shards.errors import run_command
from shards.format.codec import FLOAT_CODECS


def main() -> int:
    return run_command(command)


def command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for caches and runs")
    parser.add_argument("--extract", default="configs/extract/speech.yaml")
    parser.add_argument("--train", default="configs/train/demo.yaml")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--codecs", nargs="+", default=list(FLOAT_CODECS), choices=list(FLOAT_CODECS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the extraction")
    args = parser.parse_args(argv)

    caches = extract(args.out, args.extract, args.overrides, args.codecs)
    summaries = {
        codec: [train(args.train, cache, args.out, codec, seed, args.steps) for seed in args.seeds]
        for codec, cache in caches.items()
    }
    print(f"{args.steps} steps of {args.train}, seeds {', '.join(map(str, args.seeds))}")
    print(f"{'codec':<6} {'val_loss':>9} {'change':>8} {'seeds ±':>8} {'audio_gain':>11} {'change':>8} {'seeds ±':>8}")
    base = {name: mean(run[name] for run in next(iter(summaries.values()))) for name in ("val_loss", "audio_gain")}
    for codec, runs in summaries.items():
        cells = []
        for name in ("val_loss", "audio_gain"):
            found = [run[name] for run in runs]
            cells += [f"{mean(found):.4f}", f"{mean(found) - base[name]:+.4f}", f"{(max(found) - min(found)) / 2:.4f}"]
        print("{:<6} {:>9} {:>8} {:>8} {:>11} {:>8} {:>8}".format(codec, *cells))
    return 0


def extract(out: Path, config: str, overrides: list[str], codecs: list[str]) -> dict[str, Path]:
    """Return a complete cache per codec under ``out``, all from one plan (one shard) and one encoder pass."""
    caches, todo = {}, []
    for codec in codecs:
        words = [*overrides, f"root={out}/caches", f"codec={codec}", "shard_mb=1e6"]
        extraction = prepare(load_config(ExtractConfig, config, words))
        caches[codec] = extraction.targets[0].layout.path
        todo += extraction.jobs()
    if todo:
        fill(todo)
    return caches


def fill(jobs: list[Job]) -> None:
    first, started = jobs[0], time.perf_counter()
    assert {job.plan.id for job in jobs} == {first.plan.id}
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(job.targets[0].layout, 0, job.targets[0].spec, job.plan.id, job.owner))
            for job in jobs
        ]
        rows, spec = first.plan.shard_rows(0), first.targets[0].spec
        keys = [row["key"] for row in rows]
        labels = dict(zip(keys, first.labels.find(keys), strict=True))
        audio = first.source.read([row["audio"] for row in rows])
        for row, (_, data) in zip(tqdm(rows, desc="encode"), audio, strict=True):
            if isinstance(data, Exception):
                raise data
            samples = decode(data)
            found = encode_recording(samples, first.encoder, [spec.layer], overlap=spec.overlap, trim=spec.trim)
            for writer in writers:
                digest = hashlib.sha256(data).digest()
                writer.add(row, found[spec.layer], samples=len(samples), audio_id=digest, labels=labels[row["key"]])
        for writer in writers:
            writer.commit({"seconds": time.perf_counter() - started})
    for job in jobs:
        with job.hold_leases():
            finish_caches(job.targets, 0, job.plan, provenance(job), time.perf_counter() - started)


def train(config: str, cache: Path, out: Path, codec: str, seed: int, steps: int) -> dict[str, float]:
    """Return ``summary.json`` of one run; train it unless it exists."""
    run = out / "runs" / f"{codec}-{steps}-{seed}"
    if not (run / "summary.json").is_file():
        words = [f"caches=[{cache}]", "extract=[]", f"runs={run.parent}", f"name={run.name}", f"seed={seed}"]
        words += [f"steps={steps}", "eval_every=null", "checkpoint_every=100000"]
        subprocess.run([sys.executable, "-m", "train", "fit", "--config", config, *words], check=True)
    summary: dict[str, float] = json.loads((run / "summary.json").read_text())
    return summary


def mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
