"""Retrieval of texts by audio and of audio by text among 16 candidates, by LM likelihood and by pooled embeddings.

Takes a model and held-out utterances; returns a :class:`Retrieval` with the shares of correct first choices
(retrieval@1). Chance is 1/16. With several tasks, all are of the one
with the most different texts. Within a group all texts differ and all audio has similar length, so that length alone
does not identify a pair.

- ``by_likelihood``: each audio selects the text with the lowest loss in nats per token. ``audio_by_likelihood``: each
  text selects the audio with which its loss in nats is lowest. All 16 × 16 pairs of a group are evaluated: for each
  audio 16 texts pass through the LM, and the audio itself passes only once if the LM has a key-value cache.
- ``by_embedding``: each audio selects the text whose mean token embedding has the highest cosine similarity with the
  mean of its soft tokens. The mean over all groups is subtracted from both sides first, because neither cloud is
  centered at the origin. The cost is negligible. A projector that was not trained for this metric may score at chance
  and still work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.distributed.device import to_device
from train.evaluation.batches import UtteranceReader
from train.evaluation.bootstrap import Interval, ratio
from train.lms.packing import valid_soft
from train.model.audio_lm import AudioLM

CANDIDATES = 16


@dataclass(frozen=True)
class Retrieval:
    """Shares of correct first choices with 95 % intervals over utterances."""

    utterances: int
    candidates: int
    by_likelihood: Interval
    audio_by_likelihood: Interval
    by_embedding: Interval

    def metrics(self) -> dict[str, Any]:
        """Return the content of ``retrieval`` in ``summary.json``."""
        found = {name: getattr(self, name) for name in ("by_likelihood", "audio_by_likelihood", "by_embedding")}
        return {"utterances": self.utterances, "candidates": self.candidates, "chance": 1 / self.candidates,
                **{name: share.mean for name, share in found.items()},
                "intervals": {name: [share.low, share.high] for name, share in found.items()}}  # fmt: skip


def retrieve(model: AudioLM, reader: UtteranceReader, chosen: Sequence[int]) -> Retrieval | None:
    """Compute retrieval@1 over the utterances ``chosen`` (indices); None if fewer than two of their texts differ."""
    groups = make_groups(reader.texts, reader.frames, _of_one_task(reader, chosen))
    if not groups:
        return None
    pairs = [(index, group) for group in groups for index in group]
    rows = reader.map_items(pairs, lambda pair: _text_nll(model, reader, *pair), "retrieval")  # [audio][text]
    correct: list[list[bool]] = [[], [], []]
    start = 0
    audio, text = _mean_embeddings(model, reader, [index for group in groups for index in group])
    for group in groups:
        size = len(group)
        nll = np.array(rows[start : start + size])
        per_token = nll / [len(model.prompt.target_ids(reader.texts[index])) for index in group]
        cosine = (audio[start : start + size] @ text[start : start + size].T).numpy()
        own = np.arange(size)
        for hits, choice in zip(correct, (per_token.argmin(1), nll.argmin(0), cosine.argmax(1)), strict=True):
            hits += (choice == own).tolist()
        start += size
    shares = [ratio(np.array(hits, float), np.ones(len(hits))) for hits in correct]
    return Retrieval(len(pairs), len(groups[0]), *shares)


def make_groups(texts: Sequence[str], frames: Sequence[int], chosen: Sequence[int]) -> list[list[int]]:
    """Divide the indices ``chosen`` into groups of CANDIDATES utterances of similar length.

    No text occurs twice; of utterances with equal texts only the first is used, and an incomplete last group is
    dropped. With fewer than CANDIDATES different texts there is one smaller group; with fewer than two there is none.
    """
    first = {texts[index]: index for index in reversed(chosen)}
    order = sorted(first.values(), key=lambda index: (frames[index], index))
    size = min(CANDIDATES, len(order))
    if size < 2:
        return []
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def _of_one_task(reader: UtteranceReader, chosen: Sequence[int]) -> list[int]:
    """Return the ``chosen`` utterances of the task with the most different texts: candidates answer one instruction."""
    texts: dict[str, set[str]] = {}
    for index in chosen:
        texts.setdefault(reader.tasks[index], set()).add(reader.texts[index])
    task = max(texts, key=lambda name: len(texts[name]), default="")
    return [index for index in chosen if reader.tasks[index] == task]


def _text_nll(model: AudioLM, reader: UtteranceReader, index: int, group: Sequence[int]) -> list[float]:
    """Loss in nats of each text of ``group`` with the audio of utterance ``index``."""
    features, mask = reader.read([index])
    most = len(group) if reader.max_frames is None else max(1, reader.max_frames // features.shape[1])
    nll: list[float] = []
    for start in range(0, len(group), most):
        texts = [reader.texts[other] for other in group[start : start + most]]
        nll += model.candidate_nll(features, mask, texts, reader.rows[index]).double().tolist()
    return nll


def _mean_embeddings(model: AudioLM, reader: UtteranceReader, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean soft tokens and mean text embeddings of ``chosen``, centered, unit length: two [n, D] float32 on the CPU."""
    audio, text = [], []
    for index in chosen:
        soft, mask = model.soft_tokens(*reader.read([index]))
        audio.append(valid_soft(soft, mask).float().mean(0))
        ids = torch.tensor(model.prompt.target_ids(reader.texts[index])[:-1] or [model.prompt.end])
        text.append(model.lm.embed(to_device(ids, model.lm.device)).float().mean(0))
    clouds = torch.stack(audio).cpu(), torch.stack(text).cpu()
    a, b = (torch.nn.functional.normalize(cloud - cloud.mean(0), dim=-1) for cloud in clouds)
    return a, b
