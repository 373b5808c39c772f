"""Cost of corpora of a thousand to a million hours, extrapolated from slopes measured at a small scale.

    python bench/scale.py                 # ten minutes and 3 GB of temporary disk
    python bench/scale.py --quick         # a test with a tenth of every size

Measures the CPU seconds and bytes of each step per row, shard or gigabyte on this machine, and multiplies. CPU seconds
do not include other load; the time of a slow disk is not included either. Memory is the slope of the peak of RssAnon
between two sizes, each in a process of its own: pages that are mapped from files are not counted, because the kernel
can drop them. No encoder runs here: GPU hours are estimated from the encoder's FLOP count and a fraction of the GPU's
peak.
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
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import order_scale
import pyarrow as pa
import soundfile
from labels import status_mb
from ours import SPEC, plan_table

from pipeline.audio import decode
from pipeline.extract.audio_ids import AudioIndex, find_audio_ids
from pipeline.extract.listing import Listing, list_source
from pipeline.extract.plan import find_new, make_plan
from pipeline.extract.targets import LABEL_COLUMNS
from pipeline.sources import Source, Utterance
from pipeline.sources.selection import FilteredSource
from shards.commit.claims import new_owner
from shards.commit.finalize import commit_record, finalize, write_plan
from shards.commit.folder import add_labels
from shards.commit.writer import ShardWriter
from shards.format.layout import Layout, read_plan
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


class Corpus(Source):
    """Utterances as in LibriSpeech: 34 words each, drawn by Zipf's law from 20,000 words, and a few bytes of audio."""

    name = "corpus"

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def utterances(self) -> Iterator[Utterance]:
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(20_000)]
        weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
        for i in range(self._n):
            yield Utterance(
                "", f"{i % 2000}-{i:09d}", f"train/{i % 2000}/{i:09d}.flac",
                " ".join(rng.choices(words, cum_weights=weights, k=34)), str(i % 2000), "train",
                int(SECONDS_AN_UTTERANCE * 16_000),
            )  # fmt: skip

    def read_file(self, uri: str) -> bytes:
        return uri.encode()

    def tokens(self, uris: Sequence[str]) -> list[str]:
        return ["300000:1700000000000000000"] * len(uris)


class Peak(threading.Thread):
    """Samples the anonymous memory of this process (RssAnon: not what is mapped from files) within a context."""

    def __enter__(self) -> Peak:
        self.before, self.peak, self._done = status_mb("RssAnon"), 0.0, threading.Event()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, status_mb("RssAnon") - self.before)


def plan_alone(folder: Path, n: int, step: str) -> dict[str, float]:
    """Do in this process what every worker does with a source, without reading audio; measure one step of it.

    ``plan``: list, look up the audio ids of an earlier run, plan. ``grow``: find what a cache of all ``n`` lacks.
    ``labels``: write the label set.
    """
    source = FilteredSource(Corpus(n), name="corpus", val_fraction=0.02)
    index, layout, found = AudioIndex(folder / "index.parquet"), Layout(folder / "cache"), {}

    def listing_and_ids() -> tuple[Listing, pa.FixedSizeBinaryArray]:
        listing = list_source(source, folder)
        found["listed"] = time.process_time()
        return listing, find_audio_ids(source, listing, index)

    def plan(listing: Listing, ids: pa.FixedSizeBinaryArray) -> None:
        parts = make_plan(
            listing.table, np.arange(n), ids, shuffle=True, seed=0, frame_bytes=1024, hop=320, padded_frames=None,
            shard_mb=256,
        )  # fmt: skip
        write_plan(layout, 0, parts, new_owner())

    if step == "index":
        listing_and_ids()
        return {}
    if step == "plan":
        with Peak() as memory:
            plan(*listing_and_ids())
        seconds, size = time.process_time() - found["listed"], layout.plan(0).stat().st_size
        return {"seconds": seconds, "peak_mb": memory.peak, "size": size}
    listing, ids = listing_and_ids()
    begin = time.process_time()
    with Peak() as memory:
        if step == "grow":
            new, _ = find_new(listing.table["key"], ids, read_plan(layout.plan(0)).columns("key", "audio_id"))
            assert not new.any()
        else:
            entry = add_labels(layout, listing.table.select(["key", *LABEL_COLUMNS]), "source", "bench", reserved=True)
    size = entry.file.bytes if step == "labels" else 0
    return {"seconds": time.process_time() - begin, "peak_mb": memory.peak, "size": size}


