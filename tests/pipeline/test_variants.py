"""The samples of a variant: drawn from its audio id and the recipe alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ExtractConfig
from pipeline.variants import Change, VariantsConfig, apply_change, draw_change
from shards.config.base import validate_config
from shards.errors import UserError
from shards.format.audio_id import UNKNOWN_AUDIO, variant_id

CONFIG = VariantsConfig(variants=3, speed=0.1, noise=(10.0, 30.0), gain=6.0)
CLIP = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def ids(count: int) -> list[bytes]:
    return [hashlib.sha256(bytes([i])).digest() for i in range(count)]


def change(**changes) -> Change:
    return Change(**{"rate": 16000, "snr": None, "pink": False, "gain": 0.0, "seed": (1, 2), **changes})


@given(st.integers(1, 30_000), st.binary(min_size=32, max_size=32))
def test_the_length_of_a_variant_is_known_before_it_is_made(samples, own):
    drawn = draw_change(own, CONFIG)
    assert len(apply_change(np.zeros(samples, np.float32), drawn)) == drawn.num_samples(samples)


def test_the_same_variant_has_the_same_samples_and_another_one_has_others():
    made = [apply_change(CLIP, draw_change(own, CONFIG)) for own in ids(6)]
    again = [apply_change(CLIP, draw_change(own, CONFIG)) for own in ids(6)]
    assert all(np.array_equal(one, two) for one, two in zip(made, again, strict=True))
    assert len({one.tobytes() for one in made}) == 6


def test_a_known_variant_has_these_samples():
    """What a recipe gives must not change without a new version of the recipe."""
    config = VariantsConfig(variants=2, speed=0.1, noise=20, gain=6)
    assert config.recipe == '{"gain":6.0,"noise":[20.0,20.0],"speed":0.1,"version":1}'
    drawn = draw_change(variant_id(bytes(range(32)), 1, config.recipe), config)
    assert (drawn.rate, drawn.pink, round(drawn.gain, 4)) == (17314, False, -4.6762)
    ramp = (np.arange(-800, 800) / 1600).astype(np.float32)
    samples = apply_change(ramp, change(snr=20.0, pink=True, gain=-3.0))
    assert np.round(samples[[0, 1, 400, 1599]].astype(float), 5).tolist() == [-0.33676, -0.33538, -0.13764, 0.35693]


def test_changes_stay_inside_the_configured_ranges():
    drawn = [draw_change(own, CONFIG) for own in ids(200)]
    assert 14400 <= min(d.rate for d in drawn) < 15000 < 17000 < max(d.rate for d in drawn) <= 17600
    assert 10 <= min(d.snr for d in drawn) < 13 < 27 < max(d.snr for d in drawn) <= 30
    assert -6 <= min(d.gain for d in drawn) < -5 < 5 < max(d.gain for d in drawn) <= 6
    assert 60 < sum(d.pink for d in drawn) < 140


@pytest.mark.parametrize("pink", [False, True])
@pytest.mark.parametrize("snr", [0.0, 25.0])
def test_noise_has_the_drawn_level_relative_to_the_clip(pink, snr):
    noise = apply_change(CLIP, change(snr=snr, pink=pink)) - CLIP
    assert 10 * np.log10(np.mean(CLIP**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.05)
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert (power[1:500].mean() > 10 * power[-500:].mean()) == pink


def test_silence_gets_no_noise():
    assert not apply_change(np.zeros(1000, np.float32), change(snr=0.0, gain=6.0)).any()


def test_a_louder_variant_does_not_clip():
    loud = apply_change((CLIP / np.abs(CLIP).max() * 0.9).astype(np.float32), change(gain=12.0))
    assert np.abs(loud).max() == pytest.approx(1.0, abs=1e-6)


def test_a_variant_is_identified_by_recording_number_and_recipe_but_not_by_how_many_there_are():
    one = ids(1)[0]
    other = CONFIG.model_copy(update={"gain": 3.0})
    found = {variant_id(each, v, c.recipe) for each in ids(2) for v in (0, 1, 2) for c in (CONFIG, other)}
    assert len(found) == 2 + 2 * 2 * 2
    assert CONFIG.recipe == CONFIG.model_copy(update={"variants": 9}).recipe
    assert variant_id(one, 0, CONFIG.recipe) == one
    assert variant_id(UNKNOWN_AUDIO, 1, CONFIG.recipe) == UNKNOWN_AUDIO
    assert VariantsConfig(noise=20).recipe == VariantsConfig(noise=(20, 20)).recipe


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"variants": 3}, "would store 3 equal copies: set augment.speed"),
        ({"variants": 2, "noise": [30, 10]}, "set a ratio in dB"),
        ({"variants": 101, "gain": 1}, "augment.variants"),
        ({"variants": 2, "echo": 1}, "augment.echo"),
    ],
)
def test_settings_that_make_no_sense_are_refused(augment, message):
    with pytest.raises(UserError, match=message):
        validate_config(ExtractConfig, {"source": {"kind": "tones"}, "augment": augment}, "the test")
