"""The batches that a :class:`shards.stream.iterable_dataset.FeatureStream` yields: one rank's part of a global batch.

A batch carries the state of the stream, which checkpoints store.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass
class Batch:
    """This rank's part of one global batch. It is empty (B = 0) if the global batch has too few rows for this rank.

    Attributes:
        features: [B, T, C] float16 (codec f16) or float32 (other codecs), padded with zeros. T is the number of frames
            of the longest utterance in this part, or in the global batch if this part is empty.
        lengths: int64 [B], number of frames of each utterance.
        keys, texts: key and text of each utterance.
        prompts, tasks: its columns ``prompt`` and ``task`` of the label set; "" without them.
        rows: row of each utterance in the joined manifest.
        epoch: number of epochs completed before this batch.
        index: index of the global batch in the run, from 0.
        state: state of the stream after this batch; JSON-serializable.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    keys: list[str]
    texts: list[str]
    prompts: list[str]
    tasks: list[str]
    rows: list[int]
    epoch: int
    index: int
    state: dict[str, Any] = field(repr=False)

    def mask(self) -> torch.Tensor:
        """Return bool [B, T], true on frames and false on padding."""
        places = torch.arange(self.features.shape[1], device=self.lengths.device)
        return places[None, :] < self.lengths[:, None]

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. DataLoader calls this with ``pin_memory=True``."""
        return replace(self, features=self.features.pin_memory(), lengths=self.lengths.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to ``device``. Waits for the copy, because the buffer of this batch is reused."""
        return replace(self, features=self.features.to(device), lengths=self.lengths.to(device))
