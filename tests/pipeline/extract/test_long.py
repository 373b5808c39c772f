"""Recordings longer than the encoder's window keep every frame through a real extraction."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from extraction import only_cache, run, words
from tiny_whisper import write_tiny_whisper

from pipeline.audio import split_into_windows
from pipeline.encoders.load import load_encoder
from pipeline.extract.shard import BatchesOnDemand, PendingUtterance, read_shard
from pipeline.maintain.check import check
from pipeline.profile import StageTimes
from pipeline.weights.resolve import resolve_weights
from shards.format.schemas import UNKNOWN_AUDIO
from shards.read.cache import Cache

HOP, WINDOW, OVERLAP = 320, 480_000, 2 * 16_000


@pytest.fixture(
    scope="module",
    params=[(30.0, 30.02, 35.0, 61.0), pytest.param((600.0,), marks=pytest.mark.slow)],
    ids=["around the window", "10 min"],
)
def long(tmp_path_factory, request):
    """A cache of recordings of the given lengths, their samples, and the encoder."""
    folder, root = tmp_path_factory.mktemp("long"), tmp_path_factory.mktemp("root")
    whisper = write_tiny_whisper(tmp_path_factory.mktemp("model") / "whisper")
    audio = {}
    with open(folder / "clips.csv", "w") as manifest:
        manifest.write("audio,text\n")
        for seconds in request.param:
            noise = np.random.default_rng(int(seconds)).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
            soundfile.write(folder / f"{seconds}.wav", noise, 16_000, subtype="FLOAT")
            audio[f"{seconds}.wav"] = noise
            manifest.write(f"{seconds}.wav,{seconds} seconds\n")
    assert run(words(root, folder, whisper, "overlap=2.0")) == 0
    encoder = load_encoder(
        resolve_weights(f"path:{whisper}", role="encoder"), device="cpu", dtype="float32", batch_size=1
    )
    return Cache.open(only_cache(root)), audio, encoder


def test_every_recording_has_a_frame_for_every_20_ms_of_it(long):
    cache, audio, _ = long
    rows = {cache.row(i)["audio"]: cache.row(i) for i in range(len(cache))}
    assert rows.keys() == audio.keys()
    for name, samples in audio.items():
        assert rows[name]["frames"] == -(-len(samples) // HOP)
        assert rows[name]["samples"] == len(samples)


def test_each_frame_is_from_the_window_in_which_it_is_farther_from_an_edge(long):
    cache, audio, encoder = long
    for index in range(len(cache)):
        samples, features = audio[cache.row(index)["audio"]], cache.features(index)
        spans = split_into_windows(len(samples), WINDOW, OVERLAP)
        assert len(spans) == max(1, -(-(len(samples) - OVERLAP) // (WINDOW - OVERLAP)))
        joins = [0, *(stop // HOP - OVERLAP // HOP // 2 for _, stop in spans[:-1]), len(features)]
        for (start, stop), first, last in zip(spans, joins[:-1], joins[1:], strict=True):
            (own,) = encoder.encode([samples[start:stop]], [encoder.n_layers])
            wanted = own[encoder.n_layers][first - start // HOP : last - start // HOP]
            assert np.array_equal(features[first:last], wanted.astype(np.float16))


def test_stored_long_recordings_pass_the_check_against_their_encoder(long):
    assert [row.problem for row in check(long[0], 9)] == [""] * len(long[1])


def test_batches_are_filled_across_recordings_and_across_the_windows_of_long_ones():
    samples = [16_000 * n for n in (5, 100, 1, 31, 29, 300, 2, 2, 2, 45)]
    rows = [{"key": str(n), "audio": str(n), "audio_id": UNKNOWN_AUDIO} for n in range(len(samples))]
    clips = [np.full(n, 0.1, np.float32) for n in samples]
    sizes = []

    def encode(batch, layers, trim):
        sizes.append(len(batch))
        return [{2: np.zeros((-(-len(clip) // HOP), 1), np.float32)} for clip in batch]

    encoder = SimpleNamespace(
        sampling_rate=16_000, hop=HOP, window_samples=WINDOW, batch_size=4, encode=encode, was_checked=True,
        device="cpu", loaded=True, load=lambda: encoder,
    )  # fmt: skip
    target = SimpleNamespace(layer=2)
    plan = SimpleNamespace(shard=np.zeros(len(rows), int), shard_rows=lambda shard: rows)
    job = SimpleNamespace(
        encoder=encoder, config=SimpleNamespace(overlap=2.0, trim="valid", codec="f16"), plan=plan, targets=[target],
        reuse=[SimpleNamespace(copied=np.zeros(len(rows), bool))], labels=SimpleNamespace(find=lambda keys: [{}] * 10),
    )  # fmt: skip
    decoders = SimpleNamespace(read=lambda rows: zip(rows, [bytes([1] * 32)] * len(rows), clips, strict=True))
    utterances: list[PendingUtterance] = []
    store = SimpleNamespace(shard=0, targets=[target], put=utterances.append, complete=lambda timings: None)
    read_shard(job, store, BatchesOnDemand(job, StageTimes()), StageTimes(), decoders)
    assert [each.row for each in utterances] == rows
    assert [sum(len(part.result()[2]) for part in each.windows) for each in utterances] == [
        sum(-(-(stop - start) // HOP) for start, stop in each.spans) for each in utterances
    ]
    num_windows = sum(len(split_into_windows(n, WINDOW, OVERLAP)) for n in samples)
    assert sizes == [4] * (num_windows // 4) + [num_windows % 4] * (num_windows % 4 > 0)
