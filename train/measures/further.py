"""What only a whole evaluation asks: silence, text alone, retrieval, and where soft tokens lie.

In: a model, the reader of its held-out utterances, the matched losses. Out: :class:`Further`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.measures.losses import Losses, losses, text_only_losses
from train.measures.reader import Reader
from train.measures.retrieval import retrieve
from train.measures.silence import listen_to_silence, record_silence
from train.measures.space import look
from train.model import AudioLM


@dataclass(frozen=True)
class Further:
    """Figures by the names of ``summary.json``, columns of ``utterances.parquet``, the tree of ``space.json``."""

    figures: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    space: dict[str, Any] | None = None


def look_further(model: AudioLM, reader: Reader, matched: Losses, max_new_tokens: int, retrieval: int) -> Further:
    """All of it; ``retrieval`` is the most utterances that are told apart."""
    silence = record_silence(reader.utterances, str(model.lm.device), reader.group)
    silent = losses(model, reader, range(len(reader)), lambda index: silence.audio(reader.frames[index]))
    text_only = text_only_losses(model, reader)
    spoken = listen_to_silence(model, reader, silence, max_new_tokens)
    chosen = [reader.place[int(row)] for row in reader.utterances.first(retrieval).rows] if retrieval else []
    found = retrieve(model, reader, chosen)
    figures = {
        "val_loss_silent": silent.loss,
        "silent_gain": silent.loss - matched.loss,
        "silence": silence.source,
        "val_loss_text_only": text_only.loss,
        "text_only_gain": text_only.loss - matched.loss,
        **spoken.figures(),
        "retrieval": None if found is None else found.figures(),
    }
    columns = {"nats_silent": silent.nats, "nats_text_only": text_only.nats}
    return Further(figures, columns, look(model, reader))
