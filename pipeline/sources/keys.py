"""The source's own ids to keys and back: ``[A-Za-z0-9_-]{1,90}``, because a dot would split a WebDataset key.

Each byte (UTF-8) that a key may not hold becomes ``-xHH-``. An id that by itself reads like such an escape has the dash
that opens it escaped (``-x2D-``), so :func:`decode_key` gives exactly the id back. A key longer than 90 characters is
cut to 64 and ends in 24 digits of the id's sha256: then only the ``id`` column knows the id.
"""

from __future__ import annotations

import hashlib
import re

MAX_KEY = 90
_HEAD = 64
_DIGITS = 24
_ESCAPE = re.compile(rb"-x([0-9A-F]{2})-")
_LOOKALIKE = re.compile(rb"x[0-9A-F]{2}(-|[^A-Za-z0-9_])")  # what follows a dash: another byte becomes a dash, too
_LEGAL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def encode_key(identifier: str) -> str:
    """A legal, unique key for ``identifier``; a legal one that looks like no escape stays as it is.

    Raises:
        ValueError: the id is empty.
    """
    if not identifier:
        raise ValueError("an empty id has no key")
    raw = identifier.encode("utf-8", "surrogatepass")
    key = "".join(
        f"-x{byte:02X}-"
        if byte not in _LEGAL or (byte == ord("-") and _LOOKALIKE.match(raw, position + 1))
        else chr(byte)
        for position, byte in enumerate(raw)
    )
    if len(key) <= MAX_KEY:
        return key
    return f"{key[:_HEAD]}-{hashlib.sha256(raw).hexdigest()[:_DIGITS]}"


def decode_key(key: str) -> str:
    """The id that :func:`encode_key` made ``key`` of (not for keys that had to be cut)."""
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), key.encode())
    return raw.decode("utf-8", "surrogatepass")
