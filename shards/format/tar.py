"""The subset of USTAR that shards use: writes member headers and iterates over the members of untrusted tars.

Headers are packed without :mod:`tarfile` because their bytes must be identical on every machine (mtime 0, fixed owner
and mode). Reading needs no general tar reader, because everything except regular files is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shards.format.variants import SUFFIX

BLOCK_SIZE = 512
RECORD = 20 * BLOCK_SIZE  # tar writes whole records of 20 blocks
MAX_NAME = 100
MAX_MEMBER = 1 << 33  # 8 GiB: the limit of USTAR's eleven octal digits

_NAME = re.compile(rb"[A-Za-z0-9_-]{1,90}" + SUFFIX.encode() + rb"\.(npy|scale\.npy|json)")
_OCTAL = re.compile(rb"[0-7]{1,12}")
_TAIL = b"ustar\x0000" + b"earshard".ljust(32, b"\0") + b"earshard".ljust(32, b"\0") + b"0000000\0" * 2 + b"\0" * 167


class TarError(ValueError):
    """The bytes are not a valid shard. The message is one phrase that says why, and where."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar; ``offset`` and ``length`` of its data are in bytes."""

    name: str
    offset: int
    length: int


def pack_header(name: str, length: int) -> bytes:
    """Return the 512-byte USTAR header of a regular file with mode 0444, owner earshard (0) and mtime 0."""
    encoded = name.encode("ascii")
    if not _NAME.fullmatch(encoded) or len(encoded) > MAX_NAME or not 0 <= length < MAX_MEMBER:
        raise TarError(f"a member named {name!r} of {length} bytes is not valid in a shard")
    head = encoded.ljust(MAX_NAME, b"\0") + b"0000444\0" + b"0000000\0" * 2 + b"%011o\0" % length + b"00000000000\0"
    rest = b"0" + b"\0" * 100 + _TAIL
    checksum = sum(head) + 8 * 32 + sum(rest)
    return head + b"%06o\0 " % checksum + rest


def padding(length: int) -> bytes:
    """Return the zeros that pad ``length`` bytes to a whole block."""
    return b"\0" * (-length % BLOCK_SIZE)


def end_of_archive(length: int) -> bytes:
    """Return the end of an archive of ``length`` bytes: two zero blocks, padded to a whole record."""
    return b"\0" * (2 * BLOCK_SIZE + -(length + 2 * BLOCK_SIZE) % RECORD)


def iter_members(data: memoryview) -> Iterator[TarMember]:
    """Yield the members of the tar in ``data``, in order.

    Raises:
        TarError: the tar contains anything that :func:`pack_header` does not write: links, devices, directories, sparse
            or extended headers, other names, a duplicate name, a wrong checksum, data beyond the end, or a truncated or
            nonzero end.
    """
    position, total = 0, len(data)
    seen: set[str] = set()
    while True:
        block = bytes(data[position : position + BLOCK_SIZE])
        if len(block) < BLOCK_SIZE:
            raise TarError(f"the tar ends at byte {total} without its end-of-archive blocks")
        if not block.strip(b"\0"):
            tail = data[position:]
            if len(tail) != len(end_of_archive(position)) or bytes(tail).strip(b"\0"):
                raise TarError(f"the end-of-archive blocks at byte {position} are not valid in a shard")
            return
        member = _member(block, position)
        end = member.offset + member.length
        if end + len(padding(member.length)) > total:
            raise TarError(f"member {member.name} at byte {position} runs past the end of the tar")
        if bytes(data[end : end + len(padding(member.length))]).strip(b"\0"):
            raise TarError(f"member {member.name} at byte {position} has data in its padding")
        if member.name in seen:
            raise TarError(f"member {member.name} at byte {position} is a duplicate")
        seen.add(member.name)
        yield member
        position = end + len(padding(member.length))


def _member(block: bytes, position: int) -> TarMember:
    name, length = block[:MAX_NAME].rstrip(b"\0"), block[124:135]
    if not _NAME.fullmatch(name) or not _OCTAL.fullmatch(length):
        raise TarError(f"the header at byte {position} does not name a member of a shard")
    member = TarMember(name.decode("ascii"), position + BLOCK_SIZE, int(length, 8))
    # One comparison covers links, devices, modes, owners and the checksum.
    if block != pack_header(member.name, member.length):
        raise TarError(f"the header of {member.name} at byte {position} is not valid in a shard")
    return member
