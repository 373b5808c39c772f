"""What is in an audio file: its samples in blocks until the data ends, checked against what the file declares.

```
bytes -> RIFF, FLAC -> libsndfile -> blocks of float32 [frames, channels] -> all that the file declares, or AudioError
    '--> RF64, W64, AIFF, MP3, Ogg, Opus, MP4, WebM … -> FFmpeg (PyAV) --'
```

A file is recognised by its bytes, never by its name. libsndfile reads no further than its own estimate of the length,
so it only reads files that declare it: other RIFF and FLAC files go to FFmpeg, too. FFmpeg may open the listed
containers alone, because others name files and addresses to be read. What is declared: the size of the audio chunk
(RIFF, RF64: EBU 3285, 3306; W64; AIFF), the samples in STREAMINFO (RFC 9639), the frames in a Xing, Info or VBRI
header, granule positions and the end-of-stream page of each link (RFC 3533; links of Vorbis alone are read one by one
by libsndfile, whose samples are exact), the durations of MP4 and Matroska.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.headers import (
    LENGTH_UNKNOWN,
    SNDFILE_TAGS,
    after_id3,
    audio_chunk,
    flac_header,
    is_tail,
    last_flac_sample,
    mp3_header,
    ogg_links,
)

Block = tuple[int, npt.NDArray[np.float32]]  # sampling rate in Hz, samples [frames, channels]

TOLERANCE = 0.1  # seconds; encoders pad, and manifests round
HEAD = 8192  # bytes in which the length of most files is declared
_MAX_AT_ONCE = 2**24  # bytes of a file that is decoded at once: 70 MB of samples at most, from 8 bits
_BLOCK = 2**20  # samples of all channels
_MAX_RATE = 48_000  # the limit of a length in hours is a limit of samples at this rate
_FORMATS = "aac,aiff,amr,ape,asf,au,caf,flac,matroska,mov,mp3,nistsphere,ogg,tta,voc,w64,wav,wv"
_SOUGHT = ("mp3", "ogg", "mov,mp4,m4a,3gp,3g2,mj2", "wav", "w64", "aiff")  # FFmpeg finds any sample in these
_PREROLL = 1.0  # seconds that are decoded before a segment
_FLAC_AHEAD = 2**14  # bytes; libFLAC reads 8 kB at a time
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


class AudioError(Exception):
    """A recording cannot be used. The message is the reason in one short phrase."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into an :class:`AudioError`, so that no file can end a run."""
    try:
        yield
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"unreadable audio: {_reason(error)}") from None


def read_blocks(data: bytes, max_hours: float) -> Iterator[Block]:
    """Yield the samples of an audio file in blocks, to the end of its data.

    Args:
        data: The bytes of the file.
        max_hours: A longer recording is refused, before it is decoded if it declares its length.

    Raises:
        AudioError: The file is empty, too long, or holds less or more than it declares. The error is raised after the
            last block. Exceptions of the decoders pass through, see :func:`own_errors`.
    """
    if not data:
        raise AudioError("empty file")
    if data.startswith(b"version https://git-lfs"):
        raise AudioError("a pointer of Git LFS instead of the audio: run git lfs pull")
    frames = 0
    for rate, block in _blocks(data, max_hours):
        frames += len(block)
        _require_short(frames, rate, max_hours)
        yield rate, block


def read_at_once(data: bytes, max_hours: float) -> Block | None:
    """Return the samples of a small RIFF file whose audio ends where its header says and where the file does.

    None for every other file, also a damaged one: :func:`read_blocks` reads it or says what is wrong. Blocks, and what
    checks them, cost a clip of ten seconds a twentieth of its decoding.
    """
    if data[:4] != b"RIFF" or len(data) > _MAX_AT_ONCE:
        return None
    chunk = audio_chunk(data, len(data))
    if chunk is None or chunk.tag not in SNDFILE_TAGS or not chunk.align or chunk.size <= 0 or chunk.end != len(data):
        return None
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, samples = file.samplerate, file.read(dtype="float32", always_2d=True)
    except Exception:  # whatever it is, the other way reports it
        return None
    whole = len(samples) == chunk.size // chunk.align
    return (rate, samples) if whole and len(samples) <= max_hours * 3600 * min(rate, _MAX_RATE) else None


