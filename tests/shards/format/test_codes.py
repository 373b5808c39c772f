"""Integer codes of a neural codec in a cache: exact, and never outside of their codebook."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from tiny_cache import CODEBOOK_SIZE, make_cache, make_spec, original, original_codes

import shards
from shards.__main__ import main as command
from shards.errors import UserError, run_command
from shards.format.codec import CodecError, decode, encode
from shards.read.cache import Cache
from shards.stream.sampler import SamplerConfig


@pytest.fixture
def path(tmp_path):
    return make_cache(tmp_path / "cache", 6, 4, codec="u16", shards=2)


def codes_of(index: int, frames: int) -> np.ndarray:
    return original_codes(original(0, index, frames, 4))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_codes_come_back_exactly(dtype):
    codes = np.array([[0, 65_535], [1, 2]]).astype(dtype)
    stored = encode("u16", codes)
    assert (stored.payload.dtype, stored.scale, stored.error) == (np.dtype("<u2"), None, 0.0)
    back = decode("u16", stored.payload)
    assert back.dtype == np.int32
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("codes", [np.array([[-1]]), np.array([[65_536]])])
def test_what_16_bits_do_not_hold_is_not_stored(codes):
    with pytest.raises(CodecError, match=r"a code is -1|a code is 65536"):
        encode("u16", codes)


def test_floats_are_no_codes_and_codes_no_floats():
    with pytest.raises(CodecError, match="codec u16 is for integer codes, got float32"):
        encode("u16", np.zeros((1, 1), np.float32))
    with pytest.raises(CodecError, match="codec f16 is for floats, got int32"):
        encode("f16", np.zeros((1, 1), np.int32))
    with pytest.raises(CodecError, match="codes cannot be read as float16"):
        decode("u16", np.zeros((1, 1), np.uint16), out=np.zeros((1, 1), np.float16))


@pytest.mark.parametrize("size", [None, 0, 65_537, 3.0, True])
def test_a_spec_of_codes_says_how_many_there_are(size):
    tree = make_spec(codec="u16").model_dump()
    with pytest.raises(ValueError, match=r"needs frontend\.codebook_size"):
        make_spec().model_validate({**tree, "frontend": {"codebook_size": size}})


def test_a_writer_refuses_a_code_outside_of_the_codebook(tmp_path):
    with pytest.raises(CodecError, match="a code is 300, but the codebooks have 300 entries"):
        _write_with(tmp_path / "cache", CODEBOOK_SIZE)


def test_every_reader_returns_the_same_integers(path):
    cache, dataset = Cache.open(path), shards.open(path)
    streamed: dict[str, np.ndarray] = {}
    for encoded in (False, True):
        for batch in shards.FeatureStream([cache], SamplerConfig(batch_size=4), 0, epochs=1, encoded=encoded):
            assert batch.features.dtype == torch.int32
            assert batch.decoded().features is batch.features
            assert not batch.features[~batch.mask()].any()  # padding
            for key, row, frames in zip(batch.keys, batch.features, batch.lengths.tolist(), strict=True):
                found = row[:frames].numpy().copy()
                assert np.array_equal(streamed.setdefault(key, found), found)
    piped = {sample["__key__"]: sample["features"] for sample in shards.as_webdataset(cache)}
    for index in range(len(cache)):
        key, expected = cache.row(index)["key"], codes_of(index, int(cache.frames[index]))
        assert expected.max() > 255
        for found in (cache.features(index), streamed[key], dataset[index]["features"], piped[key]):
            assert np.asarray(found).dtype == np.int32
            assert np.array_equal(np.asarray(found), expected)


def test_a_reader_that_knows_numpy_alone_reads_the_codes(path):
    with tarfile.open(path / "shards" / "000000.tar") as tar:
        member = next(name for name in tar.getnames() if name.endswith(".npy"))
        found = np.load(io.BytesIO(tar.extractfile(member).read()))
    assert found.dtype == np.dtype("<u2")
    assert np.array_equal(found, codes_of(int(member[4:9]), len(found)))


def test_a_stored_code_outside_of_the_codebook_is_refused_by_readers_and_found_by_verify(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shards.commit.writer.check_codes", lambda codes, size: None)
    path = _write_with(tmp_path / "cache", CODEBOOK_SIZE)
    for verify in (True, False):
        with pytest.raises(UserError, match="a code is 300, but the codebooks have 300 entries"):
            Cache.open(path, verify=verify).features(0)
    with pytest.raises(UserError, match="a code is 300"):
        list(shards.as_webdataset(path))
    assert run_command(command, ["verify", str(path), "--deep"]) == 1
    assert "is no codes: a code is 300" in capsys.readouterr().out


def test_info_head_and_verify_speak_of_codes(path, capsys):
    for words in (["info", str(path)], ["head", str(path), "--n", "1"], ["verify", str(path), "--deep"]):
        assert run_command(command, words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "codes of 4 codebooks of 300 entries, codec u16" in out
    assert "codec error   none" in out
    assert "of 300 values" in out
    assert "RMS" not in out
    assert "valid (every byte" in out


def _write_with(path, code: int):
    """Write a cache of one utterance with one code of this value."""
    from tiny_cache import append, plan_row

    codes = np.zeros((3, 4), np.int64)
    codes[1, 2] = code
    rows, labels = [plan_row("utt", 960, 0, 0)], [{"key": "utt", "text": "a", "speaker": "", "split": ""}]
    append(path, make_spec(4, "u16"), rows, labels, lambda key, frames: codes)
    return path
