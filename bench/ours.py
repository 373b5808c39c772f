"""Data for the reader benchmarks, the interface of a measured library, and earshard's implementation of it.

:func:`write_cache` writes the data. :class:`Peer` is what ``bench/read.py`` and ``bench/resume.py`` require of a
library; earshard's subclasses are here, the others in ``bench/peers.py``. Payload is counted as the float16 bytes of
valid frames, regardless of the dtype that a library returns.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.format.layout import Layout
from shards.format.spec import FeatureSpec

CHANNELS, BATCH, SHARD_MB = 512, 16, 64


SPEC = FeatureSpec(
    family="whisper", tensors="0" * 64, frontend={"n_mels": 80}, layer=6, channels=CHANNELS, hop=320,
    sampling_rate=16000, window="full30", overlap=0.0, trim="valid", dtype="float32", codec="f16",
)  # fmt: skip
TEXT = "a sentence of about the usual length that nobody reads"


def write_cache(folder: Path, megabytes: int) -> Path:
    """Write a cache of random features of 100 to 800 frames with the real writer; lengths are as in LibriSpeech."""
    rng = np.random.default_rng(0)
    count = megabytes * 1_000_000 // (2 * CHANNELS * 620)
    frames = ((2 + 14 * rng.beta(2.5, 0.9, count)) * 50).astype(int)
    keys = [f"utterance-{i:06d}" for i in range(count)]
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    shards = np.cumsum(frames) * 2 * CHANNELS // (SHARD_MB * 1_000_000)
    write_features(folder, plan_table(keys, [f"{i}.flac" for i in range(count)], digests, frames, shards))
    return folder


def plan_table(keys: list[str], audio: list[str], digests: list[bytes], frames: Any, shards: Any) -> Any:
    """Return a plan (``PLAN_SCHEMA``) of utterances with these audio ids, lengths and shards (ascending from 0)."""
    import pyarrow as pa

    from shards.format.schemas import PLAN_SCHEMA

    columns = {
        "key": keys, "id": keys, "audio": audio, "samples": np.asarray(frames, np.int64) * 320, "audio_id": digests,
        "shard": np.asarray(shards, np.int32), "row": (np.arange(len(keys)) - np.searchsorted(shards, shards)),
    }  # fmt: skip
    return pa.table({**columns, "row": columns["row"].astype(np.int32)}, schema=PLAN_SCHEMA)


def write_features(folder: Path, table: Any, spec: FeatureSpec = SPEC, text: str = TEXT) -> Layout:
    """Write and finalize generation 0 of a cache: its plan ``table``, random features, and ``text`` for every key."""
    import pyarrow as pa

    from shards.commit.claims import new_owner
    from shards.commit.finalize import finalize, write_plan
    from shards.commit.folder import add_labels
    from shards.commit.writer import ShardWriter

    layout, owner = Layout(folder), new_owner()
    plan = write_plan(layout, 0, [table], owner)
    empty = pa.repeat("", len(table))
    labels = {"key": table["key"], "text": pa.repeat(text, len(table)), "speaker": empty, "split": empty}
    add_labels(layout, pa.table(labels), "source", "bench", reserved=True)
    longest = int(plan.samples.max()) // 320
    noise = np.random.default_rng(0).standard_normal((longest, spec.channels), dtype=np.float32)
    for shard in plan.shards:
        with ShardWriter(layout, shard, spec, plan.id, owner) as writer:
            for row in plan.shard_rows(shard):
                features = noise[: row["samples"] // 320]
                writer.add(row, features, samples=row["samples"], audio_id=row["audio_id"], labels={"text": text})
            writer.commit({"seconds": 0.0})
    finalize(layout, spec, 0, plan, owner, {})
    return layout


def pad(arrays: list[Any]) -> torch.Tensor:
    tensors = [torch.as_tensor(array) for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def payload(arrays: list[Any]) -> int:
    return sum(len(array) for array in arrays) * CHANNELS * 2


def batched(arrays: Iterator[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    while part := list(islice(arrays, BATCH)):
        yield pad(part), payload(part)


class Peer:
    """A library: ``prepare`` stores the rows, ``tensors`` yields each, ``batches`` yields (padded, payload bytes)."""

    label = ""
    package = ""  # the distribution that must be installed
    exact: str = "yes"  # whether a resumed run yields the batches of the uninterrupted run

    def __init__(self, cache: Path, folder: Path) -> None:
        self.cache, self.folder = cache, folder

    @classmethod
    def version(cls) -> str | None:
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def prepare(self) -> None:
        """Store the rows of the cache in the library's format."""

    def tensors(self) -> Iterator[Any]:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        return batched(self.tensors())

    def resumed(self, batch: int) -> Iterator[Any]:
        """Return an iterator whose first item is batch ``batch`` of the epoch."""
        raise NotImplementedError

    def opened(self) -> Any:
        from shards.read.cache import Cache

        return Cache.open(self.cache)

    def rows(self) -> Iterator[np.ndarray]:
        cache = self.opened()
        return (cache.features(i) for i in range(len(cache)))

    def urls(self) -> list[str]:
        return [str(path) for path in sorted((self.cache / "shards").glob("*.tar"))]


class Earshard(Peer):
    """As in the second and later epochs: mappings stand and checksums are compared (the warm-up run did both)."""

    label, package = "earshard", "earshard"
    threads, window, prefetch = 2, 8, 4
    _open: Any = None
    _running: Any = None

    def opened(self) -> Any:
        self._open = self._open or super().opened()
        return self._open

    def tensors(self) -> Iterator[Any]:
        return (torch.from_numpy(row) for row in self.rows())

    def stream(self, epochs: int | None = 1) -> Any:
        from shards.stream.iterable_dataset import FeatureStream
        from shards.stream.sampler import SamplerConfig

        config = SamplerConfig(batch_size=BATCH, window_shards=self.window)
        return FeatureStream([self.opened()], config, 1, epochs=epochs, threads=self.threads, prefetch=self.prefetch)

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield one epoch's number of batches from a stream that continues across calls."""
        if self._running is None:
            stream = self.stream(None)
            self._epoch = sum(1 for _ in stream.batch_sampler.iter_batches(stream._sampler_state, 1))
            self._running = iter(stream)
        for batch in islice(self._running, self._epoch):
            yield batch.features, int(batch.lengths.sum()) * CHANNELS * 2

    def resumed(self, batch: int) -> Iterator[Any]:
        stream = self.stream()
        stream.load_state_dict(self.states[batch])
        return iter(stream)

    def remember(self, batches: list[int]) -> None:
        """Compute the states at these batches, as a checkpoint would store them, without reading features."""
        stream = self.stream()
        steps = list(stream.batch_sampler.iter_batches(stream._sampler_state, 1))
        self.states = {batch: stream._state(steps[batch][1]) for batch in batches}


class OneThread(Earshard):
    label, threads = "earshard, 1 thread", 1


class FirstEpoch(Earshard):
    """Opens the cache each time: manifest, mappings and the checksum of every row are part of the time."""

    label = "earshard, first epoch"

    def opened(self) -> Any:
        return Peer.opened(self)

    def batches(self) -> Iterator[tuple[torch.Tensor, int]]:
        for batch in self.stream():
            yield batch.features, int(batch.lengths.sum()) * CHANNELS * 2


class FirstEpochUnchecked(FirstEpoch):
    """Uses ``Cache.open(path, verify=False)``; the difference is the cost of the checksums."""

    label = "earshard, first, unchecked"

    def opened(self) -> Any:
        from shards.read.cache import Cache

        return Cache.open(self.cache, verify=False)
