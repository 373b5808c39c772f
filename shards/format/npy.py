"""The ``.npy`` header, the part a shard needs, read without believing it.

In: the bytes of a member that nobody has vouched for. Out: dtype, shape and where the array begins. NumPy's own reader
evaluates the header as a Python expression and then allocates what it declares; this one matches the few headers that a
shard can hold and compares the declared size with the bytes that are there.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0: a header of at most 64 KiB, of which a shard needs 118 bytes
MAX_HEADER = 1024
DTYPES = {text: np.dtype(text) for text in ("<f2", "<f4", "<u2", "|i1", "|u1")}

_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((\d{1,10})(?:,|, (\d{1,10}))\), \} *\n"
)


class NpyError(ValueError):
    """These bytes are not an array of a shard: one phrase."""


def parse_npy_header(data: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """(dtype, shape of one or two dimensions, offset of the first value) of the whole ``.npy`` member in ``data``.

    Raises:
        NpyError: not version 1.0, another dtype, Fortran order, a header of another form, or an array that is not
            exactly as long as the rest of the member.
    """
    head = bytes(data[:10])
    if len(head) < 10 or not head.startswith(MAGIC):
        raise NpyError("is no .npy array of version 1.0")
    start = 10 + int.from_bytes(head[8:], "little")
    if start > MAX_HEADER or start > len(data):
        raise NpyError(f"declares an .npy header of {start} bytes")
    found = _HEADER.fullmatch(bytes(data[10:start]))
    if not found or (dtype := DTYPES.get(found[1].decode())) is None:
        raise NpyError("has an .npy header that no shard has")
    shape = tuple(int(digits) for digits in found.groups()[1:] if digits is not None)
    if prod(shape) * dtype.itemsize != len(data) - start:
        raise NpyError(f"declares the shape {shape} of {dtype} and holds {len(data) - start} bytes")
    return dtype, shape, start
