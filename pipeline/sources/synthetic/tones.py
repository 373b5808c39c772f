"""Five sines with names, made on demand: the smallest corpus that shows whether anything is learned at all.

In: ``tones.jsonl`` beside this file (key, frequency in Hz, text) and a seed. Out: 5 s of PCM16 WAV at 16 kHz each, a
sine with its second harmonic at half the amplitude and 1 % noise; uri ``seed/frequency``, the same bytes for the same
uri.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources

import numpy as np

from pipeline.audio import SAMPLING_RATE, AudioError, encode_wav
from pipeline.sources.base import Source, Utterance

TONE_SECONDS = 5
_AMPLITUDE = 0.5  # of full scale; the harmonic and the noise stay clear of clipping


class Tones(Source):
    """The source of kind ``tones``."""

    name = "tones"
    speaker_split = False

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
            raise AudioError(f"'{uri}' is no tone")
        return encode_wav(tone(int(frequency), int(seed)), SAMPLING_RATE)


def tone(frequency: int, seed: int) -> np.ndarray:
    """int16 [80000] at 16 kHz."""
    phase = 2 * np.pi * frequency * np.arange(TONE_SECONDS * SAMPLING_RATE) / SAMPLING_RATE
    # RandomState, as its numbers are the same in every version of NumPy
    noise = np.random.RandomState([seed, frequency]).standard_normal(len(phase))
    wave = _AMPLITUDE * (np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.01 * noise)
    return np.round(wave * 32767).astype(np.int16)
