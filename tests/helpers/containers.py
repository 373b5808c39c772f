"""Audio files of every container for tests, made with soundfile and PyAV: whole, cut, joined, with wrong headers."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float = 3.0, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A tone in a little noise: float32 [samples, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 330 * time)[:, None] + np.zeros((1, channels))
    return (wave + np.random.default_rng(seed).normal(0, 0.02, wave.shape)).astype(np.float32)


def written(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = RATE, **more: object) -> bytes:
    """``samples`` as a file of libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype, **more)
    return file.getvalue()


def muxed(
    samples: np.ndarray,
    form: str,
    codec: str,
    rate: int = RATE,
    options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> bytes:
    """Mono ``samples`` as a file of FFmpeg."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", options=encoder or {})
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.codec_context.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return file.getvalue()


def vbr_mp3(samples: np.ndarray) -> bytes:
    """An MP3 of variable bit rate without a Xing header, as long as ``samples``: noise, then silence."""
    noise = np.random.default_rng(0).normal(0, 0.3, samples.shape).astype(np.float32)
    noise[len(noise) // 4 :] = 0
    return muxed(
        noise,
        "mp3",
        "libmp3lame",
        options={"write_xing": "0"},
        encoder={"flags": "+qscale", "global_quality": str(118 * 4)},
    )


def flac_of_a_pipe(samples: np.ndarray) -> bytes:
    """A FLAC file whose encoder could not seek back to write its length."""
    data = written(samples, "FLAC")
    return data[:21] + bytes([data[21] & 0xF0, 0, 0, 0, 0]) + data[26:]


def with_size(wav: bytes, size: int) -> bytes:
    """A WAV whose header states another size of the data."""
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", size) + wav[at + 4 :]


def whole_files(seconds: float = 3.0) -> dict[str, bytes]:
    """A whole file of ``seconds`` of each container, by name."""
    samples = tone(seconds)
    forms: dict[str, Callable[[], bytes]] = {
        "wav": lambda: written(samples, "WAV"),
        "float.wav": lambda: written(samples, "WAV", "FLOAT"),
        "gsm.wav": lambda: written(tone(seconds, 8000), "WAV", "GSM610", rate=8000),
        "adpcm.wav": lambda: written(samples, "WAV", "MS_ADPCM"),
        "rf64": lambda: written(samples, "RF64", "PCM_16"),
        "w64": lambda: written(samples, "W64", "PCM_16"),
        "aiff": lambda: written(samples, "AIFF", "PCM_16"),
        "au": lambda: written(samples, "AU", "PCM_16"),
        "flac": lambda: written(samples, "FLAC"),
        "pipe.flac": lambda: flac_of_a_pipe(samples),
        "mp3": lambda: written(samples, "MP3"),
        "bare.mp3": lambda: vbr_mp3(samples),
        "ogg": lambda: written(samples, "OGG", "VORBIS"),
        "opus": lambda: written(samples, "OGG", "OPUS"),
        "m4a": lambda: muxed(samples, "ipod", "aac"),
        "mp4": lambda: muxed(samples, "mp4", "aac", options={"movflags": "frag_keyframe+empty_moov"}),
        "adts.aac": lambda: muxed(samples, "adts", "aac"),
        "webm": lambda: muxed(samples, "webm", "libopus", 48_000),
        "mka": lambda: muxed(samples, "matroska", "flac"),
    }
    return {name: make() for name, make in forms.items()}
