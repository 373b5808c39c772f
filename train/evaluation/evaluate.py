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
| *complete:* ``val_loss_silent``, ``silent_gain`` | hearing silence; silent minus matched | 1, and the encoder once |
| ``val_loss_text_only``, ``text_only_gain`` | with nothing where the audio would stand | less than 1 |
| ``hallucination_rate`` | share of 16 silent inputs that are answered with words | decoding 16 |
| ``retrieval`` | right first choices among 16 texts, by likelihood and pooled embedding | 16 of ``retrieval_limit`` |
| ``space.json`` | nearest vocabulary tokens of soft tokens; PCA among the LM's embeddings | next to none |

``intervals`` holds 95 % bootstrap intervals over utterances. Evaluations during training leave out what is marked
*complete*. The counts of every utterance go to ``utterances.parquet``, by which ``paired_difference`` of
``train/evaluation/bootstrap.py`` compares two runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from train.config.train import TrainConfig
from train.data.caches import Utterances
from train.distributed.group import ProcessGroup
from train.evaluation.batches import Stopped, UtteranceReader, derangement
from train.evaluation.bootstrap import Interval, table_intervals
from train.evaluation.embedding_space import measure_embedding_space, write_embedding_space
from train.evaluation.error_rates import Edits, Sample, corpus_edits, edit_columns, make_sample
from train.evaluation.held_out_loss import HeldOutLosses, held_out_losses, text_only_losses
from train.evaluation.retrieval import retrieve
from train.evaluation.silence import encode_silence, measure_hallucination
from train.evaluation.utterance_table import cache_ids, utterance_table, write_utterances
from train.model.audio_lm import AudioLM, ModelList

__all__ = ["EvalConfig", "Evaluation", "Stopped", "evaluate", "evaluate_models"]

MAX_SAMPLES = 24  # decoded utterances that an evaluation's record keeps


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation. Models with equal settings can be evaluated together."""

    limit: int | None = None  # most utterances; None: all
    batch_size: int = 16
    max_frames: int | None = None  # of a batch, padding included
    decode_limit: int = 200  # most utterances that are decoded
    max_new_tokens: int = 64  # of a decoded text
    complete: bool = False  # also silence, text alone, retrieval and the embedding space
    retrieval_limit: int = 0  # most utterances in retrieval; 0: none

    @classmethod
    def during_training(cls, config: TrainConfig) -> EvalConfig:
        """The evaluation of a run every ``eval_every`` steps."""
        return cls(
            limit=config.eval_limit,
            batch_size=config.eval_batch_size,
            max_frames=config.batch.max_frames,
            decode_limit=config.decode_samples,
            max_new_tokens=config.max_new_tokens,
        )

    @classmethod
    def final(cls, config: TrainConfig) -> EvalConfig:
        """The evaluation of a finished run."""
        return cls(
            batch_size=config.eval_batch_size,
            max_frames=config.batch.max_frames,
            decode_limit=config.decode_limit,
            max_new_tokens=config.max_new_tokens,
            complete=True,
            retrieval_limit=config.retrieval_limit,
        )


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
    extra_metrics: dict[str, Any] = field(default_factory=dict)  # further figures, by the names of summary.json
    embedding_space: dict[str, Any] | None = None  # space.json: soft tokens among the LM's embeddings

    @property
    def audio_gain(self) -> float | None:
        """``val_loss_shuffled - val_loss``."""
        return None if self.val_loss_shuffled is None else self.val_loss_shuffled - self.val_loss

    def metrics(self) -> dict[str, Any]:
        """The figures by the names of ``summary.json``, without samples."""
        names = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio",
                 "n_val", "n_decoded", "n_without_reference", "eval_seconds")  # fmt: skip
        bounds = {name: [bound.low, bound.high] for name, bound in self.intervals.items()}
        return {**{name: getattr(self, name) for name in names}, "intervals": bounds, **self.extra_metrics}

    def record(self) -> dict[str, Any]:
        """:meth:`figures` and the first samples."""
        return {**self.metrics(), "samples": [sample.record() for sample in self.samples[:MAX_SAMPLES]]}

    def write(self, folder: Path) -> None:
        """``utterances.parquet`` into ``folder``, and ``space.json`` where the evaluation looked there."""
        write_utterances(folder, self.table)
        if self.embedding_space is not None:
            write_embedding_space(folder, self.embedding_space)


@dataclass(frozen=True)
class _Extras:
    """What a complete evaluation adds: figures by the names of ``summary.json``, columns of ``utterances.parquet``,
    the tree of ``space.json``."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    embedding_space: dict[str, Any] | None = None


