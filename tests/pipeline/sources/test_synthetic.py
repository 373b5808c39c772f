from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pipeline.audio import SAMPLING_RATE, decode
from pipeline.extract.listing import list_source
from pipeline.sources import SourceConfig, open_source
from pipeline.sources.synthetic import espeak, grammar

NAMES = {220: "low tone", 330: "mid low tone", 440: "middle tone", 660: "mid high tone", 880: "high tone"}
URIS = [
    "en-us+f2/150/50/buy ten apples and some milk",
    "en/120/35/call anna on monday morning",
    "en-us/160/65/the train to paris leaves at six thirty",
    "en-gb-scotland/140/40/the dog sleeps under the table",
]


def test_the_five_tones_have_the_named_frequencies():
    source = open_source(SourceConfig(kind="tones"))
    made = list(source.utterances())
    assert {int(u.key.removeprefix("tone-")): u.text for u in made} == NAMES
    for utterance, (uri, data) in zip(made, source.read([u.audio for u in made]), strict=True):
        assert uri == utterance.audio
        assert isinstance(data, bytes)
        assert data[20:24] == b"\x01\x00\x01\x00"  # PCM, one channel
        assert data[34:36] == b"\x10\x00"  # 16 bits
        samples = decode(data)
        assert len(samples) == utterance.samples == 5 * SAMPLING_RATE
        assert np.abs(samples).max() < 0.9
        spectrum = np.abs(np.fft.rfft(samples)) / len(samples) * 2
        frequency = int(utterance.key.removeprefix("tone-"))
        assert np.argmax(spectrum) == 5 * frequency
        assert spectrum[10 * frequency] / spectrum[5 * frequency] == pytest.approx(0.5, abs=0.01)
        rest = np.delete(np.fft.rfft(samples), [5 * frequency, 10 * frequency])
        noise = np.sqrt((np.abs(rest) ** 2).sum() * 2) / len(samples)
        assert noise / spectrum[5 * frequency] == pytest.approx(0.01, rel=0.05)


def test_tones_are_the_same_bytes_for_the_same_seed_and_others_for_another():
    sound = [next(open_source(SourceConfig(kind="tones")).read([f"{seed}/440"]))[1] for seed in (0, 0, 1)]
    assert sound[0] == sound[1] != sound[2]


@pytest.mark.parametrize("kind", ["tones", "speech"])
def test_a_malformed_uri_is_an_exception(kind):
    source = open_source(SourceConfig(kind=kind))
    asked = ["", "x", "a/b/c", "../../etc/passwd", "no-such-voice/150/50/hello"]
    answers = list(source.read(asked))
    assert [uri for uri, _ in answers] == asked
    assert all(isinstance(data, Exception) for _, data in answers)


def test_sentences_are_distinct_short_and_use_few_words_often():
    made = grammar.sentences(400, seed=0)
    assert len(set(made)) == 400
    assert {len(sentence.split()) for sentence in made} <= set(range(4, 11))
    words = Counter(word for sentence in made for word in sentence.split())
    assert 120 <= len(words) <= 200
    assert min(words.values()) >= 9


def test_a_longer_list_of_sentences_begins_with_the_shorter_one_and_another_seed_gives_another():
    made = grammar.sentences(grammar.MAX_SENTENCES, seed=3)
    assert len(set(made)) == grammar.MAX_SENTENCES
    assert made[:50] == grammar.sentences(50, seed=3) != grammar.sentences(50, seed=4)


def test_every_slot_of_a_template_is_filled():
    used = {word for sentence in grammar.sentences(2000, seed=0) for word in sentence.split()}
    assert set(" ".join(grammar.SLOTS.values()).split()) <= used
    assert not any("{" in word for word in used)


def test_speech_has_the_stated_length_and_is_audible():
    source = open_source(SourceConfig(kind="speech", num_sentences=12))
    made = list(source.utterances())
    assert len({u.speaker for u in made}) > 5
    for utterance, (_, data) in zip(made, source.read([u.audio for u in made]), strict=True):
        assert isinstance(data, bytes)
        samples = decode(data)
        assert len(samples) == utterance.samples
        assert 1 < len(samples) / SAMPLING_RATE < 5
        assert 0.02 < np.sqrt(np.mean(samples**2)) < 0.5
        assert 0.1 < np.abs(samples).max() < 0.99


def test_the_same_seed_gives_the_same_utterances_and_training_shares_no_sentence_with_validation(tmp_path):
    config = SourceConfig(kind="speech", num_sentences=40, val_fraction=0.2)
    made = list_source(open_source(config), tmp_path).table.to_pylist()
    assert made == list_source(open_source(config), tmp_path).table.to_pylist()
    texts = {split: {row["text"] for row in made if row["split"] == split} for split in ("train", "val")}
    assert (len(texts["train"]), len(texts["val"])) == (32, 8)
    assert not texts["train"] & texts["val"]


def test_a_sentence_sounds_the_same_after_any_other():
    source = open_source(SourceConfig(kind="speech"))
    forward = dict(source.read(URIS))
    assert forward == dict(source.read(URIS[::-1]))
    assert forward == {uri: data for uri in URIS[::2] + URIS[1::2] for _, data in source.read([uri])}
    assert len(set(forward.values())) == len(URIS)


def test_a_sentence_sounds_the_same_in_another_process():
    program = (
        "import hashlib, sys; from pipeline.sources.synthetic.speech import synthesize_wav; "
        "print(hashlib.sha256(b''.join(map(synthesize_wav, sys.argv[1:]))).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program, *URIS],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "SOME_ENVIRONMENT": "x" * 100 * seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in (1, 2)
    }
    assert len(told) == 1


def test_the_version_names_the_synthesizer():
    assert espeak.version().startswith("espeak-ng 1.")
    assert open_source(SourceConfig(kind="speech")).version == espeak.version()


def test_an_unknown_voice_is_an_error_that_names_it():
    with pytest.raises(espeak.EspeakError, match="xx-nowhere"):
        espeak.synthesize("hello", "xx-nowhere", 150, 50)
