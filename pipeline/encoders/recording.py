"""Encode whole recordings: split into windows, encode, stitch. Shared by extraction, check and transcription.

Maps float32 mono samples at the encoder's sampling rate to float32 [frames, channels] per layer, or to integer codes.
Audio longer than the encoder's window is encoded in overlapping windows, which are joined in the middle of each
overlap; nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import split_into_windows, stitch
from pipeline.encoders.base import Encoder
from pipeline.encoders.batching import encode_in_batches
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import resolve_weights
from shards.errors import UserError
from shards.format.codec import CODES
from shards.format.spec import FeatureSpec

Array = npt.NDArray[Any]
Spans = list[tuple[int, int]]


class NonFiniteFeaturesError(ValueError):
    """The encoder returned NaN or infinite values for this recording."""


def window_spans(samples: int, encoder: Encoder, overlap: float) -> Spans:
    """Return (start, stop) of each window in samples; ``overlap``, in seconds, is rounded to whole frames."""
    hop = encoder.hop
    return split_into_windows(samples, encoder.window_samples, round(overlap * encoder.sampling_rate / hop) * hop, hop)


def join_windows(
    outputs: Sequence[Mapping[int, Array]], spans: Spans, layers: Sequence[int], hop: int
) -> dict[int, Array]:
    """Join the outputs of the windows into one array [frames, channels] per layer.

    Raises:
        NonFiniteFeaturesError: A value is NaN or infinite.
    """
    joined = {}
    for layer in layers:
        parts = [output[layer] for output in outputs]
        if len(parts) > 1:  # drop the padding of untrimmed windows, which would end up inside the speech
            parts = [part[: -(-(stop - start) // hop)] for part, (start, stop) in zip(parts, spans, strict=True)]
        frames = stitch(parts, spans, hop)
        if not np.isfinite(frames).all():
            raise NonFiniteFeaturesError(f"layer {layer} of the encoder returned NaN or infinite values")
        joined[layer] = frames
    return joined


def encode_recording(
    samples: npt.NDArray[np.float32], encoder: Encoder, layers: Sequence[int], *, overlap: float, trim: str
) -> dict[int, Array]:
    """Encode one recording exactly as extraction does, before the codec.

    Args:
        samples: float32 [samples] at ``encoder.sampling_rate``.
        encoder: The encoder.
        layers: Layers to return.
        overlap: Overlap of the windows, in seconds.
        trim: See :meth:`Encoder.encode`.

    Returns:
        Layer -> float32 [frames, channels], or codes of an integer dtype [frames, codebooks].

    Raises:
        NonFiniteFeaturesError: A value is NaN or infinite.
        UserError: A single window does not fit into memory.
    """
    spans = window_spans(len(samples), encoder, overlap)
    outputs = encode_in_batches(encoder, [samples[start:stop] for start, stop in spans], layers, trim)
    return join_windows(outputs, spans, layers, encoder.hop)


def open_encoder(spec: FeatureSpec, recorded: str | None, device: str = "auto", *, typed: str | None = None) -> Encoder:
    """Load the encoder that ``spec`` was extracted with.

    Args:
        spec: Of the features.
        recorded: The reference that a cache or a run holds; a class that it names is not imported.
        device: See :func:`load_encoder`.
        typed: The reference that the user wrote in this command, which is used instead.

    Raises:
        UserError: The reference is missing, names a class that the user did not type, or a different encoder.
    """
    reference = typed or recorded
    if not reference:
        raise UserError("the encoder of these features is not recorded: name it with --encoder")
    encoder = load_encoder(
        resolve_weights(reference, role="encoder", typed=typed is not None),
        device=device,
        dtype=spec.dtype,
        window=spec.window,
        margin=spec.margin,
        codebooks=spec.channels if spec.codec == CODES else None,
    )
    for name, expected, actual in (
        ("architecture", spec.family, encoder.family),
        ("weights (sha256 of the tensors)", spec.tensors, encoder.tensors),
        ("spectrogram settings", spec.frontend, encoder.frontend),
        ("channels", spec.channels, encoder.channels),
        ("samples per frame", spec.hop, encoder.hop),
        ("sampling rate", spec.sampling_rate, encoder.sampling_rate),
        ("layer", spec.layer, min(spec.layer, encoder.n_layers)),
    ):
        if expected != actual:
            raise UserError(
                f"the encoder '{reference}' did not make these features (expected {name} {expected}, got {actual}): "
                "name the same encoder with --encoder"
            )
    return encoder
