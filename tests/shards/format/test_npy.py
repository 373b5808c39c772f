from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.commit.writer import npy_parts
from shards.format.npy import DTYPES, NpyError, parse_npy_header


def header(text: str, body: bytes = b"") -> bytes:
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + body


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), min_size=1, max_size=2))
def test_every_array_of_a_shard_is_read_as_numpy_reads_it(text, shape):
    data = b"".join(npy_parts(np.ones(shape, dtype=text)))
    dtype, found, start = parse_npy_header(memoryview(data))
    theirs = np.load(io.BytesIO(data), allow_pickle=False)
    assert (dtype, found) == (theirs.dtype, theirs.shape)
    assert data[start:] == theirs.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04" + bytes(200),
        b"\x93NUMPY\x02\x00" + bytes(200),
        b"\x93NUMPY\x01\x00\xff\xff" + bytes(70000),
        b"\x93NUMPY\x01\x00\xff\xff",
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }", bytes(8)),
        header("{'descr': '<f2', 'fortran_order': True, 'shape': (1, 1), }", bytes(2)),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, -1), }", bytes(2)),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (), }", bytes(2)),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 1, 1), }", bytes(2)),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (2, 1), }", bytes(2)),
        header("{'descr': '>f2', 'fortran_order': False, 'shape': (1, 1), }", bytes(2)),
        header("{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (1, 1), }", bytes(2)),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 1), 'x': __import__('os'), }", bytes(2)),
        header("(" * 900),
    ],
)
def test_every_other_header_is_refused(data):
    with pytest.raises(NpyError):
        parse_npy_header(memoryview(data))


def test_a_hundred_million_frames_are_refused_without_allocating_them():
    data = header("{'descr': '<f2', 'fortran_order': False, 'shape': (100000000, 512), }", bytes(1024))
    tracemalloc.start()
    with pytest.raises(NpyError, match="declares shape"):
        parse_npy_header(memoryview(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
