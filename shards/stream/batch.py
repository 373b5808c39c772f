"""The batches that a :class:`shards.stream.iterable_dataset.FeatureStream` yields: one rank's part of a global batch.

A batch carries the state of the stream, which checkpoints store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from shards.format.codec import CODES, STORED_DTYPE
from shards.read.cache import StoredUtterance

TORCH_DTYPE = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    CODES: torch.int32,  # torch computes little with uint16
}


@dataclass
class Batch:
    """This rank's part of one global batch. It is empty (B = 0) if the global batch has too few rows for this rank.

    Attributes:
        features: [B, T, C] float16 (codec f16), int32 (codes, codec u16) or float32 (other codecs), padded with zeros;
            from an ``encoded`` stream in the dtype of the codec. 0 is also a code: ``mask`` tells padding apart. T
            is the number of frames of the longest utterance in this part, or in the global batch if this part is empty.
        lengths: int64 [B], number of frames of each utterance.
        keys, texts: key and text of each utterance; of a variant, those of its utterance.
        prompts, tasks: its columns ``prompt`` and ``task`` of the label set; "" without them.
        rows: row of each utterance in the joined manifest.
        epoch: number of epochs completed before this batch.
        index: index of the global batch in the run, from 0.
        state: state of the stream after this batch; JSON-serializable.
        scales: float32 [B, C], by which codes in ``features`` are to be multiplied; None for features and float codes.
        variants: the number of the variant of each utterance whose features these are, 0 for the utterance itself.
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
    variants: list[int] = field(default_factory=list)

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
        return replace(self, features=decode_stored(self.features, self.scales), scales=None)


def pad_stored(rows: Sequence[StoredUtterance], codec: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``rows`` as they are stored, padded with zeros to [B, T, C], and their scales, float32 [B, C] or None."""
    payloads = [row.payload for row in rows]
    dtype = np.dtype(np.int32) if codec == CODES else STORED_DTYPE[codec]
    padded = np.zeros((len(rows), max(map(len, payloads)), payloads[0].shape[1]), dtype)
    for slot, payload in zip(padded, payloads, strict=True):
        slot[: len(payload)] = payload
    scales = [row.scale for row in rows if row.scale is not None]
    return torch.from_numpy(padded).view(TORCH_DTYPE[codec]), torch.from_numpy(np.stack(scales)) if scales else None


def decode_stored(features: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return the features that encoded ones [B, T, C] with ``scales`` [B, C] stand for, float32.

    float16, float32, and the codes of a neural codec, int32, stay.

    The values have the bits of ``shards.format.codec.decode``, on any device.
    """
    if features.dtype in (torch.float16, torch.float32, torch.int32):
        return features
    return features.float() if scales is None else features.float() * scales[:, None]
