"""Five named sine tones, generated on demand: the smallest corpus that shows whether a projector learns at all.

``tones.jsonl`` next to this file has the key, frequency in Hz and text of each. A tone is 5 s of PCM16 WAV at 16 kHz: a
sine with its second harmonic at half the amplitude and 1 % noise. The URI ``seed/frequency`` determines the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np

from pipeline.audio import SAMPLING_RATE, AudioError, encode_wav
from pipeline.sources.base import Source, Utterance

TONE_SECONDS = 5
_AMPLITUDE = 0.5  # relative to full scale; leaves headroom for the harmonic and the noise


class Tones(Source):
    """The source of kind ``tones``."""

    name = "tones"
    speaker_split = False
    hash_ahead = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed

    def utterances(self) -> Iterator[Utterance]:
        manifest = resources.files("pipeline.sources.synthetic").joinpath("tones.jsonl").read_text(encoding="utf-8")
        for row in map(json.loads, manifest.splitlines()):
            uri = f"{self._seed}/{row['frequency']}"
            yield Utterance("", row["key"], uri, row["text"], samples=TONE_SECONDS * SAMPLING_RATE)

    def read_file(self, uri: str) -> bytes:
        seed, _, frequency = uri.partition("/")
        if not (seed.isdigit() and frequency.isdigit()):
            raise AudioError(f"expected seed/frequency, got '{uri}'")
        return encode_wav(tone(int(frequency), int(seed)), SAMPLING_RATE)

    def tokens(self, uris: Sequence[str]) -> list[str]:
        return [f"tones, numpy {np.__version__}"] * len(uris)  # a URI contains all else


def tone(frequency: int, seed: int) -> np.ndarray:
    """Return a tone of ``frequency`` Hz: int16 [80000] at 16 kHz."""
    phase = 2 * np.pi * frequency * np.arange(TONE_SECONDS * SAMPLING_RATE) / SAMPLING_RATE
    # RandomState returns the same numbers in every version of NumPy
    noise = np.random.RandomState([seed, frequency]).standard_normal(len(phase))
    wave = _AMPLITUDE * (np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.01 * noise)
    return np.round(wave * 32767).astype(np.int16)
