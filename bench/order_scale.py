"""Time and memory to the first batch, and to a restore at 80 % of an epoch, with 10 million rows in 20,000 shards.

    python bench/order_scale.py                                   # two minutes, 1 GB of temporary disk
    python bench/order_scale.py --rows 100000 --shards 200        # a small run

Writes a cache folder without payload (CACHE.json, manifest and label set, as the extraction would), then measures in a
new process each time: opening the cache, the stream over it, the rows, keys and texts of the batch. The import of torch
is reported separately. The cost of a batch's strings depends on the size of the manifest's row groups: see ``--group``.
A quarter of the rows is measured as well; the slope between the two sizes extrapolates to 100 million rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

WORDS = ["the", "of", "and", "to", "in", "he", "was", "that", "his", "with", "had", "as", "for", "at", "not", "said"]
REPEATS = 3  # processes; the one with the median time is reported


def write(folder: Path, rows: int, shards: int, group: int) -> None:
    from shards.commit.folder import add_labels
    from shards.files import file_sha256
    from shards.format.layout import Layout
    from shards.format.records import seal
    from shards.format.spec import SCHEMA_VERSION, FeatureSpec

    spec = FeatureSpec(
        family="whisper", tensors="0" * 64, frontend={"n_mels": 80}, layer=6, channels=512, hop=320,
        sampling_rate=16000, window="full30", overlap=0.0, trim="valid", dtype="float32", codec="f16",
    )  # fmt: skip
    layout = Layout(folder)
    for part in layout.folders:
        part.mkdir(exist_ok=True)
    manifest = layout.manifest(0)
    write_manifest(manifest, rows, shards, group)
    written = {"bytes": manifest.stat().st_size, "sha256": file_sha256(manifest)}
    nothing = {"bytes": 0, "sha256": "0" * 64}
    counts = {"utterances": rows, "shards": shards}
    generation = {
        "plan_id": "0" * 64, "manifest_id": "0" * 64, "first_shard": 0, "shards": shards, "counts": counts,
        "files": {"plan": nothing, "manifest": written, "failures": nothing}, "provenance": {},
    }  # fmt: skip
    info = {
        "schema_version": SCHEMA_VERSION,
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "generations": [generation],
        "counts": counts,
    }
    layout.cache.write_bytes(seal(info))
    with tempfile.TemporaryFile(dir=folder) as file:
        add_labels(layout, labels(rows, file), "source", "bench", reserved=True)


def write_manifest(path: Path, rows: int, shards: int, group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.format.schemas import MANIFEST_SCHEMA

    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd", store_schema=False) as writer:
        for start in range(0, rows, group):
            place = np.arange(start, min(start + group, rows))
            frames = ((2 + 15 * rng.beta(2.5, 0.9, len(place))) * 50).astype(np.int32)
            length = frames.astype(np.int64) * 1024 + 128
            names = [f"utterance-{i:09d}" for i in place.tolist()]
            columns = {
                "key": names, "id": names, "audio": names, "samples": frames.astype(np.int64) * 320,
                "audio_id": pa.array([rng.bytes(32) for _ in names], pa.binary(32)),
                "shard": (place * shards // rows).astype(np.int32), "row": np.zeros(len(place), np.int32),
                "frames": frames, "offset": np.cumsum(length) - length, "length": length,
                "scale_offset": np.full(len(place), -1), "scale_length": np.zeros(len(place), np.int64),
                "crc32": rng.integers(0, 2**32, len(place), dtype=np.uint32),
                "error": np.zeros(len(place), np.float32),
            }  # fmt: skip
            writer.write_table(pa.table(columns, schema=MANIFEST_SCHEMA))


def labels(rows: int, file: IO[bytes]) -> Any:
    """Return the labels of :func:`write_manifest`'s keys as a table that is mapped from ``file``."""
    import pyarrow as pa

    rng, batch = np.random.default_rng(0), 1 << 16
    texts = pa.array([" ".join(rng.choice(WORDS, size=35)) for _ in range(5000)])
    schema = pa.schema([(name, pa.string()) for name in ("key", "text", "speaker", "split")])
    with pa.ipc.new_file(file, schema) as writer:
        for start in range(0, rows, batch):
            names = [f"utterance-{i:09d}" for i in range(start, min(start + batch, rows))]
            drawn, empty = texts.take(pa.array(rng.integers(0, 5000, len(names)))), pa.repeat("", len(names))
            writer.write_batch(pa.record_batch([pa.array(names), drawn, empty, empty], schema=schema))
    file.flush()
    return pa.ipc.open_file(pa.memory_map(f"/proc/self/fd/{file.fileno()}")).read_all()


