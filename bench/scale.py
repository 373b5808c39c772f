"""Cost of corpora of a thousand to a million hours, extrapolated from slopes measured at a small scale.

    python bench/scale.py                 # about a minute and 1 GB of temporary disk
    python bench/scale.py --quick         # a test with a tenth of every size

Measures the CPU seconds and bytes of each step per row, shard or gigabyte on this machine, and multiplies. CPU seconds
do not include other load; the time of a slow disk is not included either. No encoder runs here: GPU hours are estimated
from the encoder's FLOP count and a fraction of the GPU's peak.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import order_scale
import pyarrow as pa
import soundfile

from pipeline.audio import decode
from pipeline.extract.plan import corpus_fingerprint, make_plan
from pipeline.sources import Utterance
from shards.commit.claims import new_owner
from shards.commit.finalize import commit_record, finalize, write_plan
from shards.commit.writer import ShardWriter
from shards.format.layout import UTTERANCE_SCHEMA, Layout, parquet_bytes, read_plan
from shards.format.spec import FeatureSpec
from shards.inspect.verify import verify

SECONDS_AN_UTTERANCE = 12.3  # LibriSpeech: 960 h in 281,241 utterances
H100, SHARE = 989e12, 0.4  # bfloat16 FLOP/s without sparsity (NVIDIA data sheet); assumed utilization
WORKER_MEMORY = 64e9  # bytes, assumed per worker
SHARD = 256e6


@dataclass(frozen=True)
class Model:
    """A Whisper encoder.

    ``flop_per_window`` counts the matrix products, attention over 1500 positions and the two convolutions of a 30 s
    window.
    """

    name: str
    channels: int
    layers: int
    mels: int

    @property
    def flop_per_window(self) -> float:
        d, n = self.channels, 1500
        return self.layers * (2 * 12 * d * d * n + 4 * n * n * d) + 2 * 3 * d * n * (2 * self.mels + d)


BASE, LARGE = Model("whisper-base", 512, 6, 80), Model("whisper-large-v3", 1280, 32, 128)
CORPORA = [
    ("LibriSpeech-960", 960, BASE),
    ("100,000 h", 100_000, BASE),
    ("100,000 h", 100_000, LARGE),
    ("1,000,000 h", 1_000_000, LARGE),
]


def utterances(n: int) -> list[Utterance]:
    """Return utterances as in LibriSpeech: 34 words each, drawn by Zipf's law from 20,000 random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(20_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    return [
        Utterance(
            f"{i % 2000}-{i:09d}", f"{i % 2000}-{i:09d}", f"train/{i % 2000}/{i:09d}.flac",
            " ".join(rng.choices(words, cum_weights=weights, k=34)), str(i % 2000), "train",
            int(SECONDS_AN_UTTERANCE * 16_000),
        )
        for i in range(n)
    ]  # fmt: skip


def plan_of(listed: list[Utterance], shard_mb: float = 256) -> pa.Table:
    return make_plan(listed, shuffle=True, seed=0, frame_bytes=1024, hop=320, padded_frames=None, shard_mb=shard_mb)


def prepare_plan(listed: list[Utterance]) -> pa.Table:
    """Do what every worker does with a listed source: identify it, plan it, compare the plan with it."""
    corpus_fingerprint(listed, "")
    table = plan_of(listed)
    planned = table.drop_columns(["shard", "row"]).to_pylist()
    corpus_fingerprint((Utterance(**row) for row in planned), "")
    return table


def measure_plan(n: int) -> dict[str, float]:
    """Return seconds, bytes of memory and bytes of plan.parquet per utterance, without listing the source."""
    prepare_plan(utterances(100))  # so that imports do not count
    tracemalloc.start()
    memory = prepare_plan(utterances(n)).nbytes + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    listed = utterances(n)
    begin = time.process_time()
    table = prepare_plan(listed)
    seconds = time.process_time() - begin
    size = len(parquet_bytes(table.cast(UTTERANCE_SCHEMA)))
    return {"plan_s": seconds / n, "memory": memory / n, "plan_bytes": size / n}


SPEC = FeatureSpec(
    family="whisper", tensors="0" * 64, frontend={"n_mels": 80}, layer=6, channels=512, hop=320,
    sampling_rate=16000, window="full30", overlap=0.0, trim="valid", dtype="float32", codec="f16",
)  # fmt: skip


