"""What an extraction has done so far, and when failures are too many.

In: utterances that were encoded or failed, by any thread. Out: counts for the summary and the commit records.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

from pipeline.profile import StageTimes
from shards.errors import WorkFailed


@dataclass
class ExtractionStats:
    """Counts of a run; failures are shared by all its shards. Any thread may :meth:`add` and :meth:`fail`."""

    utterances: int = 0
    audio_seconds: float = 0.0
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # key, stage, reason
    stage_times: StageTimes = field(default_factory=StageTimes)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, utterances: int, audio_seconds: float) -> None:
        """More utterances are encoded, or failed."""
        with self._lock:
            self.utterances += utterances
            self.audio_seconds += audio_seconds

    def add_failure(self, key: str, stage: str, reason: str) -> None:
        """An utterance failed."""
        with self._lock:
            self.failures.append((key, stage, reason))


def check_failures(stats: ExtractionStats, max_failures: float, num_utterances: int) -> None:
    """Stop a run that is going wrong.

    Args:
        max_failures: below 1 a fraction of the ``planned`` utterances, else a count.

    Raises:
        WorkFailed: there are more.
    """
    allowed = math.ceil(max_failures * num_utterances) if max_failures < 1 else int(max_failures)
    if len(stats.failures) > allowed:
        first = "; ".join(f"{key}: {reason}" for key, _, reason in stats.failures[:5])
        raise WorkFailed(
            f"{len(stats.failures)} of {num_utterances} utterances failed, more than max_failures={max_failures:g} "
            f"allows ({first}): mend the audio or raise max_failures, then run the same command again"
        )
