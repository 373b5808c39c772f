"""What a frozen speech encoder is to this project, and the one that a folder of weights holds.

In: a :class:`pipeline.weights.resolve.Weights` folder and float32 mono clips. Out: for each clip a float32 array
[frames, channels] per layer. One module a family (``pipeline/encoders/whisper.py``) does the arithmetic; here stand the
protocol that they share, the choice of device and dtype, and the hash that is an encoder's identity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shards.format.spec import WindowMode

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
CONTEXT_STEP_SECONDS = 5  # seconds: tight contexts are 5, 10, … 30; part of the format (docs/format.md)


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
            seconds of silence, rounded up to a multiple of ``CONTEXT_STEP_SECONDS`` seconds; ``clip`` pads nothing.
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
    window: WindowMode
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


def context_samples(samples: int, encoder: Encoder) -> int:
    """Samples that a clip of ``samples`` is padded to: a few sizes, so that shapes repeat."""
    if encoder.window != "tight":
        return encoder.window_samples
    step = CONTEXT_STEP_SECONDS * encoder.sampling_rate
    wanted = samples + round(encoder.margin * encoder.sampling_rate)
    return min(max(1, -(-wanted // step)) * step, encoder.window_samples)


def check_encode_args(encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str) -> None:
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
