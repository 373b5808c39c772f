"""Where an extraction's time goes: seconds for each stage, the bottleneck, a trace.

In: blocks of work, timed where they run. Out: a table for people; for ``--profile FILE`` the same in JSON with every
block as an event, in the format that https://ui.perfetto.dev and chrome://tracing open.

A stage is *busy* while it works; *waiting* is the main thread's time behind another stage. ``encode`` runs in the main
thread, ``read`` in one thread, ``decode`` in ``workers`` threads, ``codec`` and ``write`` in one; ``commit``, the end
of a shard, in another.
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

STAGE_ORDER = ("read", "decode", "encode", "codec", "write", "commit")


class StageTimes:
    """Counts from its making on; any thread may time. ``trace`` keeps every block (about 200 bytes each)."""

    def __init__(self, *, trace: bool = False) -> None:
        self.busy_seconds: defaultdict[str, float] = defaultdict(float)  # by stage, summed over threads
        self.wait_seconds: defaultdict[str, float] = defaultdict(float)  # of the main thread, by the stage waited for
        self.wall_seconds: float | None = None  # seconds of all of it, once it is over
        self._start_time = time.perf_counter()
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}  # of threads, for the trace
        self._events: list[dict[str, Any]] | None = [] if trace else None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A block of work of ``stage``."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.busy_seconds, stage, stage, since)

    @contextmanager
    def timed_wait(self, stage: str) -> Iterator[None]:
        """The main thread waits for ``stage``."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.wait_seconds, stage, f"wait for {stage}", since)

    def _add(self, sums: defaultdict[str, float], stage: str, name: str, since: float) -> None:
        now = time.perf_counter()
        with self._lock:
            sums[stage] += now - since
            if self._events is not None:
                start, length = round(1e6 * (since - self._start_time)), round(1e6 * (now - since))
                thread = threading.get_native_id()
                self._names[thread] = threading.current_thread().name
                self._events.append({"name": name, "ph": "X", "ts": start, "dur": length, "pid": 1, "tid": thread})

    def utilization(self, workers: int) -> dict[str, float]:
        """How much of the time so far each stage was busy; 1 is all of it, and of all ``workers`` for decoding."""
        wall = max(self.wall_seconds or time.perf_counter() - self._start_time, 1e-9)
        with self._lock:
            return {
                stage: self.busy_seconds[stage] / wall / (workers if stage == "decode" else 1)
                for stage in STAGE_ORDER
                if stage in self.busy_seconds
            }

    def bottleneck(self, workers: int) -> str:
        """``encode 93%``: the busiest stage; empty before the first block."""
        shares = self.utilization(workers)
        if not shares:
            return ""
        stage = max(shares, key=lambda stage: shares[stage])
        return f"{stage} {shares[stage]:.0%}"

    def table(self, workers: int) -> list[str]:
        """Lines for people."""
        lines = [f"{'stage':<8} {'seconds':>9} {'busy':>6} {'waited for':>11}"]
        for stage, share in self.utilization(workers).items():
            waited = f"{self.wait_seconds[stage]:.1f} s" if stage in self.wait_seconds else ""
            lines.append(f"{stage:<8} {self.busy_seconds[stage]:>9.1f} {share:>6.0%} {waited:>11}".rstrip())
        return lines

    def write(self, path: Path, workers: int) -> None:
        """JSON: ``wall``, ``stages`` and ``waited`` in seconds, ``shares``, ``traceEvents`` in microseconds."""
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
        """Metadata events of the trace format: what each row of it is called."""
        about = {"name": "thread_name", "ph": "M", "pid": 1}
        return [{**about, "tid": thread, "args": {"name": name}} for thread, name in self._names.items()]
