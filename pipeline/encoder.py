"""What a frozen speech encoder is to this project, and the one that a folder of weights holds.

In: a :class:`pipeline.weights.Weights` folder and float32 mono clips. Out: for each clip a float32 array
[frames, channels] per layer. One module a family (``pipeline/whisper.py``) does the arithmetic; here stand the protocol
that they share, the choice of device and dtype, and the hash that is an encoder's identity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.weights import ENCODERS, Weights, read_settings, weight_files
from shards.errors import UserError
from shards.spec import Window

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
CONTEXT_STEP = 5  # seconds: tight contexts are 5, 10, … 30; part of the format (docs/format.md)


class Encoder(Protocol):
    """What extraction needs of an encoder; sizes in samples at ``sampling_rate`` Hz.

    Attributes:
        family: architecture, part of the feature spec.
        name: part of a cache folder's name, ``[A-Za-z0-9_-]+``.
        n_layers: layer 0 is the input of the first layer, ``n_layers`` the output after the final norm.
        channels: width of a frame.
        hop: samples a frame stands for.
        window_samples: longest clip.
        window: ``full30`` pads every clip to ``window_samples``; ``tight`` cuts the context to the clip and ``margin``
            seconds of silence, rounded up to a multiple of ``CONTEXT_STEP`` seconds; ``clip`` pads nothing.
        margin: 0 but with ``tight``.
        tensors: sha256 of the encoder's tensors, see :func:`tensors_hash`.
        frontend: settings of the spectrogram, part of the feature spec.
        batch_size: clips that a call should hold to keep the device busy; lowered when memory runs out.
        dtype: arithmetic, one of ``DTYPES``.
        device: torch's name of it.
    """

    family: str
    name: str
    n_layers: int
    channels: int
    hop: int
    sampling_rate: int
    window_samples: int
    window: Window
    margin: float
    tensors: str
    frontend: dict[str, int | float | str | bool | None]
    batch_size: int
    dtype: str
    device: str

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """Features of ``clips`` (float32 [samples], at most ``window_samples``), each padded to its context.

        Returns a dict for each clip: layer -> float32 [frames, channels], where frames is ceil(samples / hop) with
        ``trim="valid"`` and the whole context's with ``trim="none"``. NaN and Inf are passed on, not checked.
        """
        ...


def load_encoder(
    weights: Weights,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    window: Window | None = None,
    margin: float = 0.0,
) -> Encoder:
    """The encoder in ``weights``, ready on ``device``.

    Args:
        device: ``auto`` is ``cuda`` where there is one, else ``cpu``.
        dtype: ``auto`` is bfloat16 where the device computes it natively, else float16 on a GPU, float32 on a CPU.
        batch_size: most clips in one forward pass on a GPU; None is as many as fit (``pipeline/memory.py``).
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
        dtype = fast_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"encoder.dtype is '{dtype}': set it to auto, {', '.join(DTYPES)}")
    family = read_settings(weights.folder / "config.json").get("model_type")
    if family in ENCODERS[1:]:
        from pipeline.selfsupervised import SelfSupervisedEncoder

        if window not in (None, "clip"):
            raise UserError(f"window={window} is of Whisper encoders, and a {family} hears the audio alone: use clip")
        return SelfSupervisedEncoder(weights, family, device=device, dtype=dtype, batch_size=batch_size)
    from pipeline.whisper import WhisperEncoder

    if window == "clip":
        raise UserError("window=clip is of encoders that take audio of any length: use full30 or tight with a Whisper")
    return WhisperEncoder(
        weights, device=device, dtype=dtype, batch_size=batch_size, window=window or "full30", margin=margin
    )


def context_samples(samples: int, encoder: Encoder) -> int:
    """Samples that a clip of ``samples`` is padded to: a few sizes, so that shapes repeat."""
    if encoder.window != "tight":
        return encoder.window_samples
    step = CONTEXT_STEP * encoder.sampling_rate
    wanted = samples + round(encoder.margin * encoder.sampling_rate)
    return min(max(1, -(-wanted // step)) * step, encoder.window_samples)


def fast_dtype(device: str) -> str:
    """The dtype that ``auto`` stands for on ``device``: depends on the hardware, not on the model."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "float32"


def check_request(encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str) -> None:
    """ValueError for a layer, trim or clip that ``encoder.encode`` cannot take."""
    if not layers or min(layers) < 0 or max(layers) > encoder.n_layers:
        raise ValueError(f"layers {list(layers)} are not in 0 … {encoder.n_layers}")
    if trim not in ("valid", "none"):
        raise ValueError(f"trim is {trim!r}, not 'valid' or 'none'")
    for clip in clips:
        if clip.ndim != 1 or clip.shape[0] > encoder.window_samples:
            raise ValueError(f"a clip has shape {clip.shape}, not [samples <= {encoder.window_samples}]")


def encoder_name(reference: str) -> str:
    """``hf:openai/whisper-tiny.en@main`` -> ``whisper-tiny-en``: a part of a folder's name."""
    last = reference.partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-") or "encoder"


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the tensors sorted by name: name, shape, values as little-endian float32; 64 hex digits.

    The same weights stored as float16, bfloat16 or float32, in a folder of an encoder or of a whole model, agree.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update(json.dumps([name, list(values.shape)]).encode() + b"\n")
        digest.update(values.data)
    return digest.hexdigest()


def read_encoder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors (as stored, on the CPU) of a Whisper folder, named as in ``WhisperModel.encoder``."""
    import torch
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    prefixes = re.compile(r"^(?:model\.)?encoder\.")  # WhisperForConditionalGeneration, WhisperModel
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if prefixes.match(name):
                        found[prefixes.sub("", name)] = file.get_tensor(name)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found.update({prefixes.sub("", name): value for name, value in state.items() if prefixes.match(name)})
    return found
