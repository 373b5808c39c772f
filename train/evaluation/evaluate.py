"""Does the language model use the audio? Held-out loss with matched, shuffled, silent and no audio, and decoded text.

Takes a model and held-out utterances; returns an :class:`Evaluation`. All losses are in nats per target token over all
utterances. Every metric is defined in the module of ``train/evaluation/`` that computes it.

| metric | meaning | cost, in passes over the held-out set |
|---|---|---|
| ``val_loss`` | loss with the utterance's own audio | 1 |
| ``val_loss_shuffled`` | loss with another utterance's audio, of the same task and with another text | 1 |
| ``audio_gain`` | shuffled minus matched: what the model gains from the audio | |
| ``wer``, ``cer`` | corpus error rates of decoded text, with insertions, deletions, substitutions | decoding |
| ``decoding`` | how it was decoded, unless greedily by the LM | |
| ``languages`` | number of decoded texts by language, unless all are English; see ``languages.py`` | |
| ``projector_rms_ratio`` | RMS of the soft tokens over RMS of the LM's embeddings | |
| *complete:* ``val_loss_silent``, ``silent_gain`` | loss with silence; silent minus matched | 1, and the encoder once |
| ``val_loss_text_only``, ``text_only_gain`` | loss without soft tokens; text only minus matched | less than 1 |
| ``hallucination_rate`` | share of 16 silent inputs whose decoded text has words | decoding 16 |
| ``retrieval`` | retrieval@1 among 16 candidates, by likelihood and pooled embedding | 16 of ``retrieval_limit`` |
| ``space.json`` | nearest vocabulary tokens of soft tokens; PCA among the LM's embeddings | negligible |

With several tasks, ``tasks`` holds the losses and error rates of each, and ``accuracy`` where every reference is one
word. ``intervals`` holds 95 % bootstrap intervals over utterances. Evaluations during training omit the metrics from
*complete* on. Counts per utterance are written to ``utterances.parquet``; ``paired_difference`` in
``train/evaluation/bootstrap.py`` compares two runs by them.
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

from train.config.model import TextConfig
from train.config.train import TrainConfig
from train.data.caches import Utterances
from train.data.text import AS_STORED
from train.distributed.group import ProcessGroup
from train.evaluation.batches import Stopped, UtteranceReader, other_audio
from train.evaluation.bootstrap import Interval, accuracy, table_intervals
from train.evaluation.embedding_space import measure_embedding_space, write_embedding_space
from train.evaluation.error_rates import Edits, Sample, corpus_edits, edit_columns, make_sample
from train.evaluation.held_out_loss import HeldOutLosses, held_out_losses, text_only_losses
from train.evaluation.languages import language_metrics
from train.evaluation.retrieval import retrieve
from train.evaluation.silence import encode_silence, measure_hallucination
from train.evaluation.utterance_table import cache_ids, utterance_table, write_utterances
from train.model.audio_lm import AudioLM, ModelList

__all__ = ["EvalConfig", "Evaluation", "Stopped", "evaluate", "evaluate_models"]

MAX_SAMPLES = 24  # decoded utterances in the record of an evaluation
TASK_METRICS = ("val_loss", "audio_gain", "wer", "cer", "accuracy")


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation. Models with equal settings can be evaluated together."""

    limit: int | None = None  # maximum number of utterances; None: all
    batch_size: int = 16
    max_frames: int | None = None  # maximum frames per batch, including padding
    decode_limit: int = 200  # maximum number of decoded utterances
    max_new_tokens: int = 64  # per decoded utterance
    complete: bool = False  # include silence, text only, retrieval and the embedding space
    retrieval_limit: int = 0  # maximum number of utterances in retrieval; 0: no retrieval
    text: TextConfig = AS_STORED  # form of the references
    language: str | None = None  # of texts whose labels name none; see ``languages.py``

    @classmethod
    def during_training(cls, config: TrainConfig) -> EvalConfig:
        """Return the settings of the evaluation that a run performs every ``eval_every`` steps."""
        return cls(
            limit=config.eval_limit,
            batch_size=config.eval_batch_size,
            max_frames=config.batch.max_frames,
            decode_limit=config.decode_samples,
            max_new_tokens=config.max_new_tokens,
            text=config.text,
            language=config.eval.language,
        )

    @classmethod
    def final(cls, config: TrainConfig) -> EvalConfig:
        """Return the settings of the complete evaluation at the end of a run."""
        return cls(
            batch_size=config.eval_batch_size,
            max_frames=config.batch.max_frames,
            decode_limit=config.decode_limit,
            max_new_tokens=config.max_new_tokens,
            complete=not config.is_stage_one,  # the others ask what a language model makes of the audio
            retrieval_limit=config.retrieval_limit,
            text=config.text,
            language=config.eval.language,
        )


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Losses are in nats per target token, error rates are fractions. A metric that is undefined on this set is None.
    """

    val_loss: float
    val_loss_shuffled: float | None  # None: one utterance, or one text is more than half of each task
    audio_gain: float | None  # val_loss_shuffled minus the loss of the same utterances, in nats per target token
    wer: float | None
    cer: float | None
    projector_rms_ratio: float  # RMS of the soft tokens over RMS of the LM's embeddings
    n_val: int
    n_decoded: int
    n_without_reference: int  # decoded, not in WER and CER: the normalized reference is empty
    eval_seconds: float
    table: pa.Table  # utterances.parquet: counts per utterance
    samples: list[Sample] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95 % over utterances, by metric name
    extra_metrics: dict[str, Any] = field(default_factory=dict)  # named as in summary.json
    embedding_space: dict[str, Any] | None = None  # space.json: soft tokens among the LM's embeddings
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # metrics of each task, if there are several

    def metrics(self) -> dict[str, Any]:
        """Return the metrics, named as in ``summary.json``, without samples."""
        names = ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio",
                 "n_val", "n_decoded", "n_without_reference", "eval_seconds")  # fmt: skip
        bounds = {name: [bound.low, bound.high] for name, bound in self.intervals.items()}
        tasks = {"tasks": self.tasks} if self.tasks else {}
        return {**{name: getattr(self, name) for name in names}, "intervals": bounds, **self.extra_metrics, **tasks}

    def record(self) -> dict[str, Any]:
        """Return :meth:`metrics`, those of the tasks also as ``val_loss/<task>``, and the first MAX_SAMPLES samples."""
        flat = {
            f"{name}/{task}": metrics[name]
            for task, metrics in self.tasks.items()
            for name in TASK_METRICS
            if name in metrics
        }
        return {**self.metrics(), **flat, "samples": [sample.record() for sample in self.samples[:MAX_SAMPLES]]}

    def write(self, folder: Path) -> None:
        """Write ``utterances.parquet`` into ``folder``, and ``space.json`` after a complete evaluation."""
        write_utterances(folder, self.table)
        if self.embedding_space is not None:
            write_embedding_space(folder, self.embedding_space)


@dataclass(frozen=True)
class _Extras:
    """Results that only a complete evaluation has.

    ``metrics`` are named as in ``summary.json``, ``columns`` as in ``utterances.parquet``; ``embedding_space`` is the
    content of ``space.json``.
    """

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
    """Evaluate ``model`` on ``utterances``. The global random state does not change.

    Every process of ``group`` must call this with the same arguments. Each evaluates its share of the batches, and all
    return the same metrics as a single process would.

    Raises:
        Stopped: ``stop()`` returned True on any rank.
        ValueError: there are no utterances.
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
    """Evaluate several models that share one LM; see :func:`evaluate`.

    Every batch is read once, and its rows from all models share the forward passes of the LM.
    """
    utterances = utterances.subset(config.limit)
    if not len(utterances):
        raise ValueError("there are no utterances to evaluate on")
    began = time.perf_counter()
    count = len(models.models)
    with _evaluation_mode(models.models):
        reader = UtteranceReader(
            utterances,
            config.batch_size,
            config.max_frames,
            stop,
            group or ProcessGroup(),
            config.text,
            config.language,
            models.models[0].lm,
        )
        matched = held_out_losses(models, reader, range(len(reader)))
        other = other_audio(reader)
        paired = [i for i, audio in enumerate(other) if audio is not None]
        audio = [i for i in other if i is not None]
        shuffled: Sequence[HeldOutLosses | None] = [None] * count
        if paired:
            shuffled = held_out_losses(models, reader, audio, text_indices=paired, what="other audio")
        decoded = _decode(models, reader, config)
        extras = _extras(models, reader, matched, config) if config.complete else [_Extras()] * count
    seconds = time.perf_counter() - began
    return [
        _evaluation(model, reader, other, seconds, *own)
        for model, own in zip(models.models, zip(matched, shuffled, decoded, extras, strict=True), strict=True)
    ]


