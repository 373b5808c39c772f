"""Encoders of the user's own: ``encoder.model=my_module:MyEncoder``, a subclass of :class:`OwnEncoder`.

Maps float32 clips at 16 kHz to float32 [frames, channels] per clip and layer, with the user's ``forward``. Each clip is
encoded alone at its own length (``window: clip``), also on a GPU, where it is waited for. What the class declares is
compared with what it returns. The class is imported only if the user typed it (``pipeline/weights/resolve.py``).
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.audio import SAMPLING_RATE
from pipeline.encoders.base import check_encode_args, encoder_name, tensors_hash
from pipeline.encoders.device import real_float32
from shards.errors import UserError
from shards.format.spec import MAX_CHANNELS, WindowMode

LIMITS = {"channels": MAX_CHANNELS, "hop": 1_000_000, "n_layers": 1000, "window_samples": 1 << 31}


class OwnEncoder(nn.Module):
    """Base class of a user's encoder, a torch module whose ``forward`` maps one clip to frames.

    A subclass sets the following, in the class or in its constructor. The constructor runs under a fixed seed on the
    CPU; the module is then moved to the device, in evaluation mode, with weights as they are.

    Attributes:
        hop: Samples per frame at 16 kHz. A clip has ceil(samples / hop) frames.
        channels: Features per frame.
        n_layers: Number of the last layer; ``forward`` is asked for layers 0 to ``n_layers``.
        window_samples: Longest clip, a multiple of ``hop``; longer audio is encoded in overlapping windows.
        sampling_rate: Of the clips in Hz; always 16,000.
        name: Part of the cache folder's name, ``[A-Za-z0-9_-]+``; "": the name of the class.
        frontend: Settings that change the features beside the weights, part of the feature id; may be left out.
        device: Name of the torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``forward`` runs under autocast to it.
    """

    hop: int
    channels: int
    n_layers: int
    window_samples: int = 30 * SAMPLING_RATE
    sampling_rate: int = SAMPLING_RATE
    name: str = ""
    frontend: dict[str, int | float | str | bool | None]

    family: str
    tensors: str
    window: WindowMode = "clip"
    margin: float = 0.0
    batch_size: int = 8  # clips that are handed over together
    was_checked: bool = False

    def __init__(self, device: str, dtype: str) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype

    def forward(self, clip: Tensor, layers: Sequence[int]) -> Mapping[int, Tensor]:
        """Encode one clip.

        Args:
            clip: float32 [samples] on ``device``, 1 to ``window_samples`` long.
            layers: Layers that are wanted.

        Returns:
            Layer -> floating-point tensor [ceil(samples / hop), channels].
        """
        raise NotImplementedError

    def identity(self) -> str:
        """Return the sha256 of the weights, 64 hex digits; by default that of the module's ``state_dict``.

        Weights that are not in the ``state_dict``, such as those of another runtime, need a method of their own.

        Raises:
            UserError: The ``state_dict`` is empty, so encoders with other weights would share their feature ids.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        if not state:
            raise UserError(
                f"encoder.model={self.family.removeprefix('own:')} has no weights in its state_dict, so nothing tells "
                "its features from those of other weights: make its network an attribute, or return the sha256 of its "
                "weights from a method identity"
            )
        return tensors_hash(state)

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`pipeline.encoders.base.Encoder.encode`; without padding, both values of ``trim`` are the same.

        Raises:
            UserError: ``forward`` returned something else than the class declares.
        """
        check_encode_args(self, clips, layers, trim)
        wanted = sorted(set(layers))
        return [self._encode(clip, wanted) for clip in clips]

    def _encode(self, clip: np.ndarray, layers: list[int]) -> dict[int, np.ndarray]:
        if not len(clip):
            return {layer: np.zeros((0, self.channels), np.float32) for layer in layers}
        where, dtype = torch.device(self.device), getattr(torch, self.dtype)
        autocast = torch.autocast(where.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), real_float32(self.dtype if where.type == "cuda" else ""), autocast:
            found = self(torch.tensor(clip, dtype=torch.float32, device=where), layers)
        self._check(found, layers, -(-len(clip) // self.hop), len(clip))
        return {layer: found[layer].to("cpu", torch.float32).numpy().copy() for layer in layers}

    def _check(self, found: object, layers: list[int], frames: int, samples: int) -> None:
        who = f"encoder.model={self.family.removeprefix('own:')} returned"
        if not isinstance(found, Mapping):
            raise UserError(f"{who} a {type(found).__name__} from forward: return a dict of layer -> tensor")
        for layer in layers:
            value, shape = found.get(layer), (frames, self.channels)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
                raise UserError(f"{who} {got} for layer {layer}: return a floating-point tensor for each wanted layer")
            if tuple(value.shape) != shape:
                declared = f"with hop={self.hop} and channels={self.channels}"
                raise UserError(
                    f"{who} {list(value.shape)} for layer {layer} of a clip of {samples} samples, expected "
                    f"{list(shape)} = [ceil(samples / hop), channels] {declared}: correct its forward or these "
                    "attributes"
                )


def load_own(reference: str, *, device: str, dtype: str, batch_size: int | None) -> OwnEncoder:
    """Import, construct and check the class at ``reference``, ``module:Class``, which the user typed.

    Raises:
        UserError: It cannot be imported or constructed, is no :class:`OwnEncoder`, or declares what cannot be.
    """
    where, (module, name) = f"encoder.model={reference}", reference.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it shadows nothing; console scripts do not have it
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(
            f"{where}: '{module}' cannot be imported ({error}): run the command where {module}.py is, or set PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, OwnEncoder) and found.forward is not OwnEncoder.forward):
        raise UserError(f"{where} is not a subclass of pipeline.OwnEncoder with a method forward: derive it from that")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            encoder: OwnEncoder = found(device, dtype)
        except TypeError as error:
            raise UserError(
                f"{where} cannot be constructed with (device, dtype) ({error}): give every other argument a default"
            ) from None
    encoder.family, encoder.device, encoder.dtype = f"own:{reference}", device, dtype
    encoder.name = encoder.name or encoder_name(reference)
    encoder.frontend = {"type": "own", **getattr(encoder, "frontend", {})}
    _check_declared(encoder, where)
    encoder.tensors = encoder.identity()
    if not re.fullmatch("[0-9a-f]{64}", encoder.tensors):
        raise UserError(f"{where} returned no sha256 from identity: return 64 hex digits")
    encoder.batch_size = batch_size or encoder.batch_size
    return encoder.requires_grad_(False).to(device).eval()


def _check_declared(encoder: OwnEncoder, where: str) -> None:
    for name, limit in LIMITS.items():
        value = getattr(encoder, name, None)
        if not isinstance(value, int) or not (name != "n_layers") <= value <= limit:
            raise UserError(f"{where} has {name}={value}: set it to a whole number of at most {limit}")
    if encoder.sampling_rate != SAMPLING_RATE:
        raise UserError(
            f"{where} has sampling_rate={encoder.sampling_rate}, but clips have {SAMPLING_RATE} Hz: leave it out and "
            "resample in forward"
        )
    if encoder.window_samples % encoder.hop:
        raise UserError(f"{where} has window_samples={encoder.window_samples}: make it a multiple of hop={encoder.hop}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", encoder.name):
        raise UserError(f"{where} has name={encoder.name!r}: use letters, digits, _ and - only")
    for key, value in encoder.frontend.items():
        plain = value is None or isinstance(value, int | float | str)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{where} has {key}={value!r} in frontend: use text, finite numbers, bools and None")
