"""Decode audio to 16 kHz mono float32, and split long recordings into windows and stitch their frames.

Takes the bytes of a WAV, FLAC, OGG or MP3 file. Audio that cannot be used raises :class:`AudioError`, whose message is
one short phrase, stored as ``error`` in the failure row. :func:`split_into_windows` and :func:`stitch` together ensure
that no sample of a recording is cut off, whatever its length.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SAMPLING_RATE = 16_000
HOP = 320  # samples per encoder frame

_WAV_LENGTH_UNKNOWN = 0x7FFF0000  # programs that write WAV to a pipe set 0x7FFFF000 or more
_SEGMENT_TOLERANCE = 0.1  # seconds; manifests round durations


class AudioError(Exception):
    """A recording cannot be used. The message is the reason in one short phrase."""


def decode(data: bytes) -> np.ndarray:
    """Decode an audio file to mono float32 [samples] at 16 kHz: the mean of its channels, resampled by soxr (HQ).

    Args:
        data: The bytes of the file.

    Raises:
        AudioError: The file is empty, unreadable or truncated, or has no samples, NaN or Inf.
    """
    import soundfile

    if not data:
        raise AudioError("empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            sampling_rate, header_frames, form = file.samplerate, file.frames, file.format
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, MemoryError) as error:
        raise AudioError(f"unreadable audio: {_reason(error)}") from None
    # libsndfile reads a truncated WAV or MP3 without an error; the transcript would then cover more than the audio
    if (form == "WAV" and _wav_is_truncated(data)) or (form == "MP3" and len(samples) < 0.9 * header_frames):
        raise AudioError("truncated audio: the header states more samples than the file contains")
    return to_mono_16k(samples, sampling_rate)


def to_mono_16k(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Convert float32 [samples, channels] at ``sampling_rate`` Hz to mono float32 [samples] at 16 kHz.

    Raises:
        AudioError: There are no samples, or some are NaN or Inf.
    """
    if not len(samples):
        raise AudioError("no samples")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError("NaN or Inf in the samples")
    if sampling_rate != SAMPLING_RATE:
        import soxr

        mono = soxr.resample(mono, sampling_rate, SAMPLING_RATE, quality="HQ")
        if not len(mono):
            raise AudioError("no samples")
    return np.ascontiguousarray(mono, dtype=np.float32)


def probe(audio: bytes | str | os.PathLike[str]) -> int:
    """Return the length in samples at 16 kHz according to the header, or 0 if the file is unreadable.

    The result equals the length that :func:`decode` returns; for MP3 it is approximate.
    """
    import soundfile

    try:
        # `soundfile.info` takes a third longer, to format what nobody reads
        with soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else os.fspath(audio)) as file:
            samples, sampling_rate = file.frames, file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError):
        return 0
    if not 0 < samples < 2**62:  # the header of a streamed file may state the largest integer
        return 0
    return num_samples_at_16k(samples, sampling_rate)


def num_samples_at_16k(samples: int, sampling_rate: int) -> int:
    """Return how many samples soxr resamples ``samples`` at ``sampling_rate`` Hz to, rounding halves up."""
    return (2 * samples * SAMPLING_RATE + sampling_rate) // (2 * sampling_rate)


