"""What a set of weights computes: corrupt values, and one window of real audio layer by layer.

Names, shapes and dtypes of tensors (``pipeline/weights/tensors.py``) do not show that their values are those of a
trained model. Here tensors that are NaN or zero are refused, and the first audible window of a job is encoded at all
layers once, before any feature is kept: values that explode, vanish or do not follow the audio end the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.encoders.base import Encoder
from shards.errors import UserError

if TYPE_CHECKING:
    import torch

# Trained encoders have an RMS of 0.1 to a few hundred at every layer; raw int8 or fp8 codes as weights exceed 1e5.
MIN_RMS, MAX_RMS = 1e-6, 1e4
MIN_CHANGE = 1e-5  # standard deviation over the frames of a window, relative to the RMS
AUDIBLE_RMS, AUDIBLE_FRAMES = 1e-4, 8


def refuse_corrupt_values(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors with NaN or infinite values, and matrices of zeros.

    Raises:
        UserError: names the tensor.
    """
    import torch

    for name, tensor in tensors.items():
        total = float(tensor.abs().sum(dtype=torch.float64))
        if not math.isfinite(total) or (total == 0 and tensor.ndim > 1):
            found = "only zeros" if total == 0 else "NaN or infinite values"
            raise UserError(f"'{folder}' holds {found} in the tensor {name}: copy it again or name another model")


def clip_to_check(encoder: Encoder, clips: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return the first of ``clips``, float32 [samples] each, that an unchecked encoder is checked on.

    None if the encoder was checked, or if all clips are silent, short or not finite: they are left for a later call.
    """
    if encoder.was_checked:
        return None
    shortest = AUDIBLE_FRAMES * encoder.hop
    return next((each for each in clips if len(each) >= shortest and AUDIBLE_RMS < _rms(each) < math.inf), None)


def check_features(encoder: Encoder, features: Mapping[int, np.ndarray]) -> None:
    """Check the features of a clip, float32 [frames, channels] of every layer; ``encoder`` then counts as checked.

    Of codes, integers, it is checked that they change over the clip.

    Raises:
        UserError: a layer's values are not finite, have an implausible RMS, or do not change over the clip.
    """
    for layer, frames in features.items():
        if np.issubdtype(frames.dtype, np.integer):
            if (frames == frames[0]).all():
                raise UserError(
                    f"the codes of '{encoder.name}' do not depend on the audio, so its weights are not those of a "
                    "trained codec: copy them again or name another model"
                )
            continue
        rms = _rms(frames)
        if not math.isfinite(rms):
            raise UserError(
                f"layer {layer} of the encoder '{encoder.name}' returned NaN or infinite values in {encoder.dtype} for "
                "the first audio: set encoder.dtype=float32, or name another model if that does not help"
            )
        change = _rms(frames - frames.mean(0, dtype=np.float64))
        if not MIN_RMS <= rms <= MAX_RMS or change < MIN_CHANGE * rms:
            found = f"have an RMS of {rms:.3g}" if change >= MIN_CHANGE * rms else "do not depend on the audio"
            raise UserError(
                f"the features of layer {layer} of the encoder '{encoder.name}' {found}, so its weights are not those "
                "of a trained model: copy them again or name another model"
            )
    encoder.was_checked = True


def _rms(values: np.ndarray) -> float:
    """Return the root mean square in float64; NaN or infinity if a value is."""
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
