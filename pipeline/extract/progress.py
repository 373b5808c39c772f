"""What a person sees while an extraction runs: utterances, audio-hours per hour, the bottleneck stage, time left.

On a terminal a bar that moves; elsewhere (SLURM, a pipe) the same line twice a minute.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType

from tqdm import tqdm


class ProgressListener:
    """Who is told how far the work is; this one tells nobody. Any thread may call."""

    def on_utterances(self, shard: int, utterances: int, audio_seconds: float) -> None:
        """More utterances of ``shard`` are encoded, or failed; fewer, when those of a lost worker count no more."""

    def on_shard_committed(self, shard: int) -> None:
        """``shard`` was made and committed, here or by a process that this one started."""

    def on_shard_skipped(self, shard: int) -> None:
        """``shard`` was committed before, or by another process."""

    def on_waiting(self, shards: int) -> None:
        """Only so many shards are left, all of them in the hands of other processes."""


class ProgressBar(ProgressListener):
    """A tqdm bar over the planned utterances; shards that stand already count as done.

    Args:
        sizes: planned utterances of each shard.
        busiest: tells the bottleneck, such as ``encode 93%``.
    """

    def __init__(self, shard_sizes: Mapping[int, int], bottleneck: Callable[[], str]) -> None:
        self._shard_sizes, self._bottleneck, self._total = shard_sizes, bottleneck, sum(shard_sizes.values())
        self._seconds, self._start_time, self._kept = 0.0, time.perf_counter(), 0
        self._shown: Counter[int] = Counter()  # utterances of a shard that the bar shows already
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> ProgressBar:
        slow = {} if sys.stderr.isatty() else {"mininterval": 30.0}
        self._bar = tqdm(total=self._total, desc="extract", unit=" utt", dynamic_ncols=True, smoothing=0.1, **slow)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_utterances(self, shard: int, utterances: int, audio_seconds: float) -> None:
        with self._lock:
            self._seconds += audio_seconds
            rate = self._seconds / max(time.perf_counter() - self._start_time, 1e-9)
            self._bar.set_postfix_str(f"{rate:.1f} audio-h/h, {self._bottleneck()}", refresh=False)
            if shard not in self._done:
                self._shown[shard] += utterances
                self._bar.update(utterances)

    def on_shard_committed(self, shard: int) -> None:
        self.on_shard_skipped(shard)

    def on_shard_skipped(
        self, shard: int
    ) -> None:  # utterances that were made elsewhere count as done, not towards the rate
        with self._lock:
            if shard not in self._done:
                self._done.add(shard)
                self._bar.update(self._shard_sizes[shard] - self._shown[shard])

    def on_waiting(self, shards: int) -> None:
        self._bar.set_postfix_str(f"waiting for {shards} shards of other processes")
