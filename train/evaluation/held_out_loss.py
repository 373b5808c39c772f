"""The loss of every held-out text, whatever stands in the place of its audio.

In: models, a :class:`~train.evaluation.batches.UtteranceReader`, and which audio each
text is heard with. Out: :class:`Losses` of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.evaluation.batches import Features, UtteranceReader
from train.evaluation.bootstrap import Array
from train.lms.base import LmRequest
from train.model.audio_lm import AudioLM, ModelList


@dataclass(frozen=True)
class HeldOutLosses:
    """Of n utterances, in their order."""

    nll: Array  # [n] in nats, summed over an utterance's targets
    tokens: npt.NDArray[np.int64]  # [n]
    soft_rms: float  # of the soft tokens heard, the mean over the utterances

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return float(self.nll.sum() / self.tokens.sum())


def held_out_losses(
    models: ModelList,
    reader: UtteranceReader,
    audio_indices: Sequence[int],
    get_features: Callable[[int], Features] | None = None,
) -> list[HeldOutLosses]:
    """Utterance i hears the audio of utterance ``heard[i]``, or what ``audio(heard[i])`` gives [frames, channels]."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[Any]:
        found = models.nll(features, mask, [reader.texts[i] for i in readers])
        return [_by_utterance(readers, out.nll, out.tokens.tolist(), float(out.soft_rms)) for out in found]

    batches = reader.map_batches(audio_indices, range(len(audio_indices)), work, get_features)
    return [_make_losses(sorted(row for batch in own for row in batch)) for own in zip(*batches, strict=True)]


def text_only_losses(models: ModelList, reader: UtteranceReader) -> list[HeldOutLosses]:
    """Nothing stands where the audio would: what the LM expects of the texts by itself."""
    here = range(len(reader))
    batches = [list(here[start : start + reader.batch_size]) for start in here[:: reader.batch_size]]

    def work(batch: list[int]) -> list[Any]:
        requests = [_without_audio(model, [reader.texts[i] for i in batch]) for model in models.models]
        found = zip(requests, models.passes.nll(requests), strict=True)
        return [_by_utterance(batch, nll, [len(ids) for ids in request.targets], 0.0) for request, nll in found]

    shares = reader.map_items(batches, work)
    return [_make_losses([row for batch in own for row in batch]) for own in zip(*shares, strict=True)]


def _without_audio(model: AudioLM, texts: Sequence[str]) -> LmRequest:
    """Where the prompt is nothing but audio (``plain``), one BOS token, or eos where the tokenizer has none, takes its
    place: something must come before the first token that is predicted.
    """
    lm, prefix, suffix = model.lm, model.prompt.prefix, model.prompt.suffix
    if not prefix and not suffix:
        prefix = [lm.tokenizer.eos if lm.tokenizer.bos is None else lm.tokenizer.bos]
    rows = len(texts)
    soft = torch.zeros(rows, 0, lm.width, dtype=lm.dtype, device=lm.device)
    mask = torch.zeros(rows, 0, dtype=torch.bool, device=lm.device)
    return LmRequest(soft, mask, [prefix] * rows, [suffix] * rows, [model.prompt.target_ids(text) for text in texts])


def _by_utterance(utterances: list[int], nll: Tensor, tokens: list[int], soft_rms: float) -> list[list[Any]]:
    return [[*row, soft_rms] for row in zip(utterances, nll.double().tolist(), tokens, strict=True)]


def _make_losses(rows: Sequence[Sequence[Any]]) -> HeldOutLosses:
    """Of (utterance, nll, tokens, RMS of the soft tokens), in the order of the utterances."""
    _, nll, tokens, soft_rms = zip(*rows, strict=True)
    return HeldOutLosses(np.array(nll), np.array(tokens), float(np.mean(soft_rms)))
