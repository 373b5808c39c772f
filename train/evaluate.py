"""Does the language model listen? Held-out loss with the right audio, with another's audio, and decoded text.

In: a model and held-out utterances. Out: an :class:`Evaluation`. ``val_loss`` is nats per target token;
``val_loss_shuffled`` is the same with every utterance hearing another utterance's features (a derangement of the whole
set in which no text meets an equal text); their difference, ``audio_gain``, is what the model takes from the audio.
Word and character error rates are corpus rates of greedy decoding, both sides through Whisper's English normaliser.

    python -m train evaluate runs/demo --cache cache/other/… --json other.json
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.reader import Cache
from train import runs
from train.config import TrainConfig
from train.data import Utterances, find_cache, judged_on, open_data, pad
from train.device import choose_device, choose_dtype
from train.distributed import Group
from train.model import AudioLM

JUDGE_KEYS = ("val.limit", "dtype")  # beside the free ones, what may differ between training and judging
KEPT_SAMPLES = 24  # decoded utterances that an evaluation's record keeps


class Stopped(Exception):
    """The caller's ``stop`` asked for an end before the evaluation was done."""


@dataclass(frozen=True)
class Sample:
    """One decoded utterance; ``wer`` is None where the normalised reference is empty."""

    key: str
    reference: str
    hypothesis: str
    wer: float | None


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
    samples: list[Sample] = field(default_factory=list)

    @property
    def audio_gain(self) -> float | None:
        """``val_loss_shuffled - val_loss``."""
        return None if self.val_loss_shuffled is None else self.val_loss_shuffled - self.val_loss

    def figures(self) -> dict[str, Any]:
        """The figures by the names of ``summary.json``, without samples."""
        tree = asdict(self)
        del tree["samples"]
        return {"val_loss": tree.pop("val_loss"), "val_loss_shuffled": tree.pop("val_loss_shuffled"),
                "audio_gain": self.audio_gain, **tree}  # fmt: skip

    def record(self) -> dict[str, Any]:
        """:meth:`figures` and the first samples."""
        return {**self.figures(), "samples": [asdict(sample) for sample in self.samples[:KEPT_SAMPLES]]}


def evaluate(
    model: AudioLM,
    utterances: Utterances,
    *,
    batch_size: int = 16,
    max_frames: int | None = None,
    decode: int = 200,
    max_new_tokens: int = 64,
    stop: Callable[[], bool] = lambda: False,
    group: Group | None = None,
) -> Evaluation:
    """Judge ``model`` on ``utterances``; decodes at most ``decode`` of them. Draws no random numbers.

    Every process of ``group`` calls this with the same arguments, does its part of the batches, and gets the same
    figures, those of a single process.

    Raises:
        Stopped: ``stop()`` became true on any rank.
    """
    group = group or Group()
    if not len(utterances):
        raise ValueError("nothing to evaluate on")
    start = time.perf_counter()
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            reader = _Reader(utterances, batch_size, max_frames, stop, group)
            own = list(range(len(utterances)))
            loss, rms = _loss(model, reader, own)
            other = derangement(reader.texts)
            shuffled = None if other is None else _loss(model, reader, other)[0]
            samples = _decode(model, utterances.first(decode), reader, max_new_tokens) if decode else []
    finally:
        for module, mode in training.items():
            module.training = mode
    wer, cer = error_rates(samples)
    return Evaluation(
        val_loss=loss,
        val_loss_shuffled=shuffled,
        wer=wer,
        cer=cer,
        projector_rms_ratio=rms / model.lm.embedding_rms,
        n_val=len(utterances),
        n_decoded=len(samples),
        n_without_reference=sum(sample.wer is None for sample in samples),
        eval_seconds=time.perf_counter() - start,
        samples=samples,
    )


def evaluate_run(run: Path, config: TrainConfig, cache: str | None = None) -> dict[str, Any]:
    """Judge a finished run on what it held out, or on ``cache``; the keys of its ``summary.json`` with new figures.

    Of a cache that the run trained on only the held-out rows are used. What tells about the training (``steps``,
    ``seconds`` …) stays as it was.

    Raises:
        UserError: the run is not finished, ``cache`` holds other features, or nothing was held out.
    """
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
        path = find_cache(cache)
        if path is None:
            raise UserError(f"there is no complete cache at '{cache}': correct --cache, or make it with `make extract`")
        opened = Cache.open(path)
        utterances = judged_on(opened, config, [each["manifest_id"] for each in about["caches"]])
    found = utterances.caches[0]
    if found.feature_id != about["feature_id"]:
        raise UserError(
            f"'{found.path}' holds other features than the run was trained on "
            f"({'; '.join(found.spec.differences(about['spec']))}): extract the cache with the run's encoder settings"
        )
    device = choose_device(config.device)
    model = runs.load_model(run, config, device, choose_dtype(config.dtype, device))
    result = evaluate(
        model,
        utterances,
        batch_size=config.eval_batch,
        max_frames=config.batch.max_frames,
        decode=config.decode_limit,
        max_new_tokens=config.max_new_tokens,
    )
    return {
        **runs.read_json(run / "summary.json"),
        **result.figures(),
        "judged_on": [str(each.path) for each in utterances.caches],
    }


