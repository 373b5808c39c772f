"""The interface of a frozen speech encoder.

An encoder maps float32 mono clips to one float32 array [frames, channels] per clip and layer. Each model family has its
own module (``pipeline/encoders/whisper.py``); this one holds the protocol they share, argument checks, and the hash
that identifies an encoder. ``load.py`` chooses the device and the dtype.
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
    from concurrent.futures import Future

    import torch

    from pipeline.encoders.device import DeviceBatches, Window, WindowOutput

DTYPES = ("float32", "bfloat16", "float16")
CONTEXT_STEP_SECONDS = 5  # tight contexts last 5, 10, …, 30 s; part of the format (docs/format.md)


class Encoder(Protocol):
    """What extraction requires of an encoder. Sizes are in samples at ``sampling_rate`` Hz.

    Attributes:
        family: Architecture, part of the feature spec.
        name: Part of the cache folder's name, ``[A-Za-z0-9_-]+``.
        n_layers: Index of the last layer. Layer 0 is the input of the first layer, layer ``n_layers`` the output after
            the final norm.
        channels: Number of features per frame.
        hop: Samples per frame.
        sampling_rate: Sampling rate of the clips, in Hz.
        window_samples: Maximum length of a clip.
        window: ``full30`` pads every clip to ``window_samples``. ``tight`` pads it with ``margin`` seconds of silence,
            then to a multiple of ``CONTEXT_STEP_SECONDS`` seconds. ``clip`` adds no padding.
        margin: Silence in seconds, 0 unless ``window`` is ``tight``.
        tensors: sha256 of the encoder's tensors, see :func:`tensors_hash`.
        frontend: Settings of the spectrogram, part of the feature spec.
        batch_size: Number of clips per call that keeps the device busy; lowered when memory runs out.
        dtype: Precision of the computation, one of ``DTYPES``.
        device: Name of the torch device.
        was_checked: Whether its first features were found plausible, see ``selfcheck.py``; set there.
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
    was_checked: bool

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """Encode ``clips``, each padded to its own context.

        Args:
            clips: float32 arrays [samples], at most ``window_samples`` long.
            layers: Layers to return, 0 to ``n_layers``.
            trim: ``valid`` returns ceil(samples / hop) frames per clip, ``none`` the frames of the whole context.

        Returns:
            One dict per clip: layer -> float32 [frames, channels]. Values are not checked for NaN or Inf.
        """
        ...


class DeviceEncoder(Encoder, Protocol):
    """An encoder on a GPU, which encodes without being waited for.

    Attributes:
        batches: Runs its batches.
    """

    batches: DeviceBatches

    def fit_batch(self, num_layers: int) -> None:
        """Set the batch size that fits into the free memory with ``num_layers`` layers, unless it was configured."""

    def prepare(self, clip: np.ndarray) -> Window:
        """Return ``clip``, float32 [samples], for :meth:`launch`; what is computed on the CPU is left to a thread."""
        ...

    def group(self, samples: int) -> int:
        """Return a number that is equal for clips that can be in one batch."""
        ...

    def launch(
        self, windows: Sequence[Window], layers: Sequence[int], trim: str, codec: str | None
    ) -> Future[list[WindowOutput]]:
        """Start to encode at most ``batch_size`` windows of one group, and encode the frames as a cache stores them.

        Args:
            windows: From :meth:`prepare`.
            layers: As in :meth:`Encoder.encode`.
            trim: As in :meth:`Encoder.encode`.
            codec: See ``shards/format/codec.py``; None: float32 frames.

        Returns:
            To come: one dict per window, layer -> what the codec stores, or float32 [frames, channels].

        Raises:
            RuntimeError: memory ran out (see :func:`pipeline.encoders.batching.is_out_of_memory`).
        """
        ...


def context_samples(samples: int, encoder: Encoder) -> int:
    """Return the number of samples that a clip of ``samples`` is padded to. There are few sizes, so shapes repeat."""
    if encoder.window != "tight":
        return encoder.window_samples
    step = CONTEXT_STEP_SECONDS * encoder.sampling_rate
    wanted = samples + round(encoder.margin * encoder.sampling_rate)
    return min(max(1, -(-wanted // step)) * step, encoder.window_samples)


def check_encode_args(encoder: Encoder, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str) -> None:
    """Raise ValueError for a layer, trim or clip that ``encoder.encode`` does not accept."""
    if not layers or min(layers) < 0 or max(layers) > encoder.n_layers:
        raise ValueError(f"expected layers between 0 and {encoder.n_layers}, got {list(layers)}")
    if trim not in ("valid", "none"):
        raise ValueError(f"expected trim 'valid' or 'none', got {trim!r}")
    for clip in clips:
        if clip.ndim != 1 or clip.shape[0] > encoder.window_samples:
            raise ValueError(f"expected clips of shape [samples <= {encoder.window_samples}], got {clip.shape}")


def encoder_name(reference: str) -> str:
    """Return the folder-name part for a model reference: ``hf:openai/whisper-tiny.en@main`` -> ``whisper-tiny-en``."""
    last = reference.partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-") or "encoder"


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of the tensors as 64 hex digits.

    The hash covers each tensor's name, shape and values as little-endian float32, sorted by name. It is the same
    whether the weights are stored as float16, bfloat16 or float32, and for an encoder alone or inside a whole model.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update(json.dumps([name, list(values.shape)]).encode() + b"\n")
        digest.update(values.data)
    return digest.hexdigest()
