"""Resolves the ``device`` and ``dtype`` keys of a run to a ``torch.device`` and a ``torch.dtype``; copies to a device.

``device: auto`` selects a GPU if there is one. ``dtype: auto`` selects bfloat16 if the hardware multiplies it natively;
elsewhere bfloat16 is slower than float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shards.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """Resolve ``auto`` | ``cpu`` | ``cuda`` | ``cuda:1`` to a device; UserError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"device={name} is not available ({reason}): set device=auto or device=cpu") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto`` | ``float32`` | ``bfloat16`` to the dtype of activations and frozen weights on ``device``."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has AMX tiles or AVX-512 BF16; without either, torch emulates bfloat16 products in software."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(probe()) for name in probes if (probe := getattr(torch.cpu, name, None)) is not None)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. The host does not wait for a copy to a GPU.

    A pinned ``tensor`` must not change until the GPU has read it; of others, a pinned copy is made.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if not tensor.is_pinned():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """As :func:`to_device`, with one copy for ``tensors`` of one dtype on the CPU."""
    if device.type == "cpu":
        return list(tensors)
    sizes = [tensor.numel() for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten() for tensor in tensors], out=block)
    parts = torch.split(to_device(block, device), sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Context manager and decorator in which numbers below 1.2e-38 become 0 on the CPU.

    CPUs compute with them at a tenth of their speed. A CTC head that is sure gives them by the million: probabilities
    of tokens that it rules out, their gradients, and the moments of AdamW. Stage 1 would end at a third of the speed at
    which it began (`bench/denormals.py`). The setting is the calling thread's; threads that it starts inherit it.
    """
    before = bool(torch.tensor(1e-40) * 1.0 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
