"""Decoding ahead of the encoder, in threads and in processes of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from extraction import write_corpus

from pipeline.audio import decode
from pipeline.decode.pool import Decoders, Failure, ThreadPool
from pipeline.decode.process import ProcessPool
from pipeline.extract.resources import CORES, PAYS, decode_in, decoding_workers
from pipeline.profile import Stages
from pipeline.sources import SourceConfig, open_source


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SourceConfig:
    """Six clips; one file is no audio, one is not there."""
    folder = tmp_path_factory.mktemp("clips")
    write_corpus(folder, 6)
    (folder / "clip 02.flac").write_bytes(b"no audio at all")
    (folder / "clip 04.flac").unlink()
    return SourceConfig(kind="manifest", path=str(folder / "clips.csv"))


def pools(config: SourceConfig):
    stages = Stages()
    return ThreadPool(2, stages), ProcessPool(1, stages, None), ProcessPool(2, stages, config)


def test_threads_and_processes_give_the_same_samples_and_failures_in_order(config):
    source = open_source(config)
    rows = [{"audio": f"clip {i:02d}.flac"} for i in range(6)]
    found = []
    for pool in pools(config):
        with Decoders(source, pool, 2, Stages()) as decoders:
            found.append(list(decoders.read(rows)))
    exact = decode((Path(str(config.path)).parent / "clip 05.flac").read_bytes())
    for each in found:
        assert [row for row, _, _ in each] == rows
        np.testing.assert_array_equal(each[5][2], exact)
        assert [isinstance(audio, Failure) for _, _, audio in each] == [False, False, True, False, True, False]
        assert [digest for _, digest, _ in each] == [digest for _, digest, _ in found[0]]
        assert [each[i][2] for i in (2, 4)] == [found[0][i][2] for i in (2, 4)]


def test_a_killed_decoding_process_is_replaced_and_its_recording_tried_again(config):
    data = (Path(str(config.path)).parent / "clip 00.flac").read_bytes()
    pool = ProcessPool(1, Stages(), None)
    try:
        first = pool.submit(data, "").result(60)
        (process,) = pool._processes
        os.kill(process._process.pid, signal.SIGKILL)
        again = pool.submit(data, "").result(60)
        assert first[0] == again[0]
        np.testing.assert_array_equal(first[1], again[1])
    finally:
        pool.close()


def test_a_recording_that_its_process_dies_of_twice_is_a_failure():
    nowhere = SourceConfig(kind="manifest", path="/nowhere.csv")  # opening it ends the process
    pool = ProcessPool(1, Stages(), nowhere)
    try:
        digest, audio = pool.submit(b"", "clip.flac").result(60)
        assert (digest, audio) == ("", Failure("decode", "the decoding process ended with status 1 at this recording"))
    finally:
        pool.close()


def test_closing_drops_what_waits_and_ends_the_processes(config):
    pool = ProcessPool(1, Stages(), config)
    first = pool.submit(b"", "clip 00.flac")
    rest = [pool.submit(b"", "clip 01.flac") for _ in range(1000)]
    assert len(first.result(60)[0]) == 64
    (process,) = pool._processes
    pool.close()
    assert process._process.returncode is not None
    assert not rest[-1].done()


@pytest.mark.parametrize(
    ("wanted", "cpu_bound", "device", "cpus", "utterances", "chosen"),
    [
        ("auto", True, "cpu", CORES, PAYS, "process"),
        ("auto", True, "cpu", CORES, PAYS - 1, "thread"),
        ("auto", True, "cpu", CORES - 1, PAYS, "thread"),
        ("auto", False, "cpu", 64, 10**6, "thread"),
        ("auto", False, "cuda:1", 2, 10**6, "process"),
        ("thread", True, "cuda", 64, 10**6, "thread"),
        ("process", False, "cpu", 1, 1, "process"),
    ],
)
def test_processes_decode_where_they_pay(wanted, cpu_bound, device, cpus, utterances, chosen):
    assert decode_in(wanted, cpu_bound=cpu_bound, device=device, cpus=cpus, utterances=utterances) == chosen


def test_a_gpu_leaves_its_share_of_the_cores_to_decoding():
    assert decoding_workers(None, device="cpu", cpus=64, gpus=0) == 2
    assert decoding_workers(None, device="cuda:1", cpus=64, gpus=8) == 6
    assert decoding_workers(None, device="cuda", cpus=128, gpus=1) == 16
    assert decoding_workers(None, device="cuda", cpus=4, gpus=4) == 2
    assert decoding_workers(5, device="cuda", cpus=64, gpus=1) == 5
