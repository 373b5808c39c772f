"""Time and memory to the first batch, and to a restore at 80 % of an epoch, with 10 million rows in 20,000 shards.

    python bench/order_scale.py                                   # two minutes, 1 GB of temporary disk
    python bench/order_scale.py --rows 100000 --shards 200        # a small run

Writes a cache folder without payload (CACHE.json and manifest.parquet, as the extraction would), then measures in a
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

import numpy as np

REPEATS = 3  # processes; the one with the median time is reported


def write(folder: Path, rows: int, shards: int, group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.files import file_sha256
    from shards.format.layout import MANIFEST_SCHEMA, Layout
    from shards.format.records import seal
    from shards.format.spec import FeatureSpec

    spec = FeatureSpec(
        family="whisper", tensors="0" * 64, frontend={"n_mels": 80}, layer=6, channels=512, hop=320,
        sampling_rate=16000, window="full30", overlap=0.0, trim="valid", dtype="float32", codec="f16",
    )  # fmt: skip
    layout, rng = Layout(folder), np.random.default_rng(0)
    words = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "he",
        "was",
        "that",
        "his",
        "with",
        "had",
        "as",
        "for",
        "at",
        "not",
        "said",
    ]
    texts = [" ".join(rng.choice(words, size=35)) for _ in range(5000)]
    with pq.ParquetWriter(layout.manifest, MANIFEST_SCHEMA, compression="zstd", store_schema=False) as writer:
        for start in range(0, rows, group):
            place = np.arange(start, min(start + group, rows))
            shard = place * shards // rows
            frames = ((2 + 15 * rng.beta(2.5, 0.9, len(place))) * 50).astype(np.int32)
            length = frames.astype(np.int64) * 1024 + 128
            offset = np.cumsum(length) - length
            keys = [f"utterance-{i:09d}" for i in place.tolist()]
            empty = pa.array([""] * len(place))
            columns = {
                "key": keys, "id": keys, "audio": keys, "samples": frames.astype(np.int64) * 320,
                "text": [texts[i] for i in rng.integers(0, 5000, len(place))], "speaker": empty, "split": empty,
                "shard": shard.astype(np.int32), "row": np.zeros(len(place), np.int32), "frames": frames,
                "codec": ["f16"] * len(place), "offset": offset, "length": length,
                "scale_offset": np.full(len(place), -1), "scale_length": np.zeros(len(place), np.int64),
                "crc32": rng.integers(0, 2**32, len(place), dtype=np.uint32),
                "error": np.zeros(len(place), np.float32), "audio_sha256": empty,
            }  # fmt: skip
            writer.write_table(pa.table(columns, schema=MANIFEST_SCHEMA))
    written = {"bytes": layout.manifest.stat().st_size, "sha256": file_sha256(layout.manifest)}
    info = {
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "manifest_id": "0" * 64,
        "files": {layout.manifest.name: written},
        "counts": {"utterances": rows},
    }
    layout.cache.write_bytes(seal(info))


def peak_mb() -> float:
    """Return the peak resident memory of this process in MiB; ``ru_maxrss`` would include the parent's before exec."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(folder: Path, part: float, shuffle: str) -> dict[str, float]:
    import torch  # noqa: F401  (the import must not be timed)

    from shards.read.cache import Cache
    from shards.stream.iterable_dataset import FeatureStream
    from shards.stream.sampler import SamplerConfig, SamplerState

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
        size = (Path(name) / "manifest.parquet").stat().st_size
        print(f"{rows:,} rows, {shards:,} shards: manifest of {size / 1e6:.0f} MB, "
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
