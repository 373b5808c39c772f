"""Payload MB/s as tensors and as padded batches of 16, for earshard and its peers; warm page cache, medians.

    make bench                                             # the peers in a separate venv; also runs resume.py
    python bench/read.py --megabytes 300 --repeats 1       # a small run; libraries that are not installed are listed

The last column divides by CPU seconds, workers included: it does not depend on other load, and shows how much CPU time
is left for the training step. A tensor counts when one byte of each of its pages has been read, because some libraries
return views that have not been read. Ceilings: ``cat`` of the tars, and memcpy of the same rows into the same padded
buffers. ``--cold`` compares bucketed reading with sequential reading of the same tars, after dropping their pages.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from ours import BATCH, CHANNELS, Earshard, FirstEpoch, write_cache
from peers import PEERS, LitDataBucketed

LEGEND = """\
earshard: two threads; batches grouped by length, shuffled over 8 shards, with keys, texts and a resumable state. It
checks the crc32 of each row the first time a process reads it: 'first epoch' includes that, opening and mapping;
'earshard' is a later epoch. Peers check no checksum of the payload and return consecutive rows in stored order,
unshuffled ('LitData, by length': earshard's batches by random access). memcpy: the same rows from memory into as many
padded buffers, in turn, as earshard uses; one buffer per thread stays in the processor's cache."""


def touched(tensors: Iterator[Any]) -> int:
    """Read one byte of every page; return the payload bytes."""
    total = 0
    for tensor in tensors:
        array = tensor.numpy()
        array.reshape(-1).view(np.uint8)[::4096].sum()
        total += len(array) * CHANNELS * 2
    return total


def median(work: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Return the MB/s of ``work``, which returns its payload bytes, per wall-clock second and per CPU second."""
    rates = []
    for _ in range(repeats + 1):
        begin, used = time.perf_counter(), os.times()
        size = work()
        spent = sum(os.times()[:4]) - sum(used[:4])  # this process and finished workers
        rates.append((size / 1e6 / (time.perf_counter() - begin), size / 1e6 / max(spent, 0.01)))
    clock, processor = zip(*rates[1:], strict=True)
    return statistics.median(clock), statistics.median(processor)


def cat(urls: list[str]) -> int:
    with open(os.devnull, "wb") as sink:
        # through a pipe, because cat may not copy at all to /dev/null
        first = subprocess.Popen(["cat", *urls], stdout=subprocess.PIPE)
        subprocess.run(["dd", "of=/dev/null", "bs=1M"], stdin=first.stdout, stderr=sink, check=True)
        first.wait()
    return sum(os.path.getsize(url) for url in urls)


def memcpy(ours: Earshard, threads: int, buffers: int) -> Callable[[], int]:
    """Return a function that copies rows in memory into padded buffers, used in turn, in earshard's batches."""
    rows = [np.array(row) for row in ours.rows()]
    stream = ours.stream()
    batches = [batch.tolist() for batch, _, _ in stream.batch_sampler.iter_batches(stream._sampler_state, 1)]
    longest = max(len(batch) * max(len(rows[i]) for i in batch) for batch in batches)
    room = [np.ones((longest, CHANNELS), np.float16) for _ in range(buffers)]

    def fill(number: int) -> int:
        batch, buffer = batches[number], room[number % buffers]
        width, size = max(len(rows[i]) for i in batch), 0
        for place, i in enumerate(batch):
            slot = buffer[place * width : (place + 1) * width]
            slot[: len(rows[i])] = rows[i]
            slot[len(rows[i]) :] = 0
            size += rows[i].nbytes
        return size

    def work() -> int:
        if threads == 1:
            return sum(map(fill, range(len(batches))))
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(fill, range(len(batches))))

    return work


def drop(urls: list[str]) -> None:
    """Drop the pages of these files from the page cache."""
    for url in urls:
        fd = os.open(url, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cold(kind: str, ours: FirstEpoch) -> float:
    """Return the MB/s of one read after dropping the pages; run it in a process that has mapped no shard."""
    buffer = bytearray(4 << 20)
    stream, size = ours.stream(), 0  # the manifest is read, but no shard is mapped
    drop(ours.urls())
    begin = time.perf_counter()
    if kind == "bucketed":
        size = sum(int(batch.lengths.sum()) * CHANNELS * 2 for batch in stream)
    else:
        for url in ours.urls():
            with open(url, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    size += count
    return size / 1e6 / (time.perf_counter() - begin)


def compare_cold(cache: Path, repeats: int) -> None:
    rates: dict[str, list[float]] = {"sequential": [], "bucketed": []}
    for _ in range(max(repeats, 1)):
        for kind, found in rates.items():
            command = [sys.executable, __file__, "--measure-cold", kind, str(cache)]
            found.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    one, other = (statistics.median(found) for found in rates.values())
    print(f"cold cache: sequential read {one:,.0f} MB/s, bucketed padded batches {other:,.0f} MB/s: "
          f"ratio {other / one:.2f} (target ≥ 0.9)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only peers whose names contain this text")
    parser.add_argument("--cold", action="store_true", help="also measure with a cold page cache")
    parser.add_argument("--folder", default=None, help="folder for temporary data")
    parser.add_argument("--measure-cold", nargs=2, metavar=("KIND", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_cold:
        kind, cache = arguments.measure_cold
        print(cold(kind, FirstEpoch(Path(cache), Path(cache))))
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        cache = write_cache(Path(name) / "cache", arguments.megabytes)
        ours, rates, absent = Earshard(cache, Path(name)), {}, []
        print(f"{arguments.megabytes} MB of float16 [100…800, {CHANNELS}], {len(ours.urls())} shards, batches of "
              f"{BATCH}; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
              f"medians of {arguments.repeats}")  # fmt: skip
        if arguments.cold:  # before anything here maps the tars: mapped pages cannot be dropped
            compare_cold(cache, arguments.repeats)
        print(f"{'payload MB/s':32}{'tensors':>10}{'padded':>10}{'padded, MB per CPU s':>24}")
        print(f"{'cat':32}{median(lambda: cat(ours.urls()), arguments.repeats)[0]:10,.0f}", flush=True)
        used = len({features.data_ptr() for features, _ in ours.batches()})
        for threads, buffers in ((1, 1), (1, used), (2, 2), (2, used)):
            label = f"memcpy, {threads} thread{'s' * (threads > 1)}, {buffers} buffer{'s' * (buffers > 1)}"
            clock, processor = rates[label] = median(memcpy(ours, threads, buffers), arguments.repeats)
            print(f"{label:32}{'':10}{clock:10,.0f}{processor:24,.0f}", flush=True)
        for kind in PEERS:
            if arguments.only.lower() not in kind.label.lower():
                continue
            if kind.version() is None:
                absent.append(kind.label)
                continue
            folder = Path(name) / ("LitData" if kind is LitDataBucketed else kind.label)
            prepared = folder.exists()
            folder.mkdir(exist_ok=True)
            try:
                peer = kind(cache, folder)
                if not prepared:
                    peer.prepare()
                tensors = median(lambda: touched(peer.tensors()), arguments.repeats)  # noqa: B023
                rates[kind.label] = median(lambda: sum(size for _, size in peer.batches()), arguments.repeats)  # noqa: B023
            except Exception:  # report a peer that fails, and measure the others
                print(f"{kind.label} {kind.version()} failed: {traceback.format_exc(limit=-1).splitlines()[-1]}")
                continue
            label = f"{kind.label} {kind.version() if kind.package != 'earshard' else ''}"
            clock, processor = rates[kind.label]
            print(f"{label:32}{tensors[0]:10,.0f}{clock:10,.0f}{processor:24,.0f}", flush=True)
        for label in absent:
            print(f"{label:32}{'not installed':>20}")
        print(LEGEND)
        if "earshard" in rates:
            compare(rates, used)


def compare(rates: dict[str, tuple[float, float]], buffers: int) -> None:
    """Print the ratios that have targets, by wall-clock and by CPU seconds."""
    pairs = [("webdataset", 12.0), ("webdataset, 2 workers", 12.0), ("LitData", 3.0), ("LitData, by length", None)]
    pairs += [(f"memcpy, 2 threads, {buffers} buffers", 0.7), ("memcpy, 1 thread, 1 buffer", None)]
    for label, aim in pairs:
        if label in rates:
            target = f" (target ≥ {aim})" if aim else ""
            clock, processor = (rates["earshard"][i] / rates[label][i] for i in range(2))
            print(f"earshard's padded batches / {label}: {clock:.2f}{target}, by CPU seconds {processor:.2f}")


if __name__ == "__main__":
    main()
