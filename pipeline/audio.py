"""Decode audio to mono float32 at 16 kHz or an encoder's own rate; split long recordings and stitch their frames.

Takes the bytes of any file that ``containers.py`` reads. Audio that cannot be used raises :class:`AudioError`, whose
message is one short phrase, stored as ``error`` in the failure row. :func:`split_into_windows` and :func:`stitch`
together ensure that no sample of a recording is cut off, whatever its length.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.containers import (
    HEAD,
    TOLERANCE,
    AudioError,
    Block,
    declared_length,
    own_errors,
    read_at_once,
    read_blocks,
    require_inside,
    scan_length,
    sndfile_span,
    sought_span,
)

__all__ = ["TOLERANCE", "AudioError"]

SAMPLING_RATE = 16_000
HOP = 320  # samples per encoder frame
MAX_HOURS = 2.0  # of one recording; 0.46 GB of samples
_MAX_DECLARED = 2**40  # samples; a length that no recording has counts as unknown


def decode(data: bytes, max_hours: float = MAX_HOURS, rate: int = SAMPLING_RATE) -> np.ndarray:
    """Decode an audio file to mono float32 [samples] at ``rate`` Hz: the mean of its channels, resampled by soxr (HQ).

    All of the audio that the file declares is returned, or none. Blocks are mixed as they are decoded, so that memory
    is that of ``max_hours`` of mono at most.

    Args:
        data: The bytes of the file.
        max_hours: A longer recording is an error.
        rate: Sampling rate of the result; the audio is resampled once, from that of the file.

    Raises:
        AudioError: The file is empty, unreadable, truncated or too long, or has no samples, NaN or Inf. No other
            exception leaves this function, whatever the file contains.
    """
    with own_errors():
        plain = read_at_once(data, max_hours)
        return resample(*_mixed(read_blocks(data, max_hours) if plain is None else [plain]), rate)


def to_mono(samples: np.ndarray, sampling_rate: int, rate: int = SAMPLING_RATE) -> np.ndarray:
    """Convert float32 [samples, channels] at ``sampling_rate`` Hz to mono float32 [samples] at ``rate`` Hz.

    Raises:
        AudioError: There are no samples, or some are NaN or Inf.
    """
    return resample(*_mixed([(sampling_rate, samples)]), rate)


def _mixed(blocks: Iterable[Block], channel: int | None = None) -> tuple[np.ndarray, int]:
    """Join blocks to mono float32 [samples], the mean of the channels or one of them, and their sampling rate."""
    parts, rate = [], 0
    for rate_of_block, block in blocks:
        if rate and rate_of_block != rate:
            raise AudioError(f"the sampling rate changes from {rate} to {rate_of_block} Hz within the file")
        rate = rate_of_block
        if channel is None:
            parts.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32))
        elif channel < block.shape[1]:
            parts.append(block[:, channel])
        else:
            raise AudioError(f"no channel {channel} in a recording with {block.shape[1]}")
    if not parts:
        raise AudioError("no samples")
    return parts[0] if len(parts) == 1 else np.concatenate(parts), rate


def resample(mono: np.ndarray, sampling_rate: int, rate: int) -> np.ndarray:
    """Resample float32 [samples] from ``sampling_rate`` to ``rate`` Hz with soxr (HQ), which is deterministic.

    Raises:
        AudioError: There are no samples, or some are NaN or Inf.
    """
    if not len(mono):
        raise AudioError("no samples")
    if not np.isfinite(mono).all():
        raise AudioError("NaN or Inf in the samples")
    if sampling_rate != rate:
        import soxr

        mono = soxr.resample(mono, sampling_rate, rate, quality="HQ")
        if not len(mono):
            raise AudioError("no samples")
    return np.ascontiguousarray(mono, dtype=np.float32)


def probe(audio: bytes | str | os.PathLike[str]) -> int:
    """Return the length in samples at 16 kHz that a file declares, or 0 if it is unreadable.

    WAV, FLAC and MP3 with a header declare it in their first bytes; other files are read, but not decoded. The result
    is within 0.1 s of what :func:`decode` returns, and equal to it for WAV and FLAC.
    """
    try:
        with own_errors():
            samples = num_samples_at_16k(*_length(audio))
    except AudioError:
        return 0
    return samples if 0 < samples < _MAX_DECLARED else 0


def _length(audio: bytes | str | os.PathLike[str]) -> tuple[int, int]:
    """Return frames and sampling rate."""
    if isinstance(audio, bytes):
        return declared_length(audio, len(audio)) or scan_length(audio)
    with open(audio, "rb") as file:
        head = file.read(HEAD)
        return declared_length(head, os.fstat(file.fileno()).st_size) or scan_length(head + file.read())


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


def read_segment(
    path: str | os.PathLike[str],
    start: float,
    stop: float | None,
    channel: int | None = None,
    max_hours: float = MAX_HOURS,
) -> bytes:
    """Read a segment of a recording as a mono float32 WAV file at the recording's sampling rate.

    A segment without an end is read to the end of the recording, which must then be whole, as for :func:`decode`. One
    with an end is sought, except in Matroska and in joined files, which are decoded from their beginning.

    Args:
        path: The audio file.
        start: In seconds.
        stop: In seconds; None: the end.
        channel: Index of the channel to keep; None: the mean of all.
        max_hours: A longer segment is an error.

    Raises:
        AudioError: The file is unreadable or has no such channel, or the segment ends more than 0.1 s after the
            recording. No other exception leaves this function.
    """
    with own_errors():
        if stop is not None and stop - start > 3600 * max_hours:
            raise AudioError(f"a segment of {(stop - start) / 3600:.2f} h: max_hours is {max_hours:g}")
        data = Path(path).read_bytes() if stop is None or not _is_seekable(path) else None
        blocks = _span(data, start, stop, max_hours) if data is not None else _sought(path, start, stop)
        samples, sampling_rate = _mixed(blocks, channel)
        return encode_wav(samples, sampling_rate)


def _is_seekable(path: str | os.PathLike[str]) -> bool:
    """Return whether libsndfile finds any sample of a file: WAV and FLAC that declare their length."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        return (
            head[:3] != b"ID3"
            and head[:4] in (b"RIFF", b"fLaC")
            and (declared_length(head, os.fstat(file.fileno()).st_size) is not None)
        )


