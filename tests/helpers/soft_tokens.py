"""Soft tokens, prompts and batches for the tests of language models and losses."""

from __future__ import annotations

import torch

from shards.stream.batch import Batch

BEFORE, AFTER, TARGETS = [[5, 6], [7], []], [[8], [], [9, 10]], [[20, 21, 2], [22, 2], [2]]


def soft_batch(width=32, lengths=(3, 1, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randn(len(lengths), max(lengths), width, generator=generator)
    return soft, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def make_batch(lengths, texts, seed):
    features = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    keys = [str(i) for i in range(len(lengths))]
    none = [""] * len(lengths)
    return Batch(features, torch.tensor(lengths), keys, texts, none, none, list(range(len(lengths))), 0, 0, {})
