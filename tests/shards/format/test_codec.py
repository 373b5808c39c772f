from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.format.codec import BF16_MAX, FLOAT_CODECS, SCALED, STORED_DTYPE, CodecError, decode, encode, relative_rms

CODECS = sorted(FLOAT_CODECS)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)


def features(limit: float, subnormal: bool = True) -> st.SearchStrategy[np.ndarray]:
    bound = float(np.float32(limit))
    values = st.floats(-bound, bound, width=32, allow_subnormal=subnormal)
    return hnp.arrays(np.float32, SHAPES, elements=values)


def allowed_error(codec: str, x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Half a step of the codec at each value, float64."""
    size = np.abs(x.astype(np.float64))
    if codec == "f16":
        return np.maximum(size * 2.0**-11, 2.0**-25)
    if codec == "bf16":
        return np.maximum(size * 2.0**-8, 2.0**-134)
    step = np.broadcast_to(scale.astype(np.float64), x.shape)
    slack = size * 2.0**-22  # the scale and the product are float32
    if codec == "int8":
        return step / 2 + slack
    return np.maximum(size * 2.0**-4, step * 2.0**-10) * (1 + 2.0**-9) + slack  # it passes through float16


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, deadline=None)
@given(x=features(65504.0))
def test_every_value_comes_back_within_half_a_step(codec, x):
    stored = encode(codec, x)
    assert stored.payload.dtype == STORED_DTYPE[codec]
    assert stored.payload.shape == x.shape
    back = decode(codec, stored.payload, stored.scale)
    assert back.dtype == np.float32
    zeroed = np.abs(x).max(axis=0) < 127 * np.finfo(np.float32).tiny if codec in SCALED else np.zeros(1, bool)
    bound = np.where(zeroed, np.abs(x.astype(np.float64)) * 1.0001, allowed_error(codec, x, stored.scale))
    assert (np.abs(back.astype(np.float64) - x) <= bound + np.finfo(np.float32).smallest_subnormal).all()


@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_are_those_of_numpy_without_torch(monkeypatch, codec):
    """Every float16 and the float32 values around the middle of each pair, among them subnormal ones and zeros."""
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    values = half[np.isfinite(half)].astype(np.float32)
    middle = (values[1:] / 2 + values[:-1] / 2).astype(np.float32)
    around = [values, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    x = np.concatenate([each[: len(middle) // 4 * 4] for each in around]).reshape(-1, 4)
    mine = encode(codec, x)
    monkeypatch.delitem(sys.modules, "torch")
    theirs = encode(codec, x)
    assert mine.payload.tobytes() == theirs.payload.tobytes()
    assert mine.error == theirs.error
    if codec == "f16":
        assert mine.payload.tobytes() == x.astype(np.float16).tobytes()


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30, deadline=None)
@given(x=features(1e30))
def test_the_error_in_the_manifest_is_the_error_of_what_is_read_back(codec, x):
    try:
        stored = encode(codec, x)
    except CodecError:
        assert codec == "f16"
        assert np.abs(x).max() > 65504
        return
    assert stored.error == relative_rms(decode(codec, stored.payload, stored.scale), x)
    assert np.isfinite(np.float32(stored.error))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(codec, bad):
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        encode(codec, x)


def test_a_value_beyond_float16_is_refused_and_its_edge_is_kept():
    assert decode("f16", encode("f16", np.full((1, 1), 65504.0)).payload)[0, 0] == 65504.0
    with pytest.raises(CodecError, match="overflows float16: use codec=bf16"):
        encode("f16", np.full((1, 1), 65505.0))


def test_a_value_that_would_round_to_infinity_in_bfloat16_is_refused_and_its_edge_is_kept():
    edge = np.full((1, 1), BF16_MAX, np.float32)
    assert decode("bf16", encode("bf16", edge).payload)[0, 0] == BF16_MAX
    with pytest.raises(CodecError, match="overflows bfloat16"):
        encode("bf16", np.full((1, 1), np.finfo(np.float32).max))


@pytest.mark.parametrize("codec", CODECS)
def test_a_channel_of_zeros_stays_zero(codec):
    x = np.random.default_rng(0).standard_normal((20, 3), dtype=np.float32)
    x[:, 1] = 0
    stored = encode(codec, x)
    assert not decode(codec, stored.payload, stored.scale)[:, 1].any()
    assert encode(codec, np.zeros((4, 3), np.float32)).error == 0.0


@pytest.mark.parametrize("codec", CODECS)
def test_subnormal_values_are_stored_without_infinities_and_their_loss_is_reported(codec):
    x = np.full((4, 2), 1e-42, np.float32)
    x[:, 0] = np.finfo(np.float32).smallest_subnormal
    stored = encode(codec, x)
    assert np.isfinite(decode(codec, stored.payload, stored.scale)).all()
    assert 0.0 <= stored.error <= 1.0


@settings(max_examples=50, deadline=None)
@given(x=features(BF16_MAX))
def test_bfloat16_rounds_as_torch_does(x):
    stored = torch.from_numpy(encode("bf16", x).payload.view(np.int16))
    assert torch.equal(stored, torch.from_numpy(x).to(torch.bfloat16).view(torch.int16))


def test_fp8_codes_are_torchs_rounding_of_every_float16():
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half) & (np.abs(half) <= 448)]
    x = np.concatenate([[448.0], half.astype(np.float32)]).astype(np.float32)[:, None]  # the first row fixes scale = 1
    stored = encode("fp8", x)
    assert stored.scale.tolist() == [1.0]
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(stored.payload, theirs)


def test_fp8_values_are_torchs_for_every_code():
    codes = np.arange(256, dtype=np.uint8)[:, None]
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(decode("fp8", codes, np.ones(1, np.float32)), theirs)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_decoding_into_a_buffer_returns_what_decoding_returns(codec, dtype):
    x = np.random.default_rng(1).standard_normal((7, 5), dtype=np.float32)
    stored = encode(codec, x)
    out = np.full(x.shape, np.nan, dtype)
    assert decode(codec, stored.payload, stored.scale, out) is out
    np.testing.assert_array_equal(out, decode(codec, stored.payload, stored.scale).astype(dtype))


def test_int8_with_a_scale_a_channel_keeps_outlier_channels_from_costing_the_others():
    x = np.random.default_rng(2).standard_normal((200, 8), dtype=np.float32)
    x[:, 3] *= 300
    stored = encode("int8", x)
    others = np.delete(decode("int8", stored.payload, stored.scale), 3, axis=1)
    assert relative_rms(others, np.delete(x, 3, axis=1)) < 0.01


def test_a_scale_where_none_belongs_and_none_where_one_belongs_are_refused():
    x = encode("f16", np.ones((2, 2), np.float32)).payload
    with pytest.raises(CodecError, match="without a scale"):
        decode("f16", x, np.ones(2, np.float32))
    with pytest.raises(CodecError, match="with a scale"):
        decode("int8", x.astype(np.int8))
    with pytest.raises(CodecError, match="unknown codec 'mp3'"):
        encode("mp3", np.ones((2, 2), np.float32))
    with pytest.raises(CodecError, match="unknown codec 'mp3'"):
        decode("mp3", x)
