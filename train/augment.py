"""Noise on cached features: frames set to zero, and Gaussian noise on all.

In: a batch, the run's seed. Out: the same batch, or one with features of its own. What an utterance suffers depends
on the seed, the number of the global batch and its row alone: neither on the other utterances nor on the world size.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from shards.batch import Batch


def augment(batch: Batch, seed: int, mask_frames: float, noise: float) -> Batch:
    """``batch`` with each frame set to zero with probability ``mask_frames``, after adding ``noise``.

    ``noise`` is the standard deviation in units of each channel's own over the utterance: a few channels of a speech
    encoder are a hundred times as large as the others. What is changed is a copy.
    """
    if not (mask_frames or noise):
        return batch
    batch = replace(batch, features=batch.features.clone())
    for features, frames, row in zip(batch.features, batch.lengths.tolist(), batch.rows, strict=True):
        generator = torch.Generator().manual_seed(_seed(seed, batch.index, row))
        own = features[:frames]
        if noise and frames > 1:
            drawn = torch.randn(own.shape, generator=generator)
            own += (noise * own.float().std(0, unbiased=False) * drawn).to(own.dtype)
        if mask_frames:
            own[torch.rand(frames, generator=generator) < mask_frames] = 0
    return batch


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:8], "big") >> 1