def encode_wav(samples: np.ndarray, sampling_rate: int) -> bytes:
    """Encode int16 or float32 samples as a WAV file (PCM16 or IEEE float). The bytes are deterministic.

    libsndfile is not used because it writes a time stamp into the PEAK chunk of a float file.

    Args:
        samples: [samples] or [samples, channels].
        sampling_rate: In Hz.

    Raises:
        ValueError: Another dtype.
    """
    kinds = {"int16": 1, "float32": 3}
    if samples.dtype.name not in kinds:
        raise ValueError(f"expected int16 or float32 samples, got {samples.dtype}")
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    payload = np.ascontiguousarray(samples, dtype=samples.dtype.newbyteorder("<")).tobytes()
    frame = channels * samples.itemsize
    form = struct.pack(
        "<HHIIHH",
        kinds[samples.dtype.name],
        channels,
        sampling_rate,
        sampling_rate * frame,
        frame,
        8 * samples.itemsize,
    )
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def read_segment(path: str | os.PathLike[str], start: float, stop: float | None, channel: int | None = None) -> bytes:
    """Read a segment of a recording as a float32 WAV file at the recording's sampling rate.

    Args:
        path: The audio file.
        start: In seconds.
        stop: In seconds; None: the end.
        channel: Index of the channel to keep; None: all.

    Raises:
        AudioError: The file is unreadable or has no such channel, or the segment ends more than 0.1 s after the
            recording.
    """
    import soundfile

    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            first = round(start * file.samplerate)
            last = file.frames if stop is None else round(stop * file.samplerate)
            if first >= file.frames or last - file.frames > _SEGMENT_TOLERANCE * file.samplerate:
                seconds = file.frames / file.samplerate
                raise AudioError(f"the segment ends after the end of the recording ({seconds:.2f} s)")
            file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True)
            sampling_rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise AudioError(f"unreadable audio: {_reason(error)}") from None
    if channel is not None:
        if channel >= samples.shape[1]:
            raise AudioError(f"no channel {channel} in a recording with {samples.shape[1]}")
        samples = samples[:, channel]
    return encode_wav(samples, sampling_rate)


def split_into_windows(samples: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return spans (start, stop) in samples that cover a recording, in order; neighbors share ``overlap`` samples.

    Starts are multiples of ``window - overlap``. All windows are full except possibly the last, which has more than
    ``overlap`` samples. Audio that fits into one window yields one span.

    Args:
        samples: Length of the recording.
        window: Length of a window, in samples.
        overlap: Overlap of neighboring windows, in samples.

    Raises:
        ValueError: ``samples`` < 1, or ``window`` and ``overlap`` are not multiples of 320 with 0 <= overlap < window.
    """
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, got {samples}")
    if window % HOP or overlap % HOP or not 0 <= overlap < window:
        raise ValueError(
            f"expected window and overlap to be multiples of {HOP} with 0 <= overlap < window, got {window}, {overlap}"
        )
    spans = [(0, min(window, samples))]
    while spans[-1][1] < samples:
        start = spans[-1][0] + window - overlap
        spans.append((start, min(start + window, samples)))
    return spans


def stitch(parts: Sequence[np.ndarray], spans: Sequence[tuple[int, int]], hop: int = HOP) -> np.ndarray:
    """Join the frames of overlapping windows; each frame comes from one window.

    The join is in the middle of each overlap, where both windows have context on both sides.

    Args:
        parts: ``parts[i]`` [frames, channels] has the ceil((stop - start) / hop) frames of ``spans[i]``. The last may
            have more, because an untrimmed window keeps its padding.
        spans: (start, stop) of each window in samples, see :func:`split_into_windows`.
        hop: Samples per frame.

    Returns:
        [ceil(samples / hop), channels].

    Raises:
        ValueError: A part has the wrong number of frames for its span.
    """
    if not parts or len(parts) != len(spans):
        raise ValueError(f"expected as many parts as windows, got {len(parts)} parts and {len(spans)} windows")
    for number, (part, (start, stop)) in enumerate(zip(parts, spans, strict=True)):
        frames = -(-(stop - start) // hop)
        if len(part) != frames and not (number == len(parts) - 1 and len(part) > frames):
            raise ValueError(f"expected {frames} frames in window {number}, got {len(part)}")
    if len(parts) == 1:
        return parts[0]
    joins = [(before[1] + after[0]) // (2 * hop) for before, after in pairwise(spans)]
    firsts = [0, *joins]
    lasts = [*joins, spans[-1][0] // hop + len(parts[-1])]
    pieces = [
        part[first - start // hop : last - start // hop]
        for part, (start, _), first, last in zip(parts, spans, firsts, lasts, strict=True)
    ]
    return np.concatenate(pieces)


def _wav_is_truncated(data: bytes) -> bool:
    """Return whether the data chunk of a RIFF file states more bytes than follow."""
    if data[:4] != b"RIFF":
        return False
    offset = 12
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if data[offset : offset + 4] == b"data":
            return size < _WAV_LENGTH_UNKNOWN and offset + 8 + size > len(data)
        offset += 8 + size + size % 2
    return False


def _reason(error: Exception) -> str:
    """Return libsndfile's message without the address of the object that was read."""
    text = getattr(error, "error_string", None) or str(error)
    return text.removeprefix("Error : ").rstrip(". ")
