"""Does the language model listen? Held-out loss with the right audio, with another's, with none, and decoded text.

In: a model and held-out utterances. Out: an :class:`Evaluation`. All losses are nats per target token, over all
utterances; every figure is defined in the module of ``train/evaluation/`` that computes it.

| figure | what it says | cost, in evaluations of the loss |
|---|---|---|
| ``val_loss`` | hearing the utterance itself | 1 |
| ``val_loss_shuffled`` | hearing another utterance: a derangement in which no text meets an equal text | 1 |
| ``audio_gain`` | shuffled minus matched: what the model takes from the audio | |
| ``wer``, ``cer`` | corpus error rates of greedy decoding, with insertions, deletions, substitutions | decoding |
| ``projector_rms_ratio`` | RMS of the soft tokens over RMS of the LM's embeddings | |
| *whole:* ``val_loss_silent``, ``silent_gain`` | hearing silence; silent minus matched | 1, and the encoder once |
| ``val_loss_text_only``, ``text_only_gain`` | with nothing where the audio would stand | less than 1 |
| ``hallucination_rate`` | share of 16 silent inputs that are answered with words | decoding 16 |
| ``retrieval`` | right first choices among 16 texts, by likelihood and pooled embedding | 16 of ``retrieval_limit`` |
| ``space.json`` | nearest vocabulary tokens of soft tokens; PCA among the LM's embeddings | next to none |

``intervals`` holds 95 % bootstrap intervals over utterances. Evaluations on the way leave out what is marked *whole*.
The counts of every utterance go to ``utterances.parquet``.

    python -m train evaluate runs/demo --cache cache/other/… --json other.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from train.data.caches import Utterances
from train.distributed.group import Group
from train.evaluation.batches import Reader, Stopped, derangement
from train.evaluation.bootstrap import Interval, table_intervals
from train.evaluation.embedding_space import look, write_space
from train.evaluation.error_rates import Edits, Sample, corpus_edits, edit_columns, make_sample
from train.evaluation.held_out_loss import Losses, losses, text_only_losses
from train.evaluation.retrieval import retrieve
from train.evaluation.silence import listen_to_silence, record_silence
from train.evaluation.utterance_table import cache_ids, utterance_table, write_utterances
from train.model.audio_lm import AudioLM

__all__ = ["Evaluation", "Stopped", "evaluate"]

KEPT_SAMPLES = 24  # decoded utterances that an evaluation's record keeps


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per target token, error rates as fractions; None where the set cannot give the figure."""

    val_loss: float
    val_loss_shuffled: float | None  # None: one utterance, or one text that fills more than half of the set
    wer: float | None
    cer: float | None
    projector_rms_ratio: float  # RMS of the soft tokens over RMS of the LM's embeddings
    n_val: int
    n_decoded: int
    n_without_reference: int  # decoded, and left out of WER and CER: the normalised reference is empty
    eval_seconds: float
    table: pa.Table  # utterances.parquet: the counts of every utterance
    samples: list[Sample] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95 % over utterances, by the figure's name
    more: dict[str, Any] = field(default_factory=dict)  # further figures, by the names of summary.json
    space: dict[str, Any] | None = None  # space.json: soft tokens among the LM's embeddings

    @property
    def audio_gain(self) -> float | None:
        """``val_loss_shuffled - val_loss``."""
        return None if self.val_loss_shuffled is None else self.val_loss_shuffled - self.val_loss

    def figures(self) -> dict[str, Any]:
        """The figures by the names of ``summary.json``, without samples."""
        names = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio",
                 "n_val", "n_decoded", "n_without_reference", "eval_seconds")  # fmt: skip
        bounds = {name: [bound.low, bound.high] for name, bound in self.intervals.items()}
        return {**{name: getattr(self, name) for name in names}, "intervals": bounds, **self.more}

    def record(self) -> dict[str, Any]:
        """:meth:`figures` and the first samples."""
        return {**self.figures(), "samples": [sample.record() for sample in self.samples[:KEPT_SAMPLES]]}

    def write(self, folder: Path) -> None:
        """``utterances.parquet`` into ``folder``, and ``space.json`` where the evaluation looked there."""
        write_utterances(folder, self.table)
        if self.space is not None:
            write_space(folder, self.space)


