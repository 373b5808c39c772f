"""Batch sampler: the rows of each global batch, as a pure function of (seed, epoch, frames, shard bounds, config).

Takes ``frames`` int32 [rows] (frames of each row of the joined manifest), ``bounds`` int64 [shards + 1] (shard s holds
the rows ``bounds[s]:bounds[s + 1]``), a :class:`SamplerConfig`, a seed and, optionally, the eligible ``rows``. Yields
windows of global batches, each an int64 array of row numbers. Uses only NumPy: no torch, no files.

```
shards --permuted--> windows of a few shards --rows sorted by length, with noise--> batches --shuffled-->
```

A window depends on (seed, epoch, window) and on no other window, so a restart recomputes only one window. Rank r of n
takes ``batch[r::n]``: every world size sees the same global batches.

Reproducibility: the only source of randomness is the raw 64-bit words of Philox-4x64, with the position as its counter,
ranked by a stable sort. NumPy guarantees the output of its bit generators (NEP 19) but not of the methods of
``Generator``, which are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from shards.config.base import Config
from shards.errors import UserError

Rows = NDArray[np.int64]
MAX_WEIGHT = 1000
Weight = Annotated[float, Field(gt=0, le=MAX_WEIGHT, allow_inf_nan=False)]

# Purpose of a range of Philox words: the highest word of the counter, so that ranges do not overlap.
SHARDS, ROWS, JITTER, BATCHES, DRAW, LENGTHS, PHASES, VERSIONS = range(8)
# Rows are sorted by a length with a relative noise of up to 1/200. Neighbors then change between epochs, even in a
# large window, at a cost of at most half a percent of padding (bench/padding.py).
LENGTH_JITTER = 200


class SamplerConfig(Config):
    """How rows become global batches.

    Attributes:
        batch_size: maximum number of utterances in a global batch (all ranks together).
        max_frames: maximum number of padded frames in a global batch: utterances × frames of the longest.
        window_shards: number of shards mixed with each other. More shards mix better and need less padding; fewer
            shards keep reads local.
        shuffle: ``none`` shuffles nothing; ``shard`` shuffles the order of shards; ``window`` also shuffles the rows
            and batches in a window; ``global`` is ``window`` with one window per epoch. Every mode groups the rows of a
            window by length.
        drop_last: drop rows that do not fill a last batch, chosen at random in each window and epoch.
        weights: how often an epoch reads the rows of each cache, in order, or of each task, by name; ``None`` reads
            each row once. Weight 2 reads every row twice. Weight 0.25 reads a quarter of the rows of every shard, and
            another quarter in the next epoch: after E epochs each row was read floor(E × weight) or ceil(E × weight)
            times. Repeated shards are shuffled independently.
    """

    batch_size: Annotated[int, Field(ge=1)] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None
    window_shards: Annotated[int, Field(ge=1)] = 8
    shuffle: Literal["none", "shard", "window", "global"] = "window"
    drop_last: bool = False
    weights: tuple[Weight, ...] | dict[str, Weight] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> SamplerConfig:
        if self.batch_size is None and self.max_frames is None:
            raise ValueError("the batch size has no limit: set batch_size, max_frames or both")
        return self


@dataclass(frozen=True, slots=True)
class SamplerState:
    """The next batch: ``batch`` of ``window`` of ``epoch``, after ``count`` batches of the run."""

    epoch: int = 0
    window: int = 0
    batch: int = 0
    count: int = 0


class Window:
    """The global batches of one window. ``window[i]`` is int64 [rows], longest row first."""

    def __init__(self, rows: Rows, frames: NDArray[np.int32], starts: Rows, sequence: Rows) -> None:
        self._rows, self._frames, self._starts, self._sequence = rows, frames, starts, sequence

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, index: int) -> Rows:
        batch = self._sequence[index]
        part = slice(self._starts[batch], self._starts[batch + 1])
        # Longest first, so that rank slices batch[rank::world] pad to nearly the same length.
        return self._rows[part][np.argsort(-self._frames[part], kind="stable")]


class BatchSampler:
    """The global batches of a joined manifest for a given config and seed.

    Args:
        frames: int32 [rows], frames of each row.
        bounds: int64 [shards + 1], ascending, from 0 to the number of rows.
        config: how rows become batches.
        seed: 0 … 2**64 - 1.
        rows: eligible rows (any order, no duplicates); ``None`` means all rows.
        name: returns the name of a row for error messages (the stream passes the utterance's key).
        groups: int [rows], for ``config.weights``: the position of each row's weight in it. ``None`` means 0.
        row_weights: float64 [rows], 0 to 1000, multiplied with the weights of the groups. A row of weight 0 is never
            read.
        frames_in: returns the frames of rows as an epoch reads them, if they differ between epochs; ``frames`` are then
            the largest.

    Raises:
        UserError: no row is eligible, a row is longer than ``max_frames``, or a row's weight is out of range.
        ValueError: the arguments are inconsistent.
    """

    def __init__(
        self,
        frames: ArrayLike,
        bounds: ArrayLike,
        config: SamplerConfig,
        seed: int,
        rows: ArrayLike | None = None,
        name: Callable[[int], str] = "row {}".format,
        groups: ArrayLike | None = None,
        row_weights: ArrayLike | None = None,
        frames_in: Callable[[int, Rows], NDArray[np.int32]] | None = None,
    ) -> None:
        self.frames: NDArray[np.int32] = np.asarray(frames, dtype=np.int32)
        self._frames_in = frames_in
        self.config, self.seed = config, seed
        edges: Rows = np.asarray(bounds, dtype=np.int64)
        total = len(self.frames)
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed} is out of range: set it to 0 … 2**64 - 1")
        if len(edges) == 0 or edges[0] != 0 or edges[-1] != total or np.any(np.diff(edges) < 0):
            raise ValueError(f"bounds do not divide {total} rows into shards")
        self.rows: Rows | None = None if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
        if self.rows is not None:
            if len(self.rows) and (self.rows[0] < 0 or self.rows[-1] >= total):
                raise ValueError(f"rows are out of range for a manifest of {total} rows")
            if len(self.rows) != np.size(np.asarray(rows)):
                raise ValueError("rows contains duplicates")
            edges = np.searchsorted(self.rows, edges)
        self.num_rows = total if self.rows is None else len(self.rows)
        if not self.num_rows:
            raise UserError("no utterance is left: widen the filter or add another cache")
        eligible = self.frames if self.rows is None else self.frames[self.rows]
        self.max_row_frames = int(eligible.max())
        if config.max_frames is not None and self.max_row_frames > config.max_frames:
            at = int(eligible.argmax())
            row = at if self.rows is None else int(self.rows[at])
            raise UserError(
                f"{name(row)} has {self.max_row_frames} frames, but a batch is limited to {config.max_frames} "
                f"(max_frames): set max_frames to {self.max_row_frames} or more, or filter utterances by duration"
            )
        self._mean = float(eligible.mean())
        filled = np.flatnonzero(np.diff(edges) > 0)  # shards without an eligible row are never opened
        self._first, self._last = edges[:-1][filled], edges[1:][filled]
        # A filter thins out the shards, so a window takes more of them, to hold as many rows as `window_shards` shards.
        width = -(-config.window_shards * total // self.num_rows)
        self._visits = np.arange(len(filled))  # shard of each visit of an epoch
        self._copies = np.zeros(len(filled), dtype=np.int64)  # earlier visits to the same shard in the epoch
        self._weights: NDArray[np.float64] | None = None  # of each eligible row
        self._strata: Rows | None = None  # of each eligible row: rows of a stratum have one group and one weight
        if config.weights is not None or row_weights is not None:
            self._weigh(groups, row_weights, name)
            # Visits that take only a part of a shard's rows thin out the windows, like a filter.
            taken = self._place_visits() / len(self._visits)
            width = math.ceil(config.window_shards * (total / len(filled)) / taken)
        self.num_windows = 1 if config.shuffle == "global" else -(-len(self._visits) // width)

    def _weigh(self, groups: ArrayLike | None, row_weights: ArrayLike | None, name: Callable[[int], str]) -> None:
        """Set the weight and the stratum of each eligible row."""
        weights = np.ones(len(self.frames))
        strata: Rows = np.zeros(len(self.frames), dtype=np.int64)
        if self.config.weights is not None:
            listed = self.config.weights
            values = np.array(list(listed.values()) if isinstance(listed, dict) else listed)
            strata = strata if groups is None else np.asarray(groups, dtype=np.int64)
            if strata.shape != weights.shape or strata.min() < 0 or strata.max() >= len(values):
                raise ValueError(f"groups must have one of 0 … {len(values) - 1} for each of {len(weights)} rows")
            weights = values[strata]
        if row_weights is not None:
            own = np.asarray(row_weights, dtype=np.float64)
            wrong = ~((own >= 0) & (own <= MAX_WEIGHT))
            if wrong.any():
                row = int(wrong.argmax())
                raise UserError(
                    f"{name(row)} has the weight {own[row]:g}: set a number from 0 to {MAX_WEIGHT} in the column weight"
                )
            distinct, index = np.unique(own, return_inverse=True)
            weights, strata = weights * own, strata * len(distinct) + index
        self._weights = weights if self.rows is None else weights[self.rows]
        self._strata = strata if self.rows is None else strata[self.rows]

    def _place_visits(self) -> float:
        """Set the visits of an epoch to each shard; return the mean number of rows that an epoch reads."""
        assert self._weights is not None
        low, high, sums = (f.reduceat(self._weights, self._first) for f in (np.minimum, np.maximum, np.add))
        if not high.any():
            raise UserError("all utterances have weight 0: set another number in the column weight")
        most = np.ceil(high).astype(np.int64)
        self._visits = np.repeat(np.arange(len(most)), most)
        self._copies = np.arange(len(self._visits)) - np.repeat(np.cumsum(most) - most, most)
        return float(np.where(low == high, low * (self._last - self._first), sums).sum())

    def one_row_per_shard(self, epoch: int, window: int) -> Rows:
        """Return one row of each shard that the window reads, in the order of visits, without duplicates."""
        first = self._first[list(dict.fromkeys(self._visits[self._window_visits(epoch, window)].tolist()))]
        return first if self.rows is None else self.rows[first]

    def window(self, epoch: int, window: int) -> Window:
        """Return the global batches of one window of one epoch."""
        config = self.config
        mixed = config.shuffle in ("window", "global")
        rows = self.rows_of(epoch, window)
        if config.drop_last:
            if mixed:
                rows = rows[self._shuffle(epoch, window, ROWS, len(rows))]
            frames = self.frames_of(epoch, rows)
            caps = self._max_batch_rows(frames[self._by_length(frames)])
            rows = rows[: _greedy(caps, len(rows), whole=True)[1]]
        frames = self.frames_of(epoch, rows)
        order = self._argsort_by_noisy_length(epoch, window, frames) if mixed else self._by_length(frames)
        rows, frames = rows[order], frames[order]
        starts = _cut(self._max_batch_rows(frames))
        count = len(starts) - 1
        sequence = self._shuffle(epoch, window, BATCHES, count) if mixed else np.arange(count)
        return Window(rows, frames, starts, sequence)

    def iter_batches(
        self, state: SamplerState, epochs: int | None = None
    ) -> Iterator[tuple[Rows, SamplerState, SamplerState]]:
        """Yield (rows, state, next state) of each batch from ``state`` to the end of ``epochs`` (``None``: endlessly).

        Raises:
            UserError: ``state`` does not belong to this sampler, or ``drop_last`` leaves an epoch without a batch.
        """
        idle = 0
        while epochs is None or state.epoch < epochs:
            if min(state.epoch, state.window, state.batch, state.count) < 0 or state.window >= self.num_windows:
                raise UserError(f"{state} is not a state of this sampler: resume from a state saved by the same run")
            window = self.window(state.epoch, state.window)
            if state.batch and state.batch >= len(window):
                raise UserError(f"{state} is not a state of this sampler: its window has {len(window)} batches")
            idle = 0 if len(window) else idle + 1
            if idle == self.num_windows and self.config.drop_last:
                raise UserError("drop_last leaves no batch in an epoch: lower batch_size or set drop_last=false")
            end = SamplerState(state.epoch, state.window + 1, 0, state.count + len(window) - state.batch)
            if end.window == self.num_windows:
                end = replace(end, epoch=state.epoch + 1, window=0)
            while state.batch < len(window):
                last = state.batch + 1 == len(window)
                after = end if last else replace(state, batch=state.batch + 1, count=state.count + 1)
                yield window[state.batch], state, after
                if last:
                    break
                state = after
            state = end

    def frames_of(self, epoch: int, rows: Rows) -> NDArray[np.int32]:
        """Return the frames of ``rows`` as ``epoch`` reads them, int32."""
        return self.frames[rows] if self._frames_in is None else self._frames_in(epoch, rows)

    def rows_of(self, epoch: int, window: int) -> Rows:
        """Return the rows of the window's (permuted) shards, each shard in stored order."""
        places = np.concatenate([self._rows_at(epoch, visit) for visit in self._window_visits(epoch, window).tolist()])
        return places if self.rows is None else self.rows[places]

    def _window_visits(self, epoch: int, window: int) -> Rows:
        """Return the shard visits of a window."""
        count = len(self._visits)
        visits = np.arange(count) if self.config.shuffle == "none" else self._shuffle(epoch, 0, SHARDS, count)
        return visits[window * count // self.num_windows : (window + 1) * count // self.num_windows]

    def _rows_at(self, epoch: int, visit: int) -> Rows:
        shard = int(self._visits[visit])
        rows: Rows = np.arange(self._first[shard], self._last[shard])
        if self._weights is None:
            return rows
        weights = self._weights[rows]
        if np.all(weights == 1.0):
            return rows
        phases = self._phases(shard)
        times = np.floor((epoch + 1) * weights + phases) - np.floor(epoch * weights + phases)
        taken: Rows = rows[times > self._copies[visit]]
        return taken

    def _phases(self, shard: int) -> NDArray[np.float64]:
        """Return the phase of each row of a shard, in [0, 1) and the same in all epochs.

        Epoch e reads a row of weight w and phase u floor((e + 1) w + u) - floor(e w + u) times. The phases of the n
        rows of a stratum are (i + c) / n in random order, so that an epoch reads floor(n w) or ceil(n w) of them.
        """
        assert self._strata is not None
        count = int(self._last[shard] - self._first[shard])
        order = self._shuffle(0, shard, DRAW, count)
        strata = self._strata[self._first[shard] : self._last[shard]][order]
        _, starts, strata, sizes = np.unique(strata, return_index=True, return_inverse=True, return_counts=True)
        ranks = np.empty(count)
        ranks[np.argsort(strata, kind="stable")] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if len(sizes) > 1:  # a stratum may have one row in each shard: the shards must not read it in the same epoch
            words = random_words(self.seed, 0, shard, PHASES, len(sizes)) >> np.uint64(11)
            ranks += (words * 2.0**-53)[np.argsort(np.argsort(starts))][strata]
        phases = np.empty(count)
        phases[order] = ranks / sizes[strata]
        return phases

    def _shuffle(self, epoch: int, window: int, purpose: int, count: int) -> Rows:
        return np.argsort(random_words(self.seed, epoch, window, purpose, count), kind="stable")

    def _by_length(self, frames: NDArray[np.int32]) -> Rows:
        """Return the order that sorts longest first, stably."""
        shorter = self.max_row_frames - frames
        # NumPy's stable sort of 16-bit integers is a radix sort, several times faster.
        return np.argsort(shorter.astype(np.uint16) if self.max_row_frames < 2**16 else shorter, kind="stable")

    def _argsort_by_noisy_length(self, epoch: int, window: int, frames: NDArray[np.int32]) -> Rows:
        """Return an order that is nearly longest first: sorted by noisy length, then each rank is moved a little.

        The noise mixes large windows, in which many rows have similar lengths; the moves mix small windows.
        """
        words = random_words(self.seed, epoch, window, LENGTHS, len(frames))
        noise = ((words >> np.uint64(40)).astype(np.int64) - (1 << 23)) // (LENGTH_JITTER // 2)
        by_length = np.argsort(-frames.astype(np.int64) * ((1 << 24) + noise), kind="stable")
        rows = self.config.batch_size or self.num_rows
        if self.config.max_frames is not None:
            rows = min(rows, int(self.config.max_frames // max(self._mean, 1)))
        moves = (random_words(self.seed, epoch, window, JITTER, len(frames)) >> np.uint64(41)) * np.uint64(rows)
        ranks = np.arange(len(frames), dtype=np.uint64) << np.uint64(24)
        grouped: Rows = by_length[np.argsort(ranks + moves, kind="stable")]
        return grouped

    def _max_batch_rows(self, frames: NDArray[np.int32]) -> Rows:
        """Return the maximum rows of a batch from each position, counting each row as long as the longest after it."""
        caps = np.full(len(frames), self.config.batch_size or len(frames), dtype=np.int64)
        if self.config.max_frames is not None:
            bound = np.maximum(np.maximum.accumulate(frames[::-1])[::-1], 1)
            np.minimum(caps, self.config.max_frames // bound, out=caps)
        return caps


def random_words(seed: int, epoch: int, window: int, purpose: int, count: int) -> NDArray[np.uint64]:
    """Return ``count`` raw Philox-4x64 words. Distinct (epoch, window, purpose) never share a word."""
    counter = np.array([0, window, epoch, purpose], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter).random_raw(
        count
    )
    return words


def _greedy(caps: Rows, count: int, *, whole: bool) -> tuple[int, int]:
    """Return (batches, rows in them) if each batch is filled. ``whole`` drops a last batch that is not full."""
    at = batches = 0
    while at < count:
        size = caps.item(at)
        if whole and at + size > count:
            break
        at, batches = min(at + size, count), batches + 1
    return batches, at


def _cut(caps: Rows) -> Rows:
    """Return batch starts [batches + 1] for non-decreasing caps: as few batches as greedy filling, evenly sized.

    Each batch takes its cap or an even share of the remaining rows, whichever is smaller. Once a share fits under its
    cap, later shares do too (shares do not grow, caps do not shrink), so the number of batches suffices and the last
    batches have equal sizes.
    """
    left = _greedy(caps, len(caps), whole=False)[0]
    starts, at = [0], 0
    for batches in range(left, 0, -1):
        at += min(caps.item(at), -(-(len(caps) - at) // batches))
        starts.append(at)
    return np.array(starts, dtype=np.int64)