def derangement(texts: Sequence[str], seed: int = 0) -> list[int] | None:
    """For each utterance the one whose audio it hears instead: a permutation in which no text meets an equal text.

    Utterances are put in a seeded order with equal texts side by side, and the order is turned by the size of the
    largest group: that is a solution whenever there is one. None when there is none.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(texts)).tolist():
        groups[texts[index]].append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(texts) or not texts:
        return None
    order = [index for group in groups.values() for index in group]
    other = [0] * len(texts)
    for place, index in enumerate(order):
        other[index] = order[(place + largest) % len(order)]
    return other


def error_rates(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """Corpus WER and CER of the samples that have a reference after normalisation; None without any."""
    import jiwer

    normalise = _normaliser()
    pairs = [(normalise(s.reference), normalise(s.hypothesis)) for s in samples if s.wer is not None]
    if not pairs:
        return None, None
    references, hypotheses = map(list, zip(*pairs, strict=True))
    return jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses)


def make_sample(key: str, reference: str, hypothesis: str) -> Sample:
    """A sample with its own word error rate."""
    import jiwer

    normalise = _normaliser()
    said = normalise(reference)
    has_words = any(letter.isalnum() for letter in said)  # the normaliser makes "…" a lone point
    return Sample(key, reference, hypothesis, jiwer.wer(said, normalise(hypothesis)) if has_words else None)


_NORMALISER: list[Callable[[str], str]] = []


def _normaliser() -> Callable[[str], str]:
    """Whisper's English normaliser, built once: it reads a table of spellings."""
    if not _NORMALISER:
        from whisper_normalizer.english import EnglishTextNormalizer

        _NORMALISER.append(EnglishTextNormalizer())
    return _NORMALISER[0]


class _Reader:
    """Reads chosen utterances in padded batches of like lengths."""

    def __init__(
        self,
        utterances: Utterances,
        batch_size: int,
        max_frames: int | None,
        stop: Callable[[], bool],
        group: Group,
    ) -> None:
        columns = utterances.columns("key", "text", "frames")
        self.keys, self.texts, self.frames = columns["key"], columns["text"], columns["frames"]
        self.place = {int(row): index for index, row in enumerate(utterances.rows)}
        self.utterances, self.batch_size, self.max_frames = utterances, batch_size, max_frames
        self.stop, self.group = stop, group

    def each(
        self, heard: Sequence[int], readers: Sequence[int], work: Callable[[list[int], Tensor, Tensor], Any]
    ) -> list[Any]:
        """``work(readers, features [B, T, C], mask [B, T])`` of every batch, in the order of the batches.

        Utterance ``readers[i]`` hears the audio of ``heard[i]``. Each rank works on its share of the batches, and all
        get all results, which must be what JSON can hold.
        """
        mine = self._batches(heard)[self.group.rank :: self.group.world]
        share: list[Any] | None
        try:
            share = [work(*self._read(batch, heard, readers)) for batch in mine]
        except Stopped:
            share = None  # the others learn it where they wait for this rank
        shares = self.group.gather(share)
        if any(part is None for part in shares):
            raise Stopped
        turns = zip_longest(*shares)  # batch i was the turn of rank i % world
        return [result for turn in turns for result in turn if result is not None]

    def _batches(self, heard: Sequence[int]) -> list[list[int]]:
        """Places in ``heard`` of like lengths."""
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(heard)), key=lambda i: (self.frames[heard[i]], i)):
            longest = self.frames[heard[i]]  # the order ascends
            too_wide = self.max_frames is not None and longest * (len(batches[-1]) + 1) > self.max_frames
            if batches[-1] and (len(batches[-1]) == self.batch_size or too_wide):
                batches.append([])
            batches[-1].append(i)
        return batches

    def _read(self, batch: list[int], heard: Sequence[int], readers: Sequence[int]) -> tuple[list[int], Tensor, Tensor]:
        if self.stop():
            raise Stopped
        return [readers[i] for i in batch], *pad([self.utterances.features(heard[i]) for i in batch])


def _loss(model: AudioLM, reader: _Reader, heard: Sequence[int]) -> tuple[float, float]:
    """(nats per target token, mean RMS of the soft tokens) with utterance i hearing the audio of ``heard[i]``."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[float]:
        out = model.nats(features, mask, [reader.texts[i] for i in readers])
        return [float(out.nats.double().sum()), int(out.tokens.sum()), float(out.soft_rms) * len(readers)]

    nats, tokens, rms = map(sum, zip(*reader.each(heard, range(len(heard)), work), strict=True))
    return nats / tokens, rms / len(heard)


def _decode(model: AudioLM, chosen: Utterances, reader: _Reader, max_new_tokens: int) -> list[Sample]:
    """Greedy decoding of ``chosen``, in their own order."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[tuple[int, str]]:
        return list(zip(readers, model.generate(features, mask, max_new_tokens), strict=True))

    wanted = [reader.place[int(row)] for row in chosen.rows]
    decoded = dict(pair for batch in reader.each(wanted, wanted, work) for pair in batch)
    return [make_sample(reader.keys[i], reader.texts[i], decoded[i].strip()) for i in wanted]
