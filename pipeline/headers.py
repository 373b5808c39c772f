"""What the bytes of an audio file declare about its length: RIFF, W64 and AIFF chunks, FLAC, MP3 and Ogg headers.

Nothing is decoded here. Sources: EBU 3285 and 3306 (RIFF, RF64), RFC 9639 (FLAC), RFC 3533 (Ogg).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LENGTH_UNKNOWN = 0x7FFF0000  # programs that write WAV to a pipe set 0x7FFFF000 or more
SNDFILE_TAGS = (1, 3, 6, 7, 0xFFFE)  # PCM, float, A-law, µ-law, extensible
_W64_RIFF, _W64_DATA = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00", b"data\xf3\xac\xd3\x11"
_FLAC_END = 2**18  # bytes that are searched for the last frame
_MP3_RATES = (44_100, 48_000, 32_000)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The chunk that holds the audio: its first byte, its declared size, and the format where it is RIFF."""

    start: int
    size: int
    end: int  # of the chunk, with padding
    tag: int
    rate: int
    align: int

    @property
    def is_plain(self) -> bool:
        return self.tag in SNDFILE_TAGS and self.align > 0 and 0 < self.size < LENGTH_UNKNOWN


def _chunk_at(data: bytes, at: int) -> tuple[bytes, int, int, int] | None:
    """Return the id of the chunk at ``at``, its first byte, its size, and where the next one begins."""
    if data[:4] == b"riff":
        if at + 24 > len(data):
            return None
        size = int.from_bytes(data[at + 16 : at + 24], "little") - 24
        return data[at : at + 8], at + 24, size, at + 24 + -(-size // 8) * 8
    if at + 8 > len(data):
        return None
    size = int.from_bytes(data[at + 4 : at + 8], "big" if data[:4] == b"FORM" else "little")
    return data[at : at + 4], at + 8, size, at + 8 + size + size % 2


def audio_chunk(data: bytes, size: int) -> Chunk | None:
    """Find the audio in the first bytes of a file of ``size`` bytes."""
    at, tag, rate, align, long_size = (40 if data[:4] == b"riff" else 12), 0, 0, 0, 0
    while at < size and (chunk := _chunk_at(data, at)):
        name, start, length, following = chunk
        if length < 0:
            return None
        if name == b"fmt " and start + 16 <= len(data):
            tag, _, rate, _, align = struct.unpack_from("<HHIIH", data, start)
        elif name == b"ds64" and start + 16 <= len(data):
            long_size = int.from_bytes(data[start + 8 : start + 16], "little")
        elif name in (b"data", b"SSND", _W64_DATA):
            if long_size and length == 0xFFFFFFFF:
                length, following = long_size, start + long_size + long_size % 2
            return Chunk(start, length, following, tag, rate, align)
        at = following
    return None


def is_tail(data: bytes, at: int) -> bool:
    """Return whether only whole chunks without audio follow."""
    while chunk := _chunk_at(data, at):
        name, _, size, at = chunk
        if name in (b"RIFF", b"data", b"SSND", b"FORM", _W64_DATA) or size < 0 or at > len(data) + 1:
            return False
        if not all(32 <= byte < 127 for byte in name[:4]):
            return False
    return True


def after_id3(data: bytes) -> int:
    """Return where the file begins after ID3v2 tags."""
    at = 0
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 127
        at += 10 + size
    return at


def flac_header(data: bytes, start: int) -> tuple[int, int]:
    """Return the sampling rate and the total of samples in STREAMINFO; 0: unknown."""
    word = int.from_bytes(data[start + 18 : start + 26], "big")
    return word >> 44, word & (2**36 - 1)


def last_flac_sample(data: bytes, start: int) -> int:
    """Return the number of the first sample in the last frame; 0 if no header of a frame is found."""
    block_size = int.from_bytes(data[start + 8 : start + 10], "big")
    end = len(data)
    while (at := data.rfind(b"\xff", max(start, len(data) - _FLAC_END), end)) >= 0:
        end = at
        if at + 16 > len(data) or data[at + 1] not in (0xF8, 0xF9):
            continue
        number, length = _utf8_number(data[at + 4 : at + 11])
        extra = {6: 1, 7: 2}.get(data[at + 2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(data[at + 2] & 15, 0)
        crc = at + 4 + length + extra
        if length and data[at + 3] & 1 == 0 and crc < len(data) and _crc8(data[at:crc]) == data[crc]:
            return number if data[at + 1] == 0xF9 else number * block_size
    return 0


def _utf8_number(data: bytes) -> tuple[int, int]:
    """Return a number in the coding of UTF-8, extended to 36 bits, and its bytes; (0, 0) if it is not one."""
    ones = 8 - (data[0] ^ 0xFF).bit_length()
    if ones in (1, 8) or ones > len(data):
        return 0, 0
    number = data[0] & (0x7F >> ones)
    for byte in data[1:ones]:
        if byte >> 6 != 2:
            return 0, 0
        number = number << 6 | byte & 63
    return number, max(ones, 1)


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (7 if crc & 128 else 0)) & 255
    return crc


@dataclass(frozen=True, slots=True)
class Mp3Header:
    """What a Xing, Info or VBRI header declares: frames without padding, Hz, and where the data ends (0: unknown)."""

    samples: int
    rate: int
    data_end: int


def mp3_header(data: bytes) -> Mp3Header | None:
    at = after_id3(data)
    at = at if data[at : at + 1] == b"\xff" else data.find(b"\xff", at, at + 4096)
    if at < 0 or at + 200 > len(data) or data[at + 1] < 0xE0 or data[at + 1] >> 1 & 3 != 1:
        return None
    version, rate_index = data[at + 1] >> 3 & 3, data[at + 2] >> 2 & 3
    if version == 1 or rate_index == 3:
        return None
    is_mono, rate = data[at + 3] >> 6 == 3, _MP3_RATES[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    per_frame = 1152 if version == 3 else 576
    tag = at + 4 + ({True: 17, False: 32} if version == 3 else {True: 9, False: 17})[is_mono]
    if data[at + 36 : at + 40] == b"VBRI":
        size, frames = struct.unpack_from(">II", data, at + 46)
        return Mp3Header(frames * per_frame, rate, at + size)
    if data[tag : tag + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(data[tag + 4 : tag + 8], "big")
    fields = [int.from_bytes(data[tag + 8 + 4 * i : tag + 12 + 4 * i], "big") for i in range((flags & 3).bit_count())]
    if not flags & 1 or not fields[0]:
        return None
    lame = tag + 8 + 4 * len(fields) + (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    padding = 0
    if data[lame : lame + 4] in (b"LAME", b"Lavf", b"Lavc"):
        trim = int.from_bytes(data[lame + 21 : lame + 24], "big")
        padding = (trim >> 12) + (trim & 0xFFF)
    return Mp3Header(max(0, fields[0] * per_frame - padding), rate, at + fields[1] if flags & 2 else 0)


@dataclass(slots=True)
class OggLink:
    """A logical stream. ``rate`` is that of its granule positions; 0: no audio, or an unknown codec."""

    start: int  # of its first page
    codec: str
    rate: int
    skip: int
    last: int = 0
    ended: bool = False

    @property
    def seconds(self) -> float:
        return max(0, self.last - self.skip) / self.rate if self.rate else 0.0


def ogg_links(data: bytes) -> list[OggLink]:
    """Return the logical streams, in order."""
    links: dict[int, OggLink] = {}  # by serial number; the latest of a number
    done: list[OggLink] = []
    at = 0
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        flags, granule, serial = struct.unpack_from("<BqI", data, at + 5)
        body = at + 27 + data[at + 26]
        end = body + sum(data[at + 27 : body])
        if flags & 2:
            links[serial] = _ogg_link(at, data[body:end])
            done.append(links[serial])
        if serial in links:
            links[serial].ended = bool(flags & 4) and end <= len(data)
            links[serial].last = granule if granule >= 0 else links[serial].last
        at = max(end, at + 4)
    return done


def _ogg_link(start: int, head: bytes) -> OggLink:
    """Return the stream at ``start`` that begins with the packet ``head``."""
    if head.startswith(b"OpusHead"):
        return OggLink(start, "opus", 48_000, int.from_bytes(head[10:12], "little"))
    if head.startswith(b"\x01vorbis"):
        return OggLink(start, "vorbis", int.from_bytes(head[12:16], "little"), 0)
    if head.startswith(b"\x7fFLAC"):
        return OggLink(start, "flac", int.from_bytes(head[27:30], "big") >> 4, 0)
    return OggLink(start, "speex" if head.startswith(b"Speex") else "", 0, 0)
