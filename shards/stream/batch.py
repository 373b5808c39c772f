"""What a stream gives: one rank's part of a global batch, padded.

In: arrays that ``shards/stream/iterable_dataset.py`` has filled. Out: :class:`Batch`, with the state that a checkpoint
keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass
class Batch:
    """This rank's part of one global batch; it may be empty (B = 0) when the global batch is smaller than the world.

    Attributes:
        features: [B, T, C] float16 (codec f16) or float32 (other codecs), zero after each utterance's end. T is the
            longest of the part; of an empty part, the longest of the global batch.
        lengths: int64 [B], frames.
        keys, texts: of each utterance.
        rows: place of each utterance in the joined manifest.
        epoch: passes over the data that were finished before this batch.
        index: number of the global batch in the run, from 0.
        state: the stream's state once this batch is done; JSON can hold it.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    keys: list[str]
    texts: list[str]
    rows: list[int]
    epoch: int
    index: int
    state: dict[str, Any] = field(repr=False)

    def mask(self) -> torch.Tensor:
        """bool [B, T], true on frames and false on padding."""
        places = torch.arange(self.features.shape[1], device=self.lengths.device)
        return places[None, :] < self.lengths[:, None]

    def pin_memory(self) -> Batch:
        """In page-locked memory; DataLoader calls it under ``pin_memory=True``."""
        return replace(self, features=self.features.pin_memory(), lengths=self.lengths.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """With the tensors on ``device``. It waits for the copy: the buffer behind this batch is used again."""
        return replace(self, features=self.features.to(device), lengths=self.lengths.to(device))