def declared_length(data: bytes, size: int) -> tuple[int, int] | None:
    """Return the length in frames and the sampling rate in Hz that the start of a file declares; None: read all of it.

    Args:
        data: The file, or its first bytes.
        size: Bytes of the file.
    """
    start = after_id3(data)
    if data[:4] == b"RIFF":
        chunk = audio_chunk(data, size)
        if chunk is None or not chunk.is_plain:
            return None
        return min(chunk.size, size - chunk.start) // chunk.align, chunk.rate
    if data[start : start + 4] == b"fLaC" and len(data) >= start + 26:
        rate, total = flac_header(data, start)
        return (total, rate) if total else None
    header = mp3_header(data)
    if header and header.data_end and abs(size - header.data_end) < HEAD // 2:
        return header.samples, header.rate
    return None


def scan_length(data: bytes) -> tuple[int, int]:
    """Return the length in frames and the sampling rate in Hz; reads the packets but decodes none of them.

    MP3 without a header costs about half as much as decoding it. The result is at most 0.1 s off.
    """
    if data[:4] == b"OggS" and (links := ogg_links(data)) and all(link.rate for link in links):
        return round(sum(link.seconds for link in links) * links[0].rate), links[0].rate  # exact if there is one
    with _av_open(data) as container:
        stream = container.streams.audio[0]
        rate = stream.rate or stream.codec_context.sample_rate
        seconds = _av_declared(container)
        if seconds is None:
            seconds = sum(_packet_seconds(packet) for packet in _av_packets(container, len(data)))
        return round(seconds * rate), rate


def _blocks(data: bytes, max_hours: float) -> Iterator[Block]:
    start = after_id3(data)
    if data[start : start + 4] == b"fLaC":
        yield from _flac_blocks(data, start, max_hours)
    elif data[:4] == b"OggS":
        yield from _ogg_blocks(data, max_hours)
    elif data[:4] in (b"RIFF", b"RF64", b"BW64", b"FORM", b"riff"):
        yield from _chunk_blocks(data, max_hours)
    else:
        header = mp3_header(data)
        declared = header.samples / header.rate if header else None
        yield from _av_blocks(data, max_hours, declared)


def _require_short(frames: int, rate: int, max_hours: float) -> None:
    if frames > max_hours * 3600 * min(rate, _MAX_RATE):
        raise AudioError(f"{frames / rate / 3600:.2f} h or more at {rate} Hz: max_hours is {max_hours:g}")


def _require_all(found: float, declared: float, tolerance: float = TOLERANCE) -> None:
    """Raise AudioError if the audio is shorter than declared; both in seconds."""
    if found < declared - tolerance:
        raise AudioError(f"truncated audio: {found:.4f} s of {declared:.4f} s")


# ---------------------------------------------------------------------------------------------------------- libsndfile


def _sndfile_blocks(data: io.BytesIO, max_hours: float) -> Iterator[Block]:
    import soundfile

    with soundfile.SoundFile(data) as file:
        _require_short(file.frames, file.samplerate, max_hours)
        yield from sndfile_span(file, 0, file.frames)


