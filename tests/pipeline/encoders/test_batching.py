"""Batches that fit into memory: the first estimate, and what happens when it was wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.encoders.batching import MAX_BATCH_SIZE, encode_in_batches, fitting_batch_size, is_out_of_memory
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import Weights
from shards.errors import UserError

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: not enough memory: you tried 3 bytes"
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


class Small:
    """An encoder with memory for ``room`` clips."""

    def __init__(self, encoder, room: int, error: BaseException) -> None:
        self._encoder, self.batch_size, self.calls = encoder, 8, []
        self.was_checked, self.name, self.device, self._room, self._error = True, "small", "cpu", room, error

    def encode(self, clips, layers, trim="valid"):
        self.calls.append(len(clips))
        if len(clips) > self._room:
            raise self._error
        return self._encoder.encode(clips, layers, trim)


@pytest.fixture(scope="module")
def encoder(whisper):
    return load_encoder(Weights(whisper, f"path:{whisper}", ""), device="cpu", dtype="float32")


@pytest.mark.parametrize("error", [GPU, CPU, CUBLAS, CUDNN, MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_the_features_are_the_same_bytes(encoder, error, capsys):
    clips = [np.full(1000 + 300 * i, 0.01 * i, np.float32) for i in range(11)]
    small = Small(encoder, 3, error)
    found = encode_in_batches(small, clips, [1, 2], "valid")
    wanted = encoder.encode(clips, [1, 2])
    assert [{layer: x.tobytes() for layer, x in each.items()} for each in found] == [
        {layer: x.tobytes() for layer, x in each.items()} for each in wanted
    ]
    assert small.calls == [8, 4, 2, 2, 2, 2, 2, 1]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "continuing with batches of 2" in notes[1]


def test_a_single_window_that_does_not_fit_is_a_one_sentence_error(encoder):
    with pytest.raises(UserError, match="does not fit into the memory of cpu"):
        encode_in_batches(Small(encoder, 0, GPU), [np.zeros(400, np.float32)], [2], "valid")


def test_other_errors_are_passed_on(encoder):
    with pytest.raises(RuntimeError, match="shapes"):
        encode_in_batches(
            Small(encoder, 0, RuntimeError("shapes do not fit")), [np.zeros(400, np.float32)], [2], "valid"
        )
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_first_batch_is_a_power_of_two_within_the_free_memory():
    assert [fitting_batch_size(free, 100) for free in (0, 150, 400, 700, 1400, 10**9)] == [
        1,
        1,
        2,
        4,
        8,
        MAX_BATCH_SIZE,
    ]
