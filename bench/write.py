"""Writing shards: MB/s of earshard's writer, webdataset's ShardWriter and the standard library's tarfile.

    python bench/write.py                       # 400 utterances of float16 [100 … 800, 512], 184 MB: a minute
    python bench/write.py --mb 1000 --fsync

All write the same float16 arrays as ``<key>.npy`` with a ``<key>.json``, in turn; the best round counts. ``add`` is
the time until the last member is written; earshard's includes a crc32 of every payload and nearly all of the tar's
sha256 (the peers compute neither). ``whole`` adds closing the file; earshard's includes reading the tar back, comparing
every byte by crc32, the rows in parquet and the commit record, which an extraction does while the next shard is
encoded. ``with codec`` starts from float32 features. Without ``--fsync``, no writer syncs. The last lines are the upper
bounds on this machine: one thread that only hashes or only writes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shards.commit.writer import ShardWriter
from shards.format.codec import Encoded
from shards.format.layout import Layout
from shards.format.records import utterance_json
from shards.format.spec import FeatureSpec

CHANNELS = 512
SPEC = FeatureSpec(
    family="whisper",
    tensors="0" * 64,
    frontend={"n_mels": 80},
    layer=6,
    channels=CHANNELS,
    hop=320,
    sampling_rate=16000,
    window="full30",
    overlap=4.0,
    trim="valid",
    dtype="bfloat16",
    codec="f16",
)
LABELS = {"text": "the text of an utterance, a line long " * 3, "speaker": "s", "split": "train"}
Timed = Callable[[Path], tuple[float, float]]  # folder -> seconds until all members are written, until it is closed


def utterances(mb: float) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return rows of a plan and their float16 features, ``mb`` MB in total."""
    rng = np.random.default_rng(0)
    made: list[tuple[dict[str, Any], np.ndarray]] = []
    left = mb * 1e6
    while left > 0:
        frames = int(rng.integers(100, 801))
        key = f"utt-{len(made):06d}"
        about = {"key": key, "id": key, "audio": f"{key}.flac", "samples": 320 * frames, "shard": 0, "row": len(made)}
        made.append((about, rng.standard_normal((frames, CHANNELS), np.float32).astype(np.float16)))
        left -= made[-1][1].nbytes
    return made


def ours(rows: list[tuple[dict[str, Any], np.ndarray]], codec: bool) -> Timed:
    wide = [(about, x.astype(np.float32)) for about, x in rows] if codec else rows

    def write(folder: Path) -> tuple[float, float]:
        layout = Layout(folder)
        layout.shards.mkdir()
        since = time.perf_counter()
        with ShardWriter(layout, 0, SPEC, "0" * 64, "bench") as writer:
            for about, x in wide:
                if codec:
                    writer.add(about, x, samples=about["samples"], audio_id=bytes(32), labels=LABELS)
                else:
                    writer.add_encoded(
                        about, Encoded(x, None, 0.0, 0.0), samples=about["samples"], audio_id=bytes(32), labels=LABELS
                    )
            added = time.perf_counter() - since
            writer.commit({})
        return added, time.perf_counter() - since

    return write


def described(rows: list[tuple[dict[str, Any], np.ndarray]]) -> list[tuple[str, bytes, np.ndarray]]:
    return [(about["key"], utterance_json({**about, "frames": len(x)}, LABELS, SPEC), x) for about, x in rows]


def webdataset_writer(rows: list[tuple[dict[str, Any], np.ndarray]]) -> Timed:
    import webdataset

    members = described(rows)

    def write(folder: Path) -> tuple[float, float]:
        since = time.perf_counter()
        pattern = str(folder / "%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=10**9, maxsize=10**13, verbose=0, mtime=0) as writer:
            for key, about, x in members:
                writer.write({"__key__": key, "npy": x, "json": about})
            added = time.perf_counter() - since
        sync(folder / "000000.tar")
        return added, time.perf_counter() - since

    return write


def tarfile_writer(rows: list[tuple[dict[str, Any], np.ndarray]]) -> Timed:
    members = described(rows)

    def write(folder: Path) -> tuple[float, float]:
        since = time.perf_counter()
        with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, about, x in members:
                buffer = io.BytesIO()
                np.save(buffer, x)
                for name, data in ((f"{key}.npy", buffer.getvalue()), (f"{key}.json", about)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            added = time.perf_counter() - since
        sync(folder / "000000.tar")
        return added, time.perf_counter() - since

    return write


def floors(folder: Path | None, mb: int = 256) -> dict[str, float]:
    """Return the MB/s of one thread that only hashes or only writes, best of three."""
    block = np.random.default_rng(0).bytes(1 << 20)

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(mb):
                file.write(block)

    def all_of(function: Callable[[bytes], object]) -> Callable[[], None]:
        return lambda: [function(block) for _ in range(mb)] and None

    sha256 = hashlib.sha256()
    steps = {"sha256 alone": all_of(sha256.update), "crc32 alone": all_of(zlib.crc32), "write alone": write}
    found = {}
    for name, step in steps.items():
        times = []
        for _ in range(3):
            since = time.perf_counter()
            step()
            times.append(time.perf_counter() - since)
        found[name] = mb * 1.048576 / min(times)
    return found


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=184, help="float16 payload of the shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fsync", action="store_true", help="sync every file (default: none)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    if not args.fsync:
        os.fsync = lambda fd: None

    rows = utterances(args.mb)
    mb = sum(x.nbytes for _, x in rows) / 1e6
    writers = {
        "earshard": ours(rows, codec=False),
        "earshard with codec": ours(rows, codec=True),
        "webdataset ShardWriter": webdataset_writer(rows),
        "tarfile": tarfile_writer(rows),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(args.rounds):
        for name, write in writers.items():
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                times[name].append(write(Path(folder)))
    print(f"{len(rows)} utterances, {mb:.0f} MB, {'with' if args.fsync else 'without'} fsync; {os.cpu_count()} CPUs, "
          f"load {os.getloadavg()[0]:.1f}; webdataset {version('webdataset')}, numpy {np.__version__}")  # fmt: skip
    print(f"{'MB/s':<24} {'add':>7} {'whole':>7}")
    for name, found in times.items():
        added, whole = (min(column) for column in zip(*found, strict=True))
        print(f"{name:<24} {mb / added:>7.0f} {mb / whole:>7.0f}")
    for name, rate in floors(args.folder).items():
        print(f"{name:<24} {rate:>7.0f}")


if __name__ == "__main__":
    main()
