"""Is a cache worth its bytes? Reading, measured now, against encoding again, measured when the cache was made.

    python -m shards info CACHE

In: a complete cache. Out: :class:`Worth`, and the sentence that tells it. An epoch without a cache costs the encoder's
time (decoding and all else runs beside it, so this favours encoding); an epoch with one costs its reading; the cache
itself has cost the whole extraction once. Epochs count over all experiments that share the cache.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import open_file
from shards.format.codec import STORED_DTYPE, Array
from shards.format.layout import Layout
from shards.read.cache import Cache

SAMPLE = 64 << 20  # bytes of tars that are read to measure, at most
PATIENCE = 1.0  # seconds after which the measurement ends


@dataclass(frozen=True, slots=True)
class Worth:
    """Seconds are of this cache's whole content.

    Attributes:
        spent: of the extraction, all shards, encoder and all.
        encoding: the encoder's part of it; 0 when the cache does not record it.
        reading: one epoch read from shards into a buffer by one thread, from the rate of a sample.
        rate: of that sample, stored bytes of features a second.
        epochs: from this epoch on, over all experiments, the cache has saved time; None when it never does.
    """

    spent: float
    encoding: float
    reading: float
    rate: float
    epochs: int | None


def break_even(spent: float, encoding: float, reading: float) -> int | None:
    """The first whole number of epochs n with ``spent + n × reading < n × encoding``; None when there is none."""
    saved = encoding - reading
    return math.floor(spent / saved) + 1 if saved > 0 and spent / saved < 1e9 else None


def measure(cache: Cache, seed: int = 0) -> Worth:
    """Read shards drawn by ``seed``, at most 64 MB or a second of them, and put the cache's own timings beside it.

    ``cache`` should be freshly opened: rows that were read before are in memory.

    Raises:
        UserError: a row that was read is not sound.
    """
    stored = cache.frames.astype(np.int64) * (cache.spec.channels * STORED_DTYPE[cache.spec.codec].itemsize)
    chosen, size = [], 0
    for place in np.random.default_rng(seed).permutation(len(cache.bounds) - 1).tolist():
        if size >= SAMPLE:
            break
        rows = range(int(cache.bounds[place]), int(cache.bounds[place + 1]))
        chosen.append(rows)
        size += int(stored[rows.start : rows.stop].sum())
    rate = _rate(cache, chosen, stored)
    spent, encoding = (_seconds(cache.info, name) for name in ("seconds", "encode_seconds"))
    reading = float(stored.sum()) / rate
    return Worth(spent, encoding, reading, rate, break_even(spent, encoding, reading) if encoding else None)


def _rate(cache: Cache, chosen: list[range], stored: Array) -> float:
    """Bytes of features a second, from the files into one buffer, one thread."""
    longest = int(cache.frames.max(initial=1))
    out = np.empty((longest, cache.spec.channels), np.float16 if cache.spec.codec == "f16" else np.float32)
    for rows in chosen:
        _forget(Layout(cache.path).tar(cache.shard_of(rows.start)))
    size, started = 0, time.perf_counter()
    for row in chain(*chosen):
        cache.read_into(row, out[: cache.frames.item(row)])
        size += int(stored[row])
        if size >= SAMPLE or time.perf_counter() - started > PATIENCE:
            break
    return max(size, 1) / max(time.perf_counter() - started, 1e-9)


def _forget(path: Path) -> None:
    """Ask the system to drop the file from its page cache, as an epoch finds most files of a large cache."""
    try:
        with open_file(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except (OSError, AttributeError):  # AttributeError: macOS has no such call
        return


def _seconds(info: dict[str, Any], name: str) -> float:
    value = info.get(name)  # caches of before have no encode_seconds
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def sentence(worth: Worth) -> str:
    """Whether the cache pays, and from when on, for people."""
    read = f"reading takes {_time(worth.reading)} an epoch ({worth.rate / 1e6:,.0f} MB/s measured now)"
    if not worth.encoding:
        return f"{read}; the encoder's time is not recorded, so whether the cache pays is not known"
    told = f"{read}, encoding again {_time(worth.encoding)}"
    if worth.epochs is None:
        return f"{told}: the cache does not pay, encode on the fly or read from a faster disk"
    return f"{told}: the cache pays from epoch {worth.epochs:,} on, counted over all experiments"


def _time(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
