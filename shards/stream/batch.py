"""The batches that a :class:`shards.stream.iterable_dataset.FeatureStream` yields: one rank's part of a global batch.

A batch carries the state of the stream, which checkpoints store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass
class Batch:
    """This rank's part of one global batch. It is empty (B = 0) if the global batch has too few rows for this rank.

    Attributes:
        features: [B, T, C] float16 (codec f16), int32 (codes, codec u16) or float32 (other codecs), padded with zeros;
            from an ``encoded`` stream in the dtype of the codec. 0 is also a code: ``mask`` tells padding apart. T
            is the number of frames of the longest utterance in this part, or in the global batch if this part is empty.
        lengths: int64 [B], number of frames of each utterance.
        keys, texts: key and text of each utterance.
        prompts, tasks: its columns ``prompt`` and ``task`` of the label set; "" without them.
        rows: row of each utterance in the joined manifest.
        epoch: number of epochs completed before this batch.
        index: index of the global batch in the run, from 0.
        state: state of the stream after this batch; JSON-serializable.
        scales: float32 [B, C], by which codes in ``features`` are to be multiplied; None for features and float codes.
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
    scales: torch.Tensor | None = None

    def mask(self) -> torch.Tensor:
        """Return bool [B, T], true on frames and false on padding."""
        places = torch.arange(self.features.shape[1], device=self.lengths.device)
        return places[None, :] < self.lengths[:, None]

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. DataLoader calls this with ``pin_memory=True``."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to ``device``. Waits for the copy, because the buffer of this batch is reused."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with ``function`` of each tensor in its place."""
        scales = None if self.scales is None else function(self.scales)
        return replace(self, features=function(self.features), lengths=function(self.lengths), scales=scales)

    def decoded(self) -> Batch:
        """Return the batch with encoded features as float32; float16 and the codes of a neural codec, int32, stay."""
        if self.features.dtype in (torch.float16, torch.float32, torch.int32):
            return self
        features = self.features.float()
        return replace(self, features=features if self.scales is None else features * self.scales[:, None], scales=None)
