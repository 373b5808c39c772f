"""Parses the ``.npy`` headers of shards safely.

Takes the bytes of an untrusted member; returns dtype, shape and the offset of the array. NumPy's own reader evaluates
the header as a Python expression and allocates the declared size. This parser matches the few headers that a shard can
contain and compares the declared size with the actual number of bytes.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0: headers of at most 64 KiB; those of a shard take 118 bytes
MAX_HEADER = 1024
DTYPES = {text: np.dtype(text) for text in ("<f2", "<f4", "<u2", "|i1", "|u1")}

_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((\d{1,10})(?:,|, (\d{1,10}))\), \} *\n"
)


class NpyError(ValueError):
    """The bytes are not an array of a shard. The message is one phrase."""


def parse_npy_header(data: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype, shape (one or two dimensions) and offset of the first value of the ``.npy`` member in ``data``.

    Raises:
        NpyError: the member is not version 1.0, has another dtype, Fortran order or another form of header, or its
            array is not exactly as long as the rest of the member.
    """
    head = bytes(data[:10])
    if len(head) < 10 or not head.startswith(MAGIC):
        raise NpyError("is not an .npy array of version 1.0")
    start = 10 + int.from_bytes(head[8:], "little")
    if start > MAX_HEADER or start > len(data):
        raise NpyError(f"declares an .npy header of {start} bytes")
    found = _HEADER.fullmatch(bytes(data[10:start]))
    if not found or (dtype := DTYPES.get(found[1].decode())) is None:
        raise NpyError("has an .npy header that is not valid in a shard")
    shape = tuple(int(digits) for digits in found.groups()[1:] if digits is not None)
    if prod(shape) * dtype.itemsize != len(data) - start:
        raise NpyError(f"declares shape {shape} of {dtype} but contains {len(data) - start} bytes")
    return dtype, shape, start
