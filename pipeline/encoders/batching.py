"""Split windows into batches for an encoder, and reduce the batch size when memory runs out.

A batch that does not fit is halved and retried; later batches keep the smaller size. On a CPU each clip is encoded
alone, so the features do not depend on the batch size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pipeline.encoders.base import Encoder
from pipeline.encoders.device import NUM_SLOTS
from pipeline.encoders.selfcheck import check_features, clip_to_check
from shards.errors import UserError

# 32 windows of 30 s are 48,000 rows per matrix product; larger batches are no faster and waste work at a shard's end
MAX_BATCH_SIZE = 32
MEMORY_FRACTION = 0.6  # of the free memory; the estimate does not cover everything
# from CUDA, torch's CPU allocator and Linux; cuBLAS and cuDNN allocate their own workspaces and handles
_OUT_OF_MEMORY_MESSAGES = (
    *("out of memory", "not enough memory", "can't allocate memory"),
    *("cublas_status_alloc_failed", "cublas_status_not_initialized", "cusolver_status_alloc_failed"),
    *("cudnn_status_alloc_failed", "cudnn_status_not_initialized", "cufft_alloc_failed"),
    *("cudnn_status_internal_error_host_allocation_failed", "cudnn_status_internal_error_device_allocation_failed"),
)


def fitting_batch_size(free_bytes: int, window_bytes: int) -> int:
    """Return the largest power of two up to ``MAX_BATCH_SIZE`` whose windows fit into the free memory, at least 1.

    Windows of ``window_bytes`` may fill ``MEMORY_FRACTION`` of ``free_bytes``.
    """
    size = 1
    while size < MAX_BATCH_SIZE and 2 * size * window_bytes <= MEMORY_FRACTION * free_bytes:
        size *= 2
    return size


def output_bytes(num_layers: int, frames: int, channels: int) -> int:
    """Return the bytes that a window's ``num_layers`` layers, [frames, channels] each, take on a GPU.

    Each is kept in float32, in the dtype of the codec and in the three slots of ``pipeline/encoders/device.py``, at
    worst as float32 again; the codec needs three more copies of one layer.
    """
    return 4 * frames * channels * ((2 + NUM_SLOTS) * num_layers + 3)


def encode_in_batches(
    encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str
) -> list[dict[int, np.ndarray]]:
    """Call :meth:`Encoder.encode` on any number of clips, ``encoder.batch_size`` at a time.

    When memory runs out, halves ``encoder.batch_size``, prints a note and retries the same clips.

    Raises:
        UserError: A single window does not fit into memory, or the encoder fails its check on the first audio.
    """
    check_encoder(encoder, clips)
    results: list[dict[int, np.ndarray]] = []
    while len(results) < len(clips):
        batch = clips[len(results) : len(results) + encoder.batch_size]
        features = _try_encode(encoder, batch, layers, trim)
        if features is not None:
            results += features
            continue
        halve_batch_size(encoder, len(batch))
    return results


def check_encoder(encoder: Encoder, clips: Sequence[np.ndarray]) -> None:
    """Check an encoder on the first audible one of ``clips``; does nothing once that is done.

    Raises:
        UserError: see :func:`pipeline.encoders.selfcheck.check_features`.
    """
    first = clip_to_check(encoder, clips)
    if first is not None and (found := _try_encode(encoder, [first], range(encoder.n_layers + 1), "valid")):
        check_features(encoder, found[0])  # with too little memory the next call tries again


def halve_batch_size(encoder: Encoder, num_windows: int) -> None:
    """Set the batch size to half of ``num_windows``, which did not fit into memory, and print a note.

    Raises:
        UserError: it was a single window.
    """
    if num_windows == 1:
        raise UserError(
            f"one window of the encoder '{encoder.name}' does not fit into the memory of {encoder.device}: stop "
            "other programs that use it, or set a smaller encoder.model or another encoder.device"
        )
    encoder.batch_size = num_windows // 2
    _empty_cuda_cache(encoder.device)
    tqdm.write(
        f"note: {num_windows} windows did not fit into the memory of {encoder.device}: continuing with batches of "
        f"{encoder.batch_size}",
        file=sys.stderr,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is an out-of-memory error of torch (GPU or CPU) or NumPy."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_MESSAGES)


def _try_encode(
    encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str
) -> list[dict[int, np.ndarray]] | None:
    """Return the features, or None when memory ran out; the failed attempt's tensors are freed by then."""
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
