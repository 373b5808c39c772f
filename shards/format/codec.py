"""Codecs: encode features for storage and decode them.

Encodes float32 [frames, channels] as a NumPy array that ``.npy`` can store (bfloat16 and fp8 have no NumPy type and are
stored as uint16 and uint8), with float32 scales [channels] for scaled codecs, and measures the relative RMS error of
the round trip. The codes of a neural codec, integers [frames, codebooks], are stored as they are.

| codec | bits/value | scale | stored as |
|-------|------------|-------|-----------|
| f16   | 16 | none                        | float16 |
| bf16  | 16 | none                        | uint16  |
| int8  |  8 | absmax / 127 of each channel | int8    |
| fp8   |  8 | absmax / 448 of each channel | uint8, e4m3 without infinities (OCP 8-bit floating point, 2023) |
| u16   | 16 | none                        | uint16; codes, not floats |

Encoder features have outlier channels, so scales are per channel (and per utterance), not per frame.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
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
    "u16": np.dtype("<u2"),
}
CODES = "u16"  # the codec of integer codes
FLOAT_CODECS = tuple(name for name in STORED_DTYPE if name != CODES)
CODE_DTYPE: np.dtype[Any] = np.dtype(np.int32)  # codes as they are read
SCALED = frozenset({"int8", "fp8"})
SCALE_DTYPE: np.dtype[Any] = np.dtype("<f4")
FP8_MAX = 448.0
BF16_MAX = float(2.0**127 * (2 - 2.0**-7))  # larger float32 values would round up to infinity


class CodecError(ValueError):
    """The features cannot be stored. The message is recorded in ``failures.parquet``."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Payload [frames, channels] in the codec's stored dtype, scale float32 [channels] or None, relative RMS error.

    ``peak`` is the largest magnitude of the features, NaN or infinite if a value is; of codes the largest.
    """

    payload: Array
    scale: Array | None
    error: float
    peak: float


def encode(codec: str, features: Array) -> Encoded:
    """Encode float32 ``features`` [frames, channels], or with codec ``u16`` integer codes [frames, codebooks].

    Raises:
        CodecError: a value is NaN or infinite, or exceeds the range of the codec (65504 for float16); or these are
            codes and the codec is for floats, or the other way round.
    """
    if (codec == CODES) != np.issubdtype(features.dtype, np.integer):
        raise CodecError(
            f"codec {codec} is for {'integer codes' if codec == CODES else 'floats'}, got {features.dtype}"
        )
    if codec == CODES:
        check_codes(features, 1 << 16)
        return Encoded(features.astype(STORED_DTYPE[CODES], order="C"), None, 0.0, float(features.max(initial=0)))
    features = np.ascontiguousarray(features, dtype=np.float32)
    peak = float(np.maximum(features.max(initial=0.0), -features.min(initial=0.0)))  # NaN stays NaN
    check_peak(codec, peak)
    if codec not in STORED_DTYPE:
        raise CodecError(f"unknown codec '{codec}'")
    scale = _scales(features, 127.0 if codec == "int8" else FP8_MAX) if codec in SCALED else None
    payload = np.empty(features.shape, STORED_DTYPE[codec])
    scratch = np.empty((BLOCK, *features.shape[1:]), np.float32)
    for start in range(0, len(features), BLOCK):
        part = features[start : start + BLOCK]
        _encode_block(codec, part, scale, payload[start : start + BLOCK], scratch[: len(part)])

    def decoded(start: int, stop: int) -> Array:
        return decode(codec, payload[start:stop], scale, out=scratch[: stop - start])

    return Encoded(payload, scale, _relative_rms(decoded, features), peak)


def _encode_block(codec: str, features: Array, scale: Array | None, payload: Array, scratch: Array) -> None:
    """Write the payload of float32 ``features`` [frames, channels] into ``payload``; overwrites ``scratch``."""
    if codec == "f16":
        _convert(payload, features)
    elif codec == "bf16":
        payload[:] = _to_bfloat16(features)
    else:
        np.divide(features, cast(Array, scale), out=scratch)
        if codec == "int8":
            np.rint(scratch, out=scratch)
            np.copyto(payload, scratch, casting="unsafe")
        else:
            half = np.empty(scratch.shape, np.float16)
            _convert(half, scratch)
            np.take(_fp8_codes(), half.view(np.uint16), out=payload)


def check_codes(codes: Array, codebook_size: int) -> None:
    """Raise CodecError unless all ``codes``, integers of any shape, are at least 0 and less than ``codebook_size``."""
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low < 0 or high >= codebook_size:
        raise CodecError(f"a code is {low if low < 0 else high}, but the codebooks have {codebook_size} entries")


def check_peak(codec: str, peak: float) -> None:
    """Raise CodecError if features whose largest magnitude is ``peak`` cannot be stored with ``codec``."""
    if not math.isfinite(peak):
        raise CodecError("the features contain NaN or infinite values")
    if codec == "f16" and peak > 65504.0:
        raise CodecError(f"a value of {peak:.4g} overflows float16: use codec=bf16")
    if codec == "bf16" and peak > BF16_MAX:
        raise CodecError(f"a value of {peak:.4g} overflows bfloat16")


def decode(codec: str, payload: Array, scale: Array | None = None, out: Array | None = None) -> Array:
    """Decode a stored array to float32 [frames, channels], or into ``out`` (float32 or float16).

    Codes are returned as int32, and ``out`` is then of int32 or int64.

    Raises:
        CodecError: the codec is unknown, ``scale`` is missing or superfluous, or ``out`` is for floats and these are
            codes.
    """
    if (codec in SCALED) != (scale is not None):
        raise CodecError(f"codec {codec} is stored {'with' if codec in SCALED else 'without'} a scale")
    if out is None:
        out = np.empty(payload.shape, dtype=decoded_dtype(codec))
    if codec == CODES:
        if out.dtype not in (np.int32, np.int64):
            raise CodecError(f"codes cannot be read as {out.dtype}: read them as int32")
        np.copyto(out, payload)
    elif codec == "f16":
        _convert(out, payload)
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


def decoded_dtype(codec: str, half: bool = False) -> np.dtype[Any]:
    """Return the dtype that ``codec`` is decoded to: float32, with ``half`` float16 for codec f16; int32 for codes."""
    if codec == CODES:
        return CODE_DTYPE
    return np.dtype(np.float16 if half and codec == "f16" else np.float32)


def relative_rms(measured: Array, reference: Array) -> float:
    """Return ‖measured − reference‖ / ‖reference‖, accurate to a relative 1e-5; 0 if both are zero."""
    return _relative_rms(lambda start, stop: measured[start:stop], reference)


def _relative_rms(measured: Callable[[int, int], Array], reference: Array) -> float:
    """Like :func:`relative_rms`, for an array of which ``measured`` returns the rows ``start`` to ``stop``."""
    for dtype in (np.float32, np.float64):
        gap = norm = 0.0
        for start in range(0, len(reference), BLOCK):
            wanted: Array = np.asarray(reference[start : start + BLOCK], dtype=dtype).ravel()
            rest: Array = measured(start, min(start + BLOCK, len(reference))).ravel() - wanted
            with np.errstate(over="ignore", invalid="ignore"):
                gap, norm = gap + float(np.vdot(rest, rest)), norm + float(np.vdot(wanted, wanted))
        if 1e-12 < norm < 1e30 and (gap > 1e-30 or not gap):  # squares well within the range of float32
            break
    return math.sqrt(gap / norm) if norm else math.sqrt(gap)


BLOCK = 128  # frames encoded or compared at once, so that they stay in the CPU cache
_SERIAL = 32_000  # torch converts more values at once in several threads, which other stages use already


def _convert(target: Array, source: Array) -> None:
    """Copy float32 to float16 or back: as NumPy does, but 20 times as fast if torch is loaded."""
    torch: Any = sys.modules.get("torch")
    if not (
        hasattr(torch, "from_numpy")
        and {source.dtype, target.dtype} == {np.dtype(np.float16), np.dtype(np.float32)}
        and all(each.flags.c_contiguous and each.flags.writeable for each in (source, target))
    ):
        np.copyto(target, source, casting="same_kind")
        return
    flat, values = torch.from_numpy(target).view(-1), torch.from_numpy(source).view(-1)
    for start in range(0, len(values), _SERIAL):
        flat[start : start + _SERIAL].copy_(values[start : start + _SERIAL])


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
