from __future__ import annotations

import io
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format import tar

KEYS = st.text("abcXYZ019_-", min_size=1, max_size=90)
NAMES = st.builds("{}.{}".format, KEYS, st.sampled_from(["npy", "scale.npy", "json"]))
FILES = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=6)


def pack(files: dict[str, bytes]) -> bytes:
    data = b"".join(tar.pack_header(name, len(body)) + body + tar.padding(len(body)) for name, body in files.items())
    return data + tar.end_of_archive(len(data))


def walk(data: bytes) -> dict[str, bytes]:
    return {m.name: data[m.offset : m.offset + m.length] for m in tar.iter_members(memoryview(data))}


def forge(**fields: bytes) -> bytes:
    """The tar of 'a.npy' with some fields of its header changed and the checksum right again."""
    block = bytearray(tar.pack_header("a.npy", 5))
    for field, value in fields.items():
        start, size = FIELDS[field]
        block[start : start + size] = value.ljust(size, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"12345" + tar.padding(5) + tar.end_of_archive(1024)


FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "uname": (265, 32),
    "devmajor": (329, 8),
    "prefix": (345, 155),
    "rest": (500, 12),
}


def standard(**fields) -> bytes:
    """What Python's tarfile writes for one file 'a.npy' of 5 bytes, with ``fields`` of its header changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fields.pop("format", tarfile.USTAR_FORMAT)) as archive:
        info = tarfile.TarInfo(fields.pop("name", "a.npy"))
        info.size, info.mode, info.uname, info.gname = 5, 0o444, "earshard", "earshard"
        for name, value in fields.items():
            setattr(info, name, value)
        archive.addfile(info, io.BytesIO(b"12345"))
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(FILES)
def test_python_reads_back_what_was_packed_in_the_same_order(files):
    with tarfile.open(fileobj=io.BytesIO(pack(files))) as archive:
        found = {info.name: archive.extractfile(info).read() for info in archive}
    assert list(found.items()) == list(files.items())


@settings(max_examples=60, deadline=None)
@given(FILES)
def test_a_walk_finds_what_was_packed_in_the_same_order(files):
    assert list(walk(pack(files)).items()) == list(files.items())


def test_the_tar_program_reads_what_was_packed(tmp_path):
    files = {"a.npy": b"\x93NUMPY" * 100, "a.json": b"{}", "-b_9.npy": b"", "-b_9.json": bytes(512)}
    path = tmp_path / "x.tar"
    path.write_bytes(pack(files))
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == list(files)
    assert listed.stderr == ""
    subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_the_header_is_the_one_that_tarfile_writes_but_for_the_device_numbers_that_it_leaves_empty():
    ours, theirs = bytearray(tar.pack_header("a.npy", 5)), bytearray(standard()[:512])
    for block in (ours, theirs):
        block[329:345], block[148:156] = bytes(16), bytes(8)
    assert ours == theirs
    assert forge() == pack({"a.npy": b"12345"})


@pytest.mark.parametrize(
    "name",
    ["", "a", "a.txt", "../a.npy", "a/b.npy", "a.b.npy", "a b.npy", "ä.npy", "a.npy\n", "a" * 91 + ".npy", ".npy"],
)
def test_names_that_are_no_members_are_never_written(name):
    with pytest.raises((tar.TarError, UnicodeEncodeError)):
        tar.pack_header(name, 1)


@pytest.mark.parametrize("length", [-1, 1 << 33])
def test_sizes_that_a_header_cannot_say_are_never_written(length):
    with pytest.raises(tar.TarError):
        tar.pack_header("a.npy", length)


@pytest.mark.parametrize(
    "fields",
    [
        *({"type": bytes([flag])} for flag in [*b"1234567gxLKSDMNVA", 0]),
        {"type": b"2", "linkname": b"/etc/passwd"},
        {"type": b"3", "devmajor": b"0000001"},
        {"name": b"../a.npy"},
        {"name": b"/a.npy"},
        {"name": b"d/a.npy"},
        {"name": b"a.npy\0evil"},
        {"prefix": b"/etc"},
        {"mode": b"0004755"},
        {"uid": b"0001000"},
        {"mtime": b"00000000001"},
        {"size": b"\x80" + bytes(10) + b"\x05"},
        {"size": b"-0000000005"},
        {"size": b"         5 "},
        {"linkname": b"b"},
        {"magic": b"ustar  "},
        {"uname": b"root"},
        {"devmajor": b""},
        {"rest": b"x"},
    ],
    ids=lambda fields: "-".join(f"{k}={v!r:.12}" for k, v in fields.items()),
)
def test_a_walk_refuses_every_header_that_a_shard_does_not_have(fields):
    with pytest.raises(tar.TarError, match=r"byte 0 "):
        walk(forge(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "ä" * 60 + ".npy", "format": tarfile.PAX_FORMAT},
        {"name": "x" * 200 + ".npy", "format": tarfile.GNU_FORMAT},
        {"mtime": 1.5, "format": tarfile.PAX_FORMAT},
        {"pax_headers": {"GNU.sparse.realsize": "99999999999"}, "format": tarfile.PAX_FORMAT},
    ],
)
def test_a_walk_refuses_extended_headers(fields):
    with pytest.raises(tar.TarError, match="byte 0 does not name a member"):
        walk(standard(**fields))


def test_a_walk_refuses_a_member_that_occurs_twice():
    with pytest.raises(tar.TarError, match="is a duplicate"):
        walk(pack({"a.npy": b"1"})[:1024] + pack({"a.npy": b"2"}))


def test_a_walk_refuses_every_truncation():
    data = pack({"a.npy": b"1" * 700, "a.json": b"{}"})
    for length in range(len(data)):
        with pytest.raises(tar.TarError):
            walk(data[:length])


def test_a_walk_refuses_what_follows_the_end():
    data = pack({"a.npy": b"1"})
    for longer in (data + b"\0", data + bytes(512), data[:-1] + b"x", data + pack({})):
        with pytest.raises(tar.TarError):
            walk(longer)


def test_a_walk_refuses_a_flip_of_any_bit_of_a_header_or_a_padding():
    data = pack({"a.npy": b"1"})
    for position in [*range(512), *range(513, len(data))]:
        for bit in range(8) if position < 512 else [position % 8]:
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(tar.TarError):
                walk(bytes(flipped))


def test_a_size_of_eight_gigabytes_in_a_header_costs_no_memory():
    with pytest.raises(tar.TarError, match="runs past the end"):
        walk(tar.pack_header("a.npy", (1 << 33) - 1) + bytes(10240))