def evaluate(
    model: AudioLM,
    utterances: Utterances,
    *,
    batch_size: int = 16,
    max_frames: int | None = None,
    decode: int = 200,
    max_new_tokens: int = 64,
    whole: bool = False,
    retrieval: int = 0,
    stop: Callable[[], bool] = lambda: False,
    group: Group | None = None,
) -> Evaluation:
    """Judge ``model`` on ``utterances``; decodes at most ``decode`` of them. Draws no random numbers.

    ``whole`` adds what an evaluation on the way leaves out (see the module); ``retrieval`` is the most utterances that
    are told apart, none when 0. Every process of ``group`` calls this with the same arguments, does its part of the
    batches, and gets the same figures, those of a single process.

    Raises:
        Stopped: ``stop()`` became true on any rank.
    """
    if not len(utterances):
        raise ValueError("nothing to evaluate on")
    start = time.perf_counter()
    with _judging(model):
        reader = Reader(utterances, batch_size, max_frames, stop, group or Group())
        matched = losses(model, reader, range(len(reader)))
        other = derangement(reader.texts)
        shuffled = None if other is None else losses(model, reader, other)
        decoded = _decode(model, utterances.first(decode), reader, max_new_tokens) if decode else {}
        further = look_further(model, reader, matched, max_new_tokens, retrieval) if whole else Further()
    columns = {
        "key": reader.keys,
        "cache": cache_ids(utterances),
        "frames": reader.frames,
        "tokens": matched.tokens,
        "nats": matched.nats,
        "reference": reader.texts,
        **edit_columns([decoded.get(i) for i in range(len(reader))]),
        **({} if shuffled is None else {"nats_shuffled": shuffled.nats}),
        **({} if other is None else {"heard": [reader.keys[i] for i in other]}),
        **further.columns,
    }
    return _evaluation(
        columns,
        list(decoded.values()),
        further,
        val_loss=matched.loss,
        val_loss_shuffled=None if shuffled is None else shuffled.loss,
        projector_rms_ratio=matched.soft_rms / model.lm.embedding_rms,
        eval_seconds=time.perf_counter() - start,
    )


@contextmanager
def _judging(model: AudioLM) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _evaluation(columns: dict[str, Any], samples: list[Sample], further: Further, **figures: Any) -> Evaluation:
    """What the counts of the utterances and the decoded samples add to ``figures``."""
    words, characters = (corpus_edits([getattr(s, name) for s in samples]) for name in ("words", "characters"))
    table = utterance_table(columns)
    return Evaluation(
        **figures,
        wer=None if words is None else words.rate,
        cer=None if characters is None else characters.rate,
        n_val=len(table),
        n_decoded=len(samples),
        n_without_reference=sum(sample.wer is None for sample in samples),
        table=table,
        samples=samples,
        intervals=table_intervals(table),
        more={"word_edits": _counts(words), "character_edits": _counts(characters), **further.figures},
        space=further.space,
    )


def _counts(edits: Edits | None) -> dict[str, int] | None:
    return None if edits is None else asdict(edits)


def _decode(model: AudioLM, chosen: Utterances, reader: Reader, max_new_tokens: int) -> dict[int, Sample]:
    """Greedy decoding of ``chosen``, by their index and in their own order."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[tuple[int, str]]:
        return list(zip(readers, model.generate(features, mask, max_new_tokens), strict=True))

    wanted = [reader.place[int(row)] for row in chosen.rows]
    decoded = dict(pair for batch in reader.each(wanted, wanted, work) for pair in batch)
    return {i: make_sample(reader.keys[i], reader.texts[i], decoded[i].strip()) for i in wanted}


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
