"""A torch IterableDataset that yields padded batches of cached features, with an exact resume state.

:class:`FeatureStream` takes caches of one feature spec, joined end to end, a
:class:`~shards.stream.sampler.SamplerConfig` and a seed; it yields :class:`Batch`, the part of each global batch that
belongs to this rank.

```
iter_batches -> global batch -> batch[rank::world_size] -> threads: mmap rows -> one copy into a padded buffer -> Batch
```

Buffers are reused only when nothing refers to them any more (``shards/stream/prefetch.py``). A loop that drops each
batch runs in a few buffers; a loop that keeps batches gets new ones.

State: ``stream.state_dict()`` counts the batches that the loop has taken, not those read ahead. Every batch also
carries ``batch.state``, the state after that batch. With ``DataLoader(stream, batch_size=None, num_workers=n)`` the
batches are counted in other processes, so save ``batch.state``, or call ``stream.consumed(batch)``. torchdata's
``StatefulDataLoader`` uses its own ``state_dict`` and needs the same number of workers as before; ``batch.state`` can
be restored with any world size and number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike
from torch.utils.data import IterableDataset, get_worker_info

from shards.errors import UserError
from shards.format.codec import CODES, STORED_DTYPE, decode, decoded_dtype
from shards.format.variants import split_key
from shards.read.cache import Cache
from shards.remote.mirror import Mirror, require_space
from shards.stream.batch import TORCH_DTYPE, Batch
from shards.stream.concat import ConcatCache
from shards.stream.prefetch import BufferPool, prefetch_batches
from shards.stream.sampler import BatchSampler, Rows, SamplerConfig, SamplerState
from shards.stream.versions import VersionDraw

STATE_VERSION = 3  # changes with the order of batches and with what identifies a stream
Step = tuple[Rows, SamplerState, SamplerState]  # rows of a batch, its state, the next state


class FeatureStream(IterableDataset[Batch]):
    """Batches of the joined caches in an order that depends only on ``sampler``, ``seed`` and the caches.

    Iteration starts at the current state: after a ``break``, the next loop continues. A stream with a finite number of
    epochs that ran to its end starts from the beginning again. Iterate only once at a time.

    Args:
        caches: caches of one feature spec, joined end to end.
        sampler: how rows become batches.
        seed: 0 … 2**64 - 1. With ``sampler``, the manifests and the labels, it determines every batch of every epoch.
        rows: the rows of the joined manifest to read; ``None`` means all.
        rank: this process takes ``batch[rank::world_size]`` of each global batch.
        world_size: number of processes that share the global batches.
        epochs: number of epochs; ``None`` is unlimited.
        prefetch: number of batches read ahead; 0 reads in the calling thread.
        threads: number of reader threads.
        pinned: use page-locked buffers, for batches that this process copies to a GPU.
        encoded: leave features as they are stored: float16, bfloat16, int8 or float8_e4m3fn, with ``batch.scales``.
            Codes (codec u16) are int32 with and without it.
        variants: an epoch reads one version of each utterance: itself, or a variant (``augment`` of an extraction)
            with a number below this. ``None``: any variant that is there; 1: none.

    Raises:
        UserError: the specs differ, no utterance is left, an utterance is longer than ``max_frames``, or the weights do
            not fit the caches or tasks.
        ValueError: ``rank``, ``prefetch`` or ``threads`` is out of range.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        sampler: SamplerConfig,
        seed: int,
        *,
        rows: ArrayLike | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        prefetch: int = 4,
        threads: int = 2,
        pinned: bool = False,
        encoded: bool = False,
        variants: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is out of range for world_size {world_size}")
        if prefetch < 0 or threads < 1:
            raise ValueError(f"expected prefetch >= 0 and threads >= 1, got {prefetch} and {threads}")
        if variants is not None and variants < 1:
            raise ValueError(f"expected variants >= 1, got {variants}")
        self.concat_cache = ConcatCache(caches)
        self.caches = self.concat_cache.caches
        self.sampler, self.seed = sampler, seed
        self.rank, self.world_size, self.epochs, self.prefetch, self.threads = (
            rank,
            world_size,
            epochs,
            prefetch,
            threads,
        )
        draws = self.concat_cache.has_variants and variants != 1
        self._draw = VersionDraw(self.concat_cache, seed, variants) if draws else None
        self.batch_sampler = BatchSampler(
            self.concat_cache.frames if self._draw is None else self.concat_cache.max_frames(variants),
            self.concat_cache.bounds,
            sampler,
            seed,
            rows,
            lambda row: "utterance '{}'".format(*self.concat_cache.strings("key", [row])),
            self._groups(rows),
            self.concat_cache.column("weight", 1.0).to_numpy() if self.concat_cache.has_column("weight") else None,
            None if self._draw is None else self._draw.frames,
        )
        self._columns = [name for name in ("prompt", "task") if self.concat_cache.has_column(name)]
        chosen = (
            "all"
            if self.batch_sampler.rows is None
            else hashlib.sha256(self.batch_sampler.rows.tobytes()).hexdigest()[:16]
        )
        if self._draw is not None:
            chosen += f", one of {self._draw.most} versions of each"
        elif any(cache.variants_are_items for cache in self.caches):
            chosen += ", with variants"
        # 16 hex digits of each id keep the state at a few hundred bytes.
        self._identity: dict[str, Any] = {
            "version": STATE_VERSION,
            "feature_id": self.concat_cache.spec.feature_id[:16],
            "manifests": [cache.manifest_id[:16] for cache in self.caches],
            "labels": [cache.labels.id[:16] for cache in self.caches],
            "rows": chosen,
            "seed": seed,
            "rules": sampler.model_dump(mode="json"),
        }
        self._sampler_state, self._ended = SamplerState(), False
        self._length: int | None = None
        self._origin: int | None = None  # in a DataLoader worker: index of worker 0's first batch
        self._pool, self.encoded = BufferPool(prefetch + 2, pinned), encoded

    def _groups(self, rows: ArrayLike | None) -> Rows | None:
        """Return, for each joined row, the position of its weight in ``sampler.weights``; None without weights."""
        weights, joined = self.sampler.weights, self.concat_cache
        if weights is None:
            return None
        if not isinstance(weights, dict):
            if len(weights) != len(self.caches):
                raise UserError(
                    f"weights has {len(weights)} numbers for {len(self.caches)} caches: set one for each cache"
                )
            return np.repeat(np.arange(len(weights)), np.diff(joined.offsets))
        tasks = joined.column("task", "")
        known = set((tasks if rows is None else tasks.take(pa.array(rows))).unique().to_pylist())
        for names, problem in ((known - weights.keys(), "lack the task"), (weights.keys() - known, "name a task")):
            if names:
                raise UserError(
                    f"weights {problem} '{min(names)}': set a weight for each task of the utterances, which are "
                    f"{', '.join(map(repr, sorted(known)))}"
                )
        found = pc.index_in(tasks, value_set=pa.array(list(weights), pa.string()))
        groups: Rows = pc.fill_null(found, 0).to_numpy().astype(np.int64)  # 0: of rows that are not read
        return groups

    def __len__(self) -> int:
        """Return the number of batches of all epochs, from the first one on. The first call makes their order.

        Raises:
            TypeError: the number of epochs is not limited.
        """
        if self.epochs is None:
            raise TypeError("a FeatureStream without a number of epochs has no length: set epochs, or count steps")
        if self._length is None:
            self._length = sum(1 for _ in self.batch_sampler.iter_batches(SamplerState(), self.epochs))
        return self._length

    def __bool__(self) -> bool:  # otherwise a stream without an end, which has no length, would have no truth value
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loop (the next batch) and the identity of the stream; JSON-serializable."""
        state = self._state(self._sampler_state)
        if self._origin is not None:
            state["origin"] = self._origin  # StatefulDataLoader restores it in the same worker
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, saved by this stream or by an equal one with any world size.

        Raises:
            UserError: the state belongs to other manifests, features, rows, sampler settings or another seed. The
                message names the first difference.
        """
        for name, mine in self._identity.items():
            if name not in state:
                raise UserError(f"not a stream state: '{name}' is missing; load a state saved by a FeatureStream")
            if state[name] != mine:
                raise UserError(_difference(name, state[name], mine))
        try:
            at = SamplerState(**{name: int(state[name]) for name in ("epoch", "window", "batch", "count")})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a stream state: a position is missing or not a number ({error})") from None
        if min(asdict(at).values()) < 0 or at.window >= self.batch_sampler.num_windows:
            raise UserError(
                f"not a state of this stream: its window is {at.window} of {self.batch_sampler.num_windows}; load a "
                "state saved with the same caches and settings"
            )
        self._sampler_state, self._ended = at, False
        self._origin = state.get("origin") if get_worker_info() is not None else None

    def consumed(self, batch: Batch) -> None:
        """Mark ``batch`` and all batches before it as taken. For loops over a DataLoader with workers."""
        self.load_state_dict(batch.state)

    def __iter__(self) -> Iterator[Batch]:
        if self._ended:
            self._sampler_state, self._origin, self._ended = SamplerState(), None, False
        walk: Iterator[Step] = self.batch_sampler.iter_batches(self._sampler_state, self.epochs)
        if any(cache.mirror for cache in self.caches):
            walk = self._prefetch_shards(walk)
        worker = get_worker_info()
        if worker is not None:
            # DataLoader takes from its workers in turn: worker w of n reads batches w, w + n, … after the origin.
            for cache in self.caches:
                cache.detach()
            origin = self._origin = self._sampler_state.count if self._origin is None else self._origin
            walk = (step for step in walk if (step[1].count - origin) % worker.num_workers == worker.id)
        for batch, step in prefetch_batches(walk, self._load_batch, self._request_pages, self.prefetch, self.threads):
            self._sampler_state = step[2]
            yield batch
            del batch  # release its buffer before waiting for the next batch
        self._ended = True

    def _prefetch_shards(self, walk: Iterator[Step]) -> Iterator[Step]:
        """Yield the same steps. At each new window, request its shards and the next window's from remote caches."""
        seen, mirrors = None, [cache.mirror for cache in self.caches if cache.mirror is not None]
        try:
            for step in walk:
                window = step[1].epoch, step[1].window
                if window != seen:
                    seen = window
                    self._prefetch_window(*window)
                yield step
        finally:
            for mirror in mirrors:
                mirror.cancel_prefetch()

    def _prefetch_window(self, epoch: int, window: int) -> None:
        now = self._remote_shards(epoch, window)
        require_space([(mirror, len(shards)) for mirror, shards in now.items()], "window_shards")
        after = (epoch, window + 1) if window + 1 < self.batch_sampler.num_windows else (epoch + 1, 0)
        later = self._remote_shards(*after) if self.epochs is None or after[0] < self.epochs else {}
        for mirror in now.keys() | later.keys():
            mirror.prefetch([*now.get(mirror, []), *later.get(mirror, [])])

    def _remote_shards(self, epoch: int, window: int) -> dict[Mirror, list[int]]:
        """Return the shards of remote caches that a window reads, in reading order."""
        found: dict[Mirror, list[int]] = {}
        if self._draw is not None:
            rows = self.batch_sampler.rows_of(epoch, window)
            shards = self.concat_cache.shards(rows, self._draw(epoch, rows))
            return {cache.mirror: numbers for cache, numbers in shards if cache.mirror is not None}
        for cache, index in map(self.concat_cache.locate, self.batch_sampler.one_row_per_shard(epoch, window).tolist()):
            if cache.mirror is not None:
                found.setdefault(cache.mirror, []).append(cache.shard_of(index))
        return found

    def _rank_rows(self, rows: Rows) -> Rows:
        return rows[self.rank :: self.world_size]

    def _versions(self, step: Step, rows: Rows) -> Rows | None:
        """Return which version of each of ``rows`` the epoch of ``step`` reads; None if there are no variants."""
        return None if self._draw is None else self._draw(step[1].epoch, rows)

    def _request_pages(self, step: Step) -> None:
        rows = self._rank_rows(step[0])
        self.concat_cache.will_need(rows, self._versions(step, rows))

    def _load_batch(self, step: Step) -> Batch:
        """Fill a buffer with this rank's part of a global batch, with one copy per row."""
        rows, here, after = step
        mine = self._rank_rows(rows)
        # Every row is checked against its file before memory is allocated for the batch.
        versions = self._versions(step, mine)
        stored = self.concat_cache.read_stored(mine, versions)
        frames = self.batch_sampler.frames_of(here.epoch, mine)
        longest = int((frames if len(mine) else self.batch_sampler.frames_of(here.epoch, rows)).max())
        codec, channels = self.concat_cache.spec.codec, self.concat_cache.spec.channels
        encoded = self.encoded and codec != CODES  # torch computes little with uint16
        dtype = STORED_DTYPE[codec] if encoded else decoded_dtype(codec, half=True)
        features = self._pool.acquire((len(mine), longest, channels), dtype)
        for slot, row, end in zip(features, stored, frames.tolist(), strict=True):
            if encoded:
                slot[:end] = row.payload
            else:
                decode(codec, row.payload, row.scale, slot[:end])
            if end < longest:
                slot[end:] = 0
        scales = [row.scale for row in stored if row.scale is not None] if encoded else []
        tensor = torch.from_numpy(features)
        names = [split_key(row.key) for row in stored]
        columns = {name: self.concat_cache.strings(name, mine) for name in self._columns}
        return Batch(
            features=tensor.view(TORCH_DTYPE[codec]) if encoded else tensor,
            lengths=torch.from_numpy(frames.astype(np.int64)),
            keys=[key for key, _ in names],
            texts=[row.text for row in stored],
            prompts=columns.get("prompt") or [""] * len(mine),
            tasks=columns.get("task") or [""] * len(mine),
            rows=mine.tolist(),
            epoch=here.epoch,
            index=here.count,
            state=self._state(after),
            scales=torch.from_numpy(np.stack(scales)) if scales else None,
            variants=[number for _, number in names],
        )

    def _state(self, at: SamplerState) -> dict[str, Any]:
        return {**self._identity, "epoch": at.epoch, "window": at.window, "batch": at.batch, "count": at.count}


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name == "rules" and isinstance(theirs, dict):
        name, theirs, mine = next(
            (f"rules.{key}", theirs.get(key), value) for key, value in mine.items() if theirs.get(key) != value
        )
    return (
        f"the state belongs to another stream: {name} is {theirs} in the state and {mine} in this stream; "
        "resume with the caches and settings of that run, or start a new run"
    )
