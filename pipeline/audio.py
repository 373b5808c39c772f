"""Encoded audio in, 16 kHz mono float32 out; and how long audio is cut into windows and put together again.

In: the bytes of a WAV, FLAC, OGG or MP3 file. Out: samples for an encoder, or :class:`AudioError` with the reason (one
short phrase, the ``error`` of a failure row). ``windows`` and ``stitch`` are the two halves of one promise: no sample
of a recording is cut off, however long it is.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SAMPLING_RATE = 16_000
HOP = 320  # samples that one encoder frame stands for

_WAV_LENGTH_UNKNOWN = 0x7FFF0000  # programs that write WAV to a pipe put 0x7FFFF000 and above here
_SEGMENT_TOLERANCE = 0.1  # s; manifests round durations


class AudioError(Exception):
    """A recording that cannot be used; the message is the reason in one short phrase."""


def decode(data: bytes) -> np.ndarray:
    """Decode an audio file to mono float32 [samples] at 16 kHz: the mean of the channels, resampled by soxr (HQ).

    Raises:
        AudioError: empty, unreadable, truncated, no samples, NaN or Inf.
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
    # libsndfile reads a WAV or MP3 that was cut short without a word; the text would then belong to more than is heard
    if (form == "WAV" and _wav_is_truncated(data)) or (form == "MP3" and len(samples) < 0.9 * header_frames):
        raise AudioError("truncated audio: the header promises more samples than the file holds")
    return to_mono_16k(samples, sampling_rate)


def to_mono_16k(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """float32 [samples, channels] at ``rate`` Hz to float32 [samples] at 16 kHz; raises AudioError as ``decode``."""
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
    """Length in samples at 16 kHz by the header alone (what ``decode`` will give, MP3 about); 0 when unreadable."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else os.fspath(audio))
    except (soundfile.LibsndfileError, RuntimeError, OSError):
        return 0
    if not 0 < info.frames < 2**62:  # a streamed header may hold the largest integer
        return 0
    return num_samples_at_16k(info.frames, info.samplerate)


def num_samples_at_16k(samples: int, sampling_rate: int) -> int:
    """How many samples soxr makes of ``samples`` at ``rate`` Hz: rounded, halves up."""
    return (2 * samples * SAMPLING_RATE + sampling_rate) // (2 * sampling_rate)


def encode_wav(samples: np.ndarray, sampling_rate: int) -> bytes:
    """int16 or float32 [samples] or [samples, channels] to a WAV file (PCM16 or IEEE float), the same bytes each time.

    libsndfile would put a time stamp into the PEAK chunk of a float file.
    """
    kinds = {"int16": 1, "float32": 3}
    if samples.dtype.name not in kinds:
        raise ValueError(f"encode_wav takes int16 or float32, not {samples.dtype}")
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
    """The seconds ``start`` to ``stop`` (None: the end) of a recording as a float32 WAV at the recording's own rate.

    Raises:
        AudioError: unreadable, no such channel, or the segment ends after the recording (by more than 0.1 s).
    """
    import soundfile

    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            first = round(start * file.samplerate)
            last = file.frames if stop is None else round(stop * file.samplerate)
            if first >= file.frames or last - file.frames > _SEGMENT_TOLERANCE * file.samplerate:
                seconds = file.frames / file.samplerate
                raise AudioError(f"the segment ends after the recording, which lasts {seconds:.2f} s")
            file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise AudioError(f"unreadable audio: {_reason(error)}") from None
    if channel is not None:
        if channel >= samples.shape[1]:
            raise AudioError(f"no channel {channel} in a recording of {samples.shape[1]}")
        samples = samples[:, channel]
    return encode_wav(samples, rate)


def split_into_windows(samples: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Spans (start, stop) in samples that cover ``samples``, in order, neighbours sharing ``overlap`` samples.

    Starts are multiples of ``window - overlap``; every window is full but perhaps the last, which holds more than
    ``overlap`` samples. Audio that fits one window gives one span.

    Raises:
        ValueError: ``samples`` < 1, or ``window`` and ``overlap`` are not multiples of 320 with 0 <= overlap < window.
    """
    if samples < 1:
        raise ValueError(f"no windows over {samples} samples")
    if window % HOP or overlap % HOP or not 0 <= overlap < window:
        raise ValueError(f"window {window} and overlap {overlap} must be multiples of {HOP} with 0 <= overlap < window")
    spans = [(0, min(window, samples))]
    while spans[-1][1] < samples:
        start = spans[-1][0] + window - overlap
        spans.append((start, min(start + window, samples)))
    return spans


def stitch(parts: Sequence[np.ndarray], spans: Sequence[tuple[int, int]], hop: int = HOP) -> np.ndarray:
    """Join the frames of overlapping windows to one [ceil(samples / hop), channels], each frame from one window.

    The join lies in the middle of each overlap, where both windows have context on both sides. ``parts[i]`` holds the
    ceil((stop - start) / hop) frames of ``spans[i]``; the last may hold more (an untrimmed window keeps its padding).

    Raises:
        ValueError: a part has another number of frames than its span.
    """
    if not parts or len(parts) != len(spans):
        raise ValueError(f"{len(parts)} parts for {len(spans)} windows")
    for number, (part, (start, stop)) in enumerate(zip(parts, spans, strict=True)):
        frames = -(-(stop - start) // hop)
        if len(part) != frames and not (number == len(parts) - 1 and len(part) > frames):
            raise ValueError(f"window {number} has {len(part)} frames where {frames} are due")
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
    """Whether the data chunk of a RIFF file claims more bytes than follow."""
    if data[:4] != b"RIFF":
        return False
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return size < _WAV_LENGTH_UNKNOWN and at + 8 + size > len(data)
        at += 8 + size + size % 2
    return False


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the address of the object that was read."""
    text = getattr(error, "error_string", None) or str(error)
    return text.removeprefix("Error : ").rstrip(". ")
