"""The batches of this rank: a ``FeatureStream`` over the caches of a run with the channels of all layers.

:func:`open_stream` returns the stream that a training loop iterates and whose state a checkpoint stores.
:func:`augment` stretches, masks and adds noise.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.stream.batch import Batch
from shards.stream.iterable_dataset import FeatureStream
from train.config.model import AugmentConfig
from train.config.train import TrainConfig
from train.data.caches import TrainData
from train.data.layers import LayeredCaches
from train.distributed.device import choose_device
from train.distributed.group import ProcessGroup

UNCHANGED = AugmentConfig()
EDGE_FRAMES = 5  # at each end of an utterance, 0.1 s of Whisper: before the first sound and after the last
NO_CODE = -1  # in place of a code; adds no embedding (train/projectors/codes.py)
PREFETCH = 2  # batches whose other layers are read while the training loop runs


class LayeredStream:
    """A ``FeatureStream`` over the first caches whose batches contain all layers; iterate it once.

    A thread reads the other layers ahead of time. The state is that of the last batch yielded.
    """

    def __init__(self, stream: FeatureStream, layers: LayeredCaches) -> None:
        self.stream, self.layers = stream, layers
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As ``FeatureStream.state_dict``."""
        return self.stream.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``FeatureStream.load_state_dict``."""
        self.stream.load_state_dict(state)
        self._state = None

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.stream)
        executor = ThreadPoolExecutor(1, thread_name_prefix="earshard-layers")

        def read() -> Batch | None:
            batch = next(batches, None)
            return None if batch is None else self.layers.add_layers(batch)

        waiting: deque[Future[Batch | None]] = deque(executor.submit(read) for _ in range(PREFETCH))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(executor.submit(read))
                self._state = batch.state
                yield batch
        finally:
            executor.shutdown(wait=True, cancel_futures=True)  # first: a running generator cannot be closed
            batches.close()  # type: ignore[attr-defined]


Stream = FeatureStream | LayeredStream


def open_stream(config: TrainConfig, data: TrainData, group: ProcessGroup) -> Stream:
    """Return the stream of this rank's batches, with all layers of the run.

    Features for a GPU stay encoded, unless the host changes them first.
    """
    on_gpu = data.layers is None and choose_device(config.device).type == "cuda"
    changes = config.frame_mask_prob, config.noise_std, config.augment
    stream = FeatureStream(
        data.caches,
        config.batch.sampler_config(),
        config.order_seed,
        rows=data.train_rows,
        rank=group.rank,
        world_size=group.world_size,
        pinned=on_gpu,
        encoded=on_gpu and not _changes_anything(*changes),
        variants=config.variants,
    )
    return stream if data.layers is None else LayeredStream(stream, data.layers)


def augment(
    batch: Batch, seed: int, frame_mask_prob: float, noise_std: float, changes: AugmentConfig = UNCHANGED
) -> Batch:
    """Return ``batch`` with the changes of a training step; ``batch`` itself does not change.

    Of integer codes, masked frames become -1, no code, and the values themselves do not change.

    In this order: a share ``changes.silence`` of the utterances become frames in random order with an empty text, the
    time axis of each utterance is stretched (``changes.speed``), Gaussian noise is added, spans of frames and bands of
    channels become the mean of their channel over the utterance, and each frame becomes zero with probability
    ``frame_mask_prob``. ``noise_std`` is the standard deviation of the noise relative to that of each
    channel over the utterance: a few channels of a speech encoder are a hundred times larger than the others.

    What happens to an utterance depends only on the seed, the index of the global batch and the row, so it is the same
    for any world size.
    """
    if not _changes_anything(frame_mask_prob, noise_std, changes):
        return batch
    batch = batch.decoded()
    masked = 0 if batch.features.is_floating_point() else NO_CODE
    utterances, texts = [], list(batch.texts)
    for i, (features, frames, row) in enumerate(zip(batch.features, batch.lengths.tolist(), batch.rows, strict=True)):
        generator = torch.Generator().manual_seed(_seed(seed, batch.index, row))
        spoken = features[:frames]
        if changes.silence and float(torch.rand((), generator=generator)) < changes.silence:
            spoken, texts[i] = _without_speech(spoken, generator), ""
        valid = _stretched(spoken, changes.speed, generator)
        if noise_std and len(valid) > 1:
            noise = torch.randn(valid.shape, generator=generator)
            valid += (noise_std * valid.float().std(0, unbiased=False) * noise).to(valid.dtype)
        _mask(valid, changes, generator)
        if frame_mask_prob:
            valid[torch.rand(len(valid), generator=generator) < frame_mask_prob] = masked
        utterances.append(valid)
    if not utterances:
        return batch
    lengths = torch.tensor([len(valid) for valid in utterances])
    return replace(batch, features=pad_sequence(utterances, batch_first=True), lengths=lengths, texts=texts)


def _changes_anything(frame_mask_prob: float, noise_std: float, changes: AugmentConfig) -> bool:
    named = changes.silence, changes.speed, changes.time_masks, changes.channel_masks
    return any((frame_mask_prob, noise_std, *named))


def _without_speech(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return frames [T, C] of [T, C] in random order: those at its ends, or all."""
    frames = len(features)
    ends = bool(torch.rand((), generator=generator) < 0.5)
    pool = torch.cat([features[:EDGE_FRAMES], features[-EDGE_FRAMES:]]) if ends else features
    return pool[torch.randint(0, len(pool), (frames,), generator=generator)]


def _stretched(features: Tensor, speed: float, generator: torch.Generator) -> Tensor:
    """Return a copy of [T, C] at 1 ± ``speed`` times the speed, linearly interpolated."""
    if not speed or len(features) < 2:
        return features.clone()
    rate = 1 + speed * (2 * float(torch.rand((), generator=generator)) - 1)
    size = max(1, round(len(features) / rate))
    stretched = F.interpolate(features.T[None].float(), size=size, mode="linear", align_corners=False)
    return stretched[0].T.contiguous().to(features.dtype)


def _mask(features: Tensor, changes: AugmentConfig, generator: torch.Generator) -> None:
    """Set spans and bands of [T, C] to the mean of their channels."""
    frames, channels = features.shape
    if not (changes.time_masks or changes.channel_masks):
        return
    floats = features.is_floating_point()
    mean = features.float().mean(0).to(features.dtype) if floats else torch.full((channels,), NO_CODE).to(features)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, max(low, high) + 1, (), generator=generator))

    shortest = max(1, changes.time_mask_frames // 5)
    for _ in range(changes.time_masks):
        width, start = draw(shortest, changes.time_mask_frames), draw(0, frames - 1)
        features[start : start + width] = mean
    for _ in range(changes.channel_masks):
        start = draw(0, channels - changes.channel_mask_size)
        band = slice(start, start + changes.channel_mask_size)
        features[:, band] = mean[band]


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:8], "big") >> 1