def peak_mb() -> float:
    """Return the peak resident memory of this process in MiB; ``ru_maxrss`` would include the parent's before exec."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(folder: Path, part: float, shuffle: str) -> dict[str, float]:
    import pyarrow as pa
    import torch  # noqa: F401  (the import must not be timed)

    from shards.read.cache import Cache
    from shards.stream.iterable_dataset import FeatureStream
    from shards.stream.sampler import SamplerConfig, SamplerState

    pa.array([0])  # imports pandas if it is installed
    before = peak_mb()
    begin, cpu = time.perf_counter(), time.process_time()
    cache = Cache.open(folder)
    opened = time.perf_counter()
    stream = FeatureStream([cache], SamplerConfig(batch_size=64, shuffle=shuffle), seed=1)  # type: ignore[arg-type]
    at = SamplerState(0, int(part * stream.batch_sampler.num_windows), 3 if part else 0, 1_000_000 if part else 0)
    stream.load_state_dict({**stream.state_dict(), **{name: getattr(at, name) for name in at.__slots__}})
    rows, _, _ = next(stream.batch_sampler.iter_batches(at))
    ordered = time.perf_counter()
    cache.strings("key", rows)
    cache.strings("text", rows)
    end = time.perf_counter()
    return {
        "open": opened - begin,
        "order": ordered - opened,
        "strings": end - ordered,
        "total": end - begin,
        "cpu": time.process_time() - cpu,
        "peak_mb": peak_mb(),
        "torch_mb": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--group", type=int, default=16_384, help="rows per row group of the manifest")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "PART", "SHUFFLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, part, shuffle = arguments.measure
        print(json.dumps(measure(Path(folder), float(part), shuffle)))
        return
    whole, part = (table(arguments.rows // n, max(arguments.shards // n, 1), arguments.group) for n in (1, 4))
    print("extrapolated to 100 million rows:")
    for label, large in whole.items():
        small, grown = part[label], arguments.rows - arguments.rows // 4
        seconds, megabytes = (
            large[name] + (large[name] - small[name]) * (100_000_000 - arguments.rows) / grown
            for name in ("total", "peak_mb")
        )
        print(f"{label:34}{seconds:9.1f} s{megabytes:9.0f} MB")


def table(rows: int, shards: int, group: int) -> dict[str, dict[str, float]]:
    """Write a cache of ``rows`` rows; print and return the cost of each start."""
    measured = {}
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        write(Path(name), rows, shards, group)
        size, texts = (sum(path.stat().st_size for path in Path(name).glob(pattern)) / 1e6
                       for pattern in ("manifests/*", "labels/*"))  # fmt: skip
        print(f"{rows:,} rows, {shards:,} shards: manifest of {size:.0f} MB, label set of {texts:.0f} MB, "
              f"written in {time.perf_counter() - begin:.0f} s")  # fmt: skip
        print(f"{'':34}{'open s':>9}{'order s':>9}{'strings s':>11}{'total s':>9}{'peak MB':>9}{'torch alone':>13}")
        for shuffle, part in (("window", 0.0), ("window", 0.8), ("global", 0.0)):
            command = [sys.executable, __file__, "--measure", name, str(part), shuffle]
            runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(REPEATS)]
            found = sorted(runs, key=lambda run: float(run["total"]))[REPEATS // 2]
            label = f"shuffle={shuffle}, " + (f"restore at {part:.0%}" if part else "first batch")
            print(f"{label:34}{found['open']:9.2f}{found['order']:9.2f}{found['strings']:11.2f}{found['total']:9.2f}"
                  f"{found['peak_mb']:9.0f}{found['torch_mb']:13.0f}", flush=True)  # fmt: skip
            measured[label] = found
    return measured


if __name__ == "__main__":
    main()
