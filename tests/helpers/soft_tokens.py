"""Soft tokens, prompts and batches for the tests of language models and losses."""

from __future__ import annotations

from unittest.mock import patch

import torch

from shards.stream.batch import Batch
from train.lms.base import LanguageModel

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


def generate_whole_rows(lm, *args):
    """What ``lm.generate`` returns if each token computes whole rows."""
    with patch.object(type(lm), "decoding", LanguageModel.decoding):
        return lm.generate(*args)


def continued(lm, *, whole=False):
    """Logits of three rows, of five that continue them in another order, and of two that continue those."""
    soft, mask = soft_batch()
    start = LanguageModel.decoding if whole else type(lm).decoding
    with torch.no_grad():
        decoding = start(lm, soft, mask, BEFORE, AFTER, 4)
        found = [decoding.logits]
        for tokens, parents in (([11, 12, 13, 14, 15], [2, 0, 0, 1, 2]), ([16, 17], [3, 1]), ([18, 19], None)):
            decoding.extend(torch.tensor(tokens), None if parents is None else torch.tensor(parents))
            found.append(decoding.logits)
    return found
