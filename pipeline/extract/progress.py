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


class Watch:
    """Who is told how far the work is; this one tells nobody. Any thread may call."""

    def step(self, shard: int, utterances: int, audio_seconds: float) -> None:
        """More utterances of ``shard`` are encoded, or failed; fewer, when those of a lost worker count no more."""

    def made(self, shard: int) -> None:
        """``shard`` was made and committed, here or by a process that this one started."""

    def found(self, shard: int) -> None:
        """``shard`` was committed before, or by another process."""

    def waiting(self, shards: int) -> None:
        """Only so many shards are left, all of them in the hands of other processes."""


class Progress(Watch):
    """A tqdm bar over the planned utterances; shards that stand already count as done.

    Args:
        sizes: planned utterances of each shard.
        busiest: tells the bottleneck, such as ``encode 93%``.
    """

    def __init__(self, sizes: Mapping[int, int], busiest: Callable[[], str]) -> None:
        self._sizes, self._busiest, self._total = sizes, busiest, sum(sizes.values())
        self._seconds, self._began, self._kept = 0.0, time.perf_counter(), 0
        self._stepped: Counter[int] = Counter()  # utterances of a shard that the bar shows already
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        slow = {} if sys.stderr.isatty() else {"mininterval": 30.0}
        self._bar = tqdm(total=self._total, desc="extract", unit=" utt", dynamic_ncols=True, smoothing=0.1, **slow)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, shard: int, utterances: int, audio_seconds: float) -> None:
        with self._lock:
            self._seconds += audio_seconds
            rate = self._seconds / max(time.perf_counter() - self._began, 1e-9)
            self._bar.set_postfix_str(f"{rate:.1f} audio-h/h, {self._busiest()}", refresh=False)
            if shard not in self._done:
                self._stepped[shard] += utterances
                self._bar.update(utterances)

    def made(self, shard: int) -> None:
        self.found(shard)

    def found(self, shard: int) -> None:  # utterances that were made elsewhere count as done, not towards the rate
        with self._lock:
            if shard not in self._done:
                self._done.add(shard)
                self._bar.update(self._sizes[shard] - self._stepped[shard])

    def waiting(self, shards: int) -> None:
        self._bar.set_postfix_str(f"waiting for {shards} shards of other processes")
