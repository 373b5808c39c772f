"""The one place that cuts windows into batches for an encoder: as many as fit, and fewer after memory ran out.

In: windows. Out: their features, whatever the first guess was: a batch that does not fit is halved and tried again, and
later ones stay at that size. On a CPU every clip passes alone, so the bytes are the same in any batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pipeline.encoders.base import Encoder
from shards.errors import UserError

MAX_BATCH_SIZE = (
    32  # windows of 30 s: 48,000 rows for each matrix product, more gains nothing and costs at a shard's end
)
MEMORY_FRACTION = 0.6  # of the free memory; the rest is for what an estimate does not see
_OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
)  # CUDA's, torch's CPU allocator's, Linux's


def fitting_batch_size(free_bytes: int, window_bytes: int) -> int:
    """A power of two, 1 … ``LARGEST``: windows of ``window`` bytes that fit into ``SHARE`` of ``free`` bytes."""
    size = 1
    while size < MAX_BATCH_SIZE and 2 * size * window_bytes <= MEMORY_FRACTION * free_bytes:
        size *= 2
    return size


def encode_in_batches(
    encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str
) -> list[dict[int, np.ndarray]]:
    """:meth:`Encoder.encode` of any number of clips, ``encoder.batch_size`` at a time.

    Where memory runs out, ``encoder.batch_size`` is halved, which a note tells, and the same clips are tried again.

    Raises:
        UserError: not even a single window fits.
    """
    results: list[dict[int, np.ndarray]] = []
    while len(results) < len(clips):
        part = clips[len(results) : len(results) + encoder.batch_size]
        found = _try_encode(encoder, part, layers, trim)
        if found is not None:
            results += found
            continue
        if len(part) == 1:
            raise UserError(
                f"one window of the encoder '{encoder.name}' does not fit into the memory of {encoder.device}: end "
                "what else uses it, or choose a smaller encoder or another encoder.device"
            )
        encoder.batch_size = len(part) // 2
        _empty_cuda_cache(encoder.device)
        tqdm.write(
            f"note: {len(part)} windows did not fit into the memory of {encoder.device}: going on with "
            f"{encoder.batch_size} at a time",
            file=sys.stderr,
        )
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, in torch's words for GPU and CPU, or NumPy's."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY_MESSAGES)


def _try_encode(
    encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str
) -> list[dict[int, np.ndarray]] | None:
    """None when memory ran out; by then nothing holds the tensors of the attempt."""
    try:
        return encoder.encode(clips, layers, trim)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _empty_cuda_cache(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
