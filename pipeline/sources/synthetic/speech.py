"""A spoken corpus generated on demand: seeded sentences of a small grammar, synthesized by espeak-ng in many voices.

The audio is PCM16 WAV at 16 kHz, in memory. The URI (``voice/rate/pitch/text``) determines the audio, so utterances can
be generated alone and in any order, with the same bytes on the same version of the library. All sentences differ, so a
validation split shares none with training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.audio import SAMPLING_RATE, AudioError, encode_wav, num_samples_at_16k
from pipeline.sources.base import Source, Utterance
from pipeline.sources.synthetic import espeak, grammar

VOICES = (
    *("en-us", "en-us+m1", "en-us+m3", "en-us+f2", "en-us+f4", "en-us+f5"),
    *("en", "en+m7", "en+f3", "en-gb-x-rp", "en-gb-scotland", "en-029"),
)
WORDS_PER_MINUTE = (120, 160)  # range, inclusive
PITCHES = (35, 65)


class Speech(Source):
    """The source of kind ``speech``; the speaker of an utterance is its voice."""

    hash_ahead = False
    speaker_split = False  # training and validation must not share sentences; they may share voices

    def __init__(self, num_sentences: int, seed: int = 0) -> None:
        super().__init__()
        self.name = f"speech-{num_sentences}"
        self.version = espeak.version()
        self._num_sentences, self._seed = num_sentences, seed

    def utterances(self) -> Iterator[Utterance]:
        rng = random.Random(self._seed)
        for number, text in enumerate(grammar.sentences(self._num_sentences, self._seed)):
            voice = VOICES[int(rng.random() * len(VOICES))]
            rate, pitch = (low + int(rng.random() * (high + 1 - low)) for low, high in (WORDS_PER_MINUTE, PITCHES))
            wave, sampling_rate = espeak.synthesize(text, voice, rate, pitch)
            samples = num_samples_at_16k(len(wave), sampling_rate)
            yield Utterance(
                "", f"speech-{self._seed}-{number:05d}", f"{voice}/{rate}/{pitch}/{text}", text, voice, "", samples
            )

    def read_file(self, uri: str) -> bytes:
        return synthesize_wav(uri)

    def tokens(self, uris: Sequence[str]) -> list[str]:
        import soxr

        return [f"{self.version}, soxr {soxr.__version__}"] * len(uris)  # a URI contains all else


def synthesize_wav(uri: str) -> bytes:
    """Synthesize the URI ``voice/rate/pitch/text`` as a WAV file.

    Raises:
        EspeakError: The synthesis failed.
        AudioError: ``uri`` is malformed.
    """
    import soxr

    voice, _, rest = uri.partition("/")
    rate, _, rest = rest.partition("/")
    pitch, _, text = rest.partition("/")
    if not (rate.isdigit() and pitch.isdigit() and text):
        raise AudioError(f"expected voice/rate/pitch/text, got '{uri}'")
    wave, sampling_rate = espeak.synthesize(text, voice, int(rate), int(pitch))
    audio = soxr.resample(wave.astype(np.float32), sampling_rate, SAMPLING_RATE, quality="HQ")
    return encode_wav(np.clip(np.round(audio), -32768, 32767).astype(np.int16), SAMPLING_RATE)
