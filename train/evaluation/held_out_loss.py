"""Nats of every held-out text, whatever stands where its audio belongs.

In: a model, a :class:`~train.evaluation.batches.Reader`, and who hears what. Out: :class:`Losses`, an utterance a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.evaluation.batches import Features, Reader
from train.evaluation.bootstrap import Array
from train.model.audio_lm import AudioLM


@dataclass(frozen=True)
class Losses:
    """Of n utterances, in their order."""

    nats: Array  # [n] summed over an utterance's targets
    tokens: npt.NDArray[np.int64]  # [n]
    soft_rms: float  # of the soft tokens heard, the mean over the utterances

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return float(self.nats.sum() / self.tokens.sum())


def losses(
    model: AudioLM, reader: Reader, heard: Sequence[int], audio: Callable[[int], Features] | None = None
) -> Losses:
    """Utterance i hears the audio of utterance ``heard[i]``, or what ``audio(heard[i])`` gives [frames, channels]."""

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[list[float]]:
        out = model.nats(features, mask, [reader.texts[i] for i in readers])
        rms = [float(out.soft_rms)] * len(readers)
        return [list(row) for row in zip(readers, out.nats.double().tolist(), out.tokens.tolist(), rms, strict=True)]

    rows = sorted(row for batch in reader.each(heard, range(len(heard)), work, audio) for row in batch)
    _, nats, tokens, rms = zip(*rows, strict=True)
    return Losses(np.array(nats), np.array(tokens), float(np.mean(rms)))


def text_only_losses(model: AudioLM, reader: Reader) -> Losses:
    """Nothing stands where the audio would: what the LM expects of the texts by itself.

    Where the prompt is nothing but audio (``plain``), one BOS token, or eos where the tokenizer has none, takes its
    place: something must come before the first token that is predicted.
    """
    lm, before, after = model.lm, model.prompt.before, model.prompt.after
    if not before and not after:
        before = [lm.tokenizer.eos if lm.tokenizer.bos is None else lm.tokenizer.bos]
    here = range(len(reader))
    batches = [list(here[start : start + reader.batch_size]) for start in here[:: reader.batch_size]]

    def work(batch: list[int]) -> list[list[float]]:
        targets = [model.prompt.target(reader.texts[i]) for i in batch]
        soft = torch.zeros(len(batch), 0, lm.width, dtype=lm.dtype, device=lm.device)
        mask = torch.zeros(len(batch), 0, dtype=torch.bool, device=lm.device)
        nats = lm.target_nats(soft, mask, [before] * len(batch), [after] * len(batch), targets)
        return [[nat, len(target)] for nat, target in zip(nats.double().tolist(), targets, strict=True)]

    nats, tokens = zip(*(row for rows in reader.share(batches, work) for row in rows), strict=True)
    return Losses(np.array(nats), np.array(tokens), 0.0)
