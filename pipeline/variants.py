"""Changed copies of a recording, encoded as further rows of a cache: another speed, added noise, another level.

```
augment: {variants: 3, speed: 0.1, noise: [10, 30], gain: 6} -> KEY (untouched), KEY~1, KEY~2
```

What happens to a variant is drawn from its audio id (``shards/format/audio_id.py``), which the recording, the number of
the variant and the recipe determine. There is no other state: every process makes the same samples, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.audio import SAMPLING_RATE, num_samples_at_16k
from shards.config.base import Config
from shards.format.spec import canonical_json
from shards.format.variants import MAX_VARIANTS

Samples = npt.NDArray[np.float32]
_VERSION = 1  # changes with the samples that a recipe gives
_OCTAVES = 14  # of pink noise: down to 1 Hz


class VariantsConfig(Config):
    """Variants of each utterance, encoded as rows of the same cache; an epoch of training draws one of them.

    Variant 0 is the untouched recording. The others are changed in speed, then in noise, then in gain; what is changed
    by how much is drawn from the audio and these keys. Labels, splits and held-out utterances stay as they are.
    """

    variants: int = Field(default=1, ge=1, le=MAX_VARIANTS)
    """Rows of each utterance, with the untouched recording. 1: no variants."""
    speed: float = Field(default=0.0, ge=0, le=0.5)
    """Largest relative change of the speed, and with it of the pitch: 0.1 draws from 0.9 to 1.1."""
    noise: float | tuple[float, float] | None = None
    """Signal-to-noise ratio in dB of the noise that is added, white or pink: one number, or the range to draw from.
    null: none."""
    gain: float = Field(default=0.0, ge=0, le=40)
    """Largest change of the level in dB, in both directions; less where the samples would clip."""

    @model_validator(mode="after")
    def _changes_something(self) -> VariantsConfig:
        low, high = self.snr or (0.0, 0.0)
        if not -20 <= low <= high <= 100:
            raise ValueError(
                f"augment.noise is {self.noise}: set a ratio in dB from -20 to 100, or a range [low, high]"
            )
        if self.variants > 1 and not (self.speed or self.gain or self.noise is not None):
            raise ValueError(
                f"augment.variants={self.variants} would store {self.variants} equal copies: set augment.speed, "
                "augment.noise or augment.gain"
            )
        return self

    @property
    def snr(self) -> tuple[float, float] | None:
        """The range of signal-to-noise ratios in dB."""
        return (self.noise, self.noise) if isinstance(self.noise, float) else self.noise

    @property
    def recipe(self) -> str:
        """What determines a variant besides the recording and its number, as canonical JSON."""
        return canonical_json({"version": _VERSION, "speed": self.speed, "noise": self.snr, "gain": self.gain})


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a recording.

    Attributes:
        rate: the recording is played as if it had this sampling rate (Hz) instead of 16 kHz; at another rate, of
            the same ratio to it.
        snr: signal-to-noise ratio in dB; None: no noise is added.
        pink: whether the noise is pink; otherwise it is white.
        gain: change of the level in dB.
        seed: two words that determine the noise.
    """

    rate: int
    snr: float | None
    pink: bool
    gain: float
    seed: tuple[int, int]

    def num_samples(self, samples: int) -> int:
        """Return the number of samples that ``samples`` of a recording become."""
        return num_samples_at_16k(samples, self.rate)


def draw_change(variant_id: bytes, config: VariantsConfig) -> Change:
    """Return what the variant with this audio id is made by."""
    words = [int.from_bytes(variant_id[start : start + 8], "big") for start in range(0, 32, 8)]
    speed, level, gain = (word / 2**64 for word in words[:3])
    low, high = config.snr or (0.0, 0.0)
    return Change(
        rate=round(SAMPLING_RATE * (1 + config.speed * (2 * speed - 1))),
        snr=None if config.snr is None else low + (high - low) * level,
        pink=bool(words[3] & 1),
        gain=config.gain * (2 * gain - 1),
        seed=(words[2], words[3]),
    )


def apply_change(samples: Samples, change: Change) -> Samples:
    """Return the variant of mono float32 [samples], float32 [``change.num_samples(len(samples))``].

    Silence gets no noise. The samples do not exceed the larger of 1 and the peak of the recording.
    """
    limit = max(1.0, float(np.abs(samples).max()))
    if change.rate != SAMPLING_RATE:
        import soxr

        samples = soxr.resample(samples, change.rate, SAMPLING_RATE, quality="HQ")
    if change.snr is not None:
        noise = _noise(len(samples), change)
        samples = samples + np.float32(_rms(samples) * 10 ** (-change.snr / 20) / max(_rms(noise), 1e-9)) * noise
    samples = samples * np.float32(10 ** (change.gain / 20))
    peak = float(np.abs(samples).max())
    return np.ascontiguousarray(samples * np.float32(limit / peak) if peak > limit else samples, dtype=np.float32)


def _noise(count: int, change: Change) -> Samples:
    """Return white noise, or pink noise: the sum of white noises that are held for 1, 2, 4 … samples (Voss)."""
    # Raw words, because NumPy does not guarantee what the methods of a Generator return.
    generator = np.random.Philox(key=np.array(change.seed, dtype=np.uint64))
    noise = np.zeros(count, np.float32)
    for octave in range(_OCTAVES if change.pink else 1):
        words = generator.random_raw(-(-count >> octave) + 1)
        values = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
        noise += np.repeat(values, 1 << octave)[:count]
    return noise


def _rms(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