def evaluate(
    model: AudioLM,
    utterances: Utterances,
    config: EvalConfig | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``utterances``. Draws no random numbers.

    Every process of ``group`` calls this with the same arguments, does its part of the batches, and gets the same
    figures, those of a single process.

    Raises:
        Stopped: ``stop()`` became true on any rank.
    """
    return evaluate_models(ModelList([model]), utterances, config or EvalConfig(), stop=stop, group=group)[0]


def evaluate_models(
    models: ModelList,
    utterances: Utterances,
    config: EvalConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
    group: ProcessGroup | None = None,
) -> list[Evaluation]:
    """:func:`evaluate` of each of ``models``: every batch is read once, and its rows share passes of the LM."""
    utterances = utterances.subset(config.limit)
    if not len(utterances):
        raise ValueError("nothing to evaluate on")
    began = time.perf_counter()
    count = len(models.models)
    with _evaluation_mode(models.models):
        reader = UtteranceReader(utterances, config.batch_size, config.max_frames, stop, group or ProcessGroup())
        matched = held_out_losses(models, reader, range(len(reader)))
        other = derangement(reader.texts)
        shuffled = [None] * count if other is None else held_out_losses(models, reader, other)
        decoded = _decode(models, reader, config)
        extras = _extras(models, reader, matched, config) if config.complete else [_Extras()] * count
    seconds = time.perf_counter() - began
    heard = {} if other is None else {"heard": [reader.keys[i] for i in other]}
    return [
        _evaluation(model, reader, heard, seconds, *own)
        for model, own in zip(models.models, zip(matched, shuffled, decoded, extras, strict=True), strict=True)
    ]


@contextmanager
def _evaluation_mode(models: Sequence[AudioLM]) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is in the mode that it was in."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _decode(models: ModelList, reader: UtteranceReader, config: EvalConfig) -> list[dict[int, Sample]]:
    """Greedy decoding of the first utterances by each model, by their index and in their own order."""
    if not config.decode_limit:
        return [{} for _ in models.models]

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[Any]:
        texts = models.generate(features, mask, config.max_new_tokens)
        return [list(zip(readers, own, strict=True)) for own in texts]

    wanted = [reader.index_of_row[int(row)] for row in reader.utterances.subset(config.decode_limit).rows]
    batches = reader.map_batches(wanted, wanted, work)
    found = [dict(pair for batch in own for pair in batch) for own in zip(*batches, strict=True)]
    return [{i: make_sample(reader.keys[i], reader.texts[i], texts[i].strip()) for i in wanted} for texts in found]


def _extras(
    models: ModelList, reader: UtteranceReader, matched: Sequence[HeldOutLosses], config: EvalConfig
) -> list[_Extras]:
    """What evaluations during training leave out."""
    silence = encode_silence(reader.utterances, str(models.models[0].lm.device), reader.group)
    silent = held_out_losses(
        models, reader, range(len(reader)), lambda index: silence.features_of_length(reader.frames[index])
    )
    text_only = text_only_losses(models, reader)
    spoken = measure_hallucination(models, reader, silence, config.max_new_tokens)
    limit = config.retrieval_limit
    chosen = [reader.index_of_row[int(row)] for row in reader.utterances.subset(limit).rows] if limit else []
    found = []
    for model, mine, without, nothing, said in zip(models.models, matched, silent, text_only, spoken, strict=True):
        retrieved = retrieve(model, reader, chosen)
        metrics = {
            "val_loss_silent": without.loss,
            "silent_gain": without.loss - mine.loss,
            "silence": silence.source,
            "val_loss_text_only": nothing.loss,
            "text_only_gain": nothing.loss - mine.loss,
            **said.metrics(),
            "retrieval": None if retrieved is None else retrieved.metrics(),
        }
        columns = {"nats_silent": without.nll, "nats_text_only": nothing.nll}
        found.append(_Extras(metrics, columns, measure_embedding_space(model, reader)))
    return found


def _evaluation(
    model: AudioLM,
    reader: UtteranceReader,
    shuffled_keys: dict[str, list[str]],
    seconds: float,
    matched: HeldOutLosses,
    shuffled: HeldOutLosses | None,
    decoded: dict[int, Sample],
    extras: _Extras,
) -> Evaluation:
    """The figures of one model."""
    samples = list(decoded.values())
    words, characters = (corpus_edits([getattr(s, name) for s in samples]) for name in ("words", "characters"))
    table = utterance_table(
        {
            "key": reader.keys,
            "cache": cache_ids(reader.utterances),
            "frames": reader.frames,
            "tokens": matched.tokens,
            "nats": matched.nll,
            "reference": reader.texts,
            **edit_columns([decoded.get(i) for i in range(len(reader))]),
            **({} if shuffled is None else {"nats_shuffled": shuffled.nll}),
            **shuffled_keys,
            **extras.columns,
        }
    )
    return Evaluation(
        val_loss=matched.loss,
        val_loss_shuffled=None if shuffled is None else shuffled.loss,
        wer=None if words is None else words.rate,
        cer=None if characters is None else characters.rate,
        projector_rms_ratio=matched.soft_rms / model.lm.embedding_rms,
        n_val=len(table),
        n_decoded=len(samples),
        n_without_reference=sum(sample.wer is None for sample in samples),
        eval_seconds=seconds,
        table=table,
        samples=samples,
        intervals=table_intervals(table),
        extra_metrics={"word_edits": _counts(words), "character_edits": _counts(characters), **extras.metrics},
        embedding_space=extras.embedding_space,
    )


def _counts(edits: Edits | None) -> dict[str, int] | None:
    return None if edits is None else asdict(edits)
