"""Where a run computes and in which arithmetic: ``auto`` becomes a device and a dtype.

In: the ``device`` and ``dtype`` keys of a run. Out: a ``torch.device`` and a ``torch.dtype``. ``auto`` takes a GPU
where there is one, and bfloat16 where the hardware multiplies it natively (elsewhere it is slower than float32).
"""

from __future__ import annotations

import torch

from shards.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """``auto`` | ``cpu`` | ``cuda`` | ``cuda:1`` as a device that is there; raises UserError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"device={name} cannot be used here ({reason}): set device=auto or device=cpu") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` | ``float32`` | ``bfloat16`` as the dtype of activations and frozen weights on ``device``."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    """AMX tiles or AVX-512 BF16: without either, bfloat16 matrices are widened in software."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(probe()) for name in probes if (probe := getattr(torch.cpu, name, None)) is not None)
