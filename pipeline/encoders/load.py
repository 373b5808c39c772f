"""Load an encoder from a folder of weights, on a given device and in a given dtype."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

from tqdm import tqdm

from pipeline.cpu import has_bfloat16_units
from pipeline.encoders.base import DTYPES, DeviceEncoder, Encoder
from pipeline.encoders.compile import CompiledForward, has_compiler, should_compile
from pipeline.weights.resolve import CODECS, SELF_SUPERVISED, TOWERS, Weights, is_own, read_model_json
from shards.errors import UserError
from shards.format.spec import WindowMode

DEVICES = Path("/dev")


def load_encoder(
    weights: Weights,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    window: WindowMode | None = None,
    margin: float = 0.0,
    codebooks: int | None = None,
) -> Encoder:
    """Load the encoder in ``weights`` onto ``device``.

    Args:
        weights: A checked folder or a typed class, see :func:`pipeline.weights.resolve.resolve_weights`.
        device: ``auto`` is ``cuda`` if available, else ``cpu``.
        dtype: ``auto`` is bfloat16 if the device supports it natively, else float16 on a GPU and float32 on a CPU.
        batch_size: Maximum number of clips per forward pass on a GPU. None: as many as fit into memory, see
            ``pipeline/encoders/batching.py``.
        window: See :class:`Encoder`. None: ``full30`` for Whisper encoders and towers that know 30 s only,
            ``clip`` for others.
        margin: See :class:`Encoder`.
        codebooks: Of a codec, see ``pipeline/encoders/codecs.py``.

    Raises:
        UserError: The model is not a supported encoder, the folder is corrupt, or the device, dtype or window is not
            available.
    """
    import torch

    if batch_size is not None and batch_size < 1:
        raise UserError(f"expected encoder.batch_size >= 1, got {batch_size}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"encoder.device '{device}' is not available on this machine: set encoder.device=auto or cpu"
        ) from None
    asked = dtype
    if dtype == "auto":
        dtype = auto_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"expected encoder.dtype auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got '{dtype}'")
    if is_own(weights.reference):
        _require_no_codebooks(codebooks, weights.reference)
        from pipeline.encoders.own import load_own

        if window not in (None, "clip"):
            raise UserError(
                f"window={window} is only for Whisper encoders; {weights.reference} is not padded: set window=clip"
            )
        return load_own(weights.reference, device=device, dtype=dtype, batch_size=batch_size)
    family = read_model_json(weights.folder / "config.json").get("model_type")
    if family in CODECS:
        from pipeline.encoders.codecs import CodecEncoder

        if window not in (None, "clip") or asked not in ("auto", "float32"):
            raise UserError(
                f"{family} is a codec, which is not padded and computes in float32, because rounding changes codes: "
                "set window=clip and encoder.dtype=float32, or leave them out"
            )
        return CodecEncoder(weights, family, device=device, batch_size=batch_size, codebooks=codebooks)
    _require_no_codebooks(codebooks, weights.reference)
    if family in SELF_SUPERVISED:
        from pipeline.encoders.self_supervised import SelfSupervisedEncoder

        if window not in (None, "clip"):
            raise UserError(
                f"window={window} is only for Whisper encoders; a {family} encoder is not padded: set window=clip"
            )
        return SelfSupervisedEncoder(weights, family, device=device, dtype=dtype, batch_size=batch_size)
    if family in TOWERS:
        from pipeline.encoders.towers import FAMILIES, TowerEncoder

        if window not in (None, FAMILIES[family].window):
            raise UserError(f"window={window} is not for {family} encoders: set window={FAMILIES[family].window}")
        return TowerEncoder(weights, family, device=device, dtype=dtype, batch_size=batch_size)
    from pipeline.encoders.whisper import WhisperEncoder

    if window == "clip":
        raise UserError("window=clip is not for Whisper encoders: set window=full30 or window=tight")
    return WhisperEncoder(
        weights, device=device, dtype=dtype, batch_size=batch_size, window=window or "full30", margin=margin
    )


def _require_no_codebooks(codebooks: int | None, reference: str) -> None:
    if codebooks is not None:
        raise UserError(f"encoder.codebooks is for codecs, and {reference} is none: leave it out, or name a codec")


def may_have_gpu() -> bool:
    """Return False if this machine surely has no device that torch calls ``cuda``; does not import torch.

    It looks for the devices of NVIDIA's drivers (also on Jetson), of WSL and of ROCm.
    """
    patterns = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")
    return any(next(DEVICES.glob(pattern), None) is not None for pattern in patterns)


def use_device(device: str) -> str:
    """Make ``device`` the GPU of this process if it names one, so that nothing is kept on the first; return it."""
    if device.startswith("cuda:"):
        import torch

        with suppress(RuntimeError, AssertionError, ValueError):  # load_encoder says that it is not available
            torch.cuda.set_device(device)
    return device


def describe_gpu(device: str) -> dict[str, str | int | None]:
    """Return the card that ``device`` names, its driver and libraries: between them the last bits may differ."""
    import torch

    try:
        driver = re.search(r"\d+(?:\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    return {
        "name": torch.cuda.get_device_name(device),
        "driver": driver and driver[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def fit_batch(encoder: Encoder, num_layers: int) -> None:
    """Fit the batch size of an encoder on a GPU to ``num_layers`` layers; see :class:`DeviceEncoder`."""
    if hasattr(encoder, "fit_batch") and encoder.device.startswith("cuda"):
        cast(DeviceEncoder, encoder).fit_batch(num_layers)


def auto_dtype(device: str) -> str:
    """Return the dtype that ``auto`` stands for on ``device``. It depends on the hardware, not on the model."""
    if device.startswith("cuda"):
        import torch

        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if has_bfloat16_units() else "float32"


def compile_encoder(encoder: Encoder, setting: str, num_windows: int) -> None:
    """Compile ``encoder`` if :func:`should_compile` says so; print its note otherwise.

    Args:
        encoder: A Whisper encoder; others are left unchanged. Of a lazy one, pass what its ``load()`` returns.
        setting: The value of ``encoder.compile``: auto, always or never.
        num_windows: Windows of the whole job.
    """
    from pipeline.encoders.whisper import WhisperEncoder

    if not isinstance(encoder, WhisperEncoder):  # others take clips of any length, so shapes do not repeat
        return
    compiler_found = encoder.device.startswith("cuda") and has_compiler()
    use, note = should_compile(
        setting,
        device=encoder.device,
        num_windows=num_windows,
        flop_per_window=encoder.flop_per_window,
        compiler_found=compiler_found,
    )
    if use:
        encoder.fix_addresses()
        encoder.forward = CompiledForward(encoder.forward, mode="reduce-overhead")  # with CUDA graphs
    elif note:
        tqdm.write(f"note: the encoder is {note}", file=sys.stderr)
