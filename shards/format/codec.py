"""Codecs: encode features for storage and decode them.

Encodes float32 [frames, channels] as a NumPy array that ``.npy`` can store (bfloat16 and fp8 have no NumPy type and are
stored as uint16 and uint8), with float32 scales [channels] for scaled codecs, and measures the relative RMS error of
the round trip.

| codec | bits/value | scale | stored as |
|-------|------------|-------|-----------|
| f16   | 16 | none                        | float16 |
| bf16  | 16 | none                        | uint16  |
| int8  |  8 | absmax / 127 of each channel | int8    |
| fp8   |  8 | absmax / 448 of each channel | uint8, e4m3 without infinities (OCP 8-bit floating point, 2023) |

Encoder features have outlier channels, so scales are per channel (and per utterance), not per frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "fp8": np.dtype("u1"),
}
SCALED = frozenset({"int8", "fp8"})
SCALE_DTYPE: np.dtype[Any] = np.dtype("<f4")
FP8_MAX = 448.0
BF16_MAX = float(2.0**127 * (2 - 2.0**-7))  # larger float32 values would round up to infinity


class CodecError(ValueError):
    """The features cannot be stored. The message is recorded in ``failures.parquet``."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Payload [frames, channels] in the codec's stored dtype, scale float32 [channels] or None, relative RMS error."""

    payload: Array
    scale: Array | None
    error: float


def encode(codec: str, features: Array) -> Encoded:
    """Encode float32 ``features`` [frames, channels].

    Raises:
        CodecError: a value is NaN or infinite, or exceeds the range of the codec (65504 for float16).
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    peak = float(np.maximum(features.max(initial=0.0), -features.min(initial=0.0)))  # NaN stays NaN
    if not np.isfinite(peak):
        raise CodecError("the features contain NaN or infinite values")
    scale: Array | None = None
    if codec == "f16":
        if peak > 65504.0:
            raise CodecError(f"a value of {peak:.4g} overflows float16: use codec=bf16")
        payload = features.astype("<f2")
    elif codec == "bf16":
        if peak > BF16_MAX:
            raise CodecError(f"a value of {peak:.4g} overflows bfloat16")
        payload = _to_bfloat16(features)
    elif codec == "int8":
        scale = _scales(features, 127.0)
        payload = np.rint(features / scale).astype(np.int8)
    elif codec == "fp8":
        scale = _scales(features, FP8_MAX)
        payload = _fp8_codes()[(features / scale).astype(np.float16).view(np.uint16)]
    else:
        raise CodecError(f"unknown codec '{codec}'")
    return Encoded(payload, scale, relative_rms(decode(codec, payload, scale), features))


def decode(codec: str, payload: Array, scale: Array | None = None, out: Array | None = None) -> Array:
    """Decode a stored array to float32 [frames, channels], or into ``out`` (float32 or float16).

    Raises:
        CodecError: the codec is unknown, or ``scale`` is missing or superfluous.
    """
    if (codec in SCALED) != (scale is not None):
        raise CodecError(f"codec {codec} is stored {'with' if codec in SCALED else 'without'} a scale")
    if out is None:
        out = np.empty(payload.shape, dtype=np.float32)
    if codec == "f16":
        np.copyto(out, payload, casting="same_kind")
    elif codec == "bf16":
        wide = payload.astype(np.uint32)
        wide <<= 16
        np.copyto(out, wide.view(np.float32), casting="same_kind")
    elif codec == "int8":
        np.multiply(payload, cast(Array, scale), out=out, casting="same_kind", dtype=np.float32)
    elif codec == "fp8":
        np.multiply(_fp8_values()[payload], cast(Array, scale), out=out, casting="same_kind")
    else:
        raise CodecError(f"unknown codec '{codec}'")
    return out


def relative_rms(measured: Array, reference: Array) -> float:
    """Return ‖measured − reference‖ / ‖reference‖, accurate to a relative 1e-5; 0 if both are zero."""
    for dtype in (np.float32, np.float64):
        gap = norm = 0.0
        for start in range(0, len(reference), BLOCK):
            wanted: Array = np.asarray(reference[start : start + BLOCK], dtype=dtype).ravel()
            rest: Array = measured[start : start + BLOCK].ravel() - wanted
            with np.errstate(over="ignore", invalid="ignore"):
                gap, norm = gap + float(np.vdot(rest, rest)), norm + float(np.vdot(wanted, wanted))
        if 1e-12 < norm < 1e30 and (gap > 1e-30 or not gap):  # squares well within the range of float32
            break
    return math.sqrt(gap / norm) if norm else math.sqrt(gap)


BLOCK = 128  # frames compared at once, so that they stay in the CPU cache


def _scales(features: Array, top: float) -> Array:
    """Return float32 [channels]: the absmax of each channel divided by ``top``; 1 for an all-zero channel."""
    peaks = np.maximum(features.max(axis=0), -features.min(axis=0))
    scale: Array = (peaks / np.float32(top)).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0  # dividing by a subnormal scale would overflow
    return scale


def _to_bfloat16(features: Array) -> Array:
    """Round float32 to its upper 16 bits, to nearest even."""
    bits = features.view(np.uint32)
    rounded: Array = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    return rounded


@cache
def _fp8_values() -> Array:
    """Return float32 [256]: the value of each e4m3 code (bias 7, no infinities, 0x7F and 0xFF are NaN)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), normal)
    value = np.where(code & 128, -value, value).astype(np.float32)
    value[[127, 255]] = np.nan
    return value


@cache
def _fp8_codes() -> Array:
    """Return uint8 [65536]: the nearest e4m3 code (ties to even) of each float16 bit pattern. Saturates at ±448."""
    with np.errstate(invalid="ignore"):
        half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    positive = _fp8_values()[:127]
    middle = (positive[1:] + positive[:-1]) / 2
    size = np.nan_to_num(np.abs(half), nan=FP8_MAX, posinf=FP8_MAX)
    low = np.searchsorted(middle, size, side="left")  # a tie takes the lower code …
    tie = (low < 126) & (size == middle[np.minimum(low, 125)])
    code = low + (tie & (low % 2 == 1))  # … unless the upper code is the even one
    codes: Array = (code + np.where(np.signbit(half), 128, 0)).astype(np.uint8)
    return codes