def sndfile_span(file: Any, first: int, last: int) -> Iterator[Block]:
    """Yield the frames ``first`` to ``last`` of an open ``soundfile.SoundFile``."""
    if first:
        file.seek(first)
    while first < last:
        block = file.read(min(max(1, _BLOCK // file.channels), last - first), dtype="float32", always_2d=True)
        if not len(block):
            break
        first += len(block)
        yield file.samplerate, block


# ------------------------------------------------------------------------------------------------ RIFF, RF64, W64, AIFF


def _chunk_blocks(data: bytes, max_hours: float) -> Iterator[Block]:
    """Read a RIFF, RF64, W64 or AIFF file and compare the size of its audio chunk with what is there."""
    chunk = audio_chunk(data, len(data))
    plain = chunk is not None and chunk.tag in SNDFILE_TAGS and chunk.size > 0 and data[:4] == b"RIFF"
    frames, rate = 0, 1
    for rate, block in _sndfile_blocks(io.BytesIO(data), max_hours) if plain else _av_blocks(data, max_hours):
        frames += len(block)
        yield rate, block
    if chunk is None or not frames:
        return
    there = len(data) - chunk.start
    unknown = chunk.size == 0 or (chunk.size >= LENGTH_UNKNOWN and chunk.size > there)
    declared = there if unknown else chunk.size
    held = min(declared, there)
    if plain and chunk.align:
        _require_all(frames / rate, held // chunk.align / rate, 0)
    if held // max(chunk.align, 1) < declared // max(chunk.align, 1):
        _require_all(frames / rate, frames / rate * declared / held, 0)
    seconds_behind = (len(data) - chunk.end) / held * frames / rate
    if not unknown and seconds_behind > TOLERANCE and not is_tail(data, chunk.end):
        raise AudioError(
            f"the header declares {frames / rate:.4f} s, but data for {seconds_behind:.4f} s follow: "
            "its size is wrong, or files were joined"
        )


# ----------------------------------------------------------------------------------------------------------------- FLAC


def _flac_blocks(data: bytes, start: int, max_hours: float) -> Iterator[Block]:
    rate, total = flac_header(data, start)
    if not total or last_flac_sample(data, start) >= total:
        yield from _av_blocks(data, max_hours, total / rate if rate else None)
        return
    frames, file = 0, io.BytesIO(data)
    for rate, block in _sndfile_blocks(file, max_hours):
        frames += len(block)
        yield rate, block
    _require_all(frames / rate, total / rate, 0)
    joined = data.find(b"fLaC", max(start + 4, file.tell() - _FLAC_AHEAD))
    if joined >= 0:
        yield from _av_blocks(data[joined:], max_hours)


# ------------------------------------------------------------------------------------------------------------------ Ogg


def _ogg_blocks(data: bytes, max_hours: float) -> Iterator[Block]:
    """Read an Ogg file of one or more links, each of which must have its end-of-stream page."""
    links = ogg_links(data)
    seconds = sum(link.seconds for link in links)
    if not all(link.ended for link in links if link.codec):
        raise AudioError(f"truncated audio: no end-of-stream page; the last one ends at {seconds:.4f} s")
    if not all(link.codec == "vorbis" for link in links):
        yield from _av_blocks(data, max_hours, seconds)
        return
    ends = [*(link.start for link in links[1:]), len(data)]
    for number, link in enumerate(links):  # libsndfile reads the first link of a file
        found = 0.0
        for rate, block in _sndfile_blocks(io.BytesIO(data[link.start : ends[number]]), max_hours):
            found += len(block) / rate
            yield rate, block
        _require_all(found, link.seconds)


# --------------------------------------------------------------------------------------------------------------- FFmpeg


@cache
def _av_options() -> dict[str, str]:
    """Only these containers, no further files or addresses, and no decoders of anything but audio."""
    import av

    av.logging.set_level(None)  # FFmpeg prints nothing
    decoders = []
    for name in av.codecs_available:
        try:
            decoders += [name] if av.Codec(name, "r").type == "audio" else []
        except ValueError:  # an encoder
            continue
    return {"format_whitelist": _FORMATS, "protocol_whitelist": "", "codec_whitelist": ",".join(sorted(decoders))}


def _require_one_mp4(data: bytes) -> None:
    """Raise AudioError if FFmpeg would not read all of an MP4 file, or read it forever."""
    if any(int.from_bytes(count, "big") > len(data) for count in re.findall(b"stsz.{8}(.{4})", data, re.DOTALL)):
        raise AudioError("the header declares more packets than the file has bytes")
    at = movies = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
        movies += data[at + 4 : at + 8] == b"moov"
        at = at + size if size >= 8 else len(data)
    if movies > 1:
        raise AudioError(f"{movies} MP4 files were joined, of which only the first can be read")


@contextmanager
def _av_open(data: bytes) -> Iterator[Any]:
    """Open a file with FFmpeg; raises AudioError if it has no audio."""
    import av

    if data[4:8] in _MP4_BOXES:
        _require_one_mp4(data)
    with av.open(io.BytesIO(data), metadata_errors="ignore", options=dict(_av_options())) as container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            raise AudioError("no audio in the file that FFmpeg can decode")
        container.streams.audio[0].codec_context.thread_count = 1
        yield container


def _av_packets(container: Any, size: int) -> Iterator[Any]:
    for number, packet in enumerate(container.demux(container.streams.audio[0])):
        if number > size:
            raise AudioError("more packets than bytes")
        yield packet


def _av_declared(container: Any) -> float | None:
    """Return the seconds that the container declares; None where FFmpeg's figure is an estimate or may be."""
    stream, name = container.streams.audio[0], container.format.name
    if name.startswith("matroska"):
        return container.duration / 1e6 if container.duration else None
    if name.startswith("mov") or name in ("wav", "w64", "aiff", "caf", "au"):
        return float(stream.duration * stream.time_base) if stream.duration else None
    return None


def _packet_seconds(packet: Any) -> float:
    """Return the seconds that a packet adds, without the samples that its decoder drops."""
    seconds = float((packet.duration or 0) * packet.time_base) if packet.size else 0.0
    if packet.has_sidedata("skip_samples"):
        first, last = struct.unpack_from("<II", bytes(packet.get_sidedata("skip_samples")))
        seconds -= (first + last) / packet.stream.rate
    return seconds


def _av_blocks(data: bytes, max_hours: float, declared: float | None = None) -> Iterator[Block]:
    """Decode with FFmpeg and compare with ``declared`` seconds (None: those of the container).

    Packets that do not decode are passed over up to 0.1 s in total: one fails where two MP3 files were joined.
    """
    import av

    found = lost = 0.0
    fifo = av.AudioFifo()
    rate = channels = 0
    with _av_open(data) as container:
        declared = _av_declared(container) if declared is None else declared
        if declared:
            rate = container.streams.audio[0].codec_context.sample_rate
            _require_short(round(declared * rate), rate, max_hours)
        for packet in _av_packets(container, len(data)):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                lost += float((packet.duration or 0) * packet.time_base)
                continue
            for frame in frames:
                frame.pts = None
                rate, channels = frame.sample_rate, frame.layout.nb_channels
                fifo.write(frame)  # a ValueError if the rate, the channels or the sample type change
            if fifo.samples * channels >= _BLOCK:
                found += fifo.samples / rate
                yield rate, _float_samples(fifo.read())
        if fifo.samples:
            found += fifo.samples / rate
            yield rate, _float_samples(fifo.read())
    if lost > TOLERANCE:
        raise AudioError(f"{lost:.4f} s of the audio cannot be decoded, {found:.4f} s can")
    _require_all(found, declared or 0.0)


def sought_span(data: bytes, start: float, stop: float) -> list[Block] | None:
    """Return the blocks from ``start`` to ``stop`` seconds, decoded from a second before ``start``.

    None: FFmpeg does not find the sample of a time in this file (Matroska, joined files, the first second).

    Raises:
        AudioError: The recording ends more than 0.1 s before ``stop``.
    """
    import av

    if start < 2 * _PREROLL or (data[:4] == b"OggS" and len(ogg_links(data)) != 1):
        return None
    found: list[Block] = []
    with _av_open(data) as container:
        stream = container.streams.audio[0]
        name, codec = container.format.name, stream.codec_context.name
        if name not in _SOUGHT or (name == "wav" and not codec.startswith("pcm")):
            return None
        zero, at = stream.start_time or 0, -1
        container.seek(zero + int((start - _PREROLL) / stream.time_base), stream=stream)
        for packet in _av_packets(container, len(data)):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                rate, samples = frame.sample_rate, _float_samples(frame)
                first, last = round(start * rate), round(stop * rate)
                at = round(float((frame.pts - zero) * frame.time_base) * rate) if at < 0 else at
                if at > first and not found:
                    return None
                if at + len(samples) > first:
                    found.append((rate, samples[max(0, first - at) : last - at]))
                at += len(samples)
                if at >= last:
                    return found
        if at < 0:  # no frame was decoded: reading all of the file says why
            return None
        require_inside(first, last, at, rate)
    return found


def require_inside(first: int, last: int, frames: int, rate: int) -> None:
    """Raise AudioError unless a segment of frames is inside a recording of ``frames``, up to 0.1 s."""
    if first >= frames or last - frames > TOLERANCE * rate:
        raise AudioError(
            f"the segment ends after the end of the recording: {max(first, last) / rate:.2f} of {frames / rate:.2f} s"
        )


def _float_samples(frame: Any) -> npt.NDArray[np.float32]:
    """Return a frame as float32 [frames, channels], scaled as libsndfile does."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        values = (values ^ 128).view(np.int8)
    samples: npt.NDArray[np.float32] = np.ascontiguousarray(values, dtype=np.float32)
    return samples if values.dtype.kind == "f" else samples * np.float32(2.0 ** (1 - 8 * values.dtype.itemsize))


def _reason(error: Exception) -> str:
    """Return the message of a decoder in one line, without addresses and names of files."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    text = re.sub(r"0x[0-9a-f]+", "…", " ".join(str(text).split())[:200])
    return text.removeprefix("Error : ").rstrip(". ") or type(error).__name__
