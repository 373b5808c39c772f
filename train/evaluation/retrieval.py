"""Does a text find its audio among 16, and an audio its text? By the LM's likelihood and by pooled embeddings.

In: a model and held-out utterances. Out: :class:`Retrieval`, shares of right first choices (retrieval@1); by chance
they are 1/16. Groups hold texts that all differ and audio of like length, so that length alone gives nothing away.

- ``by_likelihood``: an audio chooses the text with the fewest nats a token; ``audio_by_likelihood``: a text chooses
  the audio under which it has the fewest nats. All 16 × 16 pairs of a group are judged: 16 texts pass through the LM
  for each audio, which itself passes once where the LM keeps keys and values.
- ``by_embedding``: an audio chooses the text whose mean token embedding has the highest cosine with the mean of its
  soft tokens, after the mean over all groups is taken from each side (both clouds lie off the origin). Costs next to
  nothing; a projector that was not trained for it may stay at chance and still work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.caches import pad
from train.evaluation.batches import UtteranceReader
from train.evaluation.bootstrap import Interval, ratio
from train.model.audio_lm import AudioLM

CANDIDATES = 16


@dataclass(frozen=True)
class Retrieval:
    """Shares of right first choices with their 95 % intervals over utterances."""

    utterances: int
    candidates: int
    by_likelihood: Interval
    audio_by_likelihood: Interval
    by_embedding: Interval

    def metrics(self) -> dict[str, Any]:
        """By the names of ``summary.json``."""
        found = {name: getattr(self, name) for name in ("by_likelihood", "audio_by_likelihood", "by_embedding")}
        return {"utterances": self.utterances, "candidates": self.candidates, "chance": 1 / self.candidates,
                **{name: share.mean for name, share in found.items()},
                "intervals": {name: [share.low, share.high] for name, share in found.items()}}  # fmt: skip


def retrieve(model: AudioLM, reader: UtteranceReader, chosen: Sequence[int]) -> Retrieval | None:
    """Retrieval@1 over ``chosen`` utterances of the reader; None where fewer than two texts differ."""
    groups = make_groups(reader.texts, reader.frames, chosen)
    if not groups:
        return None
    heard = [(index, group) for group in groups for index in group]
    rows = reader.map_items(heard, lambda pair: _text_nll(model, reader, *pair))  # [audio][candidate text]
    right: list[list[bool]] = [[], [], []]
    start = 0
    audio, text = _mean_embeddings(model, reader, [index for group in groups for index in group])
    for group in groups:
        size = len(group)
        nll = np.array(rows[start : start + size])
        per_token = nll / [len(model.prompt.target_ids(reader.texts[index])) for index in group]
        cosine = (audio[start : start + size] @ text[start : start + size].T).numpy()
        own = np.arange(size)
        for hits, choice in zip(right, (per_token.argmin(1), nll.argmin(0), cosine.argmax(1)), strict=True):
            hits += (choice == own).tolist()
        start += size
    shares = [ratio(np.array(hits, float), np.ones(len(hits))) for hits in right]
    return Retrieval(len(heard), len(groups[0]), *shares)


def make_groups(texts: Sequence[str], frames: Sequence[int], chosen: Sequence[int]) -> list[list[int]]:
    """Indices of ``chosen`` in groups of CANDIDATES neighbours in length, no text twice; what is left over is dropped.

    One smaller group where there are fewer; none where fewer than two texts differ.
    """
    first = {texts[index]: index for index in reversed(chosen)}
    order = sorted(first.values(), key=lambda index: (frames[index], index))
    size = min(CANDIDATES, len(order))
    if size < 2:
        return []
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def _text_nll(model: AudioLM, reader: UtteranceReader, index: int, group: Sequence[int]) -> list[float]:
    """Nats of each text of ``group`` with the audio of utterance ``index``."""
    features, mask = pad([reader.utterances.features(index)])
    most = len(group) if reader.max_frames is None else max(1, reader.max_frames // features.shape[1])
    nll: list[float] = []
    for start in range(0, len(group), most):
        texts = [reader.texts[other] for other in group[start : start + most]]
        nll += model.candidate_nll(features, mask, texts).double().tolist()
    return nll


def _mean_embeddings(model: AudioLM, reader: UtteranceReader, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean soft tokens and mean text embeddings of ``chosen``, centred, of unit length: [n, D] float32 on the CPU."""
    audio, text = [], []
    for index in chosen:
        soft, mask = model.soft_tokens(*pad([reader.utterances.features(index)]))
        audio.append(soft[mask].float().mean(0).cpu())
        ids = torch.tensor(model.prompt.target_ids(reader.texts[index])[:-1] or [model.lm.tokenizer.eos])
        text.append(model.lm.embed(ids.to(model.lm.device)).float().mean(0).cpu())
    clouds = torch.stack(audio), torch.stack(text)
    a, b = (torch.nn.functional.normalize(cloud - cloud.mean(0), dim=-1) for cloud in clouds)
    return a, b
