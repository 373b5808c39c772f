"""Time to listening: when a run first uses the audio, in steps of the language model and in seconds.

Takes the records of ``evaluations.jsonl``. A run listens from the first evaluation whose audio gain is at least 1 nat a
token with an interval above 0.5: on a plateau the gain is 0.0, and after it, it passes 1 within a few evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MIN_GAIN, MIN_LOW = 1.0, 0.5  # nats per token: of the audio gain, and of the lower end of its 95 % interval


def time_to_listening(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return ``steps`` and ``seconds`` of the first evaluation that listens, stage 1 included; None if none does.

    ``seconds`` are those of training and evaluation; it is missing in records of earlier versions.
    """
    for record in evaluations:
        gain, bounds = record.get("audio_gain"), (record.get("intervals") or {}).get("audio_gain")
        if gain is not None and bounds and gain >= MIN_GAIN and bounds[0] > MIN_LOW:
            found = {"steps": record["step"], "seconds": record.get("elapsed")}
            return {name: value for name, value in found.items() if value is not None}
    return None
