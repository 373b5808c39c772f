"""What a report says first: whether the language model uses the audio, and which figures are bad.

Takes the metrics of an evaluation; returns sentences and tiles. The interval decides, not the mean: an audio gain whose
95 % interval includes 0 is no evidence of listening, however large its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from train.report.page import format_interval

MIN_AUDIO_GAIN = 0.1  # nats per token; with less, the report says that the model hardly listens
MANY_HALLUCINATIONS = 0.5  # share of silent inputs answered with words that is called bad


class Tile(NamedTuple):
    """A figure at the top of a page; ``warning`` says in a few words what is bad about it."""

    label: str
    value: str
    unit: str
    warning: str = ""


def listens(metrics: Mapping[str, Any]) -> bool:
    """Return whether the audio gain is evidence that the audio is used: above ``MIN_AUDIO_GAIN``, interval above 0."""
    gain, low = metrics.get("audio_gain"), _interval(metrics)[0]
    return gain is not None and gain >= MIN_AUDIO_GAIN and (low is None or low > 0)


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return the first sentences of a run's report."""
    gain, (low, high) = metrics.get("audio_gain"), _interval(metrics)
    first = _better_without(metrics)
    if gain is None:
        return first or "Not evaluated yet."
    shown = f"{gain:+.2f} nats per token"
    interval = f", 95 % interval {format_interval(metrics, 'audio_gain', signed=True)}" if low is not None else ""
    if listens(metrics):
        said = f"The matching audio lowers the loss by {gain:.2f} nats per token{interval}."
    elif high is not None and high < 0:
        said = f"It does not listen: the matching audio raises the loss (audio gain {shown}{interval})."
    elif low is None or low <= 0:
        includes = ", which includes 0" if low is not None else ""
        said = f"There is no evidence that it listens: audio gain {shown}{interval}{includes}."
    else:
        said = f"It hardly listens: the matching audio lowers the loss by {gain:.2f} nats per token{interval}."
    return f"{first} {said}".lstrip()


def warnings(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return, by metric, what is bad about it in a few words; metrics without a warning are missing."""
    gain = metrics.get("audio_gain")
    found = {
        "audio_gain": gain is not None and not listens(metrics) and "no evidence that it listens",
        "val_loss": _better_without(metrics) and "text alone is better",
        "wer": (metrics.get("wer") or 0) >= 1 and "as many errors as words, or more",
        "cer": (metrics.get("cer") or 0) >= 1 and "as many errors as characters, or more",
        "hallucination_rate": (metrics.get("hallucination_rate") or 0) >= MANY_HALLUCINATIONS
        and "silence is answered with words",
    }
    return {name: what for name, what in found.items() if what}


def _better_without(metrics: Mapping[str, Any]) -> str:
    """A sentence, if the loss is lower without any audio."""
    loss, alone = metrics.get("val_loss"), metrics.get("val_loss_text_only")
    if loss is None or alone is None or alone >= loss:
        return ""
    return f"Text alone is better than text with audio: its held-out loss is {loss - alone:.2f} nats per token lower."


def _interval(metrics: Mapping[str, Any]) -> tuple[float | None, float | None]:
    low, high = (metrics.get("intervals") or {}).get("audio_gain") or (None, None)
    return low, high