@contextmanager
def _evaluation_mode(models: Sequence[AudioLM]) -> Iterator[None]:
    """Disable dropout and gradients; on exit, restore the mode of every module."""
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
    """Decode up to ``decode_limit`` utterances with each model; the samples are keyed by utterance index."""
    if not config.decode_limit:
        return [{} for _ in models.models]

    def decode_batch(text_indices: list[int], features: Tensor, mask: Tensor) -> list[Any]:
        texts = models.generate(features, mask, config.max_new_tokens, [reader.rows[i] for i in text_indices])
        return [list(zip(text_indices, own, strict=True)) for own in texts]

    wanted = [reader.index_of_row[int(row)] for row in reader.utterances.subset(config.decode_limit).rows]
    batches = reader.map_batches(wanted, wanted, decode_batch, what="decode")
    found = [dict(pair for batch in own for pair in batch) for own in zip(*batches, strict=True)]
    return [
        {
            i: make_sample(reader.keys[i], reader.texts[i], texts[i].strip(), reader.tasks[i], reader.languages[i])
            for i in wanted
        }
        for texts in found
    ]


def _extras(
    models: ModelList, reader: UtteranceReader, matched: Sequence[HeldOutLosses], config: EvalConfig
) -> list[_Extras]:
    """Compute, for each model, what evaluations during training omit."""
    silence = encode_silence(reader.utterances, str(models.models[0].lm.device), reader.group)
    silent = held_out_losses(
        models,
        reader,
        range(len(reader)),
        lambda index: silence.features_of_length(reader.frames[index]),
        what="silence",
    )
    text_only = text_only_losses(models, reader)
    hallucinations = measure_hallucination(models, reader, silence, config.max_new_tokens)
    limit = config.retrieval_limit
    chosen = [reader.index_of_row[int(row)] for row in reader.utterances.subset(limit).rows] if limit else []
    found = []
    results = zip(models.models, matched, silent, text_only, hallucinations, strict=True)
    for model, with_audio, with_silence, without_audio, hallucination in results:
        retrieved = retrieve(model, reader, chosen)
        metrics = {
            "val_loss_silent": with_silence.loss,
            "silent_gain": with_silence.loss - with_audio.loss,
            "silence": silence.source,
            "val_loss_text_only": without_audio.loss,
            "text_only_gain": without_audio.loss - with_audio.loss,
            **hallucination.metrics(),
            "retrieval": None if retrieved is None else retrieved.metrics(),
        }
        columns = {"nats_silent": with_silence.nll, "nats_text_only": without_audio.nll}
        found.append(_Extras(metrics, columns, measure_embedding_space(model, reader)))
    return found


