"""Caches to padded batches: the torch IterableDataset over order and reader, with a state counted in batches taken.

In: caches of one feature spec, joined end to end, :class:`~shards.order.Rules` and a seed. Out: :class:`Batch`, the
part of each global batch that belongs to this rank.

```
Order.walk -> global batch -> batch[rank::world] -> threads: mmap rows -> one copy into a padded buffer -> Batch
```

Buffers are reused, never under your feet (``shards/buffers.py``): a loop that drops each batch before long runs in a
few buffers, one that keeps batches gets new ones.

State. ``stream.state_dict()`` counts the batches that the loop took, not those read ahead. Every batch also carries its
own ``batch.state``: the state once this batch is done. With ``DataLoader(stream, batch_size=None, num_workers=n)`` the
counting happens in other processes, so save ``batch.state`` (or tell the stream: ``stream.consumed(batch)``).
torchdata's ``StatefulDataLoader`` works by its own ``state_dict`` and wants as many workers as before; ``batch.state``
restores under any world size and number of workers.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from resource import RUSAGE_THREAD, getrusage
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import IterableDataset, get_worker_info

from shards.buffers import Pool
from shards.codec import decode
from shards.errors import UserError
from shards.mirror import Mirror, require_room
from shards.order import Order, Position, Rows, Rules
from shards.reader import Cache

STATE_VERSION = 1
NEEDED = 4  # batches beyond those being read whose pages the kernel is asked for
RESIDENT = 8  # such batches found in memory: from then on, each eighth is looked at
Step = tuple[Rows, Position, Position]  # of a walk: a batch's rows, its position, the one after it


@dataclass
class Batch:
    """This rank's part of one global batch; it may be empty (B = 0) when the global batch is smaller than the world.

    Attributes:
        features: [B, T, C] float16 (codec f16) or float32 (other codecs), zero after each utterance's end. T is the
            longest of the part; of an empty part, the longest of the global batch.
        lengths: int64 [B], frames.
        keys, texts: of each utterance.
        rows: place of each utterance in the joined manifest.
        epoch: passes over the data that were finished before this batch.
        index: number of the global batch in the run, from 0.
        state: the stream's state once this batch is done; JSON can hold it.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    keys: list[str]
    texts: list[str]
    rows: list[int]
    epoch: int
    index: int
    state: dict[str, Any] = field(repr=False)

    def mask(self) -> torch.Tensor:
        """bool [B, T], true on frames and false on padding."""
        places = torch.arange(self.features.shape[1], device=self.lengths.device)
        return places[None, :] < self.lengths[:, None]

    def pin_memory(self) -> Batch:
        """In page-locked memory; DataLoader calls it under ``pin_memory=True``."""
        return replace(self, features=self.features.pin_memory(), lengths=self.lengths.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """With the tensors on ``device``."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            lengths=self.lengths.to(device, non_blocking=non_blocking),
        )


class FeatureStream(IterableDataset[Batch]):
    """Batches of the joined caches in the order of ``rules`` and ``seed``.

    A stream iterates once at a time, from where it stands: after a ``break``, the next loop goes on. A stream of a
    finite number of epochs that ran to its end starts anew.

    Args:
        caches: joined end to end; one feature spec.
        seed: 0 … 2**64 - 1; with the rules and the manifests it fixes every batch of every epoch.
        rows: train on these rows of the joined manifest only; ``None`` is all.
        rank, world: this process takes ``batch[rank::world]`` of each global batch.
        epochs: end after so many passes; ``None`` goes on and on.
        prefetch: batches read ahead of the loop; 0 reads in the loop's own thread.
        threads: that read ahead.

    Raises:
        UserError: the specs differ, no utterance is left, or one alone is longer than ``max_frames``.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        rules: Rules,
        seed: int,
        *,
        rows: ArrayLike | None = None,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        prefetch: int = 4,
        threads: int = 2,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of a world of {world}")
        if prefetch < 0 or threads < 1:
            raise ValueError("prefetch is 0 or more and threads 1 or more")
        self.caches = list(caches)
        self.rules, self.seed = rules, seed
        self.rank, self.world, self.epochs, self.prefetch, self.threads = rank, world, epochs, prefetch, threads
        _require_one_spec(self.caches)
        self._offsets = np.cumsum([0, *map(len, self.caches)], dtype=np.int64)
        frames = [cache.frames for cache in self.caches]
        bounds = [cache.bounds[1:] + at for cache, at in zip(self.caches, self._offsets, strict=False)]
        self.order = Order(
            frames[0] if len(frames) == 1 else np.concatenate(frames),
            np.concatenate([[0], *bounds]),
            rules,
            seed,
            rows,
            lambda row: "utterance '{}'".format(*self._strings("key", [row])),
            self._offsets,
        )
        chosen = "all" if self.order.rows is None else hashlib.sha256(self.order.rows.tobytes()).hexdigest()[:16]
        # A state names what it belongs to by 16 hex digits each, so that it stays a few hundred bytes.
        self._identity: dict[str, Any] = {
            "version": STATE_VERSION,
            "feature_id": self.caches[0].feature_id[:16],
            "manifests": [cache.manifest_id[:16] for cache in self.caches],
            "rows": chosen,
            "seed": seed,
            "rules": rules.model_dump(),
        }
        self._at, self._ended = Position(), False
        self._origin: int | None = None  # in a DataLoader worker: the batch that worker 0 began with
        self._pool = Pool(prefetch + 2)
        self._resident = 0  # batches in a row whose pages were all in memory

    def locate(self, row: int) -> tuple[Cache, int]:
        """The cache of a row of the joined manifest, and its row there."""
        place = int(np.searchsorted(self._offsets, row, side="right")) - 1
        if not 0 <= row < self._offsets[-1]:
            raise IndexError(f"row {row} of {self._offsets[-1]}")
        return self.caches[place], row - int(self._offsets[place])

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands: the next batch to take, and what this belongs to. JSON can hold it."""
        state = self._state(self._at)
        if self._origin is not None:
            state["origin"] = self._origin  # StatefulDataLoader hands this back to the same worker of as many
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, made by this stream or an equal one under any world size.

        Raises:
            UserError: it belongs to other manifests, features, rows, rules or seed; names the first that differs.
        """
        for name, mine in self._identity.items():
            if name not in state:
                raise UserError(f"this is no state of a stream: it lacks '{name}'; name the checkpoint of a run")
            if state[name] != mine:
                raise UserError(_difference(name, state[name], mine))
        try:
            at = Position(**{name: int(state[name]) for name in ("epoch", "window", "batch", "count")})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no state of a stream: {error} is missing or no number") from None
        if min(asdict(at).values()) < 0 or at.window >= self.order.windows:
            raise UserError(f"this is no state of this stream: it points at window {at.window} of {self.order.windows}")
        self._at, self._ended = at, False
        self._origin = state.get("origin") if get_worker_info() is not None else None

    def consumed(self, batch: Batch) -> None:
        """Count ``batch``, and all before it, as taken: for loops over a DataLoader with workers."""
        self.load_state_dict(batch.state)

    def __iter__(self) -> Iterator[Batch]:
        if self._ended:
            self._at, self._origin, self._ended = Position(), None, False
        walk: Iterator[Step] = self.order.walk(self._at, self.epochs)
        if any(cache.mirror for cache in self.caches):
            walk = self._fetch_ahead(walk)
        worker = get_worker_info()
        if worker is not None:
            # DataLoader takes from its workers in turn: worker w of n reads the batches w, w + n … from the origin on.
            for cache in self.caches:
                cache.detach()
            origin = self._origin = self._at.count if self._origin is None else self._origin
            walk = (step for step in walk if (step[1].count - origin) % worker.num_workers == worker.id)
        for batch, after in self._read_ahead(walk):
            self._at = after
            yield batch
        self._ended = True

    def _fetch_ahead(self, walk: Iterator[Step]) -> Iterator[Step]:
        """The same steps; at each new window, far caches are told which shards come next."""
        seen, mirrors = None, [cache.mirror for cache in self.caches if cache.mirror is not None]
        try:
            for step in walk:
                window = step[1].epoch, step[1].window
                if window != seen:
                    seen = window
                    self._want(*window)
                yield step
        finally:
            for mirror in mirrors:
                mirror.want_nothing()

    def _want(self, epoch: int, window: int) -> None:
        now = self._far_shards(epoch, window)
        require_room([(mirror, len(shards)) for mirror, shards in now.items()], "window_shards")
        after = (epoch, window + 1) if window + 1 < self.order.windows else (epoch + 1, 0)
        later = self._far_shards(*after) if self.epochs is None or after[0] < self.epochs else {}
        for mirror in now.keys() | later.keys():
            mirror.want([*now.get(mirror, []), *later.get(mirror, [])])

    def _far_shards(self, epoch: int, window: int) -> dict[Mirror, list[int]]:
        """The shards of far caches that a window reads, in order of need."""
        found: dict[Mirror, list[int]] = {}
        for cache, index in map(self.locate, self.order.reads(epoch, window).tolist()):
            if cache.mirror is not None:
                found.setdefault(cache.mirror, []).append(cache.shard_of(index))
        return found

    def _read_ahead(self, walk: Iterator[Step]) -> Iterator[tuple[Batch, Position]]:
        """Batches in the walk's order, ``prefetch`` of them being read by threads while the loop works."""
        if not self.prefetch:
            for rows, here, after in walk:
                yield self._read(rows, here, after), after
            return
        executor = ThreadPoolExecutor(self.threads, thread_name_prefix="earshard-read")
        # One thread of its own asks the kernel for pages: asking waits for a busy disk's queue.
        needer = ThreadPoolExecutor(1, thread_name_prefix="earshard-need")
        try:
            waiting: deque[tuple[Future[Batch], Position]] = deque()
            coming: deque[Step] = deque()

            def look(count: int) -> None:
                for step in islice(walk, count):
                    coming.append(step)
                    needer.submit(self._need, step[0], step[1].count)

            look(self.prefetch + NEEDED)
            while coming and len(waiting) < self.prefetch:
                waiting.append((executor.submit(self._read, *coming[0]), coming.popleft()[2]))
            while waiting:
                future, after = waiting.popleft()
                batch = future.result()
                look(1)
                if coming:
                    waiting.append((executor.submit(self._read, *coming[0]), coming.popleft()[2]))
                yield batch, after
        finally:
            needer.shutdown(wait=True, cancel_futures=True)
            executor.shutdown(wait=True, cancel_futures=True)

    def _need(self, rows: Rows, number: int) -> None:
        """Ask for the pages of a batch; while asking turns out to read nothing, only now and then."""
        if self._resident < RESIDENT or number % RESIDENT == 0:
            before = getrusage(RUSAGE_THREAD).ru_inblock
            for cache, index in map(self.locate, rows[self.rank :: self.world].tolist()):
                if cache.mirror is None:  # what was just fetched is in memory
                    cache.will_need(index)
            self._resident = self._resident + 1 if getrusage(RUSAGE_THREAD).ru_inblock == before else 0

    def _read(self, rows: Rows, here: Position, after: Position) -> Batch:
        """Fill a buffer with this rank's part of a global batch."""
        mine = rows[self.rank :: self.world]
        frames = self.order.frames[mine]
        # Every row is bounded by its file, and checked, before memory is taken for the batch.
        stored = [cache.stored(index) for cache, index in map(self.locate, mine.tolist())]
        longest = int((frames if len(mine) else self.order.frames[rows]).max())
        spec = self.caches[0].spec
        dtype = np.float16 if spec.codec == "f16" else np.float32
        features = self._pool.take((len(mine), longest, spec.channels), np.dtype(dtype))
        for slot, (payload, scale), end in zip(features, stored, frames.tolist(), strict=True):
            decode(spec.codec, payload, scale, slot[:end])
            slot[end:] = 0
        return Batch(
            features=torch.from_numpy(features),
            lengths=torch.from_numpy(frames.astype(np.int64)),
            keys=self._strings("key", mine),
            texts=self._strings("text", mine),
            rows=mine.tolist(),
            epoch=here.epoch,
            index=here.count,
            state=self._state(after),
        )

    def _state(self, at: Position) -> dict[str, Any]:
        return {**self._identity, **asdict(at)}

    def _strings(self, column: str, rows: ArrayLike) -> list[str]:
        joined = np.asarray(rows, dtype=np.int64)
        if len(self.caches) == 1:
            return self.caches[0].strings(column, joined)
        caches = np.searchsorted(self._offsets, joined, side="right") - 1
        found = np.empty(len(joined), dtype=object)
        for place in np.unique(caches).tolist():
            mine = caches == place
            found[mine] = self.caches[place].strings(column, joined[mine] - self._offsets[place])
        texts: list[str] = found.tolist()
        return texts


def _require_one_spec(caches: Sequence[Cache]) -> None:
    if not caches:
        raise UserError("no cache is named: set caches to one or more cache folders")
    first = caches[0]
    for other in caches[1:]:
        if other.feature_id != first.feature_id:
            found = "; ".join(first.spec.differences(other.spec))
            raise UserError(
                f"the caches '{first.path}' and '{other.path}' hold different features ({found}): "
                "extract both with the same encoder, layer, window and codec"
            )


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name == "rules" and isinstance(theirs, dict):
        name, theirs, mine = next(
            (f"rules.{key}", theirs.get(key), value) for key, value in mine.items() if theirs.get(key) != value
        )
    return (
        f"this state belongs to another stream: {name} is {theirs} there and {mine} here; "
        "resume with the caches and settings of that run, or start a new one"
    )
