"""Profile an extraction: seconds per stage, the bottleneck, a trace.

Blocks of work are timed where they run. The result is a table; ``--profile FILE`` writes it as JSON with an event per
block, in the format that https://ui.perfetto.dev and chrome://tracing read.

A stage is *busy* while it works. *Waiting* is the time that the main thread waits for another stage. ``read`` runs in
one thread, ``decode`` in ``workers`` threads, and ``encode`` in the main thread; on a GPU the main thread's work is
``launch``, and ``encode`` is the time in which another thread waits for the device. ``codec``, ``write`` and
``commit``, which completes a shard, run in one thread per shard, so their sum may exceed the time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGE_ORDER = ("read", "decode", "launch", "encode", "codec", "write", "commit")


class StageTimes:
    """Times the stages from its construction on; thread-safe.

    Args:
        trace: Keep every block for the trace, about 200 bytes each.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self.busy_seconds: defaultdict[str, float] = defaultdict(float)  # per stage, summed over threads
        self.wait_seconds: defaultdict[str, float] = defaultdict(
            float
        )  # of the main thread, per stage that it waits for
        self.wall_seconds: float | None = None  # total duration, set when the extraction ends
        self._start_time = time.perf_counter()
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}  # thread id -> name, for the trace
        self._events: list[dict[str, Any]] | None = [] if trace else None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time a block of work of ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.busy_seconds, stage, stage, start)

    @contextmanager
    def timed_wait(self, stage: str) -> Iterator[None]:
        """Time a block in which the main thread waits for ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.wait_seconds, stage, f"wait for {stage}", start)

    def _add(self, sums: defaultdict[str, float], stage: str, name: str, start: float) -> None:
        now = time.perf_counter()
        with self._lock:
            sums[stage] += now - start
            if self._events is not None:
                offset, duration = round(1e6 * (start - self._start_time)), round(1e6 * (now - start))
                thread = threading.get_native_id()
                self._names[thread] = threading.current_thread().name
                self._events.append({"name": name, "ph": "X", "ts": offset, "dur": duration, "pid": 1, "tid": thread})

    def merge(self, other: StageTimes) -> None:
        """Add the times of a part of the work that has ended."""
        for sums, theirs in ((self.busy_seconds, other.busy_seconds), (self.wait_seconds, other.wait_seconds)):
            for stage, seconds in theirs.items():
                sums[stage] += seconds
        self.wall_seconds = (self.wall_seconds or 0.0) + (other.wall_seconds or 0.0)
        if other._events is not None:
            later = round(1e6 * (other._start_time - self._start_time))
            self._events = [*(self._events or []), *({**event, "ts": event["ts"] + later} for event in other._events)]
        self._names.update(other._names)

    def utilization(self, workers: int) -> dict[str, float]:
        """Return the fraction of the time so far that each stage was busy; for ``decode`` averaged over ``workers``."""
        wall = max(self.wall_seconds or time.perf_counter() - self._start_time, 1e-9)
        with self._lock:
            return {
                stage: self.busy_seconds[stage] / wall / (workers if stage == "decode" else 1)
                for stage in STAGE_ORDER
                if stage in self.busy_seconds
            }

    def bottleneck(self, workers: int) -> str:
        """Return the busiest stage, such as ``encode 93%``; "" before the first block."""
        shares = self.utilization(workers)
        if not shares:
            return ""
        stage = max(shares, key=lambda stage: shares[stage])
        return f"{stage} {shares[stage]:.0%}"

    def table(self, workers: int) -> list[str]:
        """Return the lines of the table."""
        lines = [f"{'stage':<8} {'seconds':>9} {'busy':>6} {'waited for':>11}"]
        for stage, share in self.utilization(workers).items():
            waited = f"{self.wait_seconds[stage]:.1f} s" if stage in self.wait_seconds else ""
            lines.append(f"{stage:<8} {self.busy_seconds[stage]:>9.1f} {share:>6.0%} {waited:>11}".rstrip())
        return lines

    def write(self, path: Path, workers: int) -> None:
        """Write the profile as JSON.

        Keys: ``wall``, ``stages`` and ``waited`` in seconds, ``shares`` as fractions, ``workers``, and ``traceEvents``
        in microseconds.
        """
        tree = {
            "wall": self.wall_seconds if self.wall_seconds is not None else time.perf_counter() - self._start_time,
            "stages": dict(self.busy_seconds),
            "waited": dict(self.wait_seconds),
            "shares": self.utilization(workers),
            "workers": workers,
            "traceEvents": [*self._thread_name_events(), *(self._events or [])],
        }
        path.write_text(json.dumps(tree) + "\n", encoding="utf-8")

    def _thread_name_events(self) -> list[dict[str, Any]]:
        """Return the metadata events that name the rows of the trace."""
        common = {"name": "thread_name", "ph": "M", "pid": 1}
        return [{**common, "tid": thread, "args": {"name": name}} for thread, name in self._names.items()]