def _evaluation(
    model: AudioLM,
    reader: UtteranceReader,
    other: list[int | None],
    seconds: float,
    matched: HeldOutLosses,
    shuffled: HeldOutLosses | None,
    decoded: dict[int, Sample],
    extras: _Extras,
) -> Evaluation:
    """Assemble the results of one model."""
    samples = list(decoded.values())
    paired = [i for i, audio in enumerate(other) if audio is not None]
    nats_shuffled: list[float | None] = [None] * len(reader)
    for i, nll in zip(paired, [] if shuffled is None else shuffled.nll.tolist(), strict=True):
        nats_shuffled[i] = nll
    words, characters = (corpus_edits([getattr(s, name) for s in samples]) for name in ("words", "characters"))
    table = utterance_table(
        {
            "key": reader.keys,
            "cache": cache_ids(reader.utterances),
            "frames": reader.frames,
            "tokens": matched.tokens,
            "nats": matched.nll,
            "reference": reader.texts,
            "nats_shuffled": nats_shuffled,
            "heard": [None if i is None else reader.keys[i] for i in other],
            "task": reader.tasks,
            "prompt": [row.prompt for row in reader.rows],
            "language": reader.languages,
            **edit_columns([decoded.get(i) for i in range(len(reader))]),
            **extras.columns,
        }
    )
    return Evaluation(
        val_loss=matched.loss,
        val_loss_shuffled=None if shuffled is None else shuffled.loss,
        audio_gain=None if shuffled is None else shuffled.loss - matched.loss_of(paired),
        wer=None if words is None else words.rate,
        cer=None if characters is None else characters.rate,
        projector_rms_ratio=matched.soft_rms / model.lm.embedding_rms,
        n_val=len(table),
        n_decoded=len(samples),
        n_without_reference=sum(sample.characters is None for sample in samples),
        eval_seconds=seconds,
        table=table,
        samples=samples,
        intervals=table_intervals(table),
        extra_metrics={
            "word_edits": _counts(words),
            "character_edits": _counts(characters),
            **({"decoding": model.decode.description} if model.decode.ctc_weight else {}),
            **language_metrics([reader.languages[i] for i in decoded]),
            **extras.metrics,
        },
        embedding_space=extras.embedding_space,
        tasks=_by_task(table, reader.tasks),
    )


def _by_task(table: pa.Table, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each task, named as in ``summary.json``; {} if there is only one task."""
    names = sorted(set(tasks))
    found: dict[str, dict[str, Any]] = {}
    for name in names if len(names) > 1 else []:
        own = table.filter(pa.array([task == name for task in tasks]))
        intervals, right = table_intervals(own), accuracy(own)
        if right is not None:
            intervals["accuracy"] = right
        found[name] = {
            "n_val": len(own),
            "n_decoded": len(own["hypothesis"].drop_null()),
            **{metric: bounds.mean for metric, bounds in intervals.items()},
            "intervals": {metric: [bounds.low, bounds.high] for metric, bounds in intervals.items()},
        }
    return found


def _counts(edits: Edits | None) -> dict[str, int] | None:
    return None if edits is None else asdict(edits)
