"""Does the language model listen? Held-out loss with the right audio, with another's, with none, and decoded text.

In: a model and held-out utterances. Out: an :class:`Evaluation`. All losses are nats per target token, over all
utterances; every figure is defined in the module of ``train/measures/`` that computes it.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from shards.disk import make_folder, told
from shards.errors import UserError
from train import runs
from train.config import TrainConfig
from train.data import Utterances, open_data
from train.device import choose_device, choose_dtype
from train.distributed import Group
from train.judged import judged_on
from train.measures.further import Further, look_further
from train.measures.intervals import Interval, table_intervals
from train.measures.losses import losses
from train.measures.reader import Reader, Stopped, derangement
from train.measures.space import write_space
from train.measures.utterances import cache_ids, utterance_table, write_utterances
from train.measures.words import Edits, Sample, corpus_edits, edit_columns, make_sample
from train.model import AudioLM

__all__ = ["Evaluation", "Stopped", "evaluate", "evaluate_run"]

JUDGE_KEYS = ("val.limit", "dtype")  # beside the free ones, what may differ between training and judging
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


def evaluate_run(
    run: Path, config: TrainConfig, cache: str | None = None, group: Group | None = None
) -> dict[str, Any]:
    """Judge a finished run on what it held out, or on ``cache``; the keys of its ``summary.json`` with new figures.

    Of a cache that the run trained on only the held-out rows are used. What tells about the training (``steps``,
    ``seconds`` …) stays as it was. The counts of the utterances go to the run's folder with the figures, or for
    another ``cache`` to ``judged/<manifest id>/`` below it, and the report shows them.

    Every process of ``group`` calls this and does its part of the batches; rank 0 writes.

    Raises:
        UserError: the run is not finished, ``cache`` holds other features, or nothing was held out.
    """
    group = group or Group()
    with group.together():
        utterances = _to_judge(run, config, cache)
        device = choose_device(group.device(config.device))
        model = runs.load_model(run, config, device, choose_dtype(config.dtype, device))
    manifests = [each.manifest_id for each in utterances.caches]
    group.agree({"choice of utterances": [manifests, utterances.rows.tolist()]})
    result = evaluate(
        model,
        utterances,
        batch_size=config.eval_batch,
        max_frames=config.batch.max_frames,
        decode=config.decode_limit,
        max_new_tokens=config.max_new_tokens,
        whole=True,
        retrieval=config.retrieval_limit,
        group=group,
    )
    caches = [str(each.path) for each in utterances.caches]
    with group.together():
        if group.is_first:
            _keep(run, run if cache is None else run / runs.JUDGED / manifests[0][:8], result, caches)
    return {**runs.read_json(run / "summary.json"), **result.figures(), "judged_on": caches}


def _to_judge(run: Path, config: TrainConfig, cache: str | None) -> Utterances:
    """What ``run`` held out, or what it may be judged on in ``cache``."""
    if not (run / "summary.json").is_file():
        raise UserError(f"'{run}' is not finished: go on with python -m train fit --resume {run}")
    changed = [key for key in runs.run_config(run).differences(config) if not key.startswith(JUDGE_KEYS)]
    if changed:
        raise UserError(f"'{run}' was trained with other settings ({'; '.join(changed)}): leave these keys alone")
    about = runs.run_caches(run)
    if cache is None:
        utterances = open_data(config).held_out
        if not len(utterances):
            raise UserError(f"'{run}' held nothing out: name a cache to judge it on with --cache")
    else:
        utterances = judged_on(cache, config, about)
    return utterances


def _keep(run: Path, folder: Path, result: Evaluation, caches: list[str]) -> None:
    """What was judged, in ``folder``, and a new report of the run that shows it."""
    from train.report import write_report

    with told("writing what was judged", folder):
        make_folder(folder)
    result.write(folder)
    runs.write_json(folder / runs.FIGURES, {**result.record(), "judged_on": caches})
    write_report(run)


def _decode(model: AudioLM, chosen: Utterances, reader: Reader, max_new_tokens: int) -> dict[int, Sample]:
    """Greedy decoding of ``chosen``, by their index and in their own order."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[tuple[int, str]]:
        return list(zip(readers, model.generate(features, mask, max_new_tokens), strict=True))

    wanted = [reader.place[int(row)] for row in chosen.rows]
    decoded = dict(pair for batch in reader.each(wanted, wanted, work) for pair in batch)
    return {i: make_sample(reader.keys[i], reader.texts[i], decoded[i].strip()) for i in wanted}