def _sought(path: str | os.PathLike[str], start: float, stop: float | None) -> Iterator[Block]:
    import soundfile

    assert stop is not None
    with soundfile.SoundFile(os.fspath(path)) as file:
        first, last = round(start * file.samplerate), round(stop * file.samplerate)
        require_inside(first, last, file.frames, file.samplerate)
        yield from sndfile_span(file, first, min(last, file.frames))


def _span(data: bytes, start: float, stop: float | None, max_hours: float) -> Iterator[Block]:
    """Yield the blocks of a segment of a file that libsndfile does not seek in."""
    if stop is not None and (sought := sought_span(data, start, stop)) is not None:
        yield from sought
        return
    done = first = last = 0
    rate = 1
    hours = max_hours + start / 3600
    for rate, block in read_blocks(data, hours if stop is None else math.inf):
        first = round(start * rate)
        last = done + len(block) if stop is None else round(stop * rate)
        if done + len(block) > first:
            yield rate, block[max(0, first - done) : last - done]
        done += len(block)
        if stop is not None and done >= last:
            return
    require_inside(first, last, done, rate)


def split_into_windows(samples: int, window: int, overlap: int, hop: int = HOP) -> list[tuple[int, int]]:
    """Return spans (start, stop) in samples that cover a recording, in order; neighbors share ``overlap`` samples.

    Starts are multiples of ``window - overlap``. All windows are full except possibly the last, which has more than
    ``overlap`` samples. Audio that fits into one window yields one span.

    Args:
        samples: Length of the recording.
        window: Length of a window, in samples.
        overlap: Overlap of neighboring windows, in samples.
        hop: Samples per encoder frame.

    Raises:
        ValueError: ``samples`` < 1, or ``window`` and ``overlap`` are not multiples of ``hop``, 0 <= overlap < window.
    """
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, got {samples}")
    if window % hop or overlap % hop or not 0 <= overlap < window:
        raise ValueError(
            f"expected window and overlap to be multiples of {hop} with 0 <= overlap < window, got {window}, {overlap}"
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
