"""Opening a cache with a label set of a million rows: seconds, and memory above an interpreter with the same imports.

    python bench/labels.py                        # a million rows: about three minutes, 0.5 GB of temporary disk
    python bench/labels.py --rows 100000 --repeats 1

Writes a cache without payload whose utterances are as in LibriSpeech (34 words each, drawn by Zipf's law), and its
labels as a set of the cache, a CSV file, JSON lines and a parquet file, each with the rows in the order of the keys and
shuffled. Each is opened with ``Cache.open(path, labels=…)`` in a new process. ``CPU s`` counts all threads. ``peak`` is
the largest resident memory (VmHWM) less that before opening; ``held`` is what remains when the cache is open.
``written`` is the time to store the set in the cache, as ``python -m shards label`` does. There is no peer: no other
format joins a hash-checked label table to stored features.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import order_scale

SECONDS, MEGABYTES = 3.0, 500.0  # targets at a million rows


def table(rows: int) -> Any:
    """Return ``key``, ``text``, ``speaker`` and ``split`` of the utterances that ``order_scale.write`` writes."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(20_000)]
    odds = np.cumsum(1 / np.arange(1, len(words) + 1))
    texts: list[str] = []
    while len(texts) < rows:
        drawn = np.searchsorted(odds, rng.random((min(10_000, rows - len(texts)), 34)) * odds[-1])
        texts += [" ".join(map(words.__getitem__, line)) for line in drawn.tolist()]
    keys = [f"utterance-{i:09d}" for i in range(rows)]
    speakers = [f"{i % 2000}" for i in range(rows)]
    return pa.table({"key": keys, "text": texts, "speaker": speakers, "split": ["train"] * rows})


def write_files(folder: Path, rows: int, cache: Path) -> list[tuple[str, str]]:
    """Write the labels in every form; return a description and the argument ``labels`` of each, and print the times."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    from shards.commit.folder import add_labels
    from shards.format.layout import Layout

    ordered, found = table(rows), []
    shuffled = ordered.take(pa.array(np.random.default_rng(1).permutation(rows)))
    print(f"{rows:,} rows, {ordered.nbytes / 1e6:.0f} MB of text; Python {platform.python_version()}, pyarrow "
          f"{pa.__version__}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, labels in (("sorted", ordered), ("shuffled", shuffled)):
        since, used = time.perf_counter(), time.process_time()
        add_labels(Layout(cache), labels, name, "bench")
        print(f"written, {name:<12} {time.perf_counter() - since:6.2f} s, {time.process_time() - used:6.2f} CPU s")
        if name == "sorted":  # both are the same set
            found.append(("set of the cache", name))
        place = folder / name
        pa_csv.write_csv(labels, f"{place}.csv")
        pq.write_table(labels, f"{place}.parquet")
        with open(f"{place}.jsonl", "w", encoding="utf-8") as file:
            for batch in labels.to_batches(10_000):
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
        found += [(f"{kind}, {name}", f"{place}.{kind}") for kind in ("csv", "jsonl", "parquet")]
    return found


def measure(cache: str, labels: str) -> dict[str, float]:
    """Open the cache in this process."""
    import pyarrow as pa

    from shards.read.cache import Cache

    pa.array([0])  # imports pandas if it is installed
    before = status_mb("VmRSS")
    since, used = time.perf_counter(), time.process_time()
    opened = Cache.open(cache, labels)
    seconds, cpu = time.perf_counter() - since, time.process_time() - used
    held = status_mb("VmRSS") - before
    assert len(opened) == len(opened.labels.table)
    return {"seconds": seconds, "cpu": cpu, "peak": status_mb("VmHWM") - before, "held": held}


def status_mb(name: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="processes; the fastest counts")
    parser.add_argument("--only", default="", help="only forms whose names contain this text")
    parser.add_argument("--folder", help="folder for temporary data")
    parser.add_argument("--measure", nargs=2, metavar=("CACHE", "LABELS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        cache = Path(name) / "cache"
        cache.mkdir()
        order_scale.write(cache, args.rows, max(args.rows // 500, 1), 16_384)
        forms = write_files(Path(name), args.rows, cache)
        print(f"{'opened with':<20} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {'held MiB':>9}")
        for label, labels in forms:
            if args.only not in label:
                continue
            command = [sys.executable, __file__, "--measure", str(cache), labels]
            runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(args.repeats)]
            best = {key: min(run[key] for run in runs) for key in runs[0]}
            missed = best["seconds"] > SECONDS or best["peak"] > MEGABYTES
            print(f"{label:<20} {best['seconds']:8.2f} {best['cpu']:8.2f} {best['peak']:9.0f} {best['held']:9.0f}"
                  f"{'   misses the target' * missed}", flush=True)  # fmt: skip
    print(f"(target at a million rows: below {SECONDS:g} s and {MEGABYTES:g} MiB)")


if __name__ == "__main__":
    main()
