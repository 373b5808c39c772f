"""Progress display of an extraction: utterances, audio-hours per hour, the bottleneck stage, time left.

A progress bar on a terminal; elsewhere (SLURM, a pipe) the same line twice a minute.
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
    """Callbacks for the progress of an extraction; the base class ignores them. They are called from any thread."""

    def on_utterances(self, shard: int, utterances: int, audio_seconds: float, copied: int = 0) -> None:
        """More utterances of ``shard`` were encoded, copied or failed; negative: a lost worker's are taken back."""

    def on_shard_committed(self, shard: int) -> None:
        """``shard`` was encoded and committed, here or by a process that this one started."""

    def on_shard_skipped(self, shard: int) -> None:
        """``shard`` was committed earlier or by another process."""

    def on_waiting(self, shards: int) -> None:
        """The remaining ``shards`` shards are all held by other processes."""


class ProgressBar(ProgressListener):
    """A tqdm bar over the planned utterances; shards that are already committed count as done.

    Args:
        shard_sizes: number of planned utterances of each shard.
        bottleneck: returns the busiest stage, e.g. ``encode 93%``.
    """

    def __init__(self, shard_sizes: Mapping[int, int], bottleneck: Callable[[], str]) -> None:
        self._shard_sizes, self._bottleneck, self._total = shard_sizes, bottleneck, sum(shard_sizes.values())
        self._seconds, self._start_time = 0.0, time.perf_counter()
        self._shown: Counter[int] = Counter()  # utterances per shard that the bar already includes
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

    def on_utterances(self, shard: int, utterances: int, audio_seconds: float, copied: int = 0) -> None:
        with self._lock:
            self._seconds += audio_seconds
            rate = self._seconds / max(time.perf_counter() - self._start_time, 1e-9)
            self._bar.set_postfix_str(f"{rate:.1f} audio-h/h, {self._bottleneck()}", refresh=False)
            if shard not in self._done:
                self._shown[shard] += utterances
                self._bar.update(utterances)

    def on_shard_committed(self, shard: int) -> None:
        self.on_shard_skipped(shard)

    def on_shard_skipped(self, shard: int) -> None:
        with self._lock:  # utterances encoded elsewhere count as done, but not towards the rate
            if shard not in self._done:
                self._done.add(shard)
                self._bar.update(self._shard_sizes[shard] - self._shown[shard])

    def on_waiting(self, shards: int) -> None:
        self._bar.set_postfix_str(f"waiting for other processes to finish {shards} shards")
