"""The loss of every held-out text with its own audio, other audio, or none.

Takes models, a :class:`~train.evaluation.batches.UtteranceReader` and the audio to pair with each text; returns the
:class:`HeldOutLosses` of each model.
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
from train.model.prompt import PromptRow


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses of n utterances, in their order."""

    nll: Array  # [n] float64, nats, summed over the utterance's targets
    tokens: npt.NDArray[np.int64]  # [n] number of targets
    soft_rms: float  # RMS of the soft tokens, mean over the utterances

    @property
    def loss(self) -> float:
        """Loss in nats per target token, over all utterances."""
        return float(self.nll.sum() / self.tokens.sum())

    def loss_of(self, indices: Sequence[int]) -> float:
        """Loss of some of the utterances, in nats per target token."""
        return float(self.nll[indices].sum() / self.tokens[indices].sum())


def held_out_losses(
    models: ModelList,
    reader: UtteranceReader,
    audio_indices: Sequence[int],
    get_features: Callable[[int], Features] | None = None,
    text_indices: Sequence[int] | None = None,
    what: str = "held out",
) -> list[HeldOutLosses]:
    """Compute the loss of text ``text_indices[i]`` with the audio of utterance ``audio_indices[i]``, for each model.

    Args:
        audio_indices: one index per text.
        get_features: returns the features [frames, channels] for an audio index; by default those of the utterance.
        text_indices: ascending indices of utterances of ``reader``; None: all.
        what: name on the progress bar.
    """

    def compute_losses(indices: list[int], features: Tensor, mask: Tensor) -> list[Any]:
        found = models.nll(features, mask, [reader.texts[i] for i in indices], [reader.rows[i] for i in indices])
        read = torch.stack([torch.cat([out.nll.double(), out.soft_rms.double()[None]]) for out in found]).tolist()
        return [
            _by_utterance(indices, nll, out.tokens.tolist(), soft_rms)
            for out, (*nll, soft_rms) in zip(found, read, strict=True)
        ]

    texts = range(len(reader)) if text_indices is None else text_indices
    batches = reader.map_batches(audio_indices, texts, compute_losses, get_features, what=what)
    return [_make_losses(sorted(row for batch in own for row in batch)) for own in zip(*batches, strict=True)]


def text_only_losses(models: ModelList, reader: UtteranceReader) -> list[HeldOutLosses]:
    """Compute the loss of the texts without any soft tokens: the LM's prior over the texts."""
    indices = range(len(reader))
    batches = [list(indices[start : start + reader.batch_size]) for start in indices[:: reader.batch_size]]

    def compute_losses(batch: list[int]) -> list[Any]:
        texts, rows = [reader.texts[i] for i in batch], [reader.rows[i] for i in batch]
        requests = [_without_audio(model, texts, rows) for model in models.models]
        found = zip(requests, torch.stack(models.passes.nll(requests)).double().tolist(), strict=True)
        return [_by_utterance(batch, nll, [len(ids) for ids in request.targets], 0.0) for request, nll in found]

    shares = reader.map_items(batches, compute_losses, "text only")
    return [_make_losses([row for batch in own for row in batch]) for own in zip(*shares, strict=True)]


def _without_audio(model: AudioLM, texts: Sequence[str], rows: Sequence[PromptRow]) -> LmRequest:
    """Make a request without soft tokens.

    A prompt that is audio only (``plain``) becomes one BOS token, or EOS if the tokenizer has no BOS: at least one
    token must precede the first predicted one.
    """
    lm = model.lm
    prefix, suffix = model.prompt.ids(rows)
    start = [lm.tokenizer.eos if lm.tokenizer.bos is None else lm.tokenizer.bos]
    prefix = [before if before or after else start for before, after in zip(prefix, suffix, strict=True)]
    soft = torch.zeros(len(rows), 0, lm.width, dtype=lm.dtype, device=lm.device)
    mask = torch.zeros(len(rows), 0, dtype=torch.bool)
    return LmRequest(soft, mask, prefix, suffix, [model.prompt.target_ids(text) for text in texts])


def _by_utterance(utterances: list[int], nll: list[float], tokens: list[int], soft_rms: float) -> list[list[Any]]:
    return [[*row, soft_rms] for row in zip(utterances, nll, tokens, strict=True)]


def _make_losses(rows: Sequence[Sequence[Any]]) -> HeldOutLosses:
    """Convert rows (utterance, nll, tokens, RMS of the soft tokens), sorted by utterance."""
    _, nll, tokens, soft_rms = zip(*rows, strict=True)
    return HeldOutLosses(np.array(nll), np.array(tokens), float(np.mean(soft_rms)))