def write_cache(folder: Path, shards: int, rows: int, frames: int) -> Layout:
    """Write real shards of ``rows`` utterances of ``frames`` frames."""
    layout, owner = Layout(folder), new_owner()
    listed = utterances(shards * rows)
    table = plan_of(listed).to_pydict()
    table["shard"] = [i // rows for i in range(len(listed))]
    table["row"] = [i % rows for i in range(len(listed))]
    plan = write_plan(layout, pa.table(table, schema=UTTERANCE_SCHEMA), owner)
    features = np.random.default_rng(0).standard_normal((frames, SPEC.channels), dtype=np.float32)
    for shard in range(shards):
        with ShardWriter(layout, shard, SPEC, plan.id, owner) as writer:
            for row in plan.shard_rows(shard):
                digest = hashlib.sha256(row["key"].encode()).hexdigest()
                writer.add(row, features, samples=frames * 320, audio_sha256=digest)
            writer.commit({"seconds": 1.0})
    return layout


def measure_shards(folder: Path, few: int, many: int) -> dict[str, float]:
    """Measure shards of 400 utterances: seconds and memory to merge, seconds per record read, bytes of the manifest."""
    found = []
    for n in (few, many):
        layout = write_cache(folder / f"{n}", n, 400, 1)
        plan = read_plan(layout)
        command = [sys.executable, __file__, "--merge", str(layout.path)]
        peak = float(subprocess.check_output(command, text=True)) * 2**20
        begin = time.process_time()
        for shard in range(n):
            commit_record(layout, shard, SPEC.feature_id, plan.id)
        look = time.process_time() - begin
        begin = time.process_time()
        finalize(layout, SPEC, plan, new_owner(), {})
        found.append((time.process_time() - begin, look / n, layout.manifest.stat().st_size, peak))
    merge = max(found[1][0] - found[0][0], 0.0) / (many - few)
    memory = max(found[1][3] - found[0][3], 0.0) / (400 * (many - few))
    return {
        "merge_s": merge,
        "merge_memory": memory,
        "look_s": found[1][1],
        "manifest_bytes": found[1][2] / (400 * many),
    }


def merge_alone(folder: Path) -> None:
    """Merge the shards of a cache in this process and print the peak memory in MiB."""
    layout = Layout(folder)
    finalize(layout, SPEC, read_plan(layout), new_owner(), {})
    print(order_scale.peak_mb())


def measure_verify(folder: Path, shards: int) -> dict[str, float]:
    """Return the seconds per gigabyte of a deep verification: every byte hashed, every member compared."""
    layout = write_cache(folder / "verified", shards, 100, 615)
    size = sum(layout.tar(shard).stat().st_size for shard in range(shards))
    finalize(layout, SPEC, read_plan(layout), new_owner(), {})
    begin = time.process_time()
    verify(layout.path, deep=True)
    return {"verify_s": (time.process_time() - begin) / (size / 1e9)}


def measure_order(folder: Path, rows: int) -> dict[str, float]:
    """Return seconds per manifest row to the first batch and to a restore at 80 %, and bytes of memory per row."""
    found = []
    for n in (rows // 4, rows):
        place = folder / f"order{n}"
        place.mkdir()
        order_scale.write(place, n, max(8, n // 400), 16_384)
        command = [sys.executable, order_scale.__file__, "--measure", str(place)]
        runs = [json.loads(subprocess.check_output([*command, part, "window"], text=True)) for part in ("0", "0.8")]
        found.append((runs[0]["cpu"], runs[1]["cpu"], (runs[0]["peak_mb"] - runs[0]["torch_mb"]) * 2**20))
    names = ("first_s", "restore_s", "trainer_memory")
    return {name: max(b - a, 0.0) / (rows - rows // 4) for name, a, b in zip(names, *found, strict=True)}


def measure_decode(clips: int) -> dict[str, float]:
    """Return the core seconds per hour of FLAC at 16 kHz."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.05, int(SECONDS_AN_UTTERANCE * 16_000)).astype(np.float32)
    soundfile.write(file, noise, 16_000, format="FLAC", subtype="PCM_16")
    begin = time.process_time()
    for _ in range(clips):
        decode(file.getvalue())
    return {"decode_s": (time.process_time() - begin) / (clips * SECONDS_AN_UTTERANCE / 3600)}


def human(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def gpu_hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.2f}"


def size_of(bytes_: float) -> str:
    unit = next((u for u in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if bytes_ >= u[0]), (1e3, "kB"))
    return f"{bytes_ / unit[0]:,.1f} {unit[1]}"


# label of a slope, its key in a measurement, and the factor to the printed unit
SLOPES = [
    ("plan, CPU us per utterance", "plan_s", 1e6),
    ("plan, bytes of memory per utterance", "memory", 1.0),
    ("plan.parquet, bytes per row", "plan_bytes", 1.0),
    ("read a commit record, CPU ms", "look_s", 1e3),
    ("merge, CPU ms per shard of 400 rows", "merge_s", 1e3),
    ("merge, bytes of memory per row", "merge_memory", 1.0),
    ("manifest.parquet, bytes per row", "manifest_bytes", 1.0),
    ("to the first batch, CPU s per million rows", "first_s", 1e6),
    ("restore at 80 %, CPU s per million rows", "restore_s", 1e6),
    ("trainer, bytes of memory per row", "trainer_memory", 1.0),
    ("verify --deep, CPU s per GB", "verify_s", 1.0),
    ("decode FLAC, core s per hour of audio", "decode_s", 1.0),
]


def table(m: dict[str, float]) -> list[tuple[str, ...]]:
    """Return one row per step and one column per corpus."""
    columns = []
    for name, hours, model in CORPORA:
        rows = hours * 3600 / SECONDS_AN_UTTERANCE
        bytes_ = hours * 3600 * 50 * model.channels * 2
        shards = max(1.0, bytes_ / SHARD)
        columns.append([
            f"{name}, {model.name}", f"{rows / 1e6:,.2f} M", size_of(bytes_), size_of(bytes_ / 2), f"{shards:,.0f}",
            gpu_hours(rows * model.flop_per_window / (H100 * SHARE) / 3600), human(m["decode_s"] * hours),
            human(m["plan_s"] * rows), size_of(m["memory"] * rows), size_of(m["plan_bytes"] * rows),
            human(m["look_s"] * shards), human(m["merge_s"] * rows / 400), size_of(m["merge_memory"] * rows),
            size_of(m["manifest_bytes"] * rows), human(m["first_s"] * rows), human(m["restore_s"] * rows),
            size_of(m["trainer_memory"] * rows), human(m["verify_s"] * bytes_ / 1e9),
        ])  # fmt: skip
    names = [
        "", "utterances", "features, f16", "features, int8", "shards of 256 MB", "H100 hours (estimate)",
        "decode FLAC, one core", "plan (each worker)", "plan: memory", "plan.parquet", "read the commit records",
        "merge", "merge: memory", "manifest.parquet", "trainer: to the first batch", "trainer: restore at 80 %",
        "trainer: memory per rank", "verify --deep, one process",
    ]  # fmt: skip
    return [(name, *(column[i] for column in columns)) for i, name in enumerate(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run with a tenth of every size")
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)  # a process of the measurement itself
    args = parser.parse_args()
    if args.merge:
        merge_alone(args.merge)
        return
    part = 10 if args.quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        m = measure_plan(25_000 // part)
        m |= measure_shards(folder, 4, 4 + 80 // part)
        m |= measure_verify(folder, 4 // min(part, 4))
        m |= measure_order(folder, 800_000 // part)
        m |= measure_decode(100 // part)
    for what, key, factor in SLOPES:
        print(f"{what:<42} {factor * m[key]:>10.4g}")
    print()
    lines = table(m)
    for i, line in enumerate(lines):
        print("| " + " | ".join(line) + " |")
        if i == 0:
            print("|---" * len(line) + "|")
    for model in (BASE, LARGE):
        print(f"{model.name}: {model.flop_per_window / 1e12:.3f} TFLOP per window of 30 s")
    for what, key in (("hold the plan", "memory"), ("merge the rows", "merge_memory")):
        most = WORKER_MEMORY / m[key]
        print(f"limit: {size_of(WORKER_MEMORY)} of memory can {what} of {most / 1e6:,.0f} M utterances, "
              f"{most * SECONDS_AN_UTTERANCE / 3600:,.0f} h of {SECONDS_AN_UTTERANCE} s each")  # fmt: skip


if __name__ == "__main__":
    main()