def measure_plan(folder: Path, n: int) -> dict[str, float]:
    """Return seconds, bytes of memory and bytes of the files per utterance, without listing the source."""
    found: dict[str, list[dict[str, float]]] = {"index": [], "plan": [], "grow": [], "labels": []}
    for count in (n // 4, n):
        place = folder / f"plan{count}"
        place.mkdir()
        for step, runs in found.items():
            runs.append(alone("plan", str(place), str(count), step))
    more = n - n // 4
    slopes = {
        f"{step}_{name}": max(large[name] - small[name], 0.0) / more * (2**20 if name == "peak_mb" else 1)
        for step, (small, large) in found.items()
        for name in small
    }
    return slopes | {"plan_size": found["plan"][1]["size"] / n, "labels_size": found["labels"][1]["size"] / n}


def write_cache(folder: Path, shards: int, rows: int, frames: int) -> Layout:
    """Write real shards of ``rows`` utterances of ``frames`` frames."""
    layout, owner, n = Layout(folder), new_owner(), shards * rows
    keys = [f"{i % 2000}-{i:09d}" for i in range(n)]
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    audio = [f"train/{i % 2000}/{i:09d}.flac" for i in range(n)]
    table = plan_table(keys, audio, digests, np.full(n, frames), np.arange(n) // rows)
    plan = write_plan(layout, 0, [table], owner)
    features = np.random.default_rng(0).standard_normal((frames, SPEC.channels), dtype=np.float32)
    for shard in range(shards):
        with ShardWriter(layout, shard, SPEC, plan.id, owner) as writer:
            for row in plan.shard_rows(shard):
                writer.add(row, features, samples=frames * 320, audio_id=row["audio_id"])
            writer.commit({"seconds": 1.0})
    return layout


def measure_shards(folder: Path, few: int, many: int) -> dict[str, float]:
    """Measure shards of 400 utterances: seconds and memory to merge, seconds per record read, bytes of the manifest."""
    found = []
    for n in (few, many):
        layout = write_cache(folder / f"{n}", n, 400, 1)
        plan = read_plan(layout.plan(0))
        begin = time.process_time()
        for shard in range(n):
            commit_record(layout, shard, SPEC.feature_id, plan.id)
        found.append(alone("merge", str(layout.path)) | {"look": (time.process_time() - begin) / n})
    rows = 400 * (many - few)
    return {
        "merge_s": max(found[1]["seconds"] - found[0]["seconds"], 0.0) / (many - few),
        "merge_memory": max(found[1]["peak_mb"] - found[0]["peak_mb"], 0.0) * 2**20 / rows,
        "look_s": found[1]["look"],
        "manifest_bytes": found[1]["size"] / (400 * many),
    }


def merge_alone(folder: Path) -> dict[str, float]:
    """Merge the shards of a cache in this process."""
    layout = Layout(folder)
    begin = time.process_time()
    with Peak() as memory:
        finalize(layout, SPEC, 0, read_plan(layout.plan(0)), new_owner(), {})
    seconds, size = time.process_time() - begin, layout.manifest(0).stat().st_size
    return {"seconds": seconds, "peak_mb": memory.peak, "size": size}


def alone(*words: str) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    found: dict[str, float] = json.loads(subprocess.check_output([sys.executable, __file__, "--alone", *words]))
    return found


def measure_verify(folder: Path, shards: int) -> dict[str, float]:
    """Return the seconds per gigabyte of a deep verification: every byte hashed, every member compared."""
    layout = write_cache(folder / "verified", shards, 100, 615)
    size = sum(layout.tar(shard).stat().st_size for shard in range(shards))
    finalize(layout, SPEC, 0, read_plan(layout.plan(0)), new_owner(), {})
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
    ("plan, CPU us per utterance", "plan_seconds", 1e6),
    ("plan, bytes of memory per utterance", "plan_peak_mb", 1.0),
    ("plans/000.parquet, bytes per row", "plan_size", 1.0),
    ("find what is new, CPU us per utterance", "grow_seconds", 1e6),
    ("find what is new, bytes of memory", "grow_peak_mb", 1.0),
    ("label set, CPU us per row", "labels_seconds", 1e6),
    ("label set, bytes of memory per row", "labels_peak_mb", 1.0),
    ("label set, bytes of the file per row", "labels_size", 1.0),
    ("read a commit record, CPU ms", "look_s", 1e3),
    ("merge, CPU ms per shard of 400 rows", "merge_s", 1e3),
    ("merge, bytes of memory per row", "merge_memory", 1.0),
    ("manifests/000.parquet, bytes per row", "manifest_bytes", 1.0),
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
            human(m["plan_seconds"] * rows), size_of(m["plan_peak_mb"] * rows), size_of(m["plan_size"] * rows),
            human(m["labels_seconds"] * rows), size_of(m["labels_peak_mb"] * rows), size_of(m["labels_size"] * rows),
            human(m["grow_seconds"] * rows), size_of(m["grow_peak_mb"] * rows), human(m["look_s"] * shards),
            human(m["merge_s"] * rows / 400), size_of(m["merge_memory"] * rows), size_of(m["manifest_bytes"] * rows),
            human(m["first_s"] * rows), human(m["restore_s"] * rows), size_of(m["trainer_memory"] * rows),
            human(m["verify_s"] * bytes_ / 1e9),
        ])  # fmt: skip
    names = [
        "", "utterances", "features, f16", "features, int8", "shards of 256 MB", "H100 hours (estimate)",
        "decode FLAC, one core", "plan (each worker)", "plan: memory", "plan: file", "write a label set",
        "label set: memory", "label set: file", "find what is new", "find what is new: memory",
        "read the commit records", "merge", "merge: memory", "manifest: file", "trainer: to the first batch",
        "trainer: restore at 80 %", "trainer: memory per rank", "verify --deep, one process",
    ]  # fmt: skip
    return [(name, *(column[i] for column in columns)) for i, name in enumerate(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run with a tenth of every size")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)  # a process of the measurement itself
    args = parser.parse_args()
    if args.alone:
        step, place, *more = args.alone
        found = merge_alone(Path(place)) if step == "merge" else plan_alone(Path(place), int(more[0]), more[1])
        print(json.dumps(found))
        return
    part = 10 if args.quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        m = measure_plan(folder, 800_000 // part)
        m |= measure_shards(folder, 40, 40 + 400 // part)
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
    limits = (("hold the plan", "plan_peak_mb"), ("write the labels", "labels_peak_mb"),
              ("find what is new", "grow_peak_mb"), ("merge the rows", "merge_memory"))  # fmt: skip
    for what, key in limits:
        most = WORKER_MEMORY / max(m[key], 1.0)
        print(f"limit: {size_of(WORKER_MEMORY)} of memory can {what} of {most / 1e6:,.0f} M utterances, "
              f"{most * SECONDS_AN_UTTERANCE / 3600:,.0f} h of {SECONDS_AN_UTTERANCE} s each")  # fmt: skip


if __name__ == "__main__":
    main()
