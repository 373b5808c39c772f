from __future__ import annotations

import io
import math

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import (
    SAMPLING_RATE,
    AudioError,
    decode,
    encode_wav,
    probe,
    read_segment,
    split_into_windows,
    stitch,
)

WINDOW = 480_000


def sine(seconds: float, rate: int, frequency: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
def test_every_format_rate_and_channel_count_becomes_mono_float32_at_16_khz(form, rate, channels):
    data = encoded(sine(0.5, rate, channels=channels), rate, form)
    samples = decode(data)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) == probe(data) == 8000
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * SAMPLING_RATE / len(samples) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(samples[800:-800] ** 2)) == pytest.approx(0.4 / math.sqrt(2), rel=0.02)


def test_stereo_becomes_the_mean_of_its_channels():
    left, right = sine(0.1, 16_000)[:, 0], np.zeros(1600, np.float32)
    both = decode(encoded(np.stack([left, right], axis=1), 16_000, "WAV", "FLOAT"))
    np.testing.assert_allclose(both, left / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("length", [1, 7, 12_345, 22_051])
def test_probe_returns_the_length_that_decode_returns(rate, length):
    data = encode_wav(np.zeros(length, np.int16), rate)
    if probe(data):
        assert len(decode(data)) == probe(data)
    else:
        with pytest.raises(AudioError, match="no samples"):
            decode(data)


def test_probe_of_an_unreadable_file_is_zero(tmp_path):
    assert probe(b"") == probe(b"not audio") == probe(tmp_path / "absent.wav") == probe(str(tmp_path)) == 0
    assert probe(encode_wav(np.zeros(0, np.int16), 16_000)) == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is a text, not a recording" * 10, "unreadable audio"),
        (encode_wav(np.zeros(0, np.int16), 16_000), "no samples"),
        (encode_wav(np.full(100, np.nan, np.float32), 16_000), "NaN or Inf"),
        (encode_wav(np.array([0, np.inf], np.float32), 8000), "NaN or Inf"),
        (encode_wav(np.ones(16_000, np.int16), 16_000)[:9000], "truncated"),
        (encoded(sine(2, 16_000), 16_000, "FLAC")[:5000], "unreadable audio"),
        (encoded(sine(5, 16_000), 16_000, "MP3")[:3000], "truncated"),
    ],
)
def test_a_recording_that_cannot_be_used_is_an_audio_error_with_the_reason(data, reason):
    with pytest.raises(AudioError, match=reason) as caught:
        decode(data)
    assert "0x" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wav_from_a_pipe_with_unknown_length_is_read_to_its_end():
    data = bytearray(encode_wav(np.ones(1000, np.int16), 16_000))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data))) == 1000


def test_digital_silence_is_audio():
    assert not decode(encode_wav(np.zeros(320, np.int16), 16_000)).any()


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_encode_wav_is_read_back_exactly_by_libsndfile(dtype, channels):
    samples = (np.random.RandomState(0).standard_normal((999, channels)) * 1000).astype(dtype)
    back, rate = soundfile.read(io.BytesIO(encode_wav(samples, 22_050)), dtype=dtype, always_2d=True)
    np.testing.assert_array_equal(back, samples)
    assert rate == 22_050


def test_read_segment_keeps_the_sampling_rate_and_selects_a_channel(tmp_path):
    samples = np.stack([sine(2, 8000)[:, 0], sine(2, 8000, 880)[:, 0]], axis=1)
    path = tmp_path / "a b.wav"
    path.write_bytes(encode_wav(samples, 8000))
    back, rate = soundfile.read(io.BytesIO(read_segment(path, 0.5, 1.25, channel=1)), dtype="float32")
    assert rate == 8000
    np.testing.assert_array_equal(back, samples[4000:10_000, 1])
    assert len(decode(read_segment(path, 1.5, None))) == 8000
    assert read_segment(path, 1.5, 2.05) == read_segment(path, 1.5, 2.0)
    for start, stop, channel, reason in [
        (2.5, 3, None, "ends after"),
        (1, 2.5, None, "ends after"),
        (0, 1, 2, "no channel"),
    ]:
        with pytest.raises(AudioError, match=reason):
            read_segment(path, start, stop, channel)


def frames_of(spans: list[tuple[int, int]]) -> list[np.ndarray]:
    """Frames that contain their position in the recording and the index of their window."""
    return [
        np.stack([np.arange(start // 320, -(-stop // 320)), np.full(-(-(stop - start) // 320), number)], axis=1)
        for number, (start, stop) in enumerate(spans)
    ]


@pytest.mark.parametrize("seconds", [0.01, 1.0, 30.0, 30.02, 35, 61, 600])
@pytest.mark.parametrize("overlap", [0, 1, 5, 29.98])
def test_windows_and_stitch_neither_lose_nor_repeat_frames(seconds, overlap):
    samples = round(seconds * SAMPLING_RATE)
    if samples > 1_000_000 and overlap > 5:
        samples = 500_000
    spans = split_into_windows(samples, WINDOW, round(overlap * SAMPLING_RATE))
    assert spans[0][0] == 0
    assert spans[-1][1] == samples
    assert all(stop - start == WINDOW for start, stop in spans[:-1])
    stitched = stitch(frames_of(spans), spans, 320)
    np.testing.assert_array_equal(stitched[:, 0], np.arange(math.ceil(samples / 320)))


@given(samples=st.integers(1, 40_000), window=st.integers(1, 20).map(lambda n: n * 320), share=st.floats(0, 0.99))
def test_any_length_is_covered_exactly_once(samples, window, share):
    overlap = int(window * share) // 320 * 320
    spans = split_into_windows(samples, window, overlap)
    assert all(start % 320 == 0 for start, _ in spans)
    assert len(spans) == 1 or spans[-1][1] - spans[-1][0] > overlap
    stitched = stitch(frames_of(spans), spans, 320)
    np.testing.assert_array_equal(stitched[:, 0], np.arange(math.ceil(samples / 320)))


def test_the_join_lies_in_the_middle_of_the_overlap():
    spans = split_into_windows(800_000, WINDOW, 80_000)
    assert spans == [(0, 480_000), (400_000, 800_000)]
    stitched = stitch(frames_of(spans), spans, 320)
    assert np.flatnonzero(stitched[:, 1])[0] == 440_000 // 320


def test_an_untrimmed_last_window_keeps_its_padding():
    spans = split_into_windows(500_000, WINDOW, 80_000)
    parts = [np.zeros((1500, 2)), np.ones((1500, 2))]
    assert stitch(parts, spans, 320).shape == (1250 + 1500, 2)


def test_frames_that_do_not_fit_their_window_are_refused():
    spans = split_into_windows(500_000, WINDOW, 0)
    for parts in (
        [np.zeros((1499, 2)), np.zeros((63, 2))],
        [np.zeros((1501, 2)), np.zeros((63, 2))],
        [np.zeros((1500, 2))],
    ):
        with pytest.raises(ValueError, match=r"frames|parts"):
            stitch(parts, spans, 320)
    for samples, window, overlap in [(0, 320, 0), (10, 300, 0), (10, 320, 100), (10, 320, 320), (10, 320, -320)]:
        with pytest.raises(ValueError, match=r"window|sample"):
            split_into_windows(samples, window, overlap)
