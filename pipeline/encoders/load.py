"""The encoder that a folder of weights holds, on the device and in the dtype asked for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipeline.encoders.base import DTYPES, Encoder
from pipeline.encoders.compile import CompiledForward, has_compiler, should_compile
from pipeline.weights.resolve import ENCODERS, Weights, read_model_json
from shards.errors import UserError
from shards.format.spec import WindowMode

if TYPE_CHECKING:
    pass


def load_encoder(
    weights: Weights,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    window: WindowMode | None = None,
    margin: float = 0.0,
) -> Encoder:
    """The encoder in ``weights``, ready on ``device``.

    Args:
        device: ``auto`` is ``cuda`` where there is one, else ``cpu``.
        dtype: ``auto`` is bfloat16 where the device computes it natively, else float16 on a GPU, float32 on a CPU.
        batch_size: most clips in one forward pass on a GPU; None is as many as fit (``pipeline/encoders/batching.py``).
        window, margin: see :class:`Encoder`; None is ``full30`` for a Whisper and ``clip`` for the others.

    Raises:
        UserError: no such encoder, a damaged folder, or a device, dtype or window that is not there.
    """
    import torch

    if batch_size is not None and batch_size < 1:
        raise UserError(f"encoder.batch_size is {batch_size}: set it to 1 or more")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"encoder.device '{device}' is not available here: set encoder.device=auto or cpu") from None
    if dtype == "auto":
        dtype = auto_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"encoder.dtype is '{dtype}': set it to auto, {', '.join(DTYPES)}")
    family = read_model_json(weights.folder / "config.json").get("model_type")
    if family in ENCODERS[1:]:
        from pipeline.encoders.self_supervised import SelfSupervisedEncoder

        if window not in (None, "clip"):
            raise UserError(f"window={window} is of Whisper encoders, and a {family} hears the audio alone: use clip")
        return SelfSupervisedEncoder(weights, family, device=device, dtype=dtype, batch_size=batch_size)
    from pipeline.encoders.whisper import WhisperEncoder

    if window == "clip":
        raise UserError("window=clip is of encoders that take audio of any length: use full30 or tight with a Whisper")
    return WhisperEncoder(
        weights, device=device, dtype=dtype, batch_size=batch_size, window=window or "full30", margin=margin
    )


def auto_dtype(device: str) -> str:
    """The dtype that ``auto`` stands for on ``device``: depends on the hardware, not on the model."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "float32"


def compile_encoder(encoder: Encoder, setting: str, num_windows: int) -> None:
    """Compile ``encoder`` where :func:`decide` says so, and tell its note."""
    from pipeline.encoders.whisper import WhisperEncoder

    if not isinstance(encoder, WhisperEncoder):  # the others take clips of any length: no shape comes twice
        return
    compiler = encoder.device.startswith("cuda") and has_compiler()
    use, note = should_compile(
        setting,
        device=encoder.device,
        num_windows=num_windows,
        flop_per_window=encoder.flop_per_window,
        compiler_found=compiler,
    )
    if use:
        encoder.forward = CompiledForward(encoder.forward, mode="reduce-overhead")  # with CUDA graphs
    elif note:
        tqdm.write(f"note: the encoder is {note}", file=sys.stderr)
