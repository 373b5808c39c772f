"""Decoding ahead of the encoder in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction import write_corpus

from pipeline.audio import decode
from pipeline.config import ExtractConfig
from pipeline.decode import AudioDecoders, UtteranceFailure
from pipeline.extract.resources import num_decode_workers
from pipeline.profile import StageTimes
from pipeline.sources import SourceConfig, open_source
from shards.config.base import validate_config
from shards.errors import UserError
from shards.format.schemas import UNKNOWN_AUDIO


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SourceConfig:
    """Six clips; one file is not audio, one is missing."""
    folder = tmp_path_factory.mktemp("clips")
    write_corpus(folder, 6)
    (folder / "clip 02.flac").write_bytes(b"no audio at all")
    (folder / "clip 04.flac").unlink()
    return SourceConfig(kind="manifest", path=str(folder / "clips.csv"))


ROWS = [{"key": "a", "audio": f"clip {i:02d}.flac", "audio_id": UNKNOWN_AUDIO, "samples": 0} for i in range(6)]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_yield_samples_and_failures_in_the_order_of_the_rows(config, threads):
    with AudioDecoders(open_source(config), threads, 2, StageTimes()) as decoders:
        found = list(decoders.read(ROWS))
    folder = Path(str(config.path)).parent
    assert [row for row, _, _ in found] == ROWS
    assert [isinstance(audio, UtteranceFailure) for _, _, audio in found] == [False, False, True, False, True, False]
    assert [failure.stage for _, _, failure in (found[2], found[4])] == ["decode", "read"]
    assert [digest != UNKNOWN_AUDIO for _, digest, _ in found] == [True] * 4 + [False, True]
    for row, _, audio in (found[i] for i in (0, 1, 3, 5)):
        np.testing.assert_array_equal(audio, decode((folder / row["audio"]).read_bytes()))


class Counting:
    """A source that counts what it read, and in which threads."""

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[str] = set()

    def file_of(self, uri: str) -> None:
        return None

    def read(self, uris: list[str]) -> Iterator[tuple[str, bytes]]:
        for uri in uris:
            self.threads.add(threading.current_thread().name)
            self.count += 1
            yield uri, b""


def test_one_thread_reads_at_most_prefetch_recordings_ahead_and_an_early_end_drops_the_rest():
    source: Any = Counting()
    with AudioDecoders(source, 2, 3, StageTimes()) as decoders:
        found = decoders.read(
            [{"key": "a", "audio": str(i), "audio_id": UNKNOWN_AUDIO, "samples": 0} for i in range(1000)]
        )
        assert [next(found)[0]["audio"] for _ in range(2)] == ["0", "1"]
        found.close()
    assert 2 <= source.count <= 5  # the two that were yielded, and three ahead
    assert len(source.threads) == 1
    assert threading.current_thread().name not in source.threads


def test_an_error_of_the_source_itself_reaches_the_caller():
    class Broken:
        def read(self, uris: list[str]) -> Iterator[tuple[str, bytes]]:
            raise OSError("the archive is gone")
            yield "", b""

    source: Any = Broken()
    with AudioDecoders(source, 2, 3, StageTimes()) as decoders, pytest.raises(OSError, match="the archive is gone"):
        list(decoders.read(ROWS))


def test_the_key_decode_in_of_earlier_versions_is_ignored(config):
    tree = {"source": config.model_dump(), "workers": 3}
    assert validate_config(ExtractConfig, {**tree, "decode_in": "process"}, "CACHE.json") == ExtractConfig(**tree)
    with pytest.raises(UserError, match="unknown key 'decode_im'"):
        validate_config(ExtractConfig, {**tree, "decode_im": "process"}, "CACHE.json")


def test_decoding_gets_a_share_of_the_cores_per_gpu():
    assert num_decode_workers(None, device="cpu", cpus=64, gpus=0) == 2
    assert num_decode_workers(None, device="cuda:1", cpus=64, gpus=8) == 6
    assert num_decode_workers(None, device="cuda", cpus=128, gpus=1) == 16
    assert num_decode_workers(None, device="cuda", cpus=4, gpus=4) == 2
    assert num_decode_workers(5, device="cuda", cpus=64, gpus=1) == 5


def test_a_recording_of_another_length_than_planned_is_a_failure_with_both_figures(tmp_path):
    write_corpus(tmp_path, 3, seconds=1.0)
    rows = [
        {"key": "a", "audio": f"clip {i:02d}.flac", "audio_id": UNKNOWN_AUDIO, "samples": samples}
        for i, samples in enumerate((16_000 + 1600, 16_997 + 1601, 17_994 - 1601))
    ]
    source = open_source(SourceConfig(kind="manifest", path=str(tmp_path / "clips.csv")))
    with AudioDecoders(source, 1, 2, StageTimes()) as decoders:
        whole, short, long = (audio for _, _, audio in decoders.read(rows))
    assert len(whole) == 16_000
    assert short.reason == "1.06 s of audio, but the manifest or the header declares 1.16 s"
    assert long.reason == "1.12 s of audio, but the manifest or the header declares 1.02 s"


def test_whatever_a_decoder_raises_is_a_failure_of_its_utterance(config, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError("cannot allocate 2**62 bytes")

    monkeypatch.setattr("soundfile.SoundFile.read", broken)
    with AudioDecoders(open_source(config), 1, 2, StageTimes()) as decoders:
        (_, _, failure), *_ = decoders.read(ROWS[:1])
    assert failure == UtteranceFailure("decode", "unreadable audio: cannot allocate 2**62 bytes")


def test_recordings_longer_than_max_hours_are_failures(config):
    with AudioDecoders(open_source(config), 1, 2, StageTimes(), max_hours=0.00001) as decoders:
        (_, _, failure), *_ = decoders.read(ROWS[:1])
    assert "max_hours is 1e-05" in failure.reason
