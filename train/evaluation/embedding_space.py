"""Soft tokens among the language model's embeddings: nearest vocabulary tokens, and a PCA plane.

Takes a model and a few held-out utterances; writes ``space.json`` to the run folder, which the report plots:

    {"tokens": [{"key", "reference", "nearest": [[text, cosine], …]}, …],
     "plane": {"explained": [share, share], "vocabulary": [[x, y, text], …],
               "utterances": [{"key", "reference", "frames", "points": [[x, y], …]}, …]}}

The nearest token of a soft token is the one with the highest cosine similarity. The plane is spanned by the first two
principal components (PCA) of the soft tokens and an equal number of vocabulary embeddings: the tokens of the
utterances' texts, then tokens drawn with a seed. The plane is an illustration, not a metric: two components explain
only part of the variance; ``explained`` holds their shares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.files import atomic_write, translate_os_errors
from train.distributed.device import to_device
from train.evaluation.batches import UtteranceReader
from train.lms.packing import valid_soft
from train.model.audio_lm import AudioLM
from train.runs.folder import EMBEDDING_SPACE_FILE

MAX_UTTERANCES = 8  # utterances in the plane: one for each color of the report
MAX_NEAREST = 4  # utterances whose nearest tokens are recorded
_CHUNK = 8192  # vocabulary tokens embedded at a time
_MAX_SOFT_TOKENS = 60  # soft tokens per utterance in the plane


def measure_embedding_space(model: AudioLM, reader: UtteranceReader, seed: int = 0) -> dict[str, Any]:
    """Return the content of ``space.json`` for utterances spread evenly over the lengths.

    The work is not divided among ranks: every rank computes all of it.
    """
    order = sorted(range(len(reader)), key=lambda index: (reader.frames[index], index))
    positions = np.linspace(0, len(order) - 1, min(MAX_UTTERANCES, len(order))).round().astype(int)
    chosen = [order[position] for position in dict.fromkeys(positions.tolist())]
    soft = [_soft_tokens(model, reader, index) for index in chosen]
    step = max(1, len(chosen) // MAX_NEAREST)
    return {
        "tokens": [
            {"key": reader.keys[index], "reference": reader.texts[index], "nearest": nearest_tokens(model, rows)}
            for index, rows in list(zip(chosen, soft, strict=True))[::step][:MAX_NEAREST]
        ],
        "plane": _pca_plane(model, reader, chosen, soft, seed),
    }


def nearest_tokens(model: AudioLM, soft: Tensor) -> list[tuple[str, float]]:
    """Return (text, cosine) of the vocabulary token with the highest cosine to each row of ``soft`` [S, D]."""
    directions = F.normalize(soft.float(), dim=-1)
    best = torch.full((len(soft),), -2.0, device=soft.device)
    chosen = torch.zeros(len(soft), dtype=torch.int64, device=soft.device)
    for start in range(0, model.lm.vocab_size, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, model.lm.vocab_size), device=soft.device)
        rows = F.normalize(model.lm.embed(ids).float(), dim=-1)
        cosine, index = (directions @ rows.T).max(1)
        better = cosine > best
        best = torch.where(better, cosine, best)
        chosen = torch.where(better, index + start, chosen)
    texts = [model.lm.tokenizer.decode([token]) for token in chosen.tolist()]
    return [(text, round(cosine, 4)) for text, cosine in zip(texts, best.tolist(), strict=True)]


def write_embedding_space(folder: Path, tree: dict[str, Any]) -> None:
    """Write ``space.json`` into ``folder`` atomically."""
    path = folder / EMBEDDING_SPACE_FILE
    with translate_os_errors("writing the embedding space", path):
        atomic_write(path, json.dumps(tree, ensure_ascii=False).encode(), str(os.getpid()))


def _soft_tokens(model: AudioLM, reader: UtteranceReader, index: int) -> Tensor:
    """Soft tokens [S, D] of one utterance, as input embeddings of the LM."""
    soft, mask = model.soft_tokens(*reader.read([index]))
    return model.lm.to_input_embeddings(valid_soft(soft, mask))


def _pca_plane(
    model: AudioLM, reader: UtteranceReader, chosen: Sequence[int], soft: Sequence[Tensor], seed: int
) -> dict[str, Any]:
    """PCA of the soft tokens and an equal number of vocabulary embeddings, in float64."""
    thinned = [rows[np.linspace(0, len(rows) - 1, min(_MAX_SOFT_TOKENS, len(rows))).astype(int)] for rows in soft]
    ids = _vocabulary(model, [reader.texts[index] for index in chosen], sum(map(len, thinned)), seed)
    words = model.lm.embed(to_device(torch.tensor(ids), model.lm.device))
    cloud = torch.cat([*thinned, words]).double().cpu()
    cloud = cloud - cloud.mean(0)
    _, scales, axes = torch.linalg.svd(cloud, full_matrices=False)
    axes = (
        axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    )  # signs of components are arbitrary
    variances = scales.square() / scales.square().sum()
    points = [[round(x, 4), round(y, 4)] for x, y in (cloud @ axes.T).tolist()]
    utterances, start = [], 0
    for index, rows in zip(chosen, thinned, strict=True):
        utterance = {"key": reader.keys[index], "reference": reader.texts[index], "frames": reader.frames[index]}
        utterances.append({**utterance, "points": points[start : start + len(rows)]})
        start += len(rows)
    texts = [model.lm.tokenizer.decode([token]) for token in ids]
    return {
        "explained": [round(share, 4) for share in variances[:2].tolist()],
        "vocabulary": [[*point, text] for point, text in zip(points[start:], texts, strict=True)],
        "utterances": utterances,
    }


def _vocabulary(model: AudioLM, texts: Sequence[str], count: int, seed: int) -> list[int]:
    """Return up to ``count`` token ids: those of ``texts``, then others drawn with ``seed``."""
    in_texts = dict.fromkeys(token for text in texts for token in model.prompt.target_ids(text)[:-1])
    drawn = np.random.default_rng(seed).permutation(model.lm.vocab_size).tolist()
    return list(dict.fromkeys([*in_texts, *drawn]))[:count]
