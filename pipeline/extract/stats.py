"""Counts of an extraction, and the limit on failures."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

from pipeline.profile import StageTimes
from shards.errors import WorkFailed


@dataclass
class ExtractionStats:
    """Counts over all shards of a run. :meth:`add` and :meth:`add_failure` are thread-safe."""

    utterances: int = 0
    copied: int = 0  # of these, from other caches
    audio_seconds: float = 0.0
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # key, stage, reason
    stage_times: StageTimes = field(default_factory=StageTimes)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, utterances: int, audio_seconds: float, copied: int = 0) -> None:
        """Add utterances that were encoded, copied or failed."""
        with self._lock:
            self.utterances += utterances
            self.copied += copied
            self.audio_seconds += audio_seconds

    def merge(self, other: ExtractionStats) -> None:
        """Add the counts of a finished job."""
        self.utterances += other.utterances
        self.copied += other.copied
        self.audio_seconds += other.audio_seconds
        self.failures += other.failures
        self.stage_times.merge(other.stage_times)

    def add_failure(self, key: str, stage: str, reason: str) -> None:
        """Add a failed utterance."""
        with self._lock:
            self.failures.append((key, stage, reason))


def check_failures(stats: ExtractionStats, max_failures: float, num_utterances: int) -> None:
    """Check that no more utterances failed than ``max_failures`` allows.

    Args:
        stats: counts so far.
        max_failures: values below 1 are a fraction of ``num_utterances``, other values a count.
        num_utterances: number of planned utterances.

    Raises:
        WorkFailed: more utterances failed.
    """
    allowed = math.ceil(max_failures * num_utterances) if max_failures < 1 else int(max_failures)
    if len(stats.failures) > allowed:
        first = "; ".join(f"{key}: {reason}" for key, _, reason in stats.failures[:5])
        raise WorkFailed(
            f"{len(stats.failures)} of {num_utterances} utterances failed, more than max_failures={max_failures:g} "
            f"allows ({first}): fix the audio or raise max_failures, then rerun the same command"
        )
