"""The codecs of ``shards/format/codec.py`` on the encoder's device, for a batch of windows.

Payloads and scales have the same bytes as there. What decides whether an utterance can be stored, and its error, is one
vector of three values per window: nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.format.codec import FP8_MAX

if TYPE_CHECKING:
    import torch

NUM_STATS = 3


def encode_batch(
    codec: str, frames: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Encode each window of a batch as an utterance of its own.

    Args:
        codec: See ``shards/format/codec.py``.
        frames: float32 [B, T, C].
        counts: int32 [B], the frames of each window that count; those after them are stored as zeros.

    Returns:
        The payload [B, T, C] in the dtype of the codec, the scales float32 [B, C] of a scaled codec, and float32
        [B, 3]: the largest magnitude (NaN or infinite if a value is), and the norms of the error and of the frames,
        divided by it.
    """
    import torch

    valid = torch.arange(frames.shape[1], device=frames.device) < counts[:, None]
    x = torch.where(valid[:, :, None], frames, 0.0)
    peaks = x.abs().amax(1)
    scale = None
    if codec == "f16":
        payload = x.half()
        rest = payload.float()
    elif codec == "bf16":
        payload = x.bfloat16()
        rest = payload.float()
    else:
        scale = peaks / (127.0 if codec == "int8" else FP8_MAX)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        quotient = x / scale[:, None]
        payload = quotient.round_().to(torch.int8) if codec == "int8" else quotient.half().to(torch.float8_e4m3fn)
        rest = payload.float().mul_(scale[:, None])
    peak = peaks.amax(1)
    size = torch.where(peak > 0, peak, 1.0)[:, None, None]  # squares then stay within the range of float32
    rest.sub_(x).div_(size)
    norms = [torch.linalg.vector_norm(each, dim=(1, 2)) for each in (rest, x.div_(size))]
    return payload, scale, torch.stack([peak, *norms], 1)
